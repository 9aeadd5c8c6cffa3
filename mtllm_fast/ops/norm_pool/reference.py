"""The specification of ``norm_pool`` in plain torch; also what runs on a CPU.

    pooled[b] = weight ⊙ Σ_t r_t x̂_t        x̂_t = h_t · rsqrt(mean(h_t²) + eps)

over all tokens t of sentence b, with r_t = 1/L_b for mean, and 1 for the first (cls) or last (eos) token and 0 for the
others. Computed in float32 (float64 for float64 inputs), rounded once at the end. On a CPU half precision is widened,
and gradients are made, block by block of rows in a core's cache, without a ``[T, D]`` temporary. On a GPU the forward
widens all rows at once, so that it waits for nothing; the backward waits for the lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.core.tensors import wide_dtype

BLOCK_ELEMENTS = 2**19  # 2 MB in float32: with less, the calls cost more than the memory


def forward(
    hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(pooled [B, D], Σ_t r_t x̂_t [B, D])"""
    normed_mean = pool(hidden_states, cu_seqlens, eps, pooling)
    return (weight.to(normed_mean.dtype) * normed_mean).to(hidden_states.dtype), normed_mean if save else None


def pool(hidden_states: Tensor, cu_seqlens: Tensor, eps: float | None, pooling: str = "mean") -> Tensor:
    """Σ_t r_t x̂_t, or Σ_t r_t h_t for states that are normed already (eps is None); [B, D] in the wide dtype."""
    dtype = wide_dtype(hidden_states.dtype)
    sentence, r = _sentences(cu_seqlens, hidden_states.shape[0], dtype, pooling)
    if hidden_states.dtype == dtype or not hidden_states.is_cpu:
        hidden_states = hidden_states.to(dtype)
        tokens = torch.arange(hidden_states.shape[0], dtype=torch.int32, device=hidden_states.device)
        r = r if eps is None else r * rstd_of(hidden_states, eps)
        # A weighted sum of rows per bag; the last bag is the tail that belongs to no sentence.
        return F.embedding_bag(tokens, hidden_states, cu_seqlens, mode="sum", per_sample_weights=r)[:-1]
    bags = r.new_zeros(cu_seqlens.shape[0], hidden_states.shape[1])
    for start, stop in row_blocks(hidden_states):
        rows = hidden_states[start:stop].to(dtype)
        share = r[start:stop] if eps is None else r[start:stop] * rstd_of(rows, eps)
        first, last = int(sentence[start]), int(sentence[stop - 1])
        offsets = (cu_seqlens[first : last + 1] - start).clamp(min=0)
        tokens = torch.arange(stop - start, dtype=torch.int32, device=rows.device)
        bags[first : last + 1] += F.embedding_bag(tokens, rows, offsets, mode="sum", per_sample_weights=share)
    return bags[:-1]


def backward(
    grad_pooled: Tensor, hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str
) -> Tensor:
    """dh_t = r_t rstd_t (g − x̂_t mean(g ⊙ x̂_t)) with g = weight ⊙ grad_pooled[b]; [T, D]"""
    dtype = wide_dtype(hidden_states.dtype)
    grad_hidden = torch.zeros_like if pooling != "mean" else torch.empty_like
    grad = grad_hidden(hidden_states, memory_format=torch.contiguous_format)
    grad[int(cu_seqlens[-1]) :] = 0  # the tail after the last sentence may hold anything
    g = weight.to(dtype) * grad_pooled
    if pooling == "mean":
        g /= cu_seqlens.diff().clamp(min=1)[:, None]
    for b, start, stop in sentence_blocks(hidden_states, cu_seqlens, pooling):
        norm_backward(g[b], hidden_states[start:stop].to(dtype), eps, out=grad[start:stop])
    return grad


def norm_backward(g: Tensor, rows: Tensor, eps: float, out: Tensor) -> None:
    """The gradient of RMSNorm without its gain, rstd (g − x̂ mean(g ⊙ x̂)), into ``out`` [R, D]; g is [D] or [R, D]."""
    rstd = rstd_of(rows, eps)
    with torch.autocast(rows.device.type, enabled=False):  # it would round the products
        along = rows @ g if g.dim() == 1 else torch.linalg.vecdot(g, rows)
    along = -along * rstd.pow(3) / rows.shape[1]
    if out.dtype == rows.dtype:
        torch.mul(g, rstd[:, None], out=out).addcmul_(rows, along[:, None])
    else:
        out.copy_((g * rstd[:, None]).addcmul_(rows, along[:, None]))


def rstd_of(rows: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vector_norm(rows, dim=-1).square() / rows.shape[-1] + eps)


def row_blocks(states: Tensor) -> Iterator[tuple[int, int]]:
    """Where blocks of rows that stay in a core's cache start and stop."""
    T, D = states.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, D))
    for start in range(0, T, rows):
        yield start, min(start + rows, T)


def sentence_blocks(states: Tensor, cu_seqlens: Tensor, pooling: str = "mean") -> Iterator[tuple[int, int, int]]:
    """(sentence, start, stop) of such blocks of the rows that a sentence pools."""
    ends = cu_seqlens.tolist()
    for b, (first, last) in enumerate(itertools.pairwise(ends)):
        if pooling == "mean":
            for start, stop in row_blocks(states[first:last]):
                yield b, first + start, first + stop
        elif first < last:
            yield b, *((first, first + 1) if pooling == "cls" else (last - 1, last))


def _sentences(cu_seqlens: Tensor, T: int, dtype: torch.dtype, pooling: str) -> tuple[Tensor, Tensor]:
    """For each token: its sentence (B for the tail after the last one), and its share r_t in the pooled vector."""
    token = torch.arange(T, dtype=torch.int32, device=cu_seqlens.device)
    sentence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    ends = F.pad(cu_seqlens, (0, 1), value=T)
    start, stop = ends[sentence], ends[sentence + 1]
    if pooling == "mean":
        share = 1 / (stop - start).to(dtype)
    else:
        share = (token == (start if pooling == "cls" else stop - 1)).to(dtype)
    return sentence, share * (sentence < cu_seqlens.shape[0] - 1)
