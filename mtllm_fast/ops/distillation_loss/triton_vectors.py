"""What the Triton kernels of ``distillation_loss`` share: vectors of bags, and what two vectors differ by.

``o_`` offsets, ``m_`` mask, ``b_`` a block of values; a row of D columns is in registers whole, padded to BD.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compare(b_x, b_t, beta, D: tl.constexpr, KIND: tl.constexpr):
    """(l(x, t), cosine, |x|, |t|) of two vectors [BD], zero beyond D; the cosine with a zero vector is 0."""
    x_norm, t_norm = tl.sqrt_rn(tl.sum(b_x * b_x, 0)), tl.sqrt_rn(tl.sum(b_t * b_t, 0))
    product = x_norm * t_norm
    cos = tl.where(product == 0, 0.0, tl.sum(b_x * b_t, 0) / tl.where(product == 0, 1.0, product))
    if KIND == "mse":
        loss = tl.sum((b_x - b_t) * (b_x - b_t), 0) / D
    elif KIND == "smooth_l1":
        b_error = tl.abs(b_x - b_t)
        loss = tl.sum(tl.where(b_error < beta, 0.5 * b_error * b_error / beta, b_error - 0.5 * beta), 0) / D
    else:
        loss = 1.0 - cos
    return loss, cos, x_norm, t_norm


@triton.jit
def gradient(b_x, b_t, beta, D: tl.constexpr, KIND: tl.constexpr):
    """The gradient of l(x, t) in x, [BD]"""
    if KIND == "mse":
        b_grad = (b_x - b_t) * (2.0 / D)
    elif KIND == "smooth_l1":
        # By default min and max turn NaN into a number.
        b_error = tl.maximum(b_x - b_t, -beta, propagate_nan=tl.PropagateNan.ALL)
        b_grad = tl.minimum(b_error, beta, propagate_nan=tl.PropagateNan.ALL) / (beta * D)
    else:
        _, cos, x_norm, t_norm = compare(b_x, b_t, beta, D, KIND)
        there = x_norm * t_norm != 0  # a zero vector has no direction
        x_norm, t_norm = tl.where(there, x_norm, 1.0), tl.where(there, t_norm, 1.0)
        b_grad = tl.where(there, (b_x * (cos / x_norm) - b_t / t_norm) / x_norm, 0.0)
    return b_grad


@triton.jit
def rstd_of(b_h, eps, D: tl.constexpr):
    return tl.rsqrt(tl.sum(b_h * b_h, 0) / D + tl.cast(eps, tl.float32))


@triton.jit
def gained(b_normed, weight, o_d, m_d):
    """weight ⊙ x̂, or x̂ itself where there is no weight."""
    if weight is not None:
        b_normed = b_normed * tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_normed


@triton.jit
def bag(states, weight, indices, start, stop, stride, eps, o_d, m_d, D: tl.constexpr, BD: tl.constexpr):
    """The mean of y over the tokens ``indices[start:stop]``, [BD]; zero where there is none."""
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i in range(start, stop):
        i_t = tl.load(indices + i)  # int64: T * D passes 2^31
        b_h = tl.load(states + i_t * stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        if weight is not None:
            b_h *= rstd_of(b_h, eps, D)
        b_sum += b_h
    return gained(b_sum * (1.0 / tl.maximum(stop - start, 1).to(tl.float32)), weight, o_d, m_d)


@triton.jit
def teacher_range(teacher_offsets, i_s):
    """Where the teacher's tokens of a span start and stop; one row, its own, if the teacher's vectors are known."""
    if teacher_offsets is None:
        start = tl.cast(i_s, tl.int64)
        stop = start + 1
    else:
        start, stop = tl.load(teacher_offsets + i_s), tl.load(teacher_offsets + i_s + 1)
    return start, stop


@triton.jit
def teacher_bag(
    teacher, weight, indices, start, stop, stride, eps, o_d, m_d, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """The teacher's vector of a span, [BD]: row ``start`` if its vectors are known, else made of its tokens."""
    if indices is None:
        b_t = tl.load(teacher + start * stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    else:
        b_t = bag(teacher, weight, indices, start, stop, stride, eps, o_d, m_d, D, BD)
    return b_t
