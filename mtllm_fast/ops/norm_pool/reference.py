"""The specification of ``norm_pool`` in plain torch; also what runs on a CPU.

    pooled[b] = weight ⊙ Σ_t r_t x̂_t        x̂_t = h_t · rsqrt(mean(h_t²) + eps)

over all tokens t of sentence b, with r_t = 1/L_b for mean, and 1 for the first (cls) or last (eos) token and 0 for the
others. Computed in float32 (float64 for float64 inputs), rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(pooled [B, D], Σ_t r_t x̂_t [B, D])"""
    x = _wide(hidden_states)
    _, r = _sentences(cu_seqlens, x, pooling)
    tokens = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    # A weighted sum of rows per bag, without a [T, D] temporary; the last bag is the tail that belongs to no sentence.
    bags = F.embedding_bag(tokens, x, cu_seqlens, mode="sum", per_sample_weights=r * _rstd(x, eps))
    normed_mean = bags[:-1]
    return (weight.to(x.dtype) * normed_mean).to(hidden_states.dtype), normed_mean if save else None


def backward(
    grad_pooled: Tensor, hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str
) -> Tensor:
    """dh_t = r_t rstd_t (g − x̂_t mean(g ⊙ x̂_t)) with g = weight ⊙ grad_pooled[b]; [T, D]"""
    x = _wide(hidden_states)
    sentence, r = _sentences(cu_seqlens, x, pooling)
    rstd = _rstd(x, eps)[:, None]
    normed = x * rstd
    g = F.pad(weight.to(x.dtype) * grad_pooled, (0, 0, 0, 1))[sentence]  # the tail's gradient is zero
    grad = r[:, None] * rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return torch.where(r[:, None] > 0, grad, 0).to(hidden_states.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1] + eps)


def _sentences(cu_seqlens: Tensor, x: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """For each token: its sentence (B for the tail after the last one), and its share r_t in the pooled vector."""
    token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    sentence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    ends = F.pad(cu_seqlens, (0, 1), value=x.shape[0])
    start, stop = ends[sentence], ends[sentence + 1]
    if pooling == "mean":
        share = 1 / (stop - start).to(x.dtype)
    else:
        share = (token == (start if pooling == "cls" else stop - 1)).to(x.dtype)
    return sentence, share * (sentence < cu_seqlens.shape[0] - 1)
