"""Triton kernels of ``stack_projection``: two products that share their left side, with the rest in their epilogues.

1. x = e W_upᵀ + b, and of each row of a tile the sum of the squares of its float32 accumulators.
2. y = rstd · (e Cᵀ + c) + b_qkv from those sums, norms of q and k, rotation; nothing un-normalised goes to memory.
   C is interleaved (``composite.py``): the columns of a rotary pair are neighbours, so whatever the head size, a tile
   may start anywhere, and the pair lies in one thread.

No atomics, sums in a fixed order. Floors at 790 TFLOP/s and 4.3 TB/s, d=1024, D=4096, N=6144, bf16 (derived, not yet
measured): 20.97 MFLOP and 22 KB a token: T=512 13.6 µs, T=4096 109 µs, T=16384 435 µs; T=32 5 µs, the weights' 21 MB.

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard, triton_is_interpreted

# The number of tokens changes from batch to batch and is a plain run-time number: a new one compiles nothing.
VARYING = ["T"]
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results


@triton.jit
def tile_of(T, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a program's tile: column by column within groups of rows, which stay in the L2 cache."""
    i = tl.program_id(0)
    rows, columns = tl.cdiv(T, BM), tl.cdiv(N, BN)
    first = i // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    return (first + i % size) * BM, (i % (GROUP * columns)) // size * BN


