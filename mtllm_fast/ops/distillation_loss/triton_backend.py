"""Triton kernels of ``distillation_loss``. Sentences are pooled by ``norm_pool``'s kernels, each side once.

Spans are gathered row by row, in the forward and again in the backward, so nothing of size [T, D] or [S, D] is written
but the gradient of the states. Sums go through fixed programs in a fixed order, without atomics; no scalar is asked
from the device.

Floors at 4.3 TB/s for T=16384, D=4096, bf16 (derived, not yet measured): the pooled forward reads each side's states
once, 8 KB a token, 134 MB, 31 µs a side; the backward reads h and writes dh, 268 MB, 62 µs. Spans add one read of
each gathered row on either side; in the backward, which makes a span again for each of its tokens, n for n tokens.

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard
from mtllm_fast.ops.distillation_loss.inputs import FIGURES, Forward, Options, Side, Spans, TokenSpans, Vectors
from mtllm_fast.ops.distillation_loss.triton_vectors import (
    bag,
    compare,
    gained,
    gradient,
    rstd_of,
    teacher_bag,
    teacher_range,
)
from mtllm_fast.ops.norm_pool.chunks import chunk_tokens, num_slots
from mtllm_fast.ops.norm_pool.triton_backend import PINNED, SENTENCES, find_chunk, pool

# Sizes that change from batch to batch are plain run-time numbers: a new T, B or S compiles nothing.
SPAN_PROGRAMS = 1024  # at most, a few per multiprocessor of a large GPU
VARIANCE_BLOCKS = {"BR": 32, "BC": 64, "num_warps": 4, **PINNED}  # sentences and columns per loop step
FIGURES_BLOCKS = {"BR": 1024, "num_warps": 4, **PINNED}


@triton.jit
def present(cu_seqlens, teacher_cu_seqlens, o_b, B):
    """Whether sentences have tokens on both sides."""
    m_b = o_b < B
    b_there = tl.load(cu_seqlens + o_b, mask=m_b, other=0) < tl.load(cu_seqlens + o_b + 1, mask=m_b, other=0)
    if teacher_cu_seqlens is not None:
        b_start = tl.load(teacher_cu_seqlens + o_b, mask=m_b, other=0)
        b_there = b_there & (b_start < tl.load(teacher_cu_seqlens + o_b + 1, mask=m_b, other=0))
    return b_there


@triton.jit
def count_present(cu_seqlens, teacher_cu_seqlens, B, BB: tl.constexpr):
    count = 0
    for i in range(0, B, BB):
        count += tl.sum(present(cu_seqlens, teacher_cu_seqlens, i + tl.arange(0, BB), B).to(tl.int32), 0)
    return tl.cast(count, tl.float32)


@triton.jit(do_not_specialize=["B"])
def distillation_sequence_kernel(
    mean, weight, cu_seqlens, teacher_mean, teacher_weight, teacher_cu_seqlens, grad_pooled, sums, B,
    sequence_weight, beta,
    D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, KIND: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """One sentence: its row of sums [B, 4] (loss, cosine, |x| − |t|, 1 or all zero), and of grad_pooled [B, D]."""
    i_b = tl.program_id(0)
    there = present(cu_seqlens, teacher_cu_seqlens, i_b, B)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_there = o_d < tl.where(there, D, 0)
    o_row = i_b.to(tl.int64) * D + o_d
    b_x = gained(tl.load(mean + o_row, mask=m_there, other=0.0), weight, o_d, m_d)
    b_t = gained(tl.load(teacher_mean + o_row, mask=m_there, other=0.0).to(tl.float32), teacher_weight, o_d, m_d)
    beta = tl.cast(beta, tl.float32)
    loss, cos, x_norm, t_norm = compare(b_x, b_t, beta, D, KIND)
    tl.store(sums + 4 * i_b, tl.where(there, loss, 0.0))
    tl.store(sums + 4 * i_b + 1, cos)
    tl.store(sums + 4 * i_b + 2, x_norm - t_norm)
    tl.store(sums + 4 * i_b + 3, there.to(tl.float32))
    scale = tl.cast(sequence_weight, tl.float32)
    if MEAN:
        scale = scale / tl.maximum(count_present(cu_seqlens, teacher_cu_seqlens, B, BB), 1.0)
    tl.store(grad_pooled + o_row, scale * gradient(b_x, b_t, beta, D, KIND), mask=m_d)


@triton.jit(do_not_specialize=["B"])
def distillation_variance_kernel(
    mean, weight, cu_seqlens, teacher_mean, teacher_weight, teacher_cu_seqlens, sums, B,
    D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Some columns of the pooled vectors: Σ (x − t)², Σ (t − mean t)², Σ (x − mean x)²; sums [programs, 3]."""
    i = tl.program_id(0)
    o_d = (i * BC + tl.arange(0, BC))[None, :]
    m_d = o_d < D
    count = tl.maximum(count_present(cu_seqlens, teacher_cu_seqlens, B, BB), 1.0)
    b_x_sum = tl.zeros([BR, BC], dtype=tl.float32)
    b_t_sum = tl.zeros([BR, BC], dtype=tl.float32)
    b_error = tl.zeros([BR, BC], dtype=tl.float32)
    for i_b in range(0, B, BR):
        o_b = i_b + tl.arange(0, BR)
        mask = present(cu_seqlens, teacher_cu_seqlens, o_b, B)[:, None] & m_d
        o_row = o_b.to(tl.int64)[:, None] * D + o_d
        b_x = gained(tl.load(mean + o_row, mask=mask, other=0.0), weight, o_d, m_d)
        b_t = gained(tl.load(teacher_mean + o_row, mask=mask, other=0.0).to(tl.float32), teacher_weight, o_d, m_d)
        b_x_sum += b_x
        b_t_sum += b_t
        b_error += (b_x - b_t) * (b_x - b_t)
    b_x_mean = tl.div_rn(tl.sum(b_x_sum, 0), count)[None, :]
    b_t_mean = tl.div_rn(tl.sum(b_t_sum, 0), count)[None, :]
    b_x_squares = tl.zeros([BR, BC], dtype=tl.float32)
    b_t_squares = tl.zeros([BR, BC], dtype=tl.float32)
    for i_b in range(0, B, BR):
        o_b = i_b + tl.arange(0, BR)
        mask = present(cu_seqlens, teacher_cu_seqlens, o_b, B)[:, None] & m_d
        o_row = o_b.to(tl.int64)[:, None] * D + o_d
        b_x = gained(tl.load(mean + o_row, mask=mask, other=0.0), weight, o_d, m_d) - b_x_mean
        b_t = gained(tl.load(teacher_mean + o_row, mask=mask, other=0.0).to(tl.float32), teacher_weight, o_d, m_d)
        b_x_squares += tl.where(mask, b_x * b_x, 0.0)
        b_t_squares += tl.where(mask, (b_t - b_t_mean) * (b_t - b_t_mean), 0.0)
    tl.store(sums + 3 * i, tl.sum(tl.sum(b_error, 1), 0))
    tl.store(sums + 3 * i + 1, tl.sum(tl.sum(b_t_squares, 1), 0))
    tl.store(sums + 3 * i + 2, tl.sum(tl.sum(b_x_squares, 1), 0))


