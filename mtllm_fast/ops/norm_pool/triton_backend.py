"""Triton kernels of ``norm_pool``. The partition into chunks and slots is explained in ``chunks.py``.

Floors at 4.3 TB/s for T=16384, D=4096, bf16 (derived): forward reads h once, 134 MB, 31 µs; backward
reads h and writes dh, 268 MB, 62 µs. Partial sums of long sentences add at most 4 / chunk of the forward's bytes.

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard
from mtllm_fast.ops.norm_pool.chunks import chunk_tokens, num_slots

# Sizes that change from batch to batch are plain run-time numbers: a new T or B compiles nothing.
VARYING = ["T", "B", "chunk"]
TILE = 8192  # elements of h per loop step
SENTENCES = 256  # of cu_seqlens per loop step
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results


@triton.jit
def find_chunk(cu_seqlens, i_slot, T, B, chunk, BB: tl.constexpr):
    """The sentence that owns a slot (B: the tail after the last one), its token range, and the number of its chunk."""
    b_owners = 0
    for i in range(0, B + 1, BB):
        o_b = i + tl.arange(0, BB)
        b_start = tl.load(cu_seqlens + o_b, mask=o_b <= B, other=0)
        b_owners += tl.sum(((o_b <= B) & (b_start // chunk + o_b <= i_slot)).to(tl.int32), 0)
    i_b = b_owners - 1
    start = tl.load(cu_seqlens + i_b)
    stop = tl.load(cu_seqlens + i_b + 1, mask=i_b < B, other=T)
    return i_b, start, stop, i_slot - (start // chunk + i_b)


@triton.jit(do_not_specialize=VARYING)
def norm_pool_fwd_kernel(
    h, weight, cu_seqlens, pooled, normed_mean, partial, stride_h, T, B, chunk, eps,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BB: tl.constexpr,
    POOLING: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Σ_t r_t h_t rstd_t of one chunk: the result if the sentence has one chunk, else a partial sum [slots, D].

    Without eps the states are normed already, rstd_t = 1; without a weight only the normed mean is wanted.
    """
    i_slot = tl.program_id(0)
    if POOLING == "mean":
        i_b, start, stop, i_chunk = find_chunk(cu_seqlens, i_slot, T, B, chunk, BB)
        first = start + i_chunk * chunk
        last = tl.minimum(first + chunk, stop)
        r = 1.0 / tl.maximum(stop - start, 1).to(tl.float32)
        whole = stop - start <= chunk
    else:
        i_b, i_chunk = i_slot, 0
        start = tl.load(cu_seqlens + i_b)
        stop = tl.load(cu_seqlens + i_b + 1)
        first = start if POOLING == "cls" else tl.maximum(stop - 1, start)
        last = tl.minimum(first + 1, stop)
        r = 1.0
        whole = True

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i_t in range(first, last, BT):
        o_t = i_t + tl.arange(0, BT)
        # h [BT, BD]; rows in int64: T * D passes 2^31
        p_h = h + o_t.to(tl.int64)[:, None] * stride_h + o_d[None, :]
        m_t = o_t < last
        b_h = tl.load(p_h, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        if eps is None:
            b_sum += tl.sum(b_h, 0)
        else:
            b_rstd = tl.rsqrt(tl.sum(b_h * b_h, 1) / D + tl.cast(eps, tl.float32))
            b_sum += tl.sum(b_h * tl.where(m_t, b_rstd, 0.0)[:, None], 0)

    if i_b < B:
        if whole:
            if i_chunk == 0:
                o_out = i_b.to(tl.int64) * D + o_d
                if weight is not None:
                    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
                    tl.store(pooled + o_out, (b_sum * r * b_w).to(pooled.dtype.element_ty), mask=m_d)
                if SAVE:
                    tl.store(normed_mean + o_out, b_sum * r, mask=m_d)
        elif first < last:
            tl.store(partial + i_slot.to(tl.int64) * D + o_d, b_sum, mask=m_d)


@triton.jit(do_not_specialize=["chunk"])
def norm_pool_combine_kernel(
    partial, weight, cu_seqlens, pooled, normed_mean, chunk,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of one sentence of several chunks, in a fixed order."""
    i_b = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    start = tl.load(cu_seqlens + i_b)
    length = tl.load(cu_seqlens + i_b + 1) - start
    if length > chunk:
        slot = start // chunk + i_b
        slots_end = slot + tl.cdiv(length, chunk)
        b_sum = tl.zeros([BC, BD], dtype=tl.float32)
        for i_slot in range(slot, slots_end, BC):
            o_slot = i_slot + tl.arange(0, BC)
            # partial [BC, BD]
            p_partial = partial + o_slot.to(tl.int64)[:, None] * D + o_d[None, :]
            b_sum += tl.load(p_partial, mask=(o_slot < slots_end)[:, None] & m_d[None, :], other=0.0)
        b_mean = tl.sum(b_sum, 0) * (1.0 / length.to(tl.float32))
        o_out = i_b.to(tl.int64) * D + o_d
        if weight is not None:
            b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
            tl.store(pooled + o_out, (b_mean * b_w).to(pooled.dtype.element_ty), mask=m_d)
        if SAVE:
            tl.store(normed_mean + o_out, b_mean, mask=m_d)


@triton.jit(do_not_specialize=VARYING)
def norm_pool_bwd_kernel(
    grad_pooled, h, weight, cu_seqlens, grad_h, stride_h, T, B, chunk, eps,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BB: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """dh_t = rstd_t (g − h_t rstd_t² mean(g ⊙ h_t)) with g = r_t weight ⊙ grad_pooled[b]; every row is written once."""
    i_b, start, stop, i_chunk = find_chunk(cu_seqlens, tl.program_id(0), T, B, chunk, BB)
    first = start + i_chunk * chunk
    last = tl.minimum(first + chunk, stop)
    # The tail after the last sentence has no gradient: nothing is read, zeros are written.
    last_read = tl.where(i_b < B, last, first)

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    m_g = o_d < tl.where(i_b < B, D, 0)
    b_g = tl.load(grad_pooled + i_b.to(tl.int64) * D + o_d, mask=m_g, other=0.0).to(tl.float32) * b_w
    if POOLING == "mean":
        b_g *= 1.0 / tl.maximum(stop - start, 1).to(tl.float32)
    for i_t in range(first, last, BT):
        o_t = i_t + tl.arange(0, BT)
        o_row = o_t.to(tl.int64)[:, None]
        m_t = o_t < last
        m_read = o_t < last_read
        if POOLING == "cls":
            m_read &= o_t == start
        if POOLING == "eos":
            m_read &= o_t == stop - 1
        # h [BT, BD]
        b_h = tl.load(h + o_row * stride_h + o_d[None, :], mask=m_read[:, None] & m_d[None, :], other=0.0).to(
            tl.float32
        )
        b_rstd = tl.rsqrt(tl.sum(b_h * b_h, 1) / D + tl.cast(eps, tl.float32))
        b_along = b_rstd * b_rstd * tl.sum(b_g[None, :] * b_h, 1) / D
        b_grad = tl.where(m_read[:, None], b_rstd[:, None] * (b_g[None, :] - b_h * b_along[:, None]), 0.0)
        tl.store(
            grad_h + o_row * D + o_d[None, :], b_grad.to(grad_h.dtype.element_ty), mask=m_t[:, None] & m_d[None, :]
        )


def blocks(width: int) -> dict[str, int]:
    """Block sizes and warps for a row width: fixed by D alone, so that no batch compiles anything new."""
    width_block = triton.next_power_of_2(width)
    rows = max(1, TILE // width_block)
    return {"BD": width_block, "BT": rows, "num_warps": 8 if width_block <= TILE else 16, **PINNED}


def combine_blocks(width: int, num_sentences: int) -> dict[str, int]:
    """Few sentences: few columns and many chunks per program; many sentences: the other way round."""
    columns = min(triton.next_power_of_2(width), 1024 if num_sentences > 64 else 64)
    return {"BD": columns, "BC": 2048 // columns, "num_warps": 4, **PINNED}


def forward(
    hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(pooled [B, D], Σ_t r_t x̂_t [B, D] fp32)"""
    D, B = hidden_states.shape[1], cu_seqlens.shape[0] - 1
    pooled = hidden_states.new_empty(B, D)
    normed_mean = torch.empty(B, D, dtype=torch.float32, device=pooled.device) if save else None
    _launch_forward(hidden_states, weight, cu_seqlens, pooled, normed_mean, eps, pooling)
    return pooled, normed_mean


def pool(hidden_states: Tensor, cu_seqlens: Tensor, eps: float | None) -> Tensor:
    """The mean of x̂_t over each sentence, or of h_t for states that are normed already (eps is None); [B, D] fp32."""
    shape = cu_seqlens.shape[0] - 1, hidden_states.shape[1]
    normed_mean = torch.empty(shape, dtype=torch.float32, device=hidden_states.device)
    _launch_forward(hidden_states, None, cu_seqlens, None, normed_mean, eps, "mean")
    return normed_mean


def _launch_forward(
    hidden_states: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    pooled: Tensor | None,
    normed_mean: Tensor | None,
    eps: float | None,
    pooling: str,
) -> None:
    """Writes ``pooled`` and ``normed_mean``, either of which may be missing."""
    (T, D), B = hidden_states.shape, cu_seqlens.shape[0] - 1
    if B == 0:
        return
    save = normed_mean is not None
    chunk = chunk_tokens(T, B)
    slots = num_slots(T, B, chunk)
    several = pooling == "mean" and chunk < T
    partial = torch.empty(slots if several else 0, D, dtype=torch.float32, device=hidden_states.device)
    with guard(hidden_states):
        norm_pool_fwd_kernel[(slots if pooling == "mean" else B,)](
            hidden_states, weight, cu_seqlens, pooled, normed_mean, partial, hidden_states.stride(0), T, B, chunk, eps,
            D=D, BB=SENTENCES, POOLING=pooling, SAVE=save, **blocks(D),
        )  # fmt: skip
        if several:
            shape = combine_blocks(D, B)
            norm_pool_combine_kernel[(B, triton.cdiv(D, shape["BD"]))](
                partial, weight, cu_seqlens, pooled, normed_mean, chunk, D=D, SAVE=save, **shape
            )


def backward(
    grad_pooled: Tensor, hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str
) -> Tensor:
    """dh [T, D]"""
    (T, D), B = hidden_states.shape, cu_seqlens.shape[0] - 1
    grad_hidden = hidden_states.new_empty(T, D)
    if T == 0:
        return grad_hidden
    chunk = chunk_tokens(T, B)
    with guard(hidden_states):
        norm_pool_bwd_kernel[(num_slots(T, B, chunk),)](
            grad_pooled, hidden_states, weight, cu_seqlens, grad_hidden, hidden_states.stride(0), T, B, chunk, eps,
            D=D, BB=SENTENCES, POOLING=pooling, **blocks(D),
        )  # fmt: skip
    return grad_hidden


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models and an odd one, each dtype and pooling."""
    return [
        *_row_cases(4096, "bf16", "mean"),
        *_row_cases(1024, "fp32", "eos"),
        *_row_cases(2000, "fp16", "cls"),
        *(_case(norm_pool_combine_kernel, "bf16", D=4096, SAVE=True, **combine_blocks(4096, B)) for B in (1, 400)),
        # ``pool``, of states that are normed already
        _case(
            norm_pool_fwd_kernel,
            "bf16",
            SAVE=True,
            D=4096,
            BB=SENTENCES,
            POOLING="mean",
            weight=None,
            pooled=None,
            eps=None,
            **blocks(4096),
        ),
    ]


def _row_cases(D: int, dtype: str, pooling: str) -> list[TritonCase]:
    constants = {"D": D, "BB": SENTENCES, "POOLING": pooling, **blocks(D)}
    return [_case(norm_pool_fwd_kernel, dtype, SAVE=True, **constants), _case(norm_pool_bwd_kernel, dtype, **constants)]


def _case(kernel, dtype: str, **constants) -> TritonCase:
    types = {
        **dict.fromkeys(("h", "weight", "pooled", "grad_pooled", "grad_h"), f"*{dtype}"),
        **dict.fromkeys(("normed_mean", "partial"), "*fp32"),
        **dict.fromkeys(("stride_h", "T", "B", "chunk"), "i32"),
        "cu_seqlens": "*i32",
        "eps": "fp32",
    }
    name = f"{kernel.__name__} {dtype} {constants}"
    return TritonCase(name, kernel, types, constants, multiples_of_16=("stride_h",), max_registers=96)
