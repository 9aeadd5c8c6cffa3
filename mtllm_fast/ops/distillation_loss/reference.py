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

from mtllm_fast.core.tensors import wide_dtype
from mtllm_fast.ops.distillation_loss.inputs import Forward, Options, Side, Spans, TokenSpans, Vectors
from mtllm_fast.ops.distillation_loss.sequence import add_span_term_, gradient_of, loss_of, sequence_term, sums_of
from mtllm_fast.ops.norm_pool.reference import (
    BLOCK_ELEMENTS,
    norm_backward,
    pool,
    row_blocks,
    rstd_of,
    sentence_blocks,
)


def forward(student: Side, teacher: Side | Vectors, spans: Spans | None, options: Options) -> Forward:
    pooled = _pooled(student)
    present = student.cu_seqlens.diff() > 0
    if isinstance(teacher, Vectors):
        target = teacher.pooled.to(pooled.dtype)
    else:
        target = _pooled(teacher).to(pooled.dtype)
        present = present & (teacher.cu_seqlens.diff() > 0)
    figures, grad_pooled = sequence_term(pooled, target, present, options)
    span_scale = pooled.new_zeros(())
    if spans is not None:
        sums = pooled.new_zeros(4)
        for x, t, there in _BySpan(student, teacher, spans):
            sums += sums_of(x, t, there, options)
        span_scale = add_span_term_(figures, sums, options)
    return Forward(loss_of(figures, options), figures, grad_pooled, span_scale)


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
    dtype = wide_dtype(h.dtype)
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
            of_spans = _from_spans(*by_span, start, stop, options)
            dy = of_spans.add_(dy) if options.sequence_weight else of_spans
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
    gradient = gradient_of(x, t, scale * there / lengths.clamp(min=1), options)
    return F.embedding_bag(occurrence, gradient, offsets[start:stop] - offsets[start], mode="sum")


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
    blocks = [rstd_of(side.states[i:j].to(wide_dtype(side.states.dtype)), side.eps) for i, j in row_blocks(side.states)]
    return torch.cat(blocks) if blocks else side.states.new_empty(0, dtype=wide_dtype(side.states.dtype))


def _bags(side: Side, rstd: Tensor | None, indices: Tensor, offsets: Tensor, which: Tensor) -> Tensor:
    """The mean of y over the tokens of some bags; [n, D] in the wide dtype."""
    dtype = wide_dtype(side.states.dtype)
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
