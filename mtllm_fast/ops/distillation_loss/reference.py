"""The specification of ``distillation_loss`` in plain torch; also what runs on a CPU.

    x_b = mean of y_t over the tokens t of bag b        (a bag is a sentence, or a span; y_t: see ``Side``)
    loss = sequence_weight · mean_b l(x_b, x'_b) + span_weight · mean_s l(x_s, x'_s)        (x': the teacher's)

It goes through tokens and spans in blocks that stay in a core's cache, so that no ``[T, D]`` or ``[S, D]`` temporary
exists and the states come from memory about as often as in a fused kernel. The blocks' indices depend on the spans: on
a GPU, this backend waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.ops.distillation_loss.inputs import FIGURES, Forward, Options, Side, Spans, TokenSpans, Vectors
from mtllm_fast.ops.norm_pool.reference import (
    BLOCK_ELEMENTS,
    norm_backward,
    pool,
    row_blocks,
    rstd_of,
    sentence_blocks,
    wide,
)


def forward(student: Side, teacher: Side | Vectors, spans: Spans | None, options: Options) -> Forward:
    pooled = _pooled(student)
    present = student.cu_seqlens.diff() > 0
    if isinstance(teacher, Vectors):
        target = teacher.pooled.to(pooled.dtype)
    else:
        target = _pooled(teacher).to(pooled.dtype)
        present = present & (teacher.cu_seqlens.diff() > 0)
    pooled, target = (torch.where(present[:, None], vectors, 0) for vectors in (pooled, target))
    sums = _sums(pooled, target, present, options)
    scale = options.sequence_weight / _divisor(sums[-1], options)
    grad_pooled = _gradient(pooled, target, scale * present, options)

    figures = pooled.new_zeros(len(FIGURES))
    figures[0] = sums[0] / _divisor(sums[-1], options)
    figures[2:4] = _unexplained(pooled, target, present)
    figures[4:6] = sums[1:3] / sums[-1].clamp(min=1)
    span_scale = pooled.new_zeros(())
    if spans is not None:
        sums = torch.zeros_like(sums)
        for x, t, there in _BySpan(student, teacher, spans):
            sums += _sums(x, t, there, options)
        span_scale = options.span_weight / _divisor(sums[-1], options)
        figures[1] = sums[0] / _divisor(sums[-1], options)
        figures[6:] = sums[1:3] / sums[-1].clamp(min=1)
    loss = options.sequence_weight * figures[0] + options.span_weight * figures[1]
    return Forward(loss, figures, grad_pooled, span_scale)


def backward(
    grad_loss: Tensor,
    student: Side,
    teacher: Side | Vectors,
    spans: Spans | None,
    spans_of_tokens: TokenSpans | None,
    saved: Forward,
    options: Options,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dh [T, D] in the states' dtype, dweight [D] in the wide dtype)

    With dy_t the gradient of the normed state, from its sentence and its spans, and g = weight ⊙ dy_t:
    dh_t = rstd_t (g − x̂_t mean(g ⊙ x̂_t)),  dweight = Σ_t dy_t ⊙ x̂_t,  x̂_t = h_t rstd_t.
    """
    h, weight, eps, cu_seqlens = student
    dtype = wide(h.dtype)
    grad_hidden = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_hidden[int(cu_seqlens[-1]) :] = 0  # the tail belongs to no sentence and to no span; it may hold anything
    grad_weight = h.new_zeros(h.shape[1], dtype=dtype) if needs_weight else None
    grad_pooled = saved.grad_pooled * (grad_loss / cu_seqlens.diff().clamp(min=1)[:, None])
    by_span = None
    if spans is not None and spans_of_tokens is not None:
        by_span = _BySpan(student, teacher, spans), spans_of_tokens, grad_loss * saved.span_scale
    for b, start, stop in sentence_blocks(h, cu_seqlens):
        dy, out = grad_pooled[b], grad_hidden[start:stop]
        if by_span is not None:
            dy = _from_spans(*by_span, start, stop, options).add_(dy)
        if weight is None:
            out.copy_(dy)
            continue
        rows = h[start:stop].to(dtype)
        if grad_weight is not None:
            grad_weight += (dy * rows * rstd_of(rows, eps)[:, None]).sum(0)
        norm_backward(dy * weight.to(dtype), rows, eps, out)
    return grad_hidden, grad_weight


