"""The Triton kernel of ``rope``: each program takes a few tokens with all their heads, so that tables are read once.

Floors at 4.3 TB/s for T=16384, 32 heads of q and 8 of k, hd=128, bf16: q and k read and written, 20 KB per token
and half of a table's row twice, 340 MB, 79 µs (H200: 81); with v copied 407 MB, 95 µs. The backward is
the same kernel.

Names: ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard

# The number of tokens changes from batch to batch and is a plain run-time number: a new one compiles nothing.
VARYING = ["T"]
TILE = 4096  # elements of q per program
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results


@triton.jit
def rotate_heads(
    x, out, b_cos, b_sin, o_t, m_t, x_stride_t, x_stride_h, out_stride_t,
    H: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BHALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Both halves [BT, BH, BHALF] of the heads of some tokens, rotated or copied; tokens in int64."""
    o_h = tl.arange(0, BH)[None, :, None]
    o_d = tl.arange(0, BHALF)[None, None, :]
    o_t = o_t.to(tl.int64)
    m = m_t & (o_h < H) & (o_d < HALF)
    p_x = x + o_t * x_stride_t + o_h * x_stride_h + o_d
    p_out = out + o_t * out_stride_t + o_h * (2 * HALF) + o_d
    b_a = tl.load(p_x, mask=m, other=0.0)
    b_b = tl.load(p_x + HALF, mask=m, other=0.0)
    if ROTATE:
        b_x, b_y = b_a.to(tl.float32), b_b.to(tl.float32)
        b_a = (b_x * b_cos - b_y * b_sin).to(out.dtype.element_ty)
        b_b = (b_y * b_cos + b_x * b_sin).to(out.dtype.element_ty)
    tl.store(p_out, b_a, mask=m)
    tl.store(p_out + HALF, b_b, mask=m)


@triton.jit(do_not_specialize=VARYING)
def rope_kernel(
    q, k, v, q_out, k_out, v_out, cos, sin, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    q_out_stride_t, k_out_stride_t, v_out_stride_t, T,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BKV: tl.constexpr,
    BHALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """a' = a cos − b sin and b' = b cos + a sin for q and k (with -sin: INVERSE); v, if there is one, is copied."""
    o_t = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None, None]
    o_d = tl.arange(0, BHALF)[None, None, :]
    m_t = o_t < T
    o_table = o_t.to(tl.int64) * (2 * HALF) + o_d
    m_table = m_t & (o_d < HALF)
    b_cos = tl.load(cos + o_table, mask=m_table, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + o_table, mask=m_table, other=0.0).to(tl.float32)
    if INVERSE:
        b_sin = -b_sin
    rotate_heads(q, q_out, b_cos, b_sin, o_t, m_t, q_stride_t, q_stride_h, q_out_stride_t, H, HALF, BH, BHALF, True)
    rotate_heads(k, k_out, b_cos, b_sin, o_t, m_t, k_stride_t, k_stride_h, k_out_stride_t, KV, HALF, BKV, BHALF, True)
    if v is not None:
        rotate_heads(
            v, v_out, b_cos, b_sin, o_t, m_t, v_stride_t, v_stride_h, v_out_stride_t, KV, HALF, BKV, BHALF, False
        )


def blocks(num_heads: int, num_kv_heads: int, half: int) -> dict[str, int]:
    """Block sizes and warps: fixed by the model alone, so that no batch compiles anything new."""
    heads, kv_heads, width = (triton.next_power_of_2(size) for size in (num_heads, num_kv_heads, half))
    tokens = max(1, TILE // (2 * heads * width))
    return {"BT": tokens, "BH": heads, "BKV": kv_heads, "BHALF": width, "num_warps": 4, **PINNED}


def rotate(inputs: list[Tensor], outputs: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """q, k and perhaps v -> the same rotated, v copied; all ``[T, heads, hd]``, heads of an output are adjacent."""
    (T, H, hd), KV = inputs[0].shape, inputs[1].shape[1]
    if T == 0:
        return
    absent = [None] * (3 - len(inputs))
    strides = [stride for x in inputs for stride in x.stride()[:2]] + [0, 0] * len(absent)
    out_strides = [out.stride(0) for out in outputs] + [0] * len(absent)
    sizes = blocks(H, KV, hd // 2)
    with guard(inputs[0]):
        rope_kernel[(triton.cdiv(T, sizes["BT"]),)](
            *inputs, *absent, *outputs, *absent, cos, sin, *strides, *out_strides, T,
            H=H, KV=KV, HALF=hd // 2, INVERSE=inverse, **sizes,
        )  # fmt: skip


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: heads of real models (Llama 8B and 1B, Qwen2 0.5B and 7B), each dtype."""
    return [
        _case(32, 8, 128, "bf16", inverse=True),
        _case(32, 8, 128, "bf16", inverse=False, absent=("v", "v_out")),
        _case(32, 8, 64, "fp16", inverse=False),
        _case(14, 2, 64, "fp32", inverse=True),
        _case(28, 4, 128, "bf16", inverse=False, tables="fp32"),
        _case(64, 8, 128, "bf16", inverse=True),
    ]


def _case(
    H: int, KV: int, hd: int, dtype: str, *, inverse: bool, absent: tuple[str, ...] = (), tables: str | None = None
) -> TritonCase:
    strides = tuple(name for name in rope_kernel.arg_names if "_stride_" in name)
    types = {
        **dict.fromkeys(("q", "k", "v", "q_out", "k_out", "v_out"), f"*{dtype}"),
        **dict.fromkeys(("cos", "sin"), f"*{tables or dtype}"),
        **dict.fromkeys((*strides, *VARYING), "i32"),
    }
    constants: dict[str, Any] = {"H": H, "KV": KV, "HALF": hd // 2, "INVERSE": inverse, **blocks(H, KV, hd // 2)}
    constants |= dict.fromkeys(absent)
    name = f"rope_kernel {dtype} {constants}"
    return TritonCase(name, rope_kernel, types, constants, strides, max_registers=104)
