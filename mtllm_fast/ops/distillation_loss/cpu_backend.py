"""The kernels of ``distillation_loss`` for the CPU (csrc/cpu), and norm_pool's for the sentences.

The forward reads each side twice, once for its sentences and once for its spans, and writes nothing of size ``[T, D]``.
The backward goes from token to token and makes the gradient of a token's spans again, unless the span is among the last
four that its thread met: it reads both sides once (spans of neighbouring tokens) and writes the gradient once. At
T=2048, D=4096 in float32 these are 134 MB and 101 MB with spans and 34 MB and 67 MB with the teacher's vectors alone.
Sums are in float32 over pieces of 64 tokens or spans, in a fixed order that depends on no number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core import buffers, native, native_cpu
from mtllm_fast.ops.distillation_loss.inputs import Forward, Options, Side, Spans, TokenSpans, Vectors
from mtllm_fast.ops.distillation_loss.sequence import add_span_term_, loss_of, sequence_term
from mtllm_fast.ops.norm_pool.cpu_backend import mean_of_normed, num_pieces, scratch_of, sentences, states

KINDS = {"mse": 0, "smooth_l1": 1, "cosine": 2}  # mtllm::cpu::LossKind
_MEAN = 0  # mtllm::cpu::Pooling


def forward(student: Side, teacher: Side | Vectors, spans: Spans | None, options: Options) -> Forward:
    pooled, present = _pooled(student), student.cu_seqlens.diff() > 0
    if isinstance(teacher, Vectors):
        target = teacher.pooled.float()
    else:
        target, present = _pooled(_narrow(teacher)), present & (teacher.cu_seqlens.diff() > 0)
    figures, grad_pooled = sequence_term(pooled, target, present, options)
    span_scale = pooled.new_zeros(())
    if spans is not None:
        span_scale = add_span_term_(figures, _sums_of_spans(student, teacher, spans, options), options)
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
    """(dh [T, D] in the states' dtype, dweight [D] fp32)"""
    h, (T, D) = student.states, student.states.shape
    grad_hidden, scratch = buffers.empty(T, D, dtype=h.dtype), scratch_of(h)
    grad_weight = buffers.empty(D) if needs_weight else None
    by_piece = buffers.empty(num_pieces(h, student.cu_seqlens), D) if needs_weight else None
    of_token = None
    if spans is None or options.sequence_weight:
        of_token = saved.grad_pooled * (grad_loss / student.cu_seqlens.diff().clamp(min=1)[:, None])
    gain, term = _gain(student), None
    if spans is not None and spans_of_tokens is not None:
        offsets, of_token_spans = (tensor.data_ptr() for tensor in spans_of_tokens)
        target = _target_of_spans(teacher, student)
        target_gain = _gain(target)
        term = _span_term(
            target, target_gain, spans, options, offsets, of_token_spans, float(grad_loss * saved.span_scale)
        )
    status = native_cpu.extension().backward(
        native_cpu.level(), states(h, gain, student.eps), sentences(h, student.cu_seqlens), _MEAN,
        native.address(of_token), term, grad_hidden.data_ptr(), native.address(grad_weight), native.address(by_piece),
        scratch.data_ptr(), len(scratch),
    )  # fmt: skip
    native_cpu.check("distillation_loss backward", status)
    return grad_hidden, grad_weight


def _pooled(side: Side) -> Tensor:
    mean = mean_of_normed(side.states, side.weight, side.cu_seqlens, side.eps)
    return mean if side.weight is None else mean.mul_(side.weight.float())


def _sums_of_spans(student: Side, teacher: Side | Vectors, spans: Spans, options: Options) -> Tensor:
    sums, scratch, count = buffers.empty(4), scratch_of(student.states), spans.offsets.shape[0] - 1
    partial = buffers.empty(-(-count // native_cpu.extension().piece_spans), 4, dtype=torch.float64)
    target = _target_of_spans(teacher, student)
    gain, target_gain = _gain(student), _gain(target)
    status = native_cpu.extension().span_sums(
        native_cpu.level(), states(student.states, gain, student.eps),
        _span_term(target, target_gain, spans, options), student.states.shape[1], sums.data_ptr(), partial.data_ptr(),
        scratch.data_ptr(), len(scratch),
    )  # fmt: skip
    native_cpu.check("distillation_loss forward", status)
    return sums


def _span_term(
    teacher: Side, gain: Tensor | None, spans: Spans, options: Options,
    token_offsets: int = 0, token_spans: int = 0, scale: float = 0.0,
) -> Any:  # fmt: skip
    """``mtllm::cpu::SpanTerm``; the caller keeps the tensors alive."""
    module = native_cpu.extension()
    return module.span_term(
        states(teacher.states, gain, teacher.eps),
        module.bags(spans.indices.data_ptr(), spans.offsets.data_ptr()),
        module.bags(native.address(spans.teacher_indices), native.address(spans.teacher_offsets)),
        spans.offsets.shape[0] - 1, KINDS[options.kind], options.beta, token_offsets, token_spans, scale,
    )  # fmt: skip


def _gain(side: Side) -> Tensor | None:
    return None if side.weight is None else side.weight.float()


def _narrow(side: Side) -> Side:
    """A teacher in float64 is compared with a student in float32 or less."""
    return side._replace(states=side.states.float()) if side.states.dtype == torch.float64 else side


def _target_of_spans(teacher: Side | Vectors, student: Side) -> Side:
    """The teacher as the kernels take it; vectors of spans are states that are normed already, bag s is row s."""
    if isinstance(teacher, Side):
        return _narrow(teacher)
    assert teacher.spans is not None
    return _narrow(Side(teacher.spans, None, 0.0, student.cu_seqlens))
