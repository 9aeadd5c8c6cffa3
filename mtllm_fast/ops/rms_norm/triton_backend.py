"""Triton kernels of ``rms_norm``. Rows are those of ``[T, H, D]``: row i is token i // H, head i % H.

Floors at 4.3 TB/s for T=16384, D=4096, bf16: forward reads x and writes the normed rows, 268 MB, 62 µs; with a
residual it reads two and writes two, 537 MB, 125 µs (H200, within a model: 102, helped by the L2 cache). Backward reads
x and the gradient and writes one, 403 MB, 94 µs; with the gradient of the sum 537 MB, 125 µs. A weight that is trained
adds partial sums of at most ``PROGRAMS * D * 4`` bytes, 4 MB, 1 % of the backward.

Names: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard

# Sizes that change from batch to batch are plain run-time numbers, and so is H, the length of a padded ``[B, L, D]``.
VARYING = ["R", "H", "rows_per_program"]
TILE = 4096  # elements of x per program and step
PROGRAMS = 256  # that sum up a weight's gradient: two fit a multiprocessor, so one wave on a GPU with 132 of them
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results


@triton.jit
def row_pointers(base, o_r, o_d, stride_t, stride_h, H):
    """Offsets in int64, T * D passes 2^31; the division in int32, which is several times faster."""
    rows = (o_r // H).to(tl.int64) * stride_t + (o_r % H).to(tl.int64) * stride_h
    return base + rows[:, None] + o_d[None, :]


@triton.jit(do_not_specialize=VARYING)
def rms_norm_fwd_kernel(
    x, weight, residual, normed, summed, rstd, x_stride_t, x_stride_h, residual_stride_t, residual_stride_h, R, H, eps,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """normed = weight ⊙ x rstd of BR rows; with a residual, x is the rounded sum, which is written too."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_r = o_r < R
    m_d = o_d < D
    m = m_r[:, None] & m_d[None, :]
    o_out = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    # x [BR, BD]; read once, so that it need not push the weight out of the cache
    b_x = tl.load(row_pointers(x, o_r, o_d, x_stride_t, x_stride_h, H), mask=m, other=0.0,
                  eviction_policy="evict_first").to(tl.float32)  # fmt: skip
    if residual is not None:
        p_residual = row_pointers(residual, o_r, o_d, residual_stride_t, residual_stride_h, H)
        b_x += tl.load(p_residual, mask=m, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_sum = b_x.to(summed.dtype.element_ty)
        tl.store(summed + o_out, b_sum, mask=m)
        b_x = b_sum.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + tl.cast(eps, tl.float32))
    tl.store(rstd + o_r, b_rstd, mask=m_r)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_normed = b_x * b_rstd[:, None] * b_w[None, :]
    tl.store(normed + o_out, b_normed.to(normed.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=VARYING)
def rms_norm_bwd_kernel(
    grad_normed, grad_summed, x, weight, rstd, grad, partial, grad_stride_t, grad_stride_h, summed_stride_t,
    summed_stride_h, x_stride_t, x_stride_h, R, H, rows_per_program,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """grad = rstd (g − x̂ mean(g ⊙ x̂)) + grad_summed with g = weight ⊙ grad_normed; partial: Σ grad_normed ⊙ x̂."""
    i_p = tl.program_id(0)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BR, BD], dtype=tl.float32)  # summed over its rows after the loop, by one exchange
    first = i_p * rows_per_program
    last = tl.minimum(first + rows_per_program, R)
    for i_r in range(first, last, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < last
        m = m_r[:, None] & m_d[None, :]
        # x, grad_normed [BR, BD]
        b_x = tl.load(row_pointers(x, o_r, o_d, x_stride_t, x_stride_h, H), mask=m, other=0.0,
                      eviction_policy="evict_first").to(tl.float32)  # fmt: skip
        b_g = tl.load(row_pointers(grad_normed, o_r, o_d, grad_stride_t, grad_stride_h, H), mask=m, other=0.0,
                      eviction_policy="evict_first").to(tl.float32)  # fmt: skip
        b_rstd = tl.load(rstd + o_r, mask=m_r, other=0.0)[:, None]
        b_g *= b_rstd
        if partial is not None:
            b_dw += b_g * b_x
        b_g *= b_w[None, :]
        b_along = b_rstd * b_rstd * (tl.sum(b_g * b_x, 1) / D)[:, None]
        b_g -= b_x * b_along
        if grad_summed is not None:
            p_summed = row_pointers(grad_summed, o_r, o_d, summed_stride_t, summed_stride_h, H)
            b_g += tl.load(p_summed, mask=m, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(grad + o_r.to(tl.int64)[:, None] * D + o_d[None, :], b_g.to(grad.dtype.element_ty), mask=m)
    if partial is not None:
        tl.store(partial + i_p.to(tl.int64) * D + o_d, tl.sum(b_dw, 0), mask=m_d)


def blocks(width: int) -> dict[str, int]:
    """Block sizes and warps for a row width: fixed by D alone, so that no batch compiles anything new."""
    columns = triton.next_power_of_2(width)
    rows = max(1, TILE // columns)
    return {"BD": columns, "BR": rows, "num_warps": 8 if columns <= TILE else 16, **PINNED}


def forward(
    hidden_states: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(normed [T, H, D], summed [T, H, D], rstd [T, H] fp32)"""
    T, H, D = shape = hidden_states.shape
    normed = hidden_states.new_empty(shape)
    summed = None if residual is None else hidden_states.new_empty(shape)
    rstd = torch.empty(T, H, dtype=torch.float32, device=normed.device)
    if normed.numel() == 0:
        return normed, summed, rstd
    sizes, R = blocks(D), rstd.numel()
    with guard(hidden_states):
        rms_norm_fwd_kernel[(triton.cdiv(R, sizes["BR"]),)](
            hidden_states, weight, residual, normed, summed, rstd, *hidden_states.stride()[:2],
            *_strides(residual), R, H, eps, D=D, **sizes,
        )  # fmt: skip
    return normed, summed, rstd


def backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    states: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(grad [T, H, D], grad of the weight [D] fp32 or None)"""
    D, R = states.shape[-1], rstd.numel()
    grad = states.new_empty(states.shape)
    sizes = blocks(D)
    steps = triton.cdiv(R, sizes["BR"])
    steps_per_program = triton.cdiv(steps, PROGRAMS) if needs_weight else 1
    programs = triton.cdiv(steps, max(1, steps_per_program))
    partial = torch.empty(programs, D, dtype=torch.float32, device=grad.device) if needs_weight else None
    if R:
        with guard(states):
            rms_norm_bwd_kernel[(programs,)](
                grad_normed, grad_summed, states, weight, rstd, grad, partial, *grad_normed.stride()[:2],
                *_strides(grad_summed), *states.stride()[:2], R, states.shape[1],
                steps_per_program * sizes["BR"], D=D, **sizes,
            )  # fmt: skip
    return grad, None if partial is None else partial.sum(0)


def _strides(states: Tensor | None) -> tuple[int, int]:
    """Of an optional tensor's tokens and heads; zeros, which nobody reads, if it is missing."""
    return (0, 0) if states is None else (states.stride(0), states.stride(1))


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models and an odd one, heads, each dtype, every option."""
    return [
        *(case for D in (128, 896, 4096, 8192) for case in _cases(D, "bf16")),
        *_cases(1536, "fp16"),
        *_cases(5120, "fp32"),
        *_cases(4096, "bf16", missing=("residual", "summed", "grad_summed", "partial")),
    ]


def _cases(D: int, dtype: str, missing: tuple[str, ...] = ()) -> list[TritonCase]:
    strides = [f"{name}_stride_{axis}" for name in ("x", "residual", "grad", "summed") for axis in "th"]
    types = {
        **dict.fromkeys(
            ("x", "weight", "residual", "normed", "summed", "grad_normed", "grad_summed", "grad"), f"*{dtype}"
        ),
        **dict.fromkeys(("rstd", "partial"), "*fp32"),
        **dict.fromkeys((*strides, *VARYING), "i32"),
        "eps": "fp32",
    }
    constants = {"D": D, **blocks(D)}
    registers = 104 if constants["num_warps"] == 8 else 128  # two blocks, or one, fit a multiprocessor
    cases = []
    for kernel in (rms_norm_fwd_kernel, rms_norm_bwd_kernel):
        absent = {name: None for name in missing if name in kernel.arg_names}
        name = f"{kernel.__name__} {dtype} {constants} {' '.join(absent)}"
        cases.append(TritonCase(name, kernel, types, {**constants, **absent}, tuple(strides), registers))
    return cases
