"""Small random stacks for tests."""

from __future__ import annotations

import peft
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mtllm_fast import MTLLM
from mtllm_fast.testing.tolerance import relative_error

SIZES = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLMS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, head_dim=32, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gpt2": GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}


def new_encoder() -> M2M100ForConditionalGeneration:
    torch.manual_seed(0)
    return M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=320, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def new_llm(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    llm = AutoModelForCausalLM.from_config(LLMS[family]).eval()
    for name, parameter in llm.named_parameters():  # norms of 1 and biases of 0 would hide mistakes
        if "norm" in name or "ln_" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float("weight" in name), std=0.2)
    return llm


def new_stack(family: str = "llama", **options) -> MTLLM:
    return MTLLM.from_encoder_and_llm(new_encoder(), new_llm(family), **options)


def batch(lengths: tuple[int, ...] = (9, 4, 6), left: tuple[int, ...] = (2,)) -> dict[str, torch.Tensor]:
    """Random ids, padded on the right, on the left in the rows ``left``."""
    generator = torch.Generator().manual_seed(2)
    width = max(lengths)
    ids = torch.randint(4, 320, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length if row in left else 0 :][:length] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


# The published regex.
LORA = r".*llm2vec.*(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj).*"


def with_lora(model: nn.Module, dropout: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=LORA, lora_dropout=dropout, **options)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide mistakes
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(6)  # of the dropout
    out = model(**batch()).pooler_output
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(one, other, tolerance: float) -> None:
    """Outputs and gradients; a gradient that is zero in exact numbers (a key's bias) is compared with the largest."""
    assert relative_error(one[0], other[0]) < tolerance
    assert one[1].keys() == other[1].keys()
    largest = max(grad.norm() for grad in other[1].values())
    for name, grad in other[1].items():
        assert (one[1][name] - grad).norm() <= 20 * tolerance * (grad.norm() + 1e-3 * largest), name


def _cpu_scales_rows() -> bool:
    """PyTorch 2.11's ``_scaled_mm`` on a CPU has one scale per tensor."""
    x, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


CPU_SCALES_ROWS = _cpu_scales_rows()
NEEDS_ROW_SCALES = "this PyTorch's _scaled_mm on a CPU has one scale per tensor"
