"""Triton kernel of ``quantize_rows``, and the function of a block of rows for kernels that have them in registers.

Floor at 4.3 TB/s for T=16384, K=4096, bf16 (derived, not yet measured): reads x and writes q, 201 MB, 47 µs; fused into
a kernel that has just computed x it is the write of q alone, 67 MB instead of that kernel's 134 MB in bf16.

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


@triton.jit
def quantized_block(b_x, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """``b_x`` ``[BT, BK]`` float32, 0 where there is no value -> (``b_x / scale`` to be cast to e4m3, scale ``[BT]``).

    Pass ``LARGEST`` and ``SMALLEST`` of ``e4m3.py``. Within [-448, 448] up to rounding, so the cast saturates nothing.
    """
    # The maximum drops NaN; the sum of zeros is NaN where the row holds NaN or an infinity.
    b_largest = tl.maximum(tl.max(tl.abs(b_x), 1), SMALLEST) + tl.sum(b_x * 0.0, 1)
    b_scale = b_largest * (1.0 / LARGEST)
    return b_x * tl.div_rn(tl.full(b_scale.shape, 1.0, tl.float32), b_scale)[:, None], b_scale


@triton.jit(do_not_specialize=["T"])
def quantize_rows_kernel(
    x, q, scale, stride_x, T,
    K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """BT whole rows: read once, written once."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < T
    mask = m_t[:, None] & (o_k < K)[None, :]
    # rows in int64: T * K passes 2^31
    o_row = o_t.to(tl.int64)[:, None]
    b_x = tl.load(x + o_row * stride_x + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    b_q, b_scale = quantized_block(b_x, LARGEST, SMALLEST)
    tl.store(q + o_row * K + o_k[None, :], b_q.to(q.dtype.element_ty), mask=mask)
    tl.store(scale + o_t, b_scale, mask=m_t)


def blocks(width: int) -> dict[str, int | float]:
    """Block sizes and warps for a row width: fixed by K alone, so that no batch compiles anything new."""
    width_block = triton.next_power_of_2(width)
    rows = max(1, TILE // width_block)
    warps = min(16, max(4, width_block // 1024))
    return {"BK": width_block, "BT": rows, "num_warps": warps, "LARGEST": LARGEST, "SMALLEST": SMALLEST, **PINNED}


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q [T, K] float8_e4m3fn, scale [T, 1] float32)"""
    T, K = x.shape
    q = torch.empty(T, K, dtype=E4M3, device=x.device)
    scale = torch.empty(T, 1, dtype=torch.float32, device=x.device)
    if T:
        shape = blocks(K)
        with guard(x):
            quantize_rows_kernel[(triton.cdiv(T, shape["BT"]),)](x, q, scale, x.stride(0), T, K=K, **shape)
    return q, scale


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models and an odd one, each dtype."""
    return [_case(*case) for case in ((4096, "bf16"), (14336, "bf16"), (1024, "fp32"), (2000, "fp16"))]


def _case(K: int, dtype: str) -> TritonCase:
    types = {"x": f"*{dtype}", "q": "*fp8e4nv", "scale": "*fp32", "stride_x": "i32", "T": "i32"}
    constants = {"K": K, **blocks(K)}
    name = f"quantize_rows_kernel {dtype} {constants}"
    return TritonCase(
        name, quantize_rows_kernel, types, constants, multiples_of_16=("stride_x",), max_registers=96, min_arch=89
    )
