"""Triton kernels of ``bias_relu``: each element is read once and written once.

Floors at 4.3 TB/s for T=16384, bf16: forward reads x and writes y, 268 MB, 62 µs for F=4096 (H200: 65)
and 125 µs for F=8192; backward reads y and its gradient and writes dx, 403 MB, 94 µs and 187 µs. Partial sums of the
bias's gradient add at most 256 · F · 4 bytes, written and read.

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``b_`` a block of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard

TILE = 4096  # elements of a block
COLUMNS = 1024  # of a block, at most
PARTIALS = 256  # programs per block of columns that sum the bias's gradient
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results


@triton.jit(do_not_specialize=["T"])
def bias_relu_fwd_kernel(x, bias, y, stride_x, T, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """y = where(x + bias < 0, 0, x + bias), which keeps NaN; bias may be None."""
    # Neighbouring programs take neighbouring columns.
    n_f: tl.constexpr = (F + BF - 1) // BF
    i_t, i_f = tl.program_id(0) // n_f, tl.program_id(0) % n_f
    # Rows in int64: T * F passes 2^31
    o_t = i_t.to(tl.int64) * BT + tl.arange(0, BT)
    o_f = i_f * BF + tl.arange(0, BF)
    m_f = o_f < F
    m = (o_t < T)[:, None] & m_f[None, :]
    # x [BT, BF]
    b_y = tl.load(x + o_t[:, None] * stride_x + o_f[None, :], mask=m, other=0.0).to(tl.float32)
    if bias is not None:
        b_y += tl.load(bias + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    b_y = tl.where(b_y < 0.0, 0.0, b_y)
    tl.store(y + o_t[:, None] * F + o_f[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T", "chunk"])
def bias_relu_bwd_kernel(grad, y, grad_x, grad_bias, T, chunk, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """dx = where(y <= 0, 0, grad) of ``chunk`` rows, and their partial sum [programs, F] unless grad_bias is None."""
    n_f: tl.constexpr = (F + BF - 1) // BF
    i_t, i_f = tl.program_id(0) // n_f, tl.program_id(0) % n_f
    first = i_t.to(tl.int64) * chunk
    last = tl.minimum(first + chunk, T)
    o_f = i_f * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_sum = tl.zeros([BF], dtype=tl.float32)
    for i in range(first, last, BT):
        o_t = i + tl.arange(0, BT)
        m = (o_t < last)[:, None] & m_f[None, :]
        o = o_t[:, None] * F + o_f[None, :]
        # y, grad [BT, BF]
        b_y = tl.load(y + o, mask=m, other=0.0)
        b_grad = tl.load(grad + o, mask=m, other=0.0)
        b_grad = tl.where(b_y <= 0.0, 0.0, b_grad.to(tl.float32))
        tl.store(grad_x + o, b_grad.to(grad_x.dtype.element_ty), mask=m)
        if grad_bias is not None:
            b_sum += tl.sum(b_grad, 0)
    if grad_bias is not None:
        tl.store(grad_bias + i_t.to(tl.int64) * F + o_f, b_sum, mask=m_f)


def blocks(width: int, num_warps: int = 4) -> dict[str, int]:
    """Block sizes for a width: fixed by F alone, so that no batch compiles anything new."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    return {"BF": columns, "BT": TILE // columns, "num_warps": num_warps, **PINNED}


def backward_blocks(width: int, needs_bias: bool) -> dict[str, int]:
    # Without sums ptxas aims at 32 registers and spills with 4 warps (sm_90); with them, at 48, with 8 (sm_100).
    return blocks(width, num_warps=4 if needs_bias else 8)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """y [T, F]"""
    T, F = x.shape
    y = x.new_empty(T, F)
    if y.numel():
        shape = blocks(F)
        programs = triton.cdiv(T, shape["BT"]) * triton.cdiv(F, shape["BF"])
        with guard(x):
            bias_relu_fwd_kernel[(programs,)](x, bias, y, x.stride(0), T, F=F, **shape)
    return y


def backward(grad: Tensor, y: Tensor, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(dx [T, F], dbias [F] fp32)"""
    T, F = y.shape
    grad_x = y.new_empty(T, F)
    shape = backward_blocks(F, needs_bias)
    chunk = shape["BT"] * (triton.cdiv(T, shape["BT"] * PARTIALS) if needs_bias else 1)
    chunks = triton.cdiv(T, chunk) if T else 0
    grad_bias = y.new_empty(chunks, F, dtype=torch.float32) if needs_bias else None
    if y.numel():
        programs = chunks * triton.cdiv(F, shape["BF"])
        with guard(y):
            bias_relu_bwd_kernel[(programs,)](grad, y, grad_x, grad_bias, T, chunk, F=F, **shape)
    return grad_x, None if grad_bias is None else grad_bias.sum(0)


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models and an odd one, each dtype, with and without."""
    return [
        _case(bias_relu_fwd_kernel, 4096, "bf16"),
        _case(bias_relu_fwd_kernel, 8192, "fp16", bias=None),
        _case(bias_relu_fwd_kernel, 3000, "fp32"),
        _case(bias_relu_bwd_kernel, 4096, "bf16", grad_bias=None),
        _case(bias_relu_bwd_kernel, 8192, "fp16"),
        _case(bias_relu_bwd_kernel, 3000, "fp32"),
    ]


def _case(kernel, F: int, dtype: str, **absent: None) -> TritonCase:
    shape = blocks(F) if kernel is bias_relu_fwd_kernel else backward_blocks(F, "grad_bias" not in absent)
    constants = {"F": F, **shape, **absent}
    types = {
        **dict.fromkeys(kernel.arg_names, f"*{dtype}"),
        "grad_bias": "*fp32",
        **dict.fromkeys(("stride_x", "T", "chunk"), "i32"),
    }
    strides = ("stride_x",) if kernel is bias_relu_fwd_kernel else ()
    name = f"{kernel.__name__} {dtype} {constants}"
    return TritonCase(name, kernel, types, constants, multiples_of_16=strides, max_registers=96)
