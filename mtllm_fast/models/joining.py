"""``from_encoder_and_llm``: a new stack from a pretrained translation encoder and a pretrained LLM."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, M2M100ForConditionalGeneration, PreTrainedConfig, PreTrainedModel
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from mtllm_fast.configuration import MTLLMConfig
from mtllm_fast.models.attention import DEFAULT_ATTENTION
from mtllm_fast.models.layers import PACKED_LLMS
from mtllm_fast.models.plain import has_twin
from mtllm_fast.models.probe import check_bidirectional
from mtllm_fast.models.towers import rope_frequencies_kept

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM


def join(
    cls: type[MTLLM],
    encoder: str | os.PathLike | PreTrainedModel,
    llm: str | os.PathLike | PreTrainedModel,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    pooling: str = "mean",
    up_proj_bias: bool = False,
    seed: int = 0,
    **hub_kwargs: Any,
) -> MTLLM:
    """Stack ``llm`` on ``encoder``; ``up_proj`` is new (PyTorch's Linear initialisation, from ``seed``).

    Args:
        encoder: hub id, path or module of an M2M-100/NLLB model or its encoder.
        llm: hub id, path or module of a decoder LLM (its causal head, if any, is dropped). Llama, Mistral, Qwen2 and
            Qwen3 run packed; another decoder runs as the module it is when it can be made bidirectional.
        dtype, device_map: as in ``from_pretrained``; when ``dtype`` is None or ``"auto"`` the whole stack takes the
            LLM's. Modules that are passed in become part of the stack: they are cast, and the LLM is bidirectional
            from then on.
        **hub_kwargs: passed to both ``from_pretrained`` calls (``revision``, ``token``, ``local_files_only``, …).

    Raises:
        TypeError: a module that is neither.
        ValueError: the LLM of a model that is fused in 8 bits.
        NotBidirectionalError: the LLM cannot attend to later tokens.
    """
    wanted = _dtype(dtype)
    encoder_module = _encoder_of(_load_encoder(encoder, wanted, device_map, hub_kwargs))
    llm_module = _decoder_of(_load_llm(llm, wanted, device_map, hub_kwargs))
    if any(map(has_twin, llm_module.modules())):
        raise ValueError(
            "from_encoder_and_llm: llm is or was part of a model fused in 8 bits: unfuse() that model first"
        )
    if wanted is not None:
        with rope_frequencies_kept(llm_module):
            llm_module.to(dtype=wanted)
    encoder_module.to(dtype=llm_module.dtype)  # of a quantised LLM, the dtype that it computes in
    config = MTLLMConfig(
        nllb_config=copy.deepcopy(encoder_module.config),
        llm2vec_config=copy.deepcopy(llm_module.config),
        pooling=pooling,
        up_proj_bias=up_proj_bias,
        llm_embeddings=llm_module.get_input_embeddings() is not None,
        tokenizer_name=encoder_module.config.name_or_path or None,
    )
    _adopt_config(encoder_module, config.nllb_config, attn_implementation or DEFAULT_ATTENTION)
    packed = config.llm2vec_config.model_type in PACKED_LLMS
    own_attention = DEFAULT_ATTENTION if packed else llm_module.config._attn_implementation
    _adopt_config(llm_module, config.llm2vec_config, attn_implementation or own_attention)
    config._attn_implementation_internal = attn_implementation or DEFAULT_ATTENTION
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        model = cls(config, nllb_encoder=encoder_module, llm2vec=llm_module)
    model.up_proj.to(next(llm_module.parameters()).device, llm_module.dtype)
    config.dtype = llm_module.dtype
    model.eval()
    check_bidirectional(model)
    return model


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named = None if dtype == "auto" else getattr(torch, str(dtype), dtype)
    if named is None or isinstance(named, torch.dtype):
        return named
    raise ValueError(f"dtype must be a torch.dtype, its name or 'auto', got {dtype!r}")


def _load_encoder(encoder: Any, dtype: torch.dtype | None, device_map: Any, hub: dict[str, Any]) -> PreTrainedModel:
    if isinstance(encoder, nn.Module):
        return encoder
    return M2M100ForConditionalGeneration.from_pretrained(encoder, dtype=dtype, device_map=device_map, **hub)


def _encoder_of(model: nn.Module) -> M2M100Encoder:
    encoder = model if isinstance(model, M2M100Encoder) else None
    if encoder is None and hasattr(model, "get_encoder"):
        encoder = model.get_encoder()
    if not isinstance(encoder, M2M100Encoder):
        raise TypeError(f"encoder must be an M2M-100 or NLLB model, its encoder, an id or a path; got {type(model)}")
    return encoder


def _load_llm(llm: Any, dtype: torch.dtype | None, device_map: Any, hub: dict[str, Any]) -> PreTrainedModel:
    if isinstance(llm, nn.Module):
        return llm
    config = AutoConfig.from_pretrained(llm, **hub)
    config.is_causal = False
    return AutoModel.from_pretrained(llm, config=config, dtype=dtype, device_map=device_map, **hub)


def _decoder_of(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"llm must be a transformers decoder, an id or a path; got {type(model)} "
            f"(merge a PEFT adapter first: llm.merge_and_unload())"
        )
    decoder = model.base_model
    if getattr(decoder.config, "is_encoder_decoder", False):
        raise TypeError(f"llm must be a decoder-only model, got the encoder-decoder {type(model).__name__}")
    return decoder


def _adopt_config(module: PreTrainedModel, config: PreTrainedConfig, attn_implementation: str) -> None:
    """One config object for the tower and all its submodules, so that a switch reaches every layer."""
    config._attn_implementation = attn_implementation
    for submodule in module.modules():
        if getattr(submodule, "config", None) is not None:
            submodule.config = config
