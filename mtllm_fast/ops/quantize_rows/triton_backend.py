"""Triton kernel of ``quantize_rows``: whole rows in registers, so that a norm or a gate before costs no pass.

Floors at 4.3 TB/s for T=16384, bf16 (derived, not yet measured). K=4096: reads x and writes q, 201 MB, 47 µs, alone and
with the norm (which alone would be 268 MB before it); with a residual two reads, two writes, 470 MB, 109 µs (537 MB
before it). K=14336, gated: reads gate and up, writes q, 1174 MB, 273 µs (1409 + 705 MB in two passes).

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard
from mtllm_fast.ops.quantize_rows.e4m3 import E4M3, LARGEST, SMALLEST

TILE = 4096  # elements per program, or one row
PINNED = {"enable_fp_fusion": True}


@triton.jit(do_not_specialize=["T"])
def quantize_rows_kernel(
    x, norm_weight, residual, q, scale, summed, stride_x, stride_residual, T, eps, K: tl.constexpr,
    GATED: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """BT whole rows: read once, written once. What precedes the rounding is that of the kernels of ``rms_norm`` and
    ``swiglu``, rounded to the dtype of x as theirs."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < T
    mask = m_t[:, None] & (o_k < K)[None, :]
    # rows in int64: T * K passes 2^31
    o_row = o_t.to(tl.int64)[:, None]
    p_x = x + o_row * stride_x + o_k[None, :]
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        b_up = tl.load(p_x + K, mask=mask, other=0.0).to(tl.float32)
        b_x = (b_x * tl.sigmoid(b_x) * b_up).to(x.dtype.element_ty).to(tl.float32)
    if residual is not None:
        p_residual = residual + o_row * stride_residual + o_k[None, :]
        b_x += tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
        b_sum = b_x.to(x.dtype.element_ty)
        tl.store(summed + o_row * K + o_k[None, :], b_sum, mask=mask)
        b_x = b_sum.to(tl.float32)
    if norm_weight is not None:
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / K + tl.cast(eps, tl.float32))
        b_w = tl.load(norm_weight + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_x = (b_x * b_rstd[:, None] * b_w[None, :]).to(x.dtype.element_ty).to(tl.float32)
    # The maximum drops NaN; the sum of zeros is NaN where the row holds NaN or an infinity.
    b_largest = tl.maximum(tl.max(tl.abs(b_x), 1), SMALLEST) + tl.sum(b_x * 0.0, 1)
    b_scale = b_largest * (1.0 / LARGEST)
    b_q = b_x * tl.div_rn(tl.full(b_scale.shape, 1.0, tl.float32), b_scale)[:, None]  # within ±448: nothing saturates
    tl.store(q + o_row * K + o_k[None, :], b_q.to(q.dtype.element_ty), mask=mask)
    tl.store(scale + o_t, b_scale, mask=m_t)


def blocks(width: int) -> dict[str, int | float]:
    """Block sizes and warps for a row width: fixed by K alone, so that no batch compiles anything new."""
    width_block = triton.next_power_of_2(width)
    rows = max(1, TILE // width_block)
    warps = min(16, max(4, width_block // 1024))
    return {"BK": width_block, "BT": rows, "num_warps": warps, "LARGEST": LARGEST, "SMALLEST": SMALLEST, **PINNED}


def quantize(
    x: Tensor, norm_weight: Tensor | None, residual: Tensor | None, eps: float, gated: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q [T, K] float8_e4m3fn, scale [T, 1] float32, x + residual [T, K] or None)"""
    T, K = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    q = torch.empty(T, K, dtype=E4M3, device=x.device)
    scale = torch.empty(T, 1, dtype=torch.float32, device=x.device)
    summed = None if residual is None else torch.empty(T, K, dtype=x.dtype, device=x.device)
    if T:
        shape = blocks(K)
        with guard(x):
            quantize_rows_kernel[(triton.cdiv(T, shape["BT"]),)](
                x, norm_weight, residual, q, scale, summed, x.stride(0), 0 if residual is None else residual.stride(0),
                T, eps, K=K, GATED=gated, **shape,
            )  # fmt: skip
    return q, scale, summed


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models and an odd one, each dtype, what may come before."""
    return [
        *(_case(*case) for case in ((4096, "bf16"), (14336, "bf16"), (1024, "fp32"), (2000, "fp16"))),
        *(
            _case(K, "bf16", *before)
            for K in (4096, 8192)
            for before in (("norm_weight",), ("norm_weight", "residual"))
        ),
        *(_case(K, "bf16", gated=True) for K in (4864, 14336)),
    ]


def _case(K: int, dtype: str, *before: str, gated: bool = False) -> TritonCase:
    strides = ("stride_x", *(("stride_residual",) if "residual" in before else ()))
    types = {
        **dict.fromkeys(("x", "norm_weight", "residual", "summed"), f"*{dtype}"),
        "q": "*fp8e4nv", "scale": "*fp32", "stride_x": "i32", "stride_residual": "i32", "T": "i32", "eps": "fp32",
    }  # fmt: skip
    absent = {name: None for name in ("norm_weight", "residual") if name not in before}
    absent |= {"summed": None} if "residual" in absent else {}
    constants = {"K": K, "GATED": gated, **blocks(K), **absent}
    name, registers = f"quantize_rows_kernel {dtype} {constants}", 128 if gated or before else 96
    return TritonCase(name, quantize_rows_kernel, types, constants, strides, registers, min_arch=89)
