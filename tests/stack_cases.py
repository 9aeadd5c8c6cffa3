"""Weights and states for ``stack_projection``: random ones, ones scaled like a model's, and ones whose means cancel."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mtllm_fast.ops.stack_projection import StackWeights

KINDS = ("random", "realistic", "cancelling")


def random_weights(
    d: int,
    D: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    up_bias: bool = True,
    qkv_biases: bool = False,
    head_norms: bool = False,
    seed: int = 0,
) -> StackWeights:
    """float64 weights of unit scale."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, kv_rows = heads * head_dim, kv_heads * head_dim
    optional: dict[str, Tensor] = {"up_bias": random(D) / 4} if up_bias else {}
    if qkv_biases:
        optional |= {name: random(n) / 4 for name, n in (("q_bias", rows), ("k_bias", kv_rows), ("v_bias", kv_rows))}
    if head_norms:
        optional |= {"q_norm": 1 + random(head_dim) / 4, "k_norm": 1 + random(head_dim) / 4}
    q, k, v = (random(n, D) / D**0.5 for n in (rows, kv_rows, kv_rows))
    return StackWeights(
        up=random(D, d) / d**0.5, norm=1 + random(D) / 4, q=q, k=k, v=v, head_dim=head_dim, eps=1e-5, **optional
    )


def states(tokens: int, d: int, *, seed: int = 1) -> Tensor:
    """float64 states [T, d] around a common mean, as an encoder's are."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(tokens, d, generator=generator, dtype=torch.float64) + mean


def problem(kind: str, tokens: int, d: int, D: int, heads: int, kv_heads: int, head_dim: int, seed: int = 1):
    """(weights, states) in float64.

    ``realistic``: heavy-tailed gains, outlier dimensions, states in a cone, an x of small rms. ``cancelling``: the
    same, and the up-projection's bias takes back 98% of what it makes of the mean state.
    """
    weights = random_weights(d, D, heads, kv_heads, head_dim, up_bias=False)
    e = states(tokens, d, seed=seed)
    if kind == "random":
        return weights, e - e.mean(0)
    generator = torch.Generator().manual_seed(7)
    gains = torch.exp(0.8 * torch.randn(D, generator=generator, dtype=torch.float64)) * 0.3
    up = weights.up * 0.012
    outliers = torch.randint(0, D, (4,), generator=generator)
    up[outliers] *= 30
    spread = torch.exp(0.7 * torch.randn(d, generator=generator, dtype=torch.float64))
    mean = torch.randn(d, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    e = (0.6 * torch.randn(tokens, d, generator=generator, dtype=torch.float64) + mean) * spread
    bias = -0.98 * up @ (mean * spread) if kind == "cancelling" else None
    return replace(weights, norm=gains, up=up, up_bias=bias), e


def rope_tables(rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Llama's cos and sin in float64, [rows, hd]."""
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = (torch.arange(rows, dtype=torch.float64)[:, None] * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def attention(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """float64 attention within sentences of one length: [T, H, hd]."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (
        t.double().repeat_interleave(r, 1).unflatten(0, (-1, length)).transpose(1, 2)
        for t, r in ((q, 1), (k, groups), (v, groups))
    )
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
