"""``prepare_llm``: merge LoRA adapters into an LLM, as the method's authors prepare theirs (MNTP, then SimCSE)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from mtllm_fast.core.errors import CheckpointError
from mtllm_fast.training.checkpoints import begin, finish

logger = logging.getLogger("mtllm_fast")


def prepare_llm(
    llm: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Merge adapters into ``llm``, one after the other, and write a folder that ``distill`` takes.

    The folder holds the decoder without its head, bidirectional (``is_causal: false``), and the tokenizer. LLM2Vec's
    recipe is ``[mntp, simcse]``: the second was trained on top of the first. Sums are made in float32 and rounded once.

    Args:
        llm: folder or hub id of a decoder LLM.
        adapters: folders or hub ids of PEFT LoRA adapters, of the LLM or of its decoder, in the order of training.
        output: a new folder.
        dtype: of the result: auto (the LLM's own), float32 or bfloat16.
        overwrite: replace ``output``.

    Returns:
        Path: ``output``.

    Raises:
        FileExistsError: ``output`` exists.
        CheckpointError: an adapter with weights that have no place in this LLM, or none for one of its own modules.
        ValueError: no adapter, or no PEFT.
    """
    output = Path(output)
    if not adapters:
        raise ValueError("adapters must name at least one: a base LLM is taken by distill as it is")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; overwrite replaces it")
    try:
        import peft
    except ImportError:
        raise ValueError("merging adapters needs peft: pip install 'mtllm-fast[train]'") from None
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(llm)
    config.is_causal = False
    decoder = AutoModel.from_pretrained(llm, config=config, dtype=torch.float32)
    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    for adapter in adapters:
        decoder = _merge(peft, decoder, os.fspath(adapter))
        logger.info("merged %s", adapter)
    decoder.to(wanted or torch.float32)
    folder = begin(output)
    decoder.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llm).save_pretrained(folder)
    finish(output)
    return output


def _merge(peft: Any, decoder: nn.Module, adapter: str) -> nn.Module:
    """The decoder with one adapter merged, every weight of which must have found its place."""
    config = peft.PeftConfig.from_pretrained(adapter)
    if config.peft_type != peft.PeftType.LORA:
        raise CheckpointError(f"{adapter}: must be LoRA, is {config.peft_type}")
    config.inference_mode = True
    wrapped = peft.get_peft_model(decoder, config)
    found = {_in_decoder(name): tensor for name, tensor in _adapter_weights(adapter).items()}
    own = set(peft.get_peft_model_state_dict(wrapped))
    if extra := sorted(found.keys() - own):
        raise CheckpointError(f"{adapter}: {extra[0]} and {len(extra) - 1} more have no place in this LLM")
    if missing := sorted(own - found.keys()):
        raise CheckpointError(f"{adapter}: no weights for {missing[0]} and {len(missing) - 1} more")
    peft.set_peft_model_state_dict(wrapped, found)
    return wrapped.merge_and_unload(safe_merge=True)


def _in_decoder(name: str) -> str:
    """An adapter trained on the LLM with its head names the decoder ``model``."""
    return name.replace("base_model.model.model.", "base_model.model.", 1)


def _adapter_weights(adapter: str) -> dict[str, torch.Tensor]:
    folder = Path(adapter)
    file = folder / "adapter_model.safetensors"
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(adapter, "adapter_model.safetensors"))
    if not file.is_file():
        raise CheckpointError(f"{adapter}: no adapter_model.safetensors (pickled adapters are not read)")
    with safe_open(file, framework="pt") as weights:
        return {name: weights.get_tensor(name).float() for name in weights.keys()}  # noqa: SIM118
