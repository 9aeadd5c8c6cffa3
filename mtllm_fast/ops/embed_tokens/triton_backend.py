"""The Triton kernel of ``embed_tokens``: a program gathers a few tokens' rows of both matrices and writes their sum.

Floor at 4.3 TB/s for T=16384, d=1024, bf16: one row of the weight is read and one written per token, 67 MB, 16 µs
(H200: 17); the table's few rows come from the L2 cache (512 positions in fp32: 2 MB, 0.5 µs).

Names: ``o_`` offsets, ``m_`` mask, ``b_`` a block of values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard

TILE = 4096  # elements of a block of rows
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results


@triton.jit(do_not_specialize=["T", "V", "P", "offset"])
def embed_tokens_kernel(
    input_ids, weight, position_ids, table, out, T, V, P, scale, offset,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = scale weight[input_ids] + table[position_ids + offset]; NaN where either row does not exist."""
    # Rows in int64: V * D and T * D pass 2^31
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_d = o_d < D
    b_id = tl.load(input_ids + o_t, mask=m_t, other=0).to(tl.int64)
    b_row = tl.load(position_ids + o_t, mask=m_t, other=0).to(tl.int64) + offset
    m_there = m_t & (b_id >= 0) & (b_id < V) & (b_row >= 0) & (b_row < P)
    m = m_there[:, None] & m_d[None, :]
    # weight, table [BT, BD]
    b_weight = tl.load(weight + b_id[:, None] * D + o_d[None, :], mask=m, other=float("nan")).to(tl.float32)
    b_table = tl.load(table + b_row[:, None] * D + o_d[None, :], mask=m, other=float("nan")).to(tl.float32)
    b_out = b_weight * tl.cast(scale, tl.float32) + b_table
    tl.store(out + o_t[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


def blocks(width: int) -> dict[str, int]:
    """Block sizes and warps for a row width: fixed by d alone, so that no batch compiles anything new."""
    width_block = triton.next_power_of_2(width)
    rows = max(1, TILE // width_block)
    return {"BD": width_block, "BT": rows, "num_warps": rows * width_block // 1024, **PINNED}


def forward(
    input_ids: Tensor, weight: Tensor, position_ids: Tensor, table: Tensor, scale: float, offset: int
) -> Tensor:
    """[T, d]"""
    T, (V, D) = input_ids.shape[0], weight.shape
    out = weight.new_empty(T, D)
    if T:
        shape = blocks(D)
        with guard(weight):
            embed_tokens_kernel[(triton.cdiv(T, shape["BT"]),)](
                input_ids, weight, position_ids, table, out, T, V, table.shape[0], float(scale), offset, D=D, **shape
            )
    return out


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models and an odd one, dtypes of weight and table."""
    shapes = ((1024, "bf16", "fp32"), (1024, "bf16", "bf16"), (2048, "fp16", "fp16"), (768, "fp32", "fp32"))
    return [_case(*shape) for shape in (*shapes, (16384, "bf16", "fp32"))]


def _case(D: int, dtype: str, table_dtype: str) -> TritonCase:
    constants = {"D": D, **blocks(D)}
    types = {
        **dict.fromkeys(("input_ids", "position_ids"), "*i64"),
        **dict.fromkeys(("weight", "out"), f"*{dtype}"),
        "table": f"*{table_dtype}",
        **dict.fromkeys(("T", "V", "P", "offset"), "i32"),
        "scale": "fp32",
    }
    name = f"{embed_tokens_kernel.__name__} {dtype} {table_dtype} {constants}"
    return TritonCase(name, embed_tokens_kernel, types, constants, max_registers=96)
