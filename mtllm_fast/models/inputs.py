"""From what a caller passes (ids or encoder states, padded or packed) to one packed batch, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtllm_fast.packing import PackedLayout, Packing, packing_from_mask, position_ids_from_cu_seqlens

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class PackedInputs:
    """One packed batch; exactly one of ``input_ids`` [T] and ``encoder_states`` [T, d] is there."""

    layout: PackedLayout
    input_ids: Tensor | None = None
    encoder_states: Tensor | None = None

    def unpack(self, packed_T: Tensor) -> Tensor:
        """Back to the caller's layout: padded if the inputs were padded."""
        return self.layout.unpack(packed_T) if isinstance(self.layout, Packing) else packed_T


def prepare_inputs(
    model: MTLLM,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> PackedInputs:
    """Check and pack; see ``MTLLM.forward`` for the arguments and errors."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds (encoder states)")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None  # for the type checker: one of the two is there
    _check_kind(model, input_ids, inputs_embeds)
    _check_device(model, given)
    if cu_seqlens is not None:
        return _packed(model, input_ids, inputs_embeds, attention_mask, cu_seqlens, max_seqlen)
    if max_seqlen is not None:
        raise ValueError("max_seqlen goes with cu_seqlens; a padded batch knows its own length")
    if given.dim() != (2 if inputs_embeds is None else 3):
        name, want = ("input_ids", "[N, L]") if inputs_embeds is None else ("inputs_embeds", "[N, L, d]")
        raise ValueError(f"{name} must be {want}, or packed with cu_seqlens; got shape {list(given.shape)}")
    mask = _mask(model, input_ids, inputs_embeds, attention_mask)
    if input_ids is not None:
        _check_vocabulary(model, input_ids)
    packing = packing_from_mask(mask)
    packed = packing.pack(given)
    return PackedInputs(packing, packed, None) if inputs_embeds is None else PackedInputs(packing, None, packed)


def _packed(
    model: MTLLM,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
) -> PackedInputs:
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if attention_mask is not None:
        raise ValueError("attention_mask and cu_seqlens exclude each other: packed tokens have no padding")
    if given.dim() != (1 if inputs_embeds is None else 2):
        name, want = ("input_ids", "[T]") if inputs_embeds is None else ("inputs_embeds", "[T, d]")
        raise ValueError(f"with cu_seqlens, {name} must be {want}; got shape {list(given.shape)}")
    layout = packed_layout(cu_seqlens, given, max_seqlen)
    if input_ids is not None:
        _check_vocabulary(model, input_ids)
    return PackedInputs(layout, input_ids, inputs_embeds)


def packed_layout(cu_seqlens: Tensor, tokens: Tensor, max_seqlen: int | None) -> PackedLayout:
    """The layout of packed ``tokens`` ``[T, …]``, checked."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must be int32 [B+1], got {cu_seqlens.dtype} with shape {list(cu_seqlens.shape)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the tokens are on {tokens.device}")
    count = tokens.shape[0]
    _check_bounds(cu_seqlens, count)
    position_ids = position_ids_from_cu_seqlens(cu_seqlens, count)
    return PackedLayout(
        cu_seqlens=cu_seqlens, position_ids=position_ids, max_seqlen=_longest(cu_seqlens, count, max_seqlen)
    )


def _check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """On the host only: on a device it would wait, and a graph cannot."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; it runs from {first} to {last}"
            + ("" if bool((cu_seqlens.diff() >= 0).all()) else " and falls in between")
        )


def _longest(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> int:
    """An upper bound of the longest sentence; the exact one where nobody has to wait for it."""
    if torch.compiler.is_compiling():
        return max_seqlen or tokens
    if max_seqlen is None and cu_seqlens.device.type == "cpu" and cu_seqlens.numel() > 1:
        return int(cu_seqlens.diff().max())
    return min(max_seqlen or tokens, tokens)


def _mask(
    model: MTLLM, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    if attention_mask is None:
        if input_ids is not None:
            return (input_ids != model.config.nllb_config.pad_token_id).int()
        assert inputs_embeds is not None
        return torch.ones(inputs_embeds.shape[:2], dtype=torch.int32, device=inputs_embeds.device)
    grid = (input_ids if input_ids is not None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
    if attention_mask.shape != grid:
        raise ValueError(f"attention_mask must be {list(grid)}, got {list(attention_mask.shape)}")
    return attention_mask


def _check_kind(model: MTLLM, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    for name, given in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if input_ids is not None:
        if input_ids.dtype not in _INTEGERS:
            raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        return
    assert inputs_embeds is not None
    width = model.config.nllb_config.d_model
    if inputs_embeds.shape[-1] != width:
        raise ValueError(f"inputs_embeds must hold encoder states of width {width}, got {inputs_embeds.shape[-1]}")
    if not inputs_embeds.is_floating_point():
        raise TypeError(f"inputs_embeds must be floating point, got {inputs_embeds.dtype}")


def _check_device(model: MTLLM, given: Tensor) -> None:
    weight = model.nllb_encoder.embed_tokens.weight
    if weight.device.type == "meta" or hasattr(model, "_hf_hook") or torch.compiler.is_compiling():
        return  # offloaded or dispatched: accelerate's hooks move what they must
    if weight.device != given.device:
        raise ValueError(f"the inputs are on {given.device}, the model is on {weight.device}; move one of them")


def _check_vocabulary(model: MTLLM, input_ids: Tensor) -> None:
    """Ids outside the vocabulary: named on the host; on a device left to the embedding kernel, which asserts."""
    if input_ids.device.type != "cpu" or input_ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(x) for x in input_ids.aminmax())
    size = getattr(model.nllb_encoder.embed_tokens, "num_embeddings", None)
    if size is None:  # PEFT's wrapper, which knows its own
        return
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise ValueError(f"input_ids holds {bad}; the encoder's vocabulary is 0 … {size - 1}")
