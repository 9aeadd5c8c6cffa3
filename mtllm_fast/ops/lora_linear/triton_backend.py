"""Triton kernels of ``lora_linear``, around base products that are the library's (cuBLAS), which add to them.

1. Forward: low = c (m ⊙ x) Aᵀ of a block of tokens, x read once for up to three adapters, then s low Bᵀ + bias into y;
   y += x Wᵀ is the base product with beta = 1.
2. Backward of x: d = s dy B, then c m ⊙ (d A) into dx; dx += dy W is the base product.
3. Backward of the adapters, dA and dB in one launch: sums over a range of tokens; a second one adds the ranges up.

No atomics, sums in a fixed order. What must move, in elements of a token with K inputs, N outputs and rank r in all
(derived): 1. reads K and writes N, 2. reads N and writes K, 3. reads N + K (Gated: N + 2K); the base
products read N and K again. Llama-3-8B's gate and up in bf16, T=16384, 4.3 TB/s: 1. 0.25 ms, 2. 0.25 ms, 3. 0.25 ms
beside 4.9 ms for each base product at 790 TFLOP/s. docs/lora.md adds up a layer.

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values. What
exists once for each adapter ends in its number; an adapter that is not there is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard, triton_is_interpreted
from mtllm_fast.ops.lora_linear.group import Gated, Group, RmsNormed
from mtllm_fast.ops.lora_linear.masks import halves, kept_scale, threshold_of
from mtllm_fast.ops.lora_linear.triton_blocks import (
    add_gradient,
    contract,
    contract_gradient,
    dropped,
    expand,
    expand_gradient,
    gradient_of_b,
    hashes,
    load_states,
    store_gradient_of_a,
    token_keys,
)

# Numbers that change from batch to batch are plain run-time numbers: new ones compile nothing.
VARYING = ["T", "seed_low", "seed_high", "tokens"]
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results
_WANTED_PROGRAMS = 2048  # of the third kernel: on an H200 four fifths of the time that 512 take
_LEAST_TOKENS = 256  # of a range of the third kernel, so that its partial sums stay small


@triton.jit(do_not_specialize=VARYING)
def lora_forward_kernel(
    x, a0, a1, a2, b0, b1, b2, bias, y, low, scale0, scale1, scale2, seed_low, seed_high, T, stride_x,
    K: tl.constexpr, N: tl.constexpr, RANKS: tl.constexpr, AT0: tl.constexpr, AT1: tl.constexpr, AT2: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BR0: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr, C: tl.constexpr, THRESHOLD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """low [T, RANKS] and the low-rank part of y [T, N] of BT tokens."""
    o_i = tl.program_id(0) * BT + tl.arange(0, BT)
    o_t = o_i.to(tl.int64)
    m_t = o_i < T
    b_key00, b_key01 = token_keys(o_i, seed_low, seed_high, 0)
    b_low0 = tl.zeros([BT, BR0], dtype=tl.float32)
    if a1 is not None:
        b_low1 = tl.zeros([BT, BR1], dtype=tl.float32)
    if a2 is not None:
        b_key10, b_key11 = token_keys(o_i, seed_low, seed_high, 1)
        b_low2 = tl.zeros([BT, BR2], dtype=tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_x = tl.load(x + o_t[:, None] * stride_x + o_k[None, :], mask=m_t[:, None] & (o_k < K)[None, :], other=0.0)
        b_hash = hashes(b_key00, b_key01, o_k)
        b_low0 = contract(b_low0, b_x, b_hash, a0, o_k, K, R0, BR0, 0, THRESHOLD, UPCAST)
        if a1 is not None:
            b_low1 = contract(b_low1, b_x, b_hash, a1, o_k, K, R1, BR1, 1, THRESHOLD, UPCAST)
        if a2 is not None:
            b_low2 = contract(b_low2, b_x, hashes(b_key10, b_key11, o_k), a2, o_k, K, R2, BR2, 2, THRESHOLD, UPCAST)
    expand(b_low0, b0, bias, y, low, scale0, o_t, m_t, C, N, AT0, N0, R0, BR0, BN, RANKS, UPCAST)
    if a1 is not None:
        expand(b_low1, b1, bias, y, low + R0, scale1, o_t, m_t, C, N, AT1, N1, R1, BR1, BN, RANKS, UPCAST)
    if a2 is not None:
        expand(b_low2, b2, bias, y, low + R0 + R1, scale2, o_t, m_t, C, N, AT2, N2, R2, BR2, BN, RANKS, UPCAST)


@triton.jit(do_not_specialize=VARYING)
def lora_backward_kernel(
    grad_y, a0, a1, a2, b0, b1, b2, d, grad_x, scale0, scale1, scale2, seed_low, seed_high, T, stride_y,
    K: tl.constexpr, RANKS: tl.constexpr, AT0: tl.constexpr, AT1: tl.constexpr, AT2: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BR0: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr, C: tl.constexpr, THRESHOLD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d [T, RANKS] and, unless it is None, the low-rank part of dx [T, K] of BT tokens."""
    o_i = tl.program_id(0) * BT + tl.arange(0, BT)
    o_t = o_i.to(tl.int64)
    m_t = o_i < T
    b_d0 = contract_gradient(grad_y, b0, d, scale0, o_t, m_t, stride_y, BT, AT0, N0, R0, BR0, BN, RANKS, UPCAST)
    if a1 is not None:
        b_d1 = contract_gradient(
            grad_y, b1, d + R0, scale1, o_t, m_t, stride_y, BT, AT1, N1, R1, BR1, BN, RANKS, UPCAST
        )
    if a2 is not None:
        b_d2 = contract_gradient(
            grad_y, b2, d + R0 + R1, scale2, o_t, m_t, stride_y, BT, AT2, N2, R2, BR2, BN, RANKS, UPCAST
        )
    if grad_x is not None:
        b_key00, b_key01 = token_keys(o_i, seed_low, seed_high, 0)
        b_key10, b_key11 = token_keys(o_i, seed_low, seed_high, 1)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            b_hash = hashes(b_key00, b_key01, o_k)
            b_x = expand_gradient(b_d0, b_hash, a0, o_k, K, R0, BR0, 0, THRESHOLD, UPCAST)
            if a1 is not None:
                b_x += expand_gradient(b_d1, b_hash, a1, o_k, K, R1, BR1, 1, THRESHOLD, UPCAST)
            if a2 is not None:
                b_hash = hashes(b_key10, b_key11, o_k)
                b_x += expand_gradient(b_d2, b_hash, a2, o_k, K, R2, BR2, 2, THRESHOLD, UPCAST)
            p_x = grad_x + o_t[:, None] * K + o_k[None, :]
            tl.store(p_x, (b_x * C).to(grad_x.dtype.element_ty), mask=m_t[:, None] & (o_k < K)[None, :])


