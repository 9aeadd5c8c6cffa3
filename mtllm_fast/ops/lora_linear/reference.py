"""The specification of ``lora_linear`` in plain torch; also what runs on a CPU.

With m_g the 0/1 mask of adapter g (``masks.py``), c = 1 / (share kept), and x in the adapters' dtype:

    low_g = c (m_g ⊙ x) A_gᵀ          y_g  = x W_gᵀ + bias_g + s_g low_g B_gᵀ
    d_g   = s_g dy_g B_g              dx   = Σ_g dy_g W_g + c m_g ⊙ (d_g A_g)
    dB_g  = s_g dy_gᵀ low_g           dA_g = c d_gᵀ (m_g ⊙ x)

Products accumulate in float32. low and d are rounded to the adapters' dtype, as PEFT's are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.core.tensors import wide_dtype
from mtllm_fast.ops.lora_linear.group import Gated, Group, RmsNormed
from mtllm_fast.ops.lora_linear.masks import keep_masks, kept_scale

_BLOCK_ELEMENTS, _LEAST_ROWS = 2**18, 32


def forward(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, group: Group) -> tuple[Tensor, Tensor]:
    """(y [T, Σ N], low [T, Σ r])"""
    y, start = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights)), 0
    for weight in weights:
        columns = slice(start, start := start + weight.shape[0])
        _product(y[:, columns], x, weight.t(), None if bias is None else bias[columns])
    low = _low(x, group)
    for rank, columns, b, scale in zip(_split(low, group), group.columns, group.b, group.scales, strict=True):
        if y.dtype == b.dtype:
            y[:, columns].addmm_(rank, b.t(), alpha=scale)
        else:
            y[:, columns] += (rank @ b.t()).mul_(scale)
    return y, low


def backward(
    grad_y: Tensor,
    x: Tensor | RmsNormed | Gated,
    low: Tensor,
    weights: Sequence[Tensor],
    group: Group,
    needs_x: bool,
    needs_adapters: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx [T, K], the gradients of all a, then of all b, flat); x itself, or what it is computed from."""
    tokens, c = grad_y.shape[0], kept_scale(group.dropout)
    grad_x = _base_gradient(grad_y, weights) if needs_x else None
    flat = low.new_zeros(group.parameters()) if needs_adapters else None
    grads_a, grads_b = ([], []) if flat is None else group.views(flat)
    grads = [grad_y[:, columns].to(b.dtype) for b, columns in zip(group.b, group.columns, strict=True)]
    for grad_b, grad, rank, scale in zip(grads_b, grads, _split(low, group), group.scales, strict=False):
        torch.mm(grad.t(), rank, out=grad_b).mul_(scale)
    # d times c: both products with it want the factor, and this is the smallest place for it.
    low_rank = [(grad @ b).mul_(scale * c) for grad, b, scale in zip(grads, group.b, group.scales, strict=True)]
    wide = [grad.to(wide_dtype(grad.dtype)) for grad in grads_a]
    for rows in _blocks(tokens, group):
        masks = _masks(group, rows)
        inputs = None if flat is None else states(_rows(x, rows))
        for g, (a, d) in enumerate(zip(group.a, low_rank, strict=True)):
            if grad_x is not None:
                _add_low_rank(grad_x[rows], d[rows], a, masks[g])
            if inputs is not None:
                wide[g] += d[rows].t() @ _masked(inputs, masks[g]).to(a.dtype)
    for grad, total in zip(grads_a, wide, strict=True):
        grad.copy_(total)
    return grad_x, flat


def states(x: Tensor | RmsNormed | Gated) -> Tensor:
    """x, computed again in float32 and rounded once where it was not kept."""
    if isinstance(x, RmsNormed):
        wide = wide_dtype(x.states.dtype)
        return (x.states.to(wide) * x.rstd[:, None]).mul_(x.weight).to(x.states.dtype)
    if isinstance(x, Gated):
        wide = wide_dtype(x.gate.dtype)
        return F.silu(x.gate.to(wide)).mul_(x.up).to(x.gate.dtype)
    return x


def _low(x: Tensor, group: Group) -> Tensor:
    dtype = group.a[0].dtype
    if group.seed is None:
        return x.to(dtype) @ (group.a[0] if len(group.a) == 1 else torch.cat([*group.a])).t()
    low = x.new_empty(x.shape[0], group.rank_starts[-1], dtype=dtype)
    for rows in _blocks(x.shape[0], group):
        for a, rank, keep in zip(group.a, _split(low, group), _masks(group, rows), strict=True):
            torch.mm(_masked(x[rows], keep).to(dtype), a.t(), out=rank[rows])
    return low.mul_(kept_scale(group.dropout))


def _blocks(tokens: int, group: Group) -> list[slice]:
    """Of rows that stay in a core's cache while they are masked; all at once where no mask is made."""
    size = tokens if group.seed is None else max(_LEAST_ROWS, _BLOCK_ELEMENTS // group.a[0].shape[1])
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, max(1, size))]


def _masks(group: Group, rows: slice) -> list[Tensor] | list[None]:
    if group.seed is None:
        return [None] * len(group.a)
    a = group.a[0]
    return keep_masks(group.seed, len(group.a), rows, a.shape[1], group.dropout, a.device)


def _rows(x: Tensor | RmsNormed | Gated, rows: slice) -> Tensor | RmsNormed | Gated:
    if isinstance(x, RmsNormed):
        return RmsNormed(x.states[rows], x.rstd[rows], x.weight)
    return Gated(x.gate[rows], x.up[rows]) if isinstance(x, Gated) else x[rows]


def _split(low: Tensor, group: Group) -> tuple[Tensor, ...]:
    return low.split(group.ranks, dim=1)


def _masked(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0.0)


def _product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _base_gradient(grad_y: Tensor, weights: Sequence[Tensor]) -> Tensor:
    start = weights[0].shape[0]
    grad_x = grad_y[:, :start] @ weights[0]
    for weight in weights[1:]:
        grad_x.addmm_(grad_y[:, start : (start := start + weight.shape[0])], weight)
    return grad_x


def _add_low_rank(grad_x: Tensor, d: Tensor, a: Tensor, keep: Tensor | None) -> None:
    if keep is None and grad_x.dtype == a.dtype:
        grad_x.addmm_(d, a)
    else:
        grad_x += _masked(d @ a, keep)