def _pooled(side: Side) -> Tensor:
    pooled = pool(side.states, side.cu_seqlens, None if side.weight is None else side.eps)
    return pooled if side.weight is None else pooled * side.weight.to(pooled.dtype)


def _from_spans(
    by_span: _BySpan, spans_of_tokens: TokenSpans, scale: Tensor, start: int, stop: int, options: Options
) -> Tensor:
    """What the spans of the tokens ``start`` to ``stop`` add to the gradients of their normed states; [R, D]"""
    offsets, spans = spans_of_tokens
    which, occurrence = spans[offsets[start] : offsets[stop]].unique(return_inverse=True)
    x, t, there = by_span.vectors(which)
    lengths = by_span.lengths(which)
    gradient = _gradient(x, t, scale * there / lengths.clamp(min=1), options)
    return F.embedding_bag(occurrence, gradient, offsets[start:stop] - offsets[start], mode="sum")


def _gradient(x: Tensor, t: Tensor, scale: Tensor, options: Options) -> Tensor:
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


def _sums(x: Tensor, t: Tensor, there: Tensor, options: Options) -> Tensor:
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


class _BySpan:
    """Vectors of spans, made when they are asked for."""

    def __init__(self, student: Side, teacher: Side | Vectors, spans: Spans) -> None:
        self.student, self.teacher, self.spans = student, teacher, spans
        self.rstd = _rstds(student)
        self.teacher_rstd = None if isinstance(teacher, Vectors) else _rstds(teacher)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The vectors of all spans, some at a time."""
        count = len(self.spans.offsets) - 1
        rows = max(1, BLOCK_ELEMENTS // self.student.states.shape[1])
        for start in range(0, count, rows):
            yield self.vectors(torch.arange(start, min(start + rows, count), device=self.spans.offsets.device))

    def lengths(self, which: Tensor) -> Tensor:
        return self.spans.offsets[which + 1] - self.spans.offsets[which]

    def vectors(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(student's [n, D], teacher's [n, D], whether both sides have tokens [n]); zero where one has none."""
        x = _bags(self.student, self.rstd, self.spans.indices, self.spans.offsets, which)
        there = self.lengths(which) > 0
        if isinstance(self.teacher, Vectors):
            assert self.teacher.spans is not None
            t = self.teacher.spans[which].to(x.dtype)
        else:
            offsets = self.spans.teacher_offsets
            assert self.spans.teacher_indices is not None
            assert offsets is not None
            t = _bags(self.teacher, self.teacher_rstd, self.spans.teacher_indices, offsets, which).to(x.dtype)
            there = there & (offsets[which + 1] > offsets[which])
        if not bool(there.all()):
            x, t = (vectors.masked_fill(~there[:, None], 0) for vectors in (x, t))
        return x, t, there


def _rstds(side: Side) -> Tensor | None:
    """1/rms of every token, [T]; None where the states are normed already."""
    if side.weight is None:
        return None
    blocks = [rstd_of(side.states[i:j].to(wide(side.states.dtype)), side.eps) for i, j in row_blocks(side.states)]
    return torch.cat(blocks) if blocks else side.states.new_empty(0, dtype=wide(side.states.dtype))


def _bags(side: Side, rstd: Tensor | None, indices: Tensor, offsets: Tensor, which: Tensor) -> Tensor:
    """The mean of y over the tokens of some bags; [n, D] in the wide dtype."""
    dtype = wide(side.states.dtype)
    starts = offsets[which]
    lengths = offsets[which + 1] - starts
    begins = lengths.cumsum(0) - lengths
    occurrence = torch.arange(int(lengths.sum()), device=indices.device)
    token = indices[occurrence + (starts - begins).repeat_interleave(lengths)]
    share = (1 / lengths.to(dtype)).repeat_interleave(lengths)
    if rstd is not None:
        share *= rstd[token]
    # embedding_bag weighs with the states' own dtype: half precision is widened first.
    rows, token = (side.states, token) if side.states.dtype == dtype else (side.states[token].to(dtype), occurrence)
    bags = F.embedding_bag(token, rows, begins, mode="sum", per_sample_weights=share)
    return bags if side.weight is None else bags.mul_(side.weight.to(dtype))