@triton.jit(do_not_specialize=VARYING)
def lora_adapters_backward_kernel(
    grad_y, x, other, weight, low, d, out, b1, b2, scale0, scale1, scale2, seed_low, seed_high, T, tokens,
    stride_y, stride_x, stride_other,
    K: tl.constexpr, RANKS: tl.constexpr, AT0: tl.constexpr, AT1: tl.constexpr, AT2: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BR0: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr, C: tl.constexpr, THRESHOLD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, SOURCE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dA and dB of a range of tokens: program (i, j) has the i-th tile of the columns of x, then of y, and range j."""
    i_tile, i_range = tl.program_id(0), tl.program_id(1)
    first = i_range * tokens
    last = tl.minimum(first + tokens, T)
    out += i_range.to(tl.int64) * SIZE
    out_b = out + RANKS * K
    A_TILES: tl.constexpr = (K + BK - 1) // BK
    TILES0: tl.constexpr = A_TILES + (N0 + BN - 1) // BN
    TILES1: tl.constexpr = TILES0 + (N1 + BN - 1) // BN
    if i_tile < A_TILES:
        o_k = i_tile * BK + tl.arange(0, BK)
        b_acc0 = tl.zeros([BK, BR0], dtype=tl.float32)
        if b1 is not None:
            b_acc1 = tl.zeros([BK, BR1], dtype=tl.float32)
        if b2 is not None:
            b_acc2 = tl.zeros([BK, BR2], dtype=tl.float32)
        for i_t in range(first, last, BT):
            o_i = i_t + tl.arange(0, BT)
            o_t, m_t = o_i.to(tl.int64), o_i < last
            m_x = m_t[:, None] & (o_k < K)[None, :]
            b_x = load_states(x, other, weight, o_t, o_k, stride_x, stride_other, m_x, SOURCE)
            b_key0, b_key1 = token_keys(o_i, seed_low, seed_high, 0)
            b_hash = hashes(b_key0, b_key1, o_k)
            b_acc0 = add_gradient(b_acc0, dropped(b_x, b_hash, 0, THRESHOLD), d, o_t, m_t, R0, BR0, RANKS, UPCAST)
            if b1 is not None:
                b_acc1 = add_gradient(
                    b_acc1, dropped(b_x, b_hash, 1, THRESHOLD), d + R0, o_t, m_t, R1, BR1, RANKS, UPCAST
                )
            if b2 is not None:
                b_key0, b_key1 = token_keys(o_i, seed_low, seed_high, 1)
                b_x = dropped(b_x, hashes(b_key0, b_key1, o_k), 2, THRESHOLD)
                b_acc2 = add_gradient(b_acc2, b_x, d + R0 + R1, o_t, m_t, R2, BR2, RANKS, UPCAST)
        store_gradient_of_a(b_acc0, out, o_k, K, R0, BR0, C)
        if b1 is not None:
            store_gradient_of_a(b_acc1, out + R0 * K, o_k, K, R1, BR1, C)
        if b2 is not None:
            store_gradient_of_a(b_acc2, out + (R0 + R1) * K, o_k, K, R2, BR2, C)
    if (i_tile >= A_TILES) & (i_tile < TILES0):
        gradient_of_b(
            grad_y, low, out_b, scale0, i_tile - A_TILES, first, last, stride_y, AT0, N0, R0, BR0, BT, BN, RANKS, UPCAST
        )
    if b1 is not None:  # noqa: SIM102 (decided when it is compiled)
        if (i_tile >= TILES0) & (i_tile < TILES1):
            gradient_of_b(
                grad_y, low + R0, out_b + N0 * R0, scale1, i_tile - TILES0, first, last, stride_y,
                AT1, N1, R1, BR1, BT, BN, RANKS, UPCAST,
            )  # fmt: skip
    if b2 is not None:  # noqa: SIM102
        if i_tile >= TILES1:
            gradient_of_b(
                grad_y, low + R0 + R1, out_b + N0 * R0 + N1 * R1, scale2, i_tile - TILES1, first, last, stride_y,
                AT2, N2, R2, BR2, BT, BN, RANKS, UPCAST,
            )  # fmt: skip


@triton.jit(do_not_specialize=["ranges"])
def sum_ranges_kernel(partial, out, ranges, SIZE: tl.constexpr, BS: tl.constexpr):
    """out [SIZE] = Σ over the ranges of partial [ranges, SIZE], in their order."""
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    m = o < SIZE
    b_sum = tl.zeros([BS], dtype=tl.float32)
    for i in range(ranges):
        b_sum += tl.load(partial + tl.cast(i, tl.int64) * SIZE + o, mask=m, other=0.0)
    tl.store(out + o, b_sum.to(out.dtype.element_ty), mask=m)


SUM = {"BS": 1024, "num_warps": 4, **PINNED}


def shape_of(itemsize: int, rank: int) -> dict[str, int]:
    """Tile sizes by the adapters' dtype and largest rank alone, so that no batch compiles anything new."""
    stages = 2 if itemsize == 4 or rank > 32 else 3  # more do not fit into the registers
    return {"BT": 64, "BK": 64, "BN": 64 if itemsize == 4 else 128, "num_warps": 4, "num_stages": stages, **PINNED}


def forward(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, group: Group) -> tuple[Tensor, Tensor]:
    """(y [T, Σ N], low [T, Σ r])"""
    (T, K), N = x.shape, sum(w.shape[0] for w in weights)
    y = x.new_empty(T, N)
    if not group.covers(N):  # the kernel writes the adapters' columns alone
        y.zero_() if bias is None else y.copy_(bias.expand(T, N))
    low = group.a[0].new_empty(T, group.rank_starts[-1])
    if T:
        with guard(x):
            constants = _constants(group, K)
            lora_forward_kernel[(triton.cdiv(T, constants["BT"]),)](
                x, *_three(group.a), *_three(group.b), bias, y, low, *_scales(group), *_seed(group), T, x.stride(0),
                N=N, **constants,
            )  # fmt: skip
    start = 0
    for weight in weights:
        y[:, start : (start := start + weight.shape[0])].addmm_(x, weight.t())
    return y, low


def backward(
    grad_y: Tensor,
    x: Tensor | RmsNormed | Gated,
    low: Tensor,
    weights: Sequence[Tensor],
    group: Group,
    needs_x: bool,
    needs_adapters: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx [T, K], the gradients of all a, then of all b, flat); x itself, or what it is computed from."""
    T, K = grad_y.shape[0], group.a[0].shape[1]
    d = torch.empty_like(low)
    grad_x = grad_y.new_empty(T, K) if needs_x else None
    constants = _constants(group, K)
    if T:
        with guard(grad_y):
            lora_backward_kernel[(triton.cdiv(T, constants["BT"]),)](
                grad_y, *_three(group.a), *_three(group.b), d, grad_x, *_scales(group), *_seed(group), T,
                grad_y.stride(0), **constants,
            )  # fmt: skip
    flat = _adapters_backward(grad_y, x, low, d, group, constants) if needs_adapters else None
    if grad_x is not None:
        start = 0
        for weight in weights:
            grad_x.addmm_(grad_y[:, start : (start := start + weight.shape[0])], weight)
    return grad_x, flat


def _adapters_backward(
    grad_y: Tensor, x: Tensor | RmsNormed | Gated, low: Tensor, d: Tensor, group: Group, constants: dict[str, Any]
) -> Tensor:
    T, K, size = grad_y.shape[0], group.a[0].shape[1], group.parameters()
    tiles = triton.cdiv(K, constants["BK"]) + sum(triton.cdiv(b.shape[0], constants["BN"]) for b in group.b)
    ranges, tokens = token_ranges(T, tiles)
    flat = low.new_empty(size)
    partial = flat if ranges == 1 else torch.empty(ranges, size, dtype=torch.float32, device=low.device)
    states, other, weight, source = _source(x)
    with guard(grad_y):
        lora_adapters_backward_kernel[(tiles, ranges)](
            grad_y, states, other, weight, low, d, partial, *_three(group.b)[1:], *_scales(group), *_seed(group), T,
            tokens, grad_y.stride(0), states.stride(0), 0 if other is None else other.stride(0),
            SIZE=size, SOURCE=source, **constants,
        )  # fmt: skip
        if ranges > 1:
            sum_ranges_kernel[(triton.cdiv(size, SUM["BS"]),)](partial, flat, ranges, SIZE=size, **SUM)
    return flat


def token_ranges(num_tokens: int, tiles: int) -> tuple[int, int]:
    """(ranges of tokens, tokens of each): enough programs, long ranges."""
    wanted = max(1, min(_WANTED_PROGRAMS // tiles, num_tokens // _LEAST_TOKENS))
    tokens = -(-num_tokens // wanted) if num_tokens else 0
    return wanted, tokens


def _three(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [*tensors, None, None][:3]


def _scales(group: Group) -> list[float]:
    return [*group.scales, 1.0, 1.0][:3]


def _seed(group: Group) -> tuple[int, int]:
    return (0, 0) if group.seed is None else halves(group.seed)


def _source(x: Tensor | RmsNormed | Gated) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    if isinstance(x, RmsNormed):
        return x.states, x.rstd.contiguous(), x.weight.contiguous(), "rms_norm"
    if isinstance(x, Gated):
        return x.gate, x.up, None, "swiglu"
    return x, None, None, "x"


def _constants(group: Group, K: int) -> dict[str, Any]:
    """What all three kernels are compiled for."""
    widths, ranks = [b.shape[0] for b in group.b], group.ranks
    dropout = group.dropout if group.seed is not None else 0.0
    return {
        "K": K, "RANKS": group.rank_starts[-1], "C": kept_scale(dropout), "THRESHOLD": threshold_of(dropout),
        **_numbered("AT", group.at), **_numbered("N", widths), **_numbered("R", ranks),
        **_numbered("BR", [max(16, triton.next_power_of_2(r)) for r in ranks], absent=16),
        "UPCAST": triton_is_interpreted(), **shape_of(group.a[0].dtype.itemsize, max(ranks)),
    }  # fmt: skip


def _numbered(name: str, values: Sequence[int], absent: int = 0) -> dict[str, int]:
    return {f"{name}{g}": value for g, value in enumerate([*values, absent, absent][:3])}


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: Llama-3-8B's q, k, v and its down, and odd widths and ranks."""
    return [
        *_cases("bf16", "bf16", ranks=[16, 16, 16], K=4096, widths=[4096, 1024, 1024], source="rms_norm"),
        *_cases("fp16", "fp16", ranks=[64, 8], K=2000, widths=[1000, 520]),
        *_cases("bf16", "fp32", ranks=[16], K=14336, widths=[4096], source="swiglu", dropout=0.0),
        _case(sum_ranges_kernel, "bf16", "bf16", {"SIZE": 16 * 8192, **SUM}, tensor_cores=False),
    ]


def _cases(
    dtype: str, adapters: str, K: int, widths: list[int], ranks: list[int], source: str = "x", dropout: float = 0.05
) -> list[TritonCase]:
    empty = torch.empty(0, dtype=torch.float32 if adapters == "fp32" else torch.bfloat16, device="meta")
    a = [empty.new_empty(r, K) for r in ranks]
    b = [empty.new_empty(n, r) for n, r in zip(widths, ranks, strict=True)]
    starts = [sum(widths[:g]) for g in range(len(widths))]
    group = Group(a, b, [1.0] * len(a), starts, dropout, torch.zeros(1, dtype=torch.int64))
    constants = {**_constants(group, K), "UPCAST": False}
    absent = {f"{part}{g}": None for part in "ab" for g in range(len(a), 3)}
    adapters_only = {"SIZE": group.parameters(), "SOURCE": source}
    adapters_only |= {"weight": None} if source != "rms_norm" else {}
    adapters_only |= {"other": None} if source == "x" else {}
    return [
        _case(lora_forward_kernel, dtype, adapters, {**constants, **absent, "N": sum(widths), "bias": None}),
        _case(lora_backward_kernel, dtype, adapters, {**constants, **absent}),
        _case(lora_adapters_backward_kernel, dtype, adapters, {**constants, **absent, **adapters_only}),
    ]


def _case(kernel, dtype: str, adapters: str, constants: dict[str, Any], tensor_cores: bool = True) -> TritonCase:
    constants = {
        k: v for k, v in constants.items() if k in kernel.arg_names or k in ("num_warps", "num_stages", *PINNED)
    }
    types = {
        **dict.fromkeys(("x", "y", "grad_x", "grad_y", "weight"), f"*{dtype}"),
        **dict.fromkeys(("a0", "a1", "a2", "b0", "b1", "b2", "low", "d"), f"*{adapters}"),
        **dict.fromkeys(("scale0", "scale1", "scale2"), "fp32"),
        **dict.fromkeys(("T", "tokens", "ranges", "seed_low", "seed_high"), "i32"),
        **dict.fromkeys(("stride_x", "stride_y", "stride_other"), "i32"),
        "partial": "*fp32",
        "out": "*fp32" if kernel is lora_adapters_backward_kernel else f"*{adapters}",
        "other": "*fp32" if constants.get("SOURCE") == "rms_norm" else f"*{dtype}",
    }
    return TritonCase(
        f"{kernel.__name__} {dtype} {adapters} {constants}", kernel, types, constants,
        multiples_of_16=("stride_x", "stride_y", "stride_other"), max_shared=160 * 1024, tensor_cores=tensor_cores,
    )  # fmt: skip
