"""What ``mtllm-fast env --check`` looks at: keys, shapes, values and tokenizer, one tensor in memory at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mtllm_fast.core.errors import TokenizerNotFoundError
from mtllm_fast.models import MTLLM, MTLLMConfig
from mtllm_fast.models.loading import checkpoint_files
from mtllm_fast.text.languages import LANGUAGES
from mtllm_fast.text.tokenization import load_tokenizer

_LISTED = 8


def check_model(model: str) -> list[str]:
    """Everything that is wrong with a checkpoint in the published layout, one sentence each; empty: nothing.

    Args:
        model: folder, hub id, or ``tiny``.
    """
    if model == "tiny":
        from mtllm_fast.tiny import tiny_path

        model = str(tiny_path())
    try:
        check_exists(model)
        config = MTLLMConfig.from_pretrained(model)
        files = checkpoint_files(model)
    except (OSError, ValueError) as error:
        return [str(error).strip().splitlines()[0]]
    return _check_tensors(config, files) + _check_tokenizer(config, model)


def check_exists(model: str) -> None:
    """Raises for a path without a folder, which would be taken for a hub id.

    Raises:
        FileNotFoundError: naming the path.
    """
    is_path = model.startswith((".", "~", os.sep)) or model.count("/") > 1
    if is_path and not Path(model).is_dir():
        raise FileNotFoundError(f"{model}: no such checkpoint folder")


def _check_tensors(config: MTLLMConfig, files: list[str]) -> list[str]:
    shapes: dict[str, list[int]] = {}
    damaged, values = [], []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    name = key.removeprefix("model.")
                    shapes[name] = tensors.get_slice(key).get_shape()
                    values += _check_values(name, tensors.get_tensor(key))
        except (SafetensorError, OSError) as error:
            damaged.append(f"{file} is corrupt or truncated ({error})")
    if damaged:
        return damaged
    expected = _expected_shapes(config, shapes)
    problems = []
    if missing := sorted(expected.keys() - shapes.keys()):
        problems.append(f"missing keys: {_listed(missing)}")
    if extra := sorted(key for key in shapes.keys() - expected.keys() if not key.startswith("score.")):
        problems.append(f"extra keys: {_listed(extra)}")
    wrong = [key for key in sorted(expected.keys() & shapes.keys()) if shapes[key] != expected[key]]
    if wrong:
        problems.append(f"wrong shapes: {_listed([f'{key} is {shapes[key]}, needs {expected[key]}' for key in wrong])}")
    return problems + values


def _expected_shapes(config: MTLLMConfig, found: dict[str, Any]) -> dict[str, list[int]]:
    """Of a model without memory; what a checkpoint may have or leave out follows the keys that were found."""
    config.up_proj_bias = "up_proj.bias" in found
    config.llm_embeddings = "llm2vec.embed_tokens.weight" in found
    with torch.device("meta"):
        model = MTLLM(config)
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}


def _check_values(name: str, tensor: torch.Tensor) -> list[str]:
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return []
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return [f"{name} holds {nan} NaN and {inf} infinite values of {tensor.numel()}"]


def _check_tokenizer(config: MTLLMConfig, model: str) -> list[str]:
    try:
        tokenizer = load_tokenizer(model, config.default_tokenizer)
    except (TokenizerNotFoundError, ValueError) as error:
        return [str(error)]
    problems = []
    unknown = [code for code in LANGUAGES if tokenizer.backend_tokenizer.token_to_id(code) is None]
    if unknown:
        problems.append(f"the tokenizer has no token for {len(unknown)} languages: {_listed(unknown)}")
    encoder: Any = config.nllb_config
    rows = encoder.vocab_size
    if len(tokenizer) > rows:
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, the encoder embeds {rows}")
    return problems


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
