"""The stack that stage 1 trains: built from its parts, wrapped in LoRA, and written down at the end."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtllm_fast.models import MTLLM
from mtllm_fast.training.checkpoints import begin, finish
from mtllm_fast.training.least_squares import init_up_proj_least_squares
from mtllm_fast.training.recipes import DistillArguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("mtllm_fast")

# All linear layers of an LLM, or of a translation encoder.
_LORA_TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2)"


def build_stack(arguments: DistillArguments) -> MTLLM:
    """The stack of a run, with a random ``up_proj`` where it is made of parts."""
    dtype = arguments.dtype
    if arguments.is_tiny or arguments.model is not None:
        if arguments.load_in_4bit:
            raise ValueError("load_in_4bit needs encoder and llm: a stack's LLM is in its checkpoint's dtype")
        return MTLLM.from_pretrained(arguments.model or "tiny", dtype=dtype)
    llm: Any = _llm_in_4bit(arguments.llm) if arguments.load_in_4bit else arguments.llm
    wanted = None if arguments.load_in_4bit else dtype
    return MTLLM.from_encoder_and_llm(arguments.encoder, llm, dtype=wanted, up_proj_bias=arguments.up_proj_bias)


def _llm_in_4bit(llm: Any) -> nn.Module:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError("load_in_4bit needs bitsandbytes: pip install 'mtllm-fast[qlora]'") from None
    from transformers import AutoConfig, AutoModel, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(llm)
    config.is_causal = False
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModel.from_pretrained(llm, config=config, quantization_config=quantization, dtype=torch.bfloat16)


def load_tokenizers(
    arguments: DistillArguments, model: MTLLM
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The LLM's and the encoder's."""
    from transformers import AutoTokenizer

    from mtllm_fast.tiny import tiny_llm_tokenizer

    named = arguments.llm_tokenizer or arguments.llm
    llm = tiny_llm_tokenizer() if named is None else AutoTokenizer.from_pretrained(named)
    encoder = model.tokenizer if arguments.encoder is None else AutoTokenizer.from_pretrained(arguments.encoder)
    return llm, encoder


def initialise(arguments: DistillArguments, model: MTLLM, texts: Any, tokenizers: tuple[Any, Any]) -> None:
    """``up_proj`` by least squares on the first of ``texts``, where that is asked for."""
    if arguments.up_proj_init == "random":
        return
    report = init_up_proj_least_squares(
        model, itertools.islice(texts, arguments.init_documents), llm_tokenizer=tokenizers[0],
        encoder_tokenizer=tokenizers[1], src_lang=arguments.src_lang, max_length=arguments.max_length,
    )  # fmt: skip
    logger.info("%s", report)


def add_lora(tower: Any, *, r: int, alpha: int, dropout: float) -> PeftModel:
    """LoRA in float32 in all linear layers of an LLM or encoder, changed in place; PEFT's wrapper comes back."""
    try:
        import peft
    except ImportError:
        raise ValueError("training needs peft: pip install 'mtllm-fast[train]'") from None
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=_LORA_TARGETS)
    wrapped = peft.get_peft_model(tower, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def save_result(arguments: DistillArguments, wrapped: PeftModel, weights: dict[str, Tensor], output: Path) -> None:
    """``output/final``: LoRA as PEFT writes it (``adapter/``), ``up_proj.safetensors``, and of what they are a part.

    Args:
        weights: the trained parameters of ``MTLLMForSelfDistillation``, whole, by name.
    """
    folder = begin(output / "final")
    llm = {name.replace("stack.llm2vec.", "base_model.model."): weight for name, weight in weights.items()}
    wrapped.save_pretrained(str(folder / "adapter"), state_dict=llm)
    up_proj = {name.removeprefix("stack."): w for name, w in weights.items() if name.startswith("stack.up_proj.")}
    save_file(up_proj, folder / "up_proj.safetensors", metadata={"format": "pt"})
    parts = {name: getattr(arguments, name) for name in ("model", "encoder", "llm", "llm_tokenizer", "load_in_4bit")}
    (folder / "stack.json").write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    finish(output / "final")


def merge_lora(stack: Any, wrapped: PeftModel) -> torch.dtype:
    """Add the adapters of a stack's LLM to its weights, in float32, and round once, to the dtype of the encoder."""
    dtype = next(stack.nllb_encoder.parameters()).dtype
    stack.llm2vec.float()
    wrapped.merge_and_unload()
    stack.to(dtype)
    return dtype


def save_merged(model: MTLLM, wrapped: PeftModel, encoder_tokenizer: Any, output: Path) -> None:
    """``output/merged``: adapters merged, the published layout, with the encoder's tokenizer. The model is used up."""
    merge_lora(model, wrapped)
    folder = begin(output / "merged")
    model.save_pretrained(folder)
    encoder_tokenizer.save_pretrained(folder)
    finish(output / "merged")
