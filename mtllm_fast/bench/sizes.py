"""The stacks that the benchmark runs on: the embedded tiny one, and random weights at three real shapes.

Weights are drawn on the device in the dtype of the run, so that an 8B stack starts in seconds and never exists in
fp32. The parameters exist once: the reference runs on plain Hugging Face modules over the model's own tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NLLB_600M = {"d_model": 1024, "layers": 12, "heads": 16, "ffn": 4096, "vocab_size": 256206}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Shape:
    """Encoder and LLM shapes of one benchmark size."""

    encoder: dict[str, int]
    llm: dict[str, Any]


SHAPES = {
    "small": Shape(
        # The vocabulary is scaled down with the width: at NLLB's 256k rows the translate-test peer's output layer
        # would cost sixteen times its decoder.
        encoder={"d_model": 256, "layers": 4, "heads": 4, "ffn": 1024, "vocab_size": 16384},
        llm={"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
             "intermediate_size": 1376, "vocab_size": 16384},
    ),
    "1b": Shape(
        encoder=NLLB_600M,
        llm={"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
             "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256,
             "rope_parameters": {**LLAMA31_ROPE, "factor": 32.0}},
    ),
    "8b": Shape(
        encoder=NLLB_600M,
        llm={"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "intermediate_size": 14336, "vocab_size": 128256, "rope_parameters": LLAMA31_ROPE},
    ),
}  # fmt: skip
SIZES = ("tiny", *SHAPES)


@dataclass
class Stack:
    """One set of parameters: plain Hugging Face modules for the reference, and the model that joins them."""

    encoder: Any  # M2M100Encoder, width d, SDPA
    up_proj: nn.Linear  # d -> D
    llm: Any  # LlamaModel with is_causal=False, width D, SDPA
    model: Any  # MTLLM over the same parameters

    @property
    def device(self) -> torch.device:
        return self.up_proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.up_proj.weight.dtype


@contextmanager
def _created_as(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have their parameters drawn on ``device`` in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def make_stack(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Stack:
    """Build the stack of one size, in eval mode.

    Args:
        size: one of ``SIZES``; ``"tiny"`` is the embedded checkpoint, the others have random weights.
        device: where the weights are created and stay.
        dtype: dtype of every parameter.
        seed: seed of the random weights.

    Raises:
        ValueError: unknown size.
    """
    from transformers import LlamaConfig, LlamaModel
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    from mtllm_fast import MTLLM

    if size == "tiny":
        model = MTLLM.from_pretrained("tiny", dtype=dtype).to(device).eval()
    elif size in SHAPES:
        torch.manual_seed(seed)
        with _created_as(device, dtype):
            encoder = M2M100Encoder(encoder_config(SHAPES[size].encoder))
            llm = LlamaModel(LlamaConfig(**{**SHAPES[size].llm, "is_causal": False, "use_cache": False}))
        model = MTLLM.from_encoder_and_llm(encoder, llm, seed=seed).eval()
    else:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return Stack(
        encoder=plain_copy(M2M100Encoder, model.nllb_encoder),
        up_proj=model.up_proj,
        llm=plain_copy(LlamaModel, model.llm2vec),
        model=model,
    )


def plain_copy(module_class: Any, tower: Any) -> Any:
    """The Hugging Face module that a user of the reference would have, on the same weights: no memory, no copies.

    The model's own towers carry packed layers and a default attention of their own; the reference must not.
    """
    config = copy.deepcopy(tower.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        module = module_class(config)
    share_tensors(module, tower)
    return module.eval().requires_grad_(False)


def share_tensors(module: Any, source: Any) -> None:
    """Put the tensors of ``source`` into a module without data."""
    module.load_state_dict(source.state_dict(), assign=True)
    for name, buffer in source.named_buffers():  # those that no state dict holds: sinusoids, rotary frequencies
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer)


def encoder_config(shape: dict[str, int]) -> Any:
    """``M2M100Config`` of an NLLB encoder, and of the decoder of the same depth that translate-test needs."""
    from transformers import M2M100Config

    return M2M100Config(
        vocab_size=shape["vocab_size"],
        d_model=shape["d_model"],
        encoder_layers=shape["layers"],
        decoder_layers=shape["layers"],
        encoder_attention_heads=shape["heads"],
        decoder_attention_heads=shape["heads"],
        encoder_ffn_dim=shape["ffn"],
        decoder_ffn_dim=shape["ffn"],
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=1024,
    )


def make_translator(stack: Stack, seed: int) -> Any:
    """The stack's own encoder under a random decoder of the same shape, with the embeddings tied as NLLB ties them.

    Source of the method: the translate-test baseline, NLLB generating English that an English model then reads.
    """
    from transformers import M2M100ForConditionalGeneration

    torch.manual_seed(seed)
    with _created_as(stack.device, stack.dtype):
        translator = M2M100ForConditionalGeneration(copy.deepcopy(stack.encoder.config))
    embeddings = stack.encoder.embed_tokens
    translator.model.encoder = stack.encoder
    translator.model.shared = embeddings
    translator.model.decoder.embed_tokens.weight = embeddings.weight
    translator.lm_head.weight = embeddings.weight
    return translator.eval()