@triton.jit
def product(
    e, weight, residual, i_m, i_n, T, N,
    d: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Accumulators [BM, BN] of e (weight + residual)ᵀ, rows from i_m and columns from i_n on."""
    o_m = (i_m + tl.arange(0, BM)).to(tl.int64)
    o_n = (i_n + tl.arange(0, BN)).to(tl.int64)
    o_k = tl.arange(0, BK)
    p_e = e + o_m[:, None] * d + o_k[None, :]  # e [BM, BK]
    o_w = o_n[None, :] * d + o_k[:, None]  # weightᵀ [BK, BN]
    m_m, m_n = (o_m < T)[:, None], (o_n < N)[None, :]
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, d, BK):
        if d % BK == 0:
            b_e = tl.load(p_e + k, mask=m_m, other=0.0)
            b_w = tl.load(weight + o_w + k, mask=m_n, other=0.0)
        else:
            b_e = tl.load(p_e + k, mask=m_m & (o_k < d - k)[None, :], other=0.0)
            b_w = tl.load(weight + o_w + k, mask=m_n & (o_k < d - k)[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bfloat16
            b_e, b_w = b_e.to(tl.float32), b_w.to(tl.float32)
        b_acc = tl.dot(b_e, b_w, b_acc, input_precision="ieee")
        if residual is not None:
            if d % BK == 0:
                b_r = tl.load(residual + o_w + k, mask=m_n, other=0.0)
            else:
                b_r = tl.load(residual + o_w + k, mask=m_n & (o_k < d - k)[:, None], other=0.0)
            if UPCAST:
                b_r = b_r.to(tl.float32)
            b_acc = tl.dot(b_e, b_r, b_acc, input_precision="ieee")
    return b_acc


@triton.jit(do_not_specialize=VARYING)
def up_projection_kernel(
    e, up_weight, up_bias, x, squares, T,
    d: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """x [T, D] and squares [D / BN, T], the sums of squares of each tile's rows."""
    i_m, i_n = tile_of(T, D, BM, BN, GROUP)
    b_x = product(e, up_weight, None, i_m, i_n, T, D, d, BM, BN, BK, UPCAST)
    o_m, o_n = i_m + tl.arange(0, BM), i_n + tl.arange(0, BN)
    m_m, m_n = o_m < T, o_n < D
    if up_bias is not None:
        b_x += tl.load(up_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(squares + (i_n // BN).to(tl.int64) * T + o_m, tl.sum(b_x * b_x, 1), mask=m_m)
    p_x = x + o_m.to(tl.int64)[:, None] * D + o_n[None, :]
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=VARYING)
def qkv_kernel(
    e, weight, residual, bias, qkv_bias, head_norms, cos, sin, position_ids, squares, qkv, rstd, T, stride_rope, eps,
    d: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ROTATED: tl.constexpr, HD: tl.constexpr, TILES: tl.constexpr,
    BTILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """qkv [T, N] in the order of the heads, and rstd [T]. Columns from ROTATED on are v: neither normed nor rotated."""
    HALF: tl.constexpr = BN // 2
    i_m, i_n = tile_of(T, N, BM, BN, GROUP)
    b_acc = product(e, weight, residual, i_m, i_n, T, N, d, BM, BN, BK, UPCAST)
    o_m, o_n = i_m + tl.arange(0, BM), i_n + tl.arange(0, BN)
    m_m, m_n = o_m < T, o_n < N

    o_tile = tl.arange(0, BTILES)
    # squares [BM, BTILES]
    p_squares = squares + o_tile.to(tl.int64)[None, :] * T + o_m[:, None]
    b_squares = tl.load(p_squares, mask=m_m[:, None] & (o_tile < TILES)[None, :], other=0.0)
    b_rstd = tl.rsqrt(tl.sum(b_squares, 1) / D + tl.cast(eps, tl.float32))
    if i_n == 0:
        tl.store(rstd + o_m, b_rstd, mask=m_m)
    b_y = (b_acc + tl.load(bias + o_n, mask=m_n, other=0.0)[None, :]) * b_rstd[:, None]
    if qkv_bias is not None:
        b_y += tl.load(qkv_bias + o_n, mask=m_n, other=0.0)[None, :]
    if head_norms is not None:
        b_heads = tl.reshape(b_y, [BM, BN // HD, HD])
        b_mean = tl.sum(b_heads * b_heads, 2) / HD
        b_normed = tl.reshape(b_heads * tl.rsqrt(b_mean + tl.cast(eps, tl.float32))[:, :, None], [BM, BN])
        m_rotated = o_n < ROTATED
        b_y = tl.where(
            m_rotated[None, :], b_normed * tl.load(head_norms + o_n, mask=m_rotated, other=0.0)[None, :], b_y
        )

    b_1, b_2 = tl.split(tl.reshape(b_y, [BM, HALF, 2]))
    # Pair i of a head: columns i and i + HD / 2 of it, and of the rotary tables column i.
    o_pair = i_n // 2 + tl.arange(0, HALF)
    o_i = o_pair % (HD // 2)
    o_first = o_pair // (HD // 2) * HD + o_i
    m_out = m_m[:, None] & (o_pair < N // 2)[None, :]
    if cos is not None:
        o_row = o_m.to(tl.int64)
        if position_ids is not None:
            o_row = tl.load(position_ids + o_m, mask=m_m, other=0)
        # cos, sin [BM, HALF]
        p_rope = o_row[:, None] * stride_rope + o_i[None, :]
        m_rope = m_m[:, None] & (o_pair < ROTATED // 2)[None, :]
        b_cos = tl.load(cos + p_rope, mask=m_rope, other=1.0).to(tl.float32)
        b_sin = tl.load(sin + p_rope, mask=m_rope, other=0.0).to(tl.float32)
        b_1, b_2 = b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin
    p_qkv = qkv + o_m.to(tl.int64)[:, None] * N + o_first[None, :]
    tl.store(p_qkv, b_1.to(qkv.dtype.element_ty), mask=m_out)
    tl.store(p_qkv + HD // 2, b_2.to(qkv.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_x, grad_qkv, x, qkv, rstd, qkv_bias, cos, sin, position_ids, grad_hidden, grad_raw, T, stride_rope,
    D: tl.constexpr, N: tl.constexpr, ROTATED: tl.constexpr, HD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One token: draw [N], interleaved, and dx [D]; see ``reference.backward`` for the formulas.

    Reads grad_x, grad_qkv, x and qkv once, writes both gradients once; the rows stay in the cache between the passes.
    """
    i_t = tl.program_id(0).to(tl.int64)
    o_pair = tl.arange(0, BN // 2)
    b_rstd = tl.load(rstd + i_t)
    row = i_t
    if position_ids is not None:
        row = tl.load(position_ids + i_t)
    b_along = tl.zeros([BN // 2], dtype=tl.float32)
    for i_n in range(0, N // 2, BN // 2):
        o_p = i_n + o_pair
        o_i = o_p % (HD // 2)
        m_p = o_p < N // 2
        p_pair = i_t * N + o_p // (HD // 2) * HD + o_i
        b_1 = tl.load(grad_qkv + p_pair, mask=m_p, other=0.0).to(tl.float32)
        b_2 = tl.load(grad_qkv + p_pair + HD // 2, mask=m_p, other=0.0).to(tl.float32)
        b_along += b_1 * tl.load(qkv + p_pair, mask=m_p, other=0.0).to(tl.float32)
        b_along += b_2 * tl.load(qkv + p_pair + HD // 2, mask=m_p, other=0.0).to(tl.float32)
        if cos is not None:
            m_rope = o_p < ROTATED // 2
            b_cos = tl.load(cos + row * stride_rope + o_i, mask=m_rope, other=1.0).to(tl.float32)
            b_sin = tl.load(sin + row * stride_rope + o_i, mask=m_rope, other=0.0).to(tl.float32)
            b_1, b_2 = b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin
        if qkv_bias is not None:
            b_along -= b_1 * tl.load(qkv_bias + 2 * o_p, mask=m_p, other=0.0)
            b_along -= b_2 * tl.load(qkv_bias + 2 * o_p + 1, mask=m_p, other=0.0)
        o_out = i_t * N + 2 * i_n + tl.arange(0, BN)
        b_out = tl.reshape(tl.join(b_1, b_2), [BN]) * b_rstd
        tl.store(grad_raw + o_out, b_out.to(grad_raw.dtype.element_ty), mask=2 * i_n + tl.arange(0, BN) < N)
    scale = b_rstd * b_rstd * tl.sum(b_along, 0) / D
    for i_d in range(0, D, BN):
        o_d = i_d + tl.arange(0, BN)
        m_d = o_d < D
        b_x = tl.load(x + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_g = tl.load(grad_x + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(grad_hidden + i_t * D + o_d, (b_g - scale * b_x).to(grad_hidden.dtype.element_ty), mask=m_d)


def tiles(num_tokens: int, itemsize: int, residual: bool = False) -> dict[str, int]:
    """Tile sizes by number of tokens: a fixed table of four, so that lengths that come and go compile nothing new."""
    if residual:  # a third operand per stage: one stage less stays within the shared memory of sm_80
        shape = tiles(num_tokens, itemsize)
        return {**shape, "num_stages": shape["num_stages"] - 1}
    if itemsize == 4:  # float32 products run on the plain cores; small tiles keep their operands in registers
        return {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3, **PINNED}
    if num_tokens <= 64:
        return {"BM": 32, "BN": 64, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 4, **PINNED}
    if num_tokens <= 1024:
        return {"BM": 64, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4, **PINNED}
    return {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4, **PINNED}


def forward(
    encoder_states: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    bias: Tensor,
    qkv_bias: Tensor | None,
    head_norms: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    num_rotated: int,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [T, D], qkv [T, N], rstd [T])"""
    e = encoder_states
    (T, d), D, N = e.shape, up_weight.shape[0], weight.shape[0]
    shape = tiles(T, e.dtype.itemsize, residual is not None)
    if head_norms is not None and head_dim > shape["BN"]:
        shape |= {"BN": head_dim, "BK": 64, "num_stages": 2}  # a whole head per tile, within sm_80's shared memory
    columns = triton.cdiv(D, shape["BN"])
    x, qkv = e.new_empty(T, D), e.new_empty(T, N)
    squares = torch.empty(columns, T, dtype=torch.float32, device=e.device)
    rstd = torch.empty(T, dtype=torch.float32, device=e.device)
    if T == 0:
        return x, qkv, rstd
    common = {"d": d, "D": D, "UPCAST": triton_is_interpreted(), **shape}
    rows = triton.cdiv(T, shape["BM"])
    with guard(e):
        up_projection_kernel[(rows * columns,)](e, up_weight, up_bias, x, squares, T, **common)
        qkv_kernel[(rows * triton.cdiv(N, shape["BN"]),)](
            e, weight, residual, bias, qkv_bias, head_norms, cos, sin, position_ids, squares, qkv, rstd, T,
            0 if cos is None else cos.stride(0), eps,
            N=N, ROTATED=num_rotated, HD=head_dim, TILES=columns, BTILES=triton.next_power_of_2(columns), **common,
        )  # fmt: skip
    return x, qkv, rstd


def backward(
    grad_x: Tensor,
    grad_qkv: Tensor,
    x: Tensor,
    qkv: Tensor,
    rstd: Tensor,
    qkv_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    num_rotated: int,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """(grad_hidden [T, D], grad_raw [T, N])"""
    (T, D), N = x.shape, qkv.shape[1]
    grad_hidden, grad_raw = torch.empty_like(x), torch.empty_like(qkv)
    if T == 0:
        return grad_hidden, grad_raw
    with guard(x):
        backward_kernel[(T,)](
            grad_x, grad_qkv, x, qkv, rstd, qkv_bias, cos, sin, position_ids, grad_hidden, grad_raw, T,
            0 if cos is None else cos.stride(0), D=D, N=N, ROTATED=num_rotated, HD=head_dim, **BACKWARD,
        )  # fmt: skip
    return grad_hidden, grad_raw


BACKWARD = {"BN": 2048, "num_warps": 4, **PINNED}


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: Llama-3-8B's widths in every tile shape, and what other models add."""
    llama = {"d": 1024, "D": 4096, "N": 6144, "ROTATED": 5120, "HD": 128}
    odd = {"d": 1000, "D": 2000, "N": 960, "ROTATED": 720, "HD": 80}
    return [
        *(case for tokens in (32, 512, 16384) for case in _cases(tokens, "bf16", llama)),
        *_cases(4096, "fp16", llama, "up_bias", "residual", "qkv_bias", "position_ids"),
        *_cases(512, "bf16", llama, "head_norms"),
        *_cases(512, "bf16", odd),
        *_cases(32, "bf16", {**llama, "HD": 256, "BN": 256, "BK": 64, "num_stages": 2}, "head_norms"),
        *_cases(512, "fp32", llama),
        _case(backward_kernel, "bf16", ("qkv_bias",), {k: v for k, v in llama.items() if k != "d"} | BACKWARD, 80),
    ]


def _cases(tokens: int, dtype: str, sizes: dict[str, int], *extras: str) -> list[TritonCase]:
    constants = {**tiles(tokens, 4 if dtype == "fp32" else 2, "residual" in extras), "UPCAST": False, **sizes}
    columns = triton.cdiv(sizes["D"], constants["BN"])
    up = {k: v for k, v in constants.items() if k not in ("N", "ROTATED", "HD")}
    qkv = {**constants, "TILES": columns, "BTILES": triton.next_power_of_2(columns)}
    return [
        _case(up_projection_kernel, dtype, extras, up, 255, dot=True),
        _case(qkv_kernel, dtype, extras, qkv, 255, dot=True),
    ]


def _case(kernel, dtype: str, extras: tuple[str, ...], constants, max_registers: int, dot: bool = False) -> TritonCase:
    half = ("e", "up_weight", "weight", "x", "qkv", "cos", "sin", "grad_x", "grad_qkv", "grad_hidden", "grad_raw")
    optional = {
        "up_bias": f"*{dtype}", "residual": f"*{dtype}", "qkv_bias": "*fp32", "head_norms": "*fp32",
        "position_ids": "*i64",
    }  # fmt: skip
    types = {
        **dict.fromkeys(half, f"*{dtype}"),
        **dict.fromkeys(("bias", "squares", "rstd"), "*fp32"),
        **dict.fromkeys(("T", "stride_rope"), "i32"),
        **{name: kind for name, kind in optional.items() if name in extras},
        "eps": "fp32",
    }
    absent = {name: None for name in optional if name not in extras and name in kernel.arg_names}
    name = f"{kernel.__name__} {dtype} {' '.join(extras)} {constants}"
    return TritonCase(
        name, kernel, types, {**constants, **absent}, multiples_of_16=("stride_rope",), max_registers=max_registers,
        max_shared=160 * 1024, tensor_cores=dot and dtype != "fp32" and constants["BM"] >= 64,  # 32 rows: mma.sync
    )  # fmt: skip