@triton.jit(do_not_specialize=["S"])
def distillation_span_kernel(
    h, weight, indices, offsets, teacher, teacher_weight, teacher_indices, teacher_offsets, sums,
    stride_h, stride_teacher, S, eps, teacher_eps, beta,
    D: tl.constexpr, BD: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Every so manieth span: Σ loss, Σ cosine, Σ (|x| − |t|), how many have tokens on both sides; sums [programs, 4]"""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    beta = tl.cast(beta, tl.float32)
    loss_sum, cos_sum, difference_sum, count = 0.0, 0.0, 0.0, 0.0
    for i_s in range(tl.program_id(0), S, tl.num_programs(0)):
        start, stop = tl.load(offsets + i_s), tl.load(offsets + i_s + 1)
        t_start, t_stop = teacher_range(teacher_offsets, i_s)
        if (start < stop) & (t_start < t_stop):
            b_x = bag(h, weight, indices, start, stop, stride_h, eps, o_d, m_d, D, BD)
            b_t = teacher_bag(
                teacher, teacher_weight, teacher_indices, t_start, t_stop, stride_teacher, teacher_eps, o_d, m_d, D, BD
            )
            loss, cos, x_norm, t_norm = compare(b_x, b_t, beta, D, KIND)
            loss_sum += loss
            cos_sum += cos
            difference_sum += x_norm - t_norm
            count += 1.0
    p_sums = sums + 4 * tl.program_id(0)
    tl.store(p_sums, loss_sum)
    tl.store(p_sums + 1, cos_sum)
    tl.store(p_sums + 2, difference_sum)
    tl.store(p_sums + 3, count)


@triton.jit
def column_sum(sums, i_column, rows, WIDTH: tl.constexpr, BR: tl.constexpr):
    """The sum of one column of sums [rows, WIDTH], in a fixed order."""
    b_sum = tl.zeros([BR], dtype=tl.float32)
    for i in range(0, rows, BR):
        o_row = i + tl.arange(0, BR)
        b_sum += tl.load(sums + o_row * WIDTH + i_column, mask=o_row < rows, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def unexplained(error, variance):
    return tl.where(error == 0, 0.0, error / tl.where(error == 0, 1.0, variance))


@triton.jit(do_not_specialize=["B", "V", "G"])
def distillation_figures_kernel(
    sequence_sums, variance_sums, span_sums, loss, figures, span_scale, B, V, G, sequence_weight, span_weight,
    MEAN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program: everything of size one, from sums [B, 4], [V, 3] and [G, 4]."""
    n = column_sum(sequence_sums, 3, B, 4, BR)
    n_span = column_sum(span_sums, 3, G, 4, BR)
    divisor, span_divisor = 1.0, 1.0
    if MEAN:
        divisor, span_divisor = tl.maximum(n, 1.0), tl.maximum(n_span, 1.0)
    sequence_loss = column_sum(sequence_sums, 0, B, 4, BR) / divisor
    span_loss = column_sum(span_sums, 0, G, 4, BR) / span_divisor
    error = column_sum(variance_sums, 0, V, 3, BR)
    tl.store(figures, sequence_loss)
    tl.store(figures + 1, span_loss)
    tl.store(figures + 2, unexplained(error, column_sum(variance_sums, 1, V, 3, BR)))
    tl.store(figures + 3, unexplained(error, column_sum(variance_sums, 2, V, 3, BR)))
    for i in tl.static_range(2):
        tl.store(figures + 4 + i, column_sum(sequence_sums, 1 + i, B, 4, BR) / tl.maximum(n, 1.0))
        tl.store(figures + 6 + i, column_sum(span_sums, 1 + i, G, 4, BR) / tl.maximum(n_span, 1.0))
    span_weight = tl.cast(span_weight, tl.float32)
    tl.store(loss, tl.cast(sequence_weight, tl.float32) * sequence_loss + span_weight * span_loss)
    tl.store(span_scale, span_weight / span_divisor)


@triton.jit(do_not_specialize=["T", "B", "chunk"])
def distillation_bwd_kernel(
    grad_loss, span_scale, grad_pooled, h, weight, cu_seqlens, indices, offsets, token_offsets, token_spans,
    teacher, teacher_weight, teacher_indices, teacher_offsets, grad_h, grad_weight,
    stride_h, stride_teacher, T, B, chunk, eps, teacher_eps, beta,
    D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One chunk of a sentence: its rows of dh [T, D], and Σ_t dy_t ⊙ x̂_t, its row of grad_weight [slots, D].

    dy_t = r_t grad_pooled[b] + Σ over the token's spans of the gradient of l(x_s, t_s) in the token's share of x_s,
    dh_t = rstd_t (g − x̂_t mean(g ⊙ x̂_t)) with g = weight ⊙ dy_t, or dy_t where the states are normed already.
    """
    i_b, start, stop, i_chunk = find_chunk(cu_seqlens, tl.program_id(0), T, B, chunk, BB)
    first = start + i_chunk * chunk
    last = tl.minimum(first + chunk, stop)
    # The tail after the last sentence has no gradient: nothing is read, zeros are written.
    last_read = tl.where(i_b < B, last, first)

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    beta = tl.cast(beta, tl.float32)
    scale = tl.load(grad_loss).to(tl.float32)
    b_zero = tl.zeros([BD], dtype=tl.float32)
    share = scale / tl.maximum(stop - start, 1).to(tl.float32)
    if token_offsets is not None:
        scale *= tl.load(span_scale)
    b_grad_weight = b_zero
    for i in range(first, last_read):
        i_t = tl.cast(i, tl.int64)
        b_x_hat = tl.load(h + i_t * stride_h + o_d, mask=m_d, other=0.0).to(tl.float32)
        rstd = 1.0
        if weight is not None:
            rstd = rstd_of(b_x_hat, eps, D)
            b_x_hat *= rstd
        # Again for each token: it comes from the L1 cache, and registers are scarce.
        b_dy = share * tl.load(grad_pooled + i_b.to(tl.int64) * D + o_d, mask=m_d, other=0.0)
        if token_offsets is not None:
            for i_k in range(tl.load(token_offsets + i_t), tl.load(token_offsets + i_t + 1)):
                i_s = tl.load(token_spans + i_k)
                s_start, s_stop = tl.load(offsets + i_s), tl.load(offsets + i_s + 1)
                t_start, t_stop = teacher_range(teacher_offsets, i_s)
                if t_start < t_stop:
                    if s_stop - s_start == 1:  # this token alone: its row is here already
                        b_x = gained(b_x_hat, weight, o_d, m_d)
                    else:
                        b_x = bag(h, weight, indices, s_start, s_stop, stride_h, eps, o_d, m_d, D, BD)
                    b_t = teacher_bag(
                        teacher, teacher_weight, teacher_indices, t_start, t_stop, stride_teacher, teacher_eps,
                        o_d, m_d, D, BD,
                    )  # fmt: skip
                    b_dy += scale / (s_stop - s_start).to(tl.float32) * gradient(b_x, b_t, beta, D, KIND)
        if grad_weight is not None:
            b_grad_weight += b_dy * b_x_hat
        b_grad = gained(b_dy, weight, o_d, m_d)
        if weight is not None:
            b_grad = rstd * (b_grad - b_x_hat * (tl.sum(b_grad * b_x_hat, 0) / D))
        tl.store(grad_h + i_t * D + o_d, b_grad.to(grad_h.dtype.element_ty), mask=m_d)
    for i in range(last_read, last):
        tl.store(grad_h + tl.cast(i, tl.int64) * D + o_d, b_zero.to(grad_h.dtype.element_ty), mask=m_d)
    if grad_weight is not None:
        tl.store(grad_weight + tl.program_id(0).to(tl.int64) * D + o_d, b_grad_weight, mask=m_d)


def blocks(width: int, elements: int = 16) -> dict[str, int]:
    """The row in registers, so many elements a thread; fixed by D alone, so that no batch compiles anything new."""
    width_block = triton.next_power_of_2(width)
    return {"BD": width_block, "num_warps": max(1, min(16, width_block // (32 * elements))), **PINNED}


def span_blocks(width: int) -> dict[str, int]:
    return blocks(width, elements=8)  # with 16, some spill on sm_80


def forward(student: Side, teacher: Side | Vectors, spans: Spans | None, options: Options) -> Forward:
    D, B = student.states.shape[1], student.cu_seqlens.shape[0] - 1
    S = 0 if spans is None else spans.offsets.shape[0] - 1
    G, V = min(S, SPAN_PROGRAMS), triton.cdiv(D, VARIANCE_BLOCKS["BC"])
    loss, figures, grad_pooled, span_scale, sequence_sums, variance_sums, span_sums = (
        torch.empty(shape, dtype=torch.float32, device=student.states.device)
        for shape in ((), (len(FIGURES),), (B, D), (), (B, 4), (V, 3), (G, 4))
    )
    sequence_weight, span_weight = float(options.sequence_weight), 0.0 if spans is None else float(options.span_weight)
    beta, mean = float(options.beta), options.reduction == "mean"
    pooled = _pooled(student)[0], student.weight, student.cu_seqlens, *_pooled(teacher)
    with guard(student.states):
        if B:
            distillation_sequence_kernel[(B,)](
                *pooled, grad_pooled, sequence_sums, B, sequence_weight, beta,
                D=D, BB=SENTENCES, KIND=options.kind, MEAN=mean, **blocks(D),
            )  # fmt: skip
        distillation_variance_kernel[(V,)](*pooled, variance_sums, B, D=D, BB=SENTENCES, **VARIANCE_BLOCKS)
        if G:
            assert spans is not None
            distillation_span_kernel[(G,)](
                student.states, student.weight, spans.indices, spans.offsets, **_teacher_of_spans(teacher, spans),
                sums=span_sums, stride_h=student.states.stride(0), S=S, eps=float(student.eps), beta=beta,
                D=D, KIND=options.kind, **span_blocks(D),
            )  # fmt: skip
        distillation_figures_kernel[(1,)](
            sequence_sums, variance_sums, span_sums, loss, figures, span_scale, B, V, G, sequence_weight, span_weight,
            MEAN=mean, **FIGURES_BLOCKS,
        )  # fmt: skip
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
    """(dh [T, D] in the states' dtype, dweight [D] fp32)"""
    h, weight, eps, cu_seqlens = student
    (T, D), B = h.shape, cu_seqlens.shape[0] - 1
    grad_hidden = h.new_empty(T, D)
    chunk = chunk_tokens(T, B)
    slots = num_slots(T, B, chunk) if T else 0
    shape = slots, D
    grad_weight = (
        torch.empty(shape, dtype=torch.float32, device=h.device) if needs_weight and weight is not None else None
    )
    indices, offsets = (None, None) if spans is None else (spans.indices, spans.offsets)
    token_offsets, token_spans = (None, None) if spans_of_tokens is None else spans_of_tokens
    if slots:
        with guard(h):
            distillation_bwd_kernel[(slots,)](
                grad_loss, saved.span_scale, saved.grad_pooled, h, weight, cu_seqlens, indices, offsets, token_offsets,
                token_spans, **_teacher_of_spans(teacher, spans), grad_h=grad_hidden, grad_weight=grad_weight,
                stride_h=h.stride(0), T=T, B=B, chunk=chunk, eps=float(eps), beta=float(options.beta),
                D=D, BB=SENTENCES, KIND=options.kind, **blocks(D),
            )  # fmt: skip
    return grad_hidden, None if grad_weight is None else grad_weight.sum(0)


def _pooled(side: Side | Vectors) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(means of sentences [B, D], the gain they lack, where their tokens are)"""
    if isinstance(side, Vectors):
        return side.pooled, None, None
    eps = None if side.weight is None else float(side.eps)
    return pool(side.states, side.cu_seqlens, eps), side.weight, side.cu_seqlens


def _teacher_of_spans(teacher: Side | Vectors, spans: Spans | None) -> dict[str, Tensor | float | None]:
    """What the kernels that go through spans are told of the teacher: its states, or its vectors with stride D."""
    names = ("teacher", "teacher_weight", "teacher_indices", "teacher_offsets", "stride_teacher", "teacher_eps")
    if spans is None:
        values: tuple[Tensor | float | None, ...] = (None, None, None, None, 0, 0.0)
    elif isinstance(teacher, Vectors):
        assert teacher.spans is not None
        values = (teacher.spans, None, None, None, teacher.spans.shape[1], 0.0)
    else:
        states, weight, eps, _ = teacher
        values = (states, weight, spans.teacher_indices, spans.teacher_offsets, states.stride(0), float(eps))
    return dict(zip(names, values, strict=True))


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models with each dtype, kind and form of the teacher."""
    return [
        *_row_cases(4096, "bf16", "mse"),
        *_row_cases(2048, "fp16", "smooth_l1"),
        *_row_cases(1024, "fp32", "cosine"),
        *_row_cases(4096, "bf16", "cosine"),
        *_row_cases(4096, "bf16", "mse", weight=None),
        *_row_cases(4096, "bf16", "mse", **dict.fromkeys(("teacher_weight", "teacher_indices", "teacher_offsets"))),
        _case(distillation_bwd_kernel, "bf16", D=4096, BB=SENTENCES, KIND="mse", token_offsets=None, **blocks(4096)),
        _case(distillation_variance_kernel, "bf16", D=4096, BB=SENTENCES, **VARIANCE_BLOCKS),
        _case(distillation_figures_kernel, "bf16", MEAN=True, **FIGURES_BLOCKS)._replace(wide_loads=False),
    ]


def _row_cases(D: int, dtype: str, kind: str, **absent: None) -> list[TritonCase]:
    constants = {"D": D, "KIND": kind, **absent}
    no_grad_weight = {"grad_weight": None} if "weight" in absent else {}
    return [
        _case(distillation_sequence_kernel, dtype, BB=SENTENCES, MEAN=True, **constants, **blocks(D)),
        _case(distillation_span_kernel, dtype, **constants, **span_blocks(D)),
        _case(distillation_bwd_kernel, dtype, BB=SENTENCES, **constants, **blocks(D), **no_grad_weight),
    ]


def _case(kernel, dtype: str, **constants) -> TritonCase:
    types = {
        **dict.fromkeys(("h", "weight", "teacher", "teacher_weight", "grad_h"), f"*{dtype}"),
        **dict.fromkeys(("cu_seqlens", "teacher_cu_seqlens"), "*i32"),
        **dict.fromkeys(("stride_h", "stride_teacher", "T", "B", "S", "V", "G", "chunk"), "i32"),
        **dict.fromkeys(("eps", "teacher_eps", "beta", "sequence_weight", "span_weight"), "fp32"),
    }
    for name in kernel.arg_names:
        whole = name.endswith(("indices", "offsets")) or name == "token_spans"
        types.setdefault(name, "*i64" if whole else "*fp32")
    name = f"{kernel.__name__} {dtype} {constants}"
    strides = tuple(name for name in ("stride_h", "stride_teacher") if name in kernel.arg_names)
    registers = 152 if (kernel is distillation_bwd_kernel and dtype == "fp32") else 128
    return TritonCase(name, kernel, types, constants, multiples_of_16=strides, max_registers=registers)
