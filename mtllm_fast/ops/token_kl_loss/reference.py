"""``token_kl_loss`` in plain torch, tile by tile of the logits ``[N, V]``; it runs on a CPU and on a GPU.

With s and t the student's and the teacher's logits over τ, q = softmax(s) and p = softmax(t), per row:

    kl    Σ_c P_c (KL(p|c ‖ q|c) + log P_c − log Q_c)        ds = q − p
    jsd   Σ_v β p log(p/m) + (1−β) q log(q/m)                ds = (1−β) q (log(q/m) − KL(q‖m))

where p|c is p within a chunk c of the vocabulary and P_c is the chunk's share of p: this chain rule makes kl a single
pass in which nothing large cancels. jsd needs a pass before for the log-sum-exps, because m mixes p and q. The gradient
is one more pass, in the backward, so that nothing of its size is kept until then and it is rounded once.

A pass takes 2NV(D + D') FLOPs, each gradient 2NVD more. Probabilities are kept as logarithms, which are finite: where
one underflows, its term is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mtllm_fast.core import onednn
from mtllm_fast.core.tensors import wide_dtype

# Of a tile. Its logits take 8 MB in float32, and up to five such tensors are alive. At a width of 4096 the product that
# is added to a gradient takes 32 MB, and where halves must be cast, its rows do too and its part of a head takes 16 MB.
# Its products are large enough to fill a GPU.
ROWS = 2048
COLUMNS = 1024


class _Tile(NamedTuple):
    """Logits over τ of some rows and some of the vocabulary; ``s`` and ``t`` may be overwritten."""

    chunk: int
    columns: slice
    rows: slice
    head: Tensor
    s: Tensor
    t: Tensor


def forward(
    hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """(loss of each row [N], what the gradient needs [3, N]: log-sum-exp of s, of t, and for jsd KL(q‖m))"""
    inputs = (hidden_states, teacher_hidden_states, weight, teacher_weight, temperature)
    chunks, rows = len(_slices(weight.shape[0], COLUMNS)), hidden_states.shape[0]
    log_sums = hidden_states.new_empty(2, chunks, rows, dtype=wide_dtype(hidden_states.dtype))
    losses = torch.zeros_like(log_sums)  # of q and of p, like log_sums
    for tile in _tiles(*inputs):
        at = (tile.chunk, tile.rows)
        log_sums[0][at], log_sums[1][at] = tile.s.logsumexp(1), tile.t.logsumexp(1)
        if divergence == "kl":
            losses[1][at] = _kl(tile.t.sub_(log_sums[1][at][:, None]), tile.s.sub_(log_sums[0][at][:, None]))
    log_sum = log_sums.logsumexp(1)
    if divergence == "kl":
        log_share_q, log_share_p = log_sums - log_sum[:, None]
        loss = (log_share_p.exp() * (losses[1] + log_share_p - log_share_q)).sum(0)
        return loss, torch.cat((log_sum, torch.zeros_like(loss)[None]))
    for tile in _tiles(*inputs):
        log_q, log_p = tile.s.sub_(log_sum[0, tile.rows, None]), tile.t.sub_(log_sum[1, tile.rows, None])
        log_m = _log_mixture(log_p, log_q, beta)
        losses[0, tile.chunk, tile.rows] = _kl(log_q, log_m)
        losses[1, tile.chunk, tile.rows] = _kl(log_p, log_m)
    kl_q, kl_p = losses.sum(1)
    return beta * kl_p + (1 - beta) * kl_q, torch.cat((log_sum, kl_q[None]))


def backward(
    scale: Tensor,
    statistics: Tensor,
    hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``scale`` times the gradient of the sum of all rows' losses: (of hidden_states, of weight), if needed."""
    wide, scale = statistics.dtype, scale / temperature
    grad_hidden = hidden_states.new_zeros(hidden_states.shape, dtype=wide) if needs_hidden else None
    grad_weight = weight.new_zeros(weight.shape) if needs_weight else None
    of_columns = scale
    for tile in _tiles(hidden_states, teacher_hidden_states, weight, teacher_weight, temperature):
        log_sum_q, log_sum_p, kl_q = statistics[:, tile.rows, None]
        log_q, log_p = tile.s.sub_(log_sum_q), tile.t.sub_(log_sum_p)
        if divergence == "kl":
            ds = log_q.exp_().sub_(log_p.exp_())
        else:
            log_ratio = log_q - _log_mixture(log_p, log_q, beta)
            ds = log_ratio.sub_(kl_q).mul_(log_q.exp_()).mul_(1 - beta)
        ds = ds.to(tile.head.dtype)  # before it is scaled: 1/N would make fp16 underflow
        if grad_hidden is not None:
            grad_hidden[tile.rows] += _product(ds, tile.head, wide)
        if grad_weight is not None:
            of_rows = _product(ds.t(), hidden_states[tile.rows].to(ds.dtype), wide)
            of_columns = of_rows if tile.rows.start == 0 else of_columns.add_(of_rows)
            grad_weight[tile.columns] = of_columns * scale  # complete after the last rows
    return None if grad_hidden is None else grad_hidden.mul_(scale).to(hidden_states.dtype), grad_weight


def _tiles(
    hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    temperature: float,
) -> Iterator[_Tile]:
    """Every tile, chunk by chunk of the vocabulary, so that a head is read once and its gradient is finished once."""
    wide = wide_dtype(hidden_states.dtype)
    dtype, teacher_dtype = _product_dtype(hidden_states), _product_dtype(teacher_hidden_states)
    of_teacher = weight if teacher_weight is None else teacher_weight
    for chunk, columns in enumerate(_slices(weight.shape[0], COLUMNS)):
        head = weight[columns].to(dtype)
        shared = of_teacher is weight and teacher_dtype == dtype
        teacher_head = head if shared else of_teacher[columns].to(teacher_dtype)
        for rows in _slices(hidden_states.shape[0], ROWS):
            s = _logits(hidden_states[rows], head, temperature, wide)
            t = _logits(teacher_hidden_states[rows], teacher_head, temperature, wide)
            yield _Tile(chunk, columns, rows, head, s, t)


def _logits(states: Tensor, head: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    logits = _product(states.to(head.dtype), head.t(), wide)
    return logits if temperature == 1 else logits.div_(temperature)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b), row by row."""
    return (log_a - log_b).mul_(log_a.exp()).sum(1)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """``a b`` in ``wide``; half precision on a GPU is multiplied as it is and not rounded."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32).to(wide)
    return torch.mm(a, b).to(wide)


def _product_dtype(states: Tensor) -> torch.dtype:
    if states.device.type == "cpu" and states.dtype.itemsize == 2:
        return onednn.product_dtype(states.dtype) or torch.float32
    return states.dtype


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
