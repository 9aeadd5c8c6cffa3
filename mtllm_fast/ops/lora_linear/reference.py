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

from mtllm_fast.ops.lora_linear.group import Gated, Group, RmsNormed
from mtllm_fast.ops.lora_linear.masks import keep_mask, kept_scale


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
    flat = low.new_empty(group.parameters()) if needs_adapters else None
    grads_a, grads_b = ([], []) if flat is None else group.views(flat)
    inputs = None if flat is None else states(x)
    for g, (a, b, columns, rank) in enumerate(zip(group.a, group.b, group.columns, _split(low, group), strict=True)):
        grad = grad_y[:, columns].to(b.dtype)
        d = (grad @ b).mul_(group.scales[g])
        keep = None
        if group.seed is not None:
            keep = keep_mask(group.seed, g, tokens, a.shape[1], group.dropout, grad_y.device)
        if grad_x is not None:
            _add_low_rank(grad_x, d, a, keep, c)
        if inputs is not None:
            torch.mm(grad.t(), rank, out=grads_b[g]).mul_(group.scales[g])
            torch.mm(d.t(), _masked(inputs, keep).to(a.dtype), out=grads_a[g]).mul_(c)
    return grad_x, flat


def states(x: Tensor | RmsNormed | Gated) -> Tensor:
    """x, computed again in float32 and rounded once where it was not kept."""
    if isinstance(x, RmsNormed):
        wide = torch.promote_types(x.states.dtype, torch.float32)
        return (x.states.to(wide) * x.rstd[:, None]).mul_(x.weight).to(x.states.dtype)
    if isinstance(x, Gated):
        wide = torch.promote_types(x.gate.dtype, torch.float32)
        return F.silu(x.gate.to(wide)).mul_(x.up).to(x.gate.dtype)
    return x


def _low(x: Tensor, group: Group) -> Tensor:
    dtype = group.a[0].dtype
    if group.seed is None:
        return x.to(dtype) @ (group.a[0] if len(group.a) == 1 else torch.cat([*group.a])).t()
    low = x.new_empty(x.shape[0], group.rank_starts[-1], dtype=dtype)
    for g, (a, rank) in enumerate(zip(group.a, _split(low, group), strict=True)):
        keep = keep_mask(group.seed, g, x.shape[0], x.shape[1], group.dropout, x.device)
        rank.copy_(_masked(x, keep).to(dtype) @ a.t())
    return low.mul_(kept_scale(group.dropout))


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


def _add_low_rank(grad_x: Tensor, d: Tensor, a: Tensor, keep: Tensor | None, c: float) -> None:
    if keep is None and grad_x.dtype == a.dtype:
        grad_x.addmm_(d, a)
    else:
        grad_x += _masked((d @ a).mul_(c), keep)
