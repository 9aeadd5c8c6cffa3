"""Loading and saving in the published layout: keys are checked by name, nothing is initialised in silence."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from mtllm_fast.configuration import MTLLMConfig, check_pooling
from mtllm_fast.core.errors import CheckpointError, TokenizerNotFoundError
from mtllm_fast.models.probe import check_bidirectional
from mtllm_fast.text.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("mtllm_fast")

# Llama, Mistral, Qwen, Gemma, OPT; GPT-2; Bloom, Falcon; GPT-NeoX.
LLM_EMBEDDINGS = re.compile(r"^llm2vec\.(.+\.)?(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
# What a head adds to a base checkpoint: may be missing (trained afterwards) or left over (a base from a head).
_HEAD_KEYS = re.compile(r"^score\.(weight|bias)$")
_CONFIG_FIELDS = (
    "pooling", "llm_embeddings", "num_labels", "id2label", "label2id", "problem_type", "output_hidden_states",
)  # fmt: skip
_HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class CheckpointMixin:
    """``from_pretrained``, ``save_pretrained`` and the tokenizer of every MT-LLM class."""

    # transformers evaluates annotations here, so no type-checking-only name
    _tokenizer: Any = None
    _tokenizer_source: Any = None  # path or id of the checkpoint, and what it was loaded with

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint in the published layout, from a folder, a hub id, or ``"tiny"`` (the embedded default).

        Takes what ``transformers.PreTrainedModel.from_pretrained`` takes (``dtype``, ``device_map``,
        ``attn_implementation``, ``quantization_config``, …), and fields of ``MTLLMConfig``: ``pooling=``,
        ``llm_embeddings=False`` (do not read the LLM's token embeddings, 1 GB at Llama-3 size, which only a
        teacher needs).

        Raises:
            CheckpointError: keys are missing, extra or of another shape (each named), or a file is corrupt.
            NotBidirectionalError: the LLM ignores later tokens, or padding changes its states.

        Example:

            >>> import torch
            >>> from mtllm_fast import MTLLM
            >>> MTLLM.from_pretrained("tiny", dtype=torch.bfloat16, pooling="eos").config.pooling
            'eos'
        """
        path = _resolve(pretrained_model_name_or_path)
        if kwargs.get("variant") is not None:
            raise ValueError("variant is not supported: name the folder or revision that holds model.safetensors")
        if path is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
            return super().from_pretrained(path, *args, **kwargs)  # type: ignore[misc]
        hub = {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}
        keys = checkpoint_keys(path, **hub)
        config, kwargs = _config_for(cls, path, keys, hub, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(f"{path}: a safetensors file is corrupt or truncated ({error})") from error
        _check_loading_info(path, info, allow_mismatch)
        check_bidirectional(model.base_model)
        model.base_model._tokenizer_source = (os.path.abspath(path) if os.path.isdir(path) else path, hub)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save in the published key layout (safetensors, sharded when large), with the tokenizer when there is one."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        try:
            tokenizer = self._find_tokenizer(local_files_only=True)
        except TokenizerNotFoundError as error:
            logger.warning("saved %s without a tokenizer: %s", save_directory, error)
            return
        tokenizer.save_pretrained(save_directory)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The encoder's tokenizer: from the checkpoint's folder when it is there, else from the id in the config."""
        return self._find_tokenizer()

    @tokenizer.setter
    def tokenizer(self, value: PreTrainedTokenizerBase) -> None:
        self.base_model._tokenizer = value  # type: ignore[attr-defined]

    def _find_tokenizer(self, **hub: Any) -> PreTrainedTokenizerBase:
        base = self.base_model  # type: ignore[attr-defined]
        if base._tokenizer is None:
            path, loaded_with = base._tokenizer_source or (base.config.name_or_path, dict[str, Any]())
            hub = {**loaded_with, **hub}
            sources = [source for source in (path, base.config.default_tokenizer) if source]
            if not sources:
                raise TokenizerNotFoundError(
                    "this stack was made without a tokenizer; set model.tokenizer or config.tokenizer_name (id or path)"
                )
            base._tokenizer = load_tokenizer(*dict.fromkeys(sources), **hub)
        return base._tokenizer


def _resolve(path: str | os.PathLike | None) -> str | os.PathLike | None:
    if path == "tiny" and not os.path.isdir(path):
        from mtllm_fast.tiny import tiny_path

        return str(tiny_path())
    looks_local = path is not None and str(path).startswith((".", "/", "~"))
    if looks_local and not os.path.isdir(str(path)):
        raise CheckpointError(f"{path}: no such folder")
    return path


def checkpoint_files(path: str | os.PathLike, **hub: Any) -> list[str]:
    """The safetensors files of a checkpoint folder or hub id.

    Raises:
        CheckpointError: there are none (pickled weights are never read).
    """
    optional = {"_raise_exceptions_for_missing_entries": False, **hub}
    single = cached_file(path, SAFE_WEIGHTS_NAME, **optional)
    if single is not None:
        return [single]
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **optional)
    if index is None:
        raise CheckpointError(f"{path}: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} (pickle is not read)")
    try:
        with open(index, encoding="utf-8") as f:
            shards = sorted(set(json.load(f)["weight_map"].values()))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: no index of shards ({type(error).__name__}: {error})") from error
    found = [cached_file(path, shard, **optional) for shard in shards]
    missing = [shard for shard, file in zip(shards, found, strict=True) if file is None]
    if missing:
        raise CheckpointError(f"{path}: shards named in the index are missing: {', '.join(missing)}")
    return [file for file in found if file is not None]


def checkpoint_keys(path: str | os.PathLike, **hub: Any) -> set[str]:
    """Names of all tensors, read from the headers only; a head checkpoint's ``model.`` prefix is removed."""
    keys: set[str] = set()
    for file in checkpoint_files(path, **hub):
        try:
            with safe_open(file, framework="pt") as f:
                keys.update(f.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file}: corrupt or truncated safetensors file ({error})") from error
    return {key.removeprefix("model.") for key in keys}


def _config_for(
    cls: Any, path: Any, keys: set[str], hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[MTLLMConfig, dict[str, Any]]:
    """The checkpoint's config with what only its keys tell: the bias of ``up_proj``, the LLM's embeddings."""
    config = kwargs.pop("config", None)
    if not isinstance(config, MTLLMConfig):
        if (
            config is None
            and cached_file(path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub) is None
        ):
            raise CheckpointError(f"{path}: no {CONFIG_NAME}")
        fields = {key: kwargs.pop(key) for key in _CONFIG_FIELDS if key in kwargs}
        config = MTLLMConfig.from_pretrained(config or path, **hub, **fields)
    else:
        config = copy.deepcopy(config)
        for key in _CONFIG_FIELDS:
            if key in kwargs:
                setattr(config, key, kwargs.pop(key))
    check_pooling(config.pooling)
    config.up_proj_bias = "up_proj.bias" in keys
    config.llm_embeddings = config.llm_embeddings and any(map(LLM_EMBEDDINGS.match, keys))
    return config, kwargs


def _check_loading_info(path: Any, info: dict[str, Any], allow_mismatch: bool) -> None:
    missing = sorted(k for k in info["missing_keys"] if not _HEAD_KEYS.match(k))
    extra = sorted(k for k in info["unexpected_keys"] if not _HEAD_KEYS.match(k))
    problems = []
    if missing:
        problems.append(f"missing keys: {_listed(missing)}")
    if extra:
        problems.append(f"extra keys: {_listed(extra)}")
    if info["mismatched_keys"] and not allow_mismatch:
        shapes = [f"{key} is {list(found)}, needs {list(want)}" for key, found, want in info["mismatched_keys"]]
        problems.append(f"wrong shapes: {_listed(shapes)}")
    if info.get("error_msgs"):
        problems.append(f"errors: {_listed(info['error_msgs'])}")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + rest
