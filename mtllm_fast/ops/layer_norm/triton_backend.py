"""Triton kernels of ``layer_norm``: each row is read once, held in registers, and normed about its mean.

Floors at 4.3 TB/s for T=16384, d=1024, bf16, 33.5 MB per ``[T, d]``: norm alone reads h and writes normed, 67 MB,
16 µs; with a residual two are read and two written, 134 MB, 31 µs (H200: 33). Backward reads the sum and the gradient
of normed and writes dx, 101 MB, 23 µs; with the gradient of the sum 134 MB, 31 µs. Partial sums of the parameters'
gradients add at most 2 · 512 · d · 4 bytes, written and read.

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard

TILE = 4096  # elements of a block of rows
PARTIALS = 512  # programs that sum the parameters' gradients: about four per multiprocessor of a large GPU
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results


@triton.jit(do_not_specialize=["T"])
def layer_norm_fwd_kernel(
    x, residual, weight, bias, sum_bias, normed, summed, mean, rstd, stride_x, stride_residual, T, eps,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """normed = (s − mean) rstd weight + bias with s = x + residual; summed = s + sum_bias. Absent pointers are None."""
    # Rows in int64: T * D passes 2^31
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_d = o_d < D
    m = m_t[:, None] & m_d[None, :]
    o_out = o_t[:, None] * D + o_d[None, :]
    # x, residual [BT, BD]
    b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    if residual is not None:
        b_x += tl.load(residual + o_t[:, None] * stride_residual + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    if summed is not None:
        b_summed = b_x
        if sum_bias is not None:
            b_summed += tl.load(sum_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        tl.store(summed + o_out, b_summed.to(summed.dtype.element_ty), mask=m)
    if residual is not None:
        b_x = b_x.to(x.dtype.element_ty).to(tl.float32)  # the sum that is stored, and that the backward reads

    b_mean = tl.sum(b_x, 1) / D
    b_centred = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) / D + tl.cast(eps, tl.float32))
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_b = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_normed = b_centred * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(normed + o_out, b_normed.to(normed.dtype.element_ty), mask=m)
    if mean is not None:
        tl.store(mean + o_t, b_mean, mask=m_t)
        tl.store(rstd + o_t, b_rstd, mask=m_t)


@triton.jit(do_not_specialize=["T", "chunk"])
def layer_norm_bwd_kernel(
    grad_normed, grad_summed, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, stride_x, T, chunk,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g − mean(g) − x̂ mean(g ⊙ x̂)) + grad_summed with g = weight ⊙ grad_normed, for ``chunk`` rows; their
    partial sums of the parameters' gradients [programs, D]. Absent pointers are None."""
    first = tl.program_id(0).to(tl.int64) * chunk
    last = tl.minimum(first + chunk, T)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_grad_weight = tl.zeros([BD], dtype=tl.float32)
    b_grad_bias = tl.zeros([BD], dtype=tl.float32)
    for i_t in range(first, last, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < last
        m = m_t[:, None] & m_d[None, :]
        o_row = o_t[:, None] * D + o_d[None, :]
        # grad_normed, x, grad_summed [BT, BD]; what is masked is zero in every product
        b_grad = tl.load(grad_normed + o_row, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_rstd = tl.load(rstd + o_t, mask=m_t, other=0.0)
        b_x_hat = (b_x - tl.load(mean + o_t, mask=m_t, other=0.0)[:, None]) * b_rstd[:, None]
        if grad_weight is not None:
            b_grad_weight += tl.sum(b_grad * b_x_hat, 0)
            b_grad_bias += tl.sum(b_grad, 0)
        if grad_x is not None:
            b_grad *= b_w[None, :]
            b_along = tl.sum(b_grad * b_x_hat, 1) / D
            b_level = tl.sum(b_grad, 1) / D
            b_grad = b_rstd[:, None] * (b_grad - b_level[:, None] - b_x_hat * b_along[:, None])
            if grad_summed is not None:
                b_grad += tl.load(grad_summed + o_row, mask=m, other=0.0).to(tl.float32)
            tl.store(grad_x + o_row, b_grad.to(grad_x.dtype.element_ty), mask=m)
    if grad_weight is not None:
        o_partial = tl.program_id(0).to(tl.int64) * D + o_d
        tl.store(grad_weight + o_partial, b_grad_weight, mask=m_d)
        tl.store(grad_bias + o_partial, b_grad_bias, mask=m_d)


def blocks(width: int, elements: int = 32) -> dict[str, int]:
    """Rows in registers, so many elements a thread: fixed by d alone, so that no batch compiles anything new."""
    width_block = triton.next_power_of_2(width)
    rows = max(1, TILE // width_block)
    return {"BD": width_block, "BT": rows, "num_warps": rows * width_block // (32 * elements), **PINNED}


def backward_blocks(width: int) -> dict[str, int]:
    return blocks(width, elements=16)  # with 32, some are over their budget of registers


def forward(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    sum_bias: Tensor | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(normed [T, d], summed [T, d], mean [T], rstd [T])"""
    T, D = hidden_states.shape
    normed = hidden_states.new_empty(T, D)
    summed = None if residual is None and sum_bias is None else hidden_states.new_empty(T, D)
    mean, rstd = (hidden_states.new_empty(T, dtype=torch.float32) if save else None for _ in range(2))
    if T:
        shape = blocks(D)
        stride_residual = 0 if residual is None else residual.stride(0)
        with guard(hidden_states):
            layer_norm_fwd_kernel[(triton.cdiv(T, shape["BT"]),)](
                hidden_states, residual, weight, bias, sum_bias, normed, summed, mean, rstd,
                hidden_states.stride(0), stride_residual, T, eps, D=D, **shape,
            )  # fmt: skip
    return normed, summed, mean, rstd


def backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    states: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_states: bool,
    needs_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(gradient of the sum [T, d], of weight [d] fp32, of bias [d] fp32)"""
    T, D = states.shape
    shape = backward_blocks(D)
    chunk = shape["BT"] * (triton.cdiv(T, shape["BT"] * PARTIALS) if needs_parameters else 1)
    programs = triton.cdiv(T, chunk) if T else 0
    grad_states = states.new_empty(T, D) if needs_states else None
    partials = (states.new_empty(programs, D, dtype=torch.float32) if needs_parameters else None for _ in range(2))
    grad_weight, grad_bias = partials
    if programs:
        with guard(states):
            layer_norm_bwd_kernel[(programs,)](
                grad_normed, grad_summed, states, mean, rstd, weight, grad_states, grad_weight, grad_bias,
                states.stride(0), T, chunk, D=D, **shape,
            )  # fmt: skip
    if grad_weight is None or grad_bias is None:
        return grad_states, None, None
    return grad_states, grad_weight.sum(0), grad_bias.sum(0)


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models and an odd one, each dtype, with and without."""
    sum_alone = dict.fromkeys(("residual", "mean", "rstd"))
    norm_alone = {**sum_alone, "sum_bias": None, "summed": None}
    frozen = dict.fromkeys(("grad_weight", "grad_bias"))
    return [
        _case(layer_norm_fwd_kernel, 1024, "bf16"),
        _case(layer_norm_fwd_kernel, 1024, "bf16", **sum_alone),
        _case(layer_norm_fwd_kernel, 1024, "bf16", **norm_alone),
        _case(layer_norm_fwd_kernel, 2048, "fp16"),
        _case(layer_norm_fwd_kernel, 768, "fp32", **sum_alone),
        _case(layer_norm_fwd_kernel, 8192, "bf16"),
        _case(layer_norm_bwd_kernel, 1024, "bf16", **frozen),
        _case(layer_norm_bwd_kernel, 1024, "bf16", grad_summed=None, **frozen),
        _case(layer_norm_bwd_kernel, 1024, "bf16"),
        _case(layer_norm_bwd_kernel, 2048, "fp16"),
        _case(layer_norm_bwd_kernel, 768, "fp32"),
        _case(layer_norm_bwd_kernel, 8192, "bf16", **frozen),
    ]


def _case(kernel, D: int, dtype: str, **absent: None) -> TritonCase:
    shape = blocks(D) if kernel is layer_norm_fwd_kernel else backward_blocks(D)
    constants = {"D": D, **shape, **absent}
    types = {
        **dict.fromkeys(kernel.arg_names, f"*{dtype}"),
        **dict.fromkeys(("mean", "rstd", "grad_weight", "grad_bias"), "*fp32"),
        **dict.fromkeys(("stride_x", "stride_residual", "T", "chunk"), "i32"),
        "eps": "fp32",
    }
    strides = tuple(name for name in ("stride_x", "stride_residual") if name in kernel.arg_names)
    name = f"{kernel.__name__} {dtype} {constants}"
    return TritonCase(name, kernel, types, constants, multiples_of_16=strides, max_registers=128)
