"""The CUDA C++ kernels of ``distillation_loss`` (csrc/distillation_loss.cu), and norm_pool's for the sentences.

The forward reads each side twice, once for its sentences and once for its spans, and writes nothing of size [T, D]. The
backward goes from token to token, in norm_pool's partition (see ``norm_pool/chunks.py``), and makes the vectors of a
token's spans again: a span of n tokens is gathered n times, its rows mostly from the cache. Not yet measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core import native
from mtllm_fast.core.aot import CudaCase
from mtllm_fast.core.devices import guard
from mtllm_fast.ops.distillation_loss.inputs import Forward, Options, Side, Spans, TokenSpans, Vectors
from mtllm_fast.ops.distillation_loss.sequence import add_span_term_, loss_of, sequence_term
from mtllm_fast.ops.norm_pool.chunks import chunk_tokens, num_slots
from mtllm_fast.ops.norm_pool.cuda_backend import mean_of_normed, readable

KINDS = {"mse": 0, "smooth_l1": 1, "cosine": 2}  # mtllm::LossKind
_HELD_WIDTH = 4096
_MAX_BLOCKS = 1024  # each goes through several spans: about eight per multiprocessor of a large GPU

# By columns per load and per thread, as norm_pool's; two blocks of 256 threads fit a multiprocessor with 128 registers.
LINT_CASES = (
    CudaCase(
        r"distillation_(spans|backward)_kernel.*Li[48]E", max_registers=128, must_contain=(r"LDG\.E(\.\w+)*\.128",)
    ),
    CudaCase(r"distillation_(spans|backward)_kernel.*Li1E", max_registers=255),
)


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
    h = student.states
    (T, D), B = h.shape, student.cu_seqlens.shape[0] - 1
    chunk = chunk_tokens(T, B)
    grad_hidden = h.new_empty(T, D)
    by_slot = torch.zeros(num_slots(T, B, chunk), D, dtype=torch.float32, device=h.device) if needs_weight else None
    scratch = _scratch(h, num_slots(T, B, chunk))
    sides, kept = _sides(student, teacher, spans)
    offsets, of_token = (None, None) if spans is None or spans_of_tokens is None else spans_of_tokens
    floats = [tensor.float().contiguous() for tensor in (grad_loss, saved.span_scale, saved.grad_pooled)]
    with guard(h):
        status = native.extension().distillation_backward(
            *sides, _shape(options, D), *(tensor.data_ptr() for tensor in floats), student.cu_seqlens.data_ptr(),
            native.address(offsets), native.address(of_token), grad_hidden.data_ptr(), native.address(by_slot),
            scratch.data_ptr(), T, B, chunk, native.stream(h),
        )  # fmt: skip
    del kept
    native.check("distillation_loss backward", status)
    return grad_hidden, None if by_slot is None else by_slot.sum(0)


def _pooled(side: Side) -> Tensor:
    mean = mean_of_normed(side.states, side.weight, side.cu_seqlens, side.eps)
    return mean if side.weight is None else mean.mul_(side.weight)


def _sums_of_spans(student: Side, teacher: Side | Vectors, spans: Spans, options: Options) -> Tensor:
    """As ``sums_of`` over all spans, [4]"""
    h, S = student.states, len(spans.offsets) - 1
    blocks = min(S, _MAX_BLOCKS)
    sums = torch.empty(blocks, 4, dtype=torch.float32, device=h.device)
    scratch = _scratch(h, blocks)
    sides, kept = _sides(student, teacher, spans)
    with guard(h):
        status = native.extension().distillation_spans(
            *sides, _shape(options, h.shape[1]), sums.data_ptr(), scratch.data_ptr(), S, blocks, native.stream(h)
        )
    del kept
    native.check("distillation_loss spans", status)
    return sums.sum(0)


def _shape(options: Options, width: int) -> Any:
    return native.extension().loss_shape(KINDS[options.kind], options.beta, width)


def _sides(student: Side, teacher: Side | Vectors, spans: Spans | None) -> tuple[tuple[Any, Any], list[Tensor | None]]:
    """(both sides as the kernels take them, what must live until they are launched)"""
    own = (None, None) if spans is None else (spans.indices, spans.offsets)
    first = _side(student, *own)
    if spans is None:  # nothing of the teacher is read
        second = _side(student, *own)
    elif isinstance(teacher, Side):
        second = _side(_narrow(teacher), spans.teacher_indices, spans.teacher_offsets)
    else:
        assert teacher.spans is not None
        second = _side(_narrow(Side(teacher.spans, None, 0.0, student.cu_seqlens)), None, None)
    return (first[0], second[0]), first[1] + second[1]


def _side(side: Side, indices: Tensor | None, offsets: Tensor | None) -> tuple[Any, list[Tensor | None]]:
    states = _aligned(side.states)
    weight = None if side.weight is None else _aligned(readable(side.weight, states))
    described = native.extension().span_side(
        native.DTYPES[states.dtype], states.data_ptr(), states.stride(0), native.address(weight),
        weight is not None and weight.dtype == torch.float32, side.eps, native.address(indices),
        native.address(offsets),
    )  # fmt: skip
    return described, [states, weight]


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor whose rows the kernels can read 16 bytes at a time, copied if only its place in memory forbids it."""
    if tensor.shape[-1] % 8 or (tensor.data_ptr() % 16 == 0 and (tensor.dim() == 1 or tensor.stride(0) % 8 == 0)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _scratch(h: Tensor, blocks: int) -> Tensor:
    """Two vectors for each block, where its registers cannot hold them (spans.cuh: ``kHold``)."""
    D = h.shape[1]
    needed = D > _HELD_WIDTH or D % 8 != 0
    return torch.empty(blocks if needed else 0, 2, D, dtype=torch.float32, device=h.device)


def _narrow(side: Side) -> Side:
    """The kernels read no float64."""
    return side if side.states.dtype in native.DTYPES else side._replace(states=side.states.float())
