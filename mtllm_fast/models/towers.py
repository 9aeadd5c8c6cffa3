"""The two towers on packed tokens: functions that run the Hugging Face modules' own parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.m2m_100.modeling_m2m_100 import M2M100ScaledWordEmbedding

from mtllm_fast.core.buffers import reusing
from mtllm_fast.core.tensors import wide_dtype
from mtllm_fast.models.layers import PackedContext
from mtllm_fast.models.norms import norm
from mtllm_fast.models.plain import is_hooked
from mtllm_fast.ops.embed_tokens import embed_tokens
from mtllm_fast.packing import PackedLayout, right_padded

# attn_implementation -> backend of the varlen_attention op. The first is the default.
ATTENTION_BACKENDS = {
    "mtllm_varlen": "auto",
    "sdpa": "sdpa",
    "eager": "reference",
    "flash_attention_2": "flash_attn",
}


def _context(tower: PreTrainedModel, layout: PackedLayout, **rope: Tensor) -> PackedContext:
    backend = ATTENTION_BACKENDS[tower.config._attn_implementation]
    return PackedContext(layout.cu_seqlens, layout.max_seqlen, backend, layout.dead_tail, **rope)


@reusing
def run_encoder(
    encoder: PreTrainedModel,
    input_ids_T: Tensor,
    layout: PackedLayout,
    collect: list[Tensor] | None = None,
) -> Tensor:
    """``M2M100Encoder`` on packed tokens: ids int64 [T] -> [T, d]. ``collect`` receives the state after each layer."""
    hidden = _embed(encoder, input_ids_T, layout)
    hidden = F.dropout(hidden, encoder.dropout, encoder.training)
    packed = _context(encoder, layout)
    for layer in encoder.layers:
        if collect is not None:
            collect.append(hidden)
        if encoder.training and encoder.layerdrop > 0 and torch.rand([]) < encoder.layerdrop:
            continue
        hidden = layer(hidden, packed=packed)
    if collect is not None:
        collect.append(hidden)
    return encoder.layer_norm(hidden)


def _embed(encoder: PreTrainedModel, input_ids_T: Tensor, layout: PackedLayout) -> Tensor:
    """Scaled embeddings and fairseq's sinusoids, whose row ``padding_idx + 1`` is position 0; they grow with texts."""
    reserve_positions(encoder, layout.max_seqlen)
    tokens, positions = encoder.embed_tokens, encoder.embed_positions
    offset = positions.padding_idx + 1
    if type(tokens) is M2M100ScaledWordEmbedding and type(tokens.weight) is nn.Parameter and not is_hooked(tokens):
        return embed_tokens(
            input_ids_T, tokens.weight, layout.position_ids, positions.weights, scale=tokens.embed_scale, offset=offset,
            padding_idx=tokens.padding_idx,
        )  # fmt: skip
    hidden = tokens(input_ids_T)
    return hidden + positions.weights.index_select(0, layout.position_ids + offset).to(hidden)


def reserve_positions(encoder: PreTrainedModel, length: int) -> None:
    """Grow the table of positions for texts of up to so many tokens, where it is smaller."""
    positions = encoder.embed_positions
    rows = positions.padding_idx + 1 + length
    if rows > positions.weights.shape[0]:
        positions.make_weights(rows, positions.embedding_dim, positions.padding_idx)


@reusing
def run_llm(
    llm: PreTrainedModel,
    inputs_embeds_TD: Tensor,
    layout: PackedLayout,
    collect: list[Tensor] | None = None,
    num_layers: int | None = None,
    *,
    first_qkv: tuple[Tensor, Tensor, Tensor] | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A decoder of a packed family, bidirectional: [T, D] -> [T, D] *before* its last RMSNorm.

    ``first_qkv``: q, k and v of the first layer, rotated, and ``rope``: the tables, where the caller has them already.
    """
    hidden = inputs_embeds_TD
    cos, sin = rope_tables(llm, hidden, layout.position_ids) if rope is None else rope
    packed = _context(llm, layout, cos=cos, sin=sin)
    for i, layer in enumerate(llm.layers[:num_layers]):
        if collect is not None:
            collect.append(hidden)
        given = first_qkv is not None and i == 0
        hidden = layer(hidden, packed=replace(packed, qkv=first_qkv) if given else packed)
    return hidden


def final_norm(llm: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """The last RMSNorm of a packed family."""
    return norm(llm.norm, hidden_TD)


def rope_tables(llm: PreTrainedModel, like_TD: Tensor, position_ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin ``[T, hd]`` in the dtype of the activations, from float32 angles."""
    cos, sin = llm.rotary_emb(like_TD, position_ids_T[None])
    return cos[0], sin[0]


@contextmanager
def rope_frequencies_kept(root: nn.Module) -> Iterator[None]:
    """Casting a model rounds its RoPE frequencies with everything else, and bf16 angles are off by whole radians."""
    kept = {m: m.inv_freq for m in root.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)}
    yield
    for module, inv_freq in kept.items():
        if module.inv_freq.dtype != inv_freq.dtype:
            module.inv_freq = inv_freq.to(module.inv_freq.device)


def every_module(root: nn.Module) -> list[nn.Module]:
    """The module and all below it, in no order; ``nn.Module.modules()`` takes several times as long, which one sentence
    notices."""
    found = {id(root): root}
    waiting = [root]
    while waiting:
        children = [c for c in waiting.pop()._modules.values() if c is not None and id(c) not in found]
        found.update(zip(map(id, children), children, strict=True))
        waiting += children
    return list(found.values())


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """No dropout within; each module's own mode is restored. A model in evaluation mode is not touched."""
    training = [module for module in every_module(root) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def run_other_llm(
    llm: PreTrainedModel,
    inputs_embeds_TD: Tensor,
    layout: PackedLayout,
    collect: list[Tensor] | None = None,
) -> Tensor:
    """A decoder without packed layers, as the module it is: padded on the right, bidirectional by its config.

    [T, D] -> [T, D] *after* its last norm (which belongs to the module).
    """
    packing = right_padded(layout)
    embeds_NLD = packing.unpack(inputs_embeds_TD)
    mask_NL = packing.unpack(torch.ones_like(packing.indices))
    out = llm(
        inputs_embeds=embeds_NLD, attention_mask=mask_NL, use_cache=False, output_hidden_states=collect is not None
    )
    if collect is not None:
        collect.extend(packing.pack(state) for state in out.hidden_states[:-1])
    return packing.pack(out.last_hidden_state)


def pool(hidden_TD: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """Pool states that are normed already: [T, D] -> [B, D], fp32 accumulation for the mean."""
    if pooling == "cls":
        return hidden_TD.index_select(0, cu_seqlens[:-1].long())
    if pooling == "eos":
        return hidden_TD.index_select(0, cu_seqlens[1:].long() - 1)
    summed = torch.segment_reduce(hidden_TD.to(wide_dtype(hidden_TD.dtype)), "mean", offsets=cu_seqlens.long(), axis=0)
    return summed.to(hidden_TD.dtype)
