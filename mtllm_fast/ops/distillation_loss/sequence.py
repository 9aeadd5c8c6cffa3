"""The formulas on vectors that are pooled already, in plain torch: every backend's sequence term and figures.

Of size ``[B, D]`` or less, and nothing here waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.ops.distillation_loss.inputs import FIGURES, Options


def sequence_term(pooled: Tensor, target: Tensor, present: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(figures [len(FIGURES)] without those of spans, the gradient of the loss in ``pooled`` [B, D])

    ``present`` [B] says which sentences have tokens on both sides; the others' vectors may hold anything.
    """
    pooled, target = (torch.where(present[:, None], vectors, 0) for vectors in (pooled, target))
    sums = sums_of(pooled, target, present, options)
    scale = options.sequence_weight / _divisor(sums[-1], options)
    figures = pooled.new_zeros(len(FIGURES))
    figures[0] = sums[0] / _divisor(sums[-1], options)
    figures[2:4] = _unexplained(pooled, target, present)
    figures[4:6] = sums[1:3] / sums[-1].clamp(min=1)
    return figures, gradient_of(pooled, target, scale * present, options)


def add_span_term_(figures: Tensor, sums: Tensor, options: Options) -> Tensor:
    """Writes the figures of spans from their ``sums_of``; what the loss of one span counts for in the loss, []."""
    divisor = _divisor(sums[-1], options)
    figures[1] = sums[0] / divisor
    figures[6:] = sums[1:3] / sums[-1].clamp(min=1)
    return options.span_weight / divisor


def loss_of(figures: Tensor, options: Options) -> Tensor:
    return options.sequence_weight * figures[0] + options.span_weight * figures[1]


def gradient_of(x: Tensor, t: Tensor, scale: Tensor, options: Options) -> Tensor:
    """The gradient of scale · l(x, t) in x, row by row; x, t [n, D], scale [n]"""
    scale, D = scale[:, None], x.shape[1]
    if options.kind == "mse":
        return (x - t).mul_(scale * (2 / D))
    if options.kind == "smooth_l1":
        return (x - t).clamp_(-options.beta, options.beta).mul_(scale / (options.beta * D))
    cos, x_norm, t_norm = (value[:, None] for value in _angles(x, t))
    gradient = (x * (cos / x_norm) - t / t_norm).mul_(scale / x_norm)
    return gradient.masked_fill_(x_norm * t_norm == 0, 0)  # a zero vector has no direction


def _angles(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(cosine, 0 with a zero vector; |x|; |t|), row by row."""
    x_norm, t_norm = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(t, dim=1)
    product = x_norm * t_norm
    with torch.autocast(x.device.type, enabled=False):  # it would round the products
        cos = torch.linalg.vecdot(x, t) / product
    return cos.masked_fill_(product == 0, 0), x_norm, t_norm


def sums_of(x: Tensor, t: Tensor, there: Tensor, options: Options) -> Tensor:
    """Over the rows that are there: [Σ l(x, t), Σ cosine, Σ (|x| − |t|), how many]. The other rows are zero."""
    cos, x_norm, t_norm = _angles(x, t)
    if options.kind == "mse":
        losses = torch.linalg.vector_norm(x - t, dim=1).square() / x.shape[1]
    elif options.kind == "smooth_l1":
        losses = F.smooth_l1_loss(x, t, beta=options.beta, reduction="none").mean(1)
    else:
        losses = 1 - cos
    count = there.to(x.dtype)
    return torch.stack(((losses * count).sum(), (cos * count).sum(), ((x_norm - t_norm) * count).sum(), count.sum()))


def _divisor(count: Tensor, options: Options) -> Tensor:
    return count.clamp(min=1) if options.reduction == "mean" else torch.ones_like(count)


def _unexplained(x: Tensor, t: Tensor, there: Tensor) -> Tensor:
    """mean((x − t)²) over the variance of the teacher's vectors, and over that of the student's; [2]"""
    rows = there[:, None].to(x.dtype)
    count = rows.sum().clamp(min=1)

    def variance(vectors: Tensor) -> Tensor:
        return ((vectors - vectors.sum(0) / count) * rows).square().sum()

    error = (x - t).square().sum()
    return torch.where(error == 0, 0, error / torch.stack((variance(t), variance(x))))
