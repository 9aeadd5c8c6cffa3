"""Triton kernels of ``swiglu``: elementwise over ``[T, F]``, each program a tile of rows and columns.

Floors at 4.3 TB/s for T=16384, F=14336, bf16: forward reads gate and up and writes one, 1409 MB, 328 µs (H200: 320);
backward reads three and writes two, 2349 MB, 546 µs.

Names: ``i_`` index of a program, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` a block of values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.core.devices import guard

# The number of rows changes from batch to batch and is a plain run-time number: a new one compiles nothing.
VARYING = ["T"]
TILE = 2048  # elements per program, 16 per thread: two loads of 16 bytes from each tensor
PINNED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default, and with it the last bits of the results


@triton.jit
def tile(T, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """Rows in int64, since T * F passes 2^31; columns; and which of them exist."""
    # One grid dimension for both: the others end at 65535.
    tiles_per_row: tl.constexpr = (F + BF - 1) // BF
    i = tl.program_id(0)
    o_t = i // tiles_per_row * BT + tl.arange(0, BT)
    o_f = i % tiles_per_row * BF + tl.arange(0, BF)
    return o_t.to(tl.int64)[:, None], o_f[None, :], (o_t < T)[:, None] & (o_f < F)[None, :]


@triton.jit(do_not_specialize=VARYING)
def swiglu_fwd_kernel(
    gate, up, out, gate_stride, up_stride, T, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """out = gate σ(gate) up."""
    o_t, o_f, m = tile(T, F, BT, BF)
    b_gate = tl.load(gate + o_t * gate_stride + o_f, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(up + o_t * up_stride + o_f, mask=m, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(out + o_t * F + o_f, b_out.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=VARYING)
def swiglu_bwd_kernel(
    grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride, T,
    F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """dgate = d up σ (1 + gate (1 − σ)), dup = d gate σ, with σ = σ(gate)."""
    o_t, o_f, m = tile(T, F, BT, BF)
    b_d = tl.load(grad + o_t * grad_stride + o_f, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + o_t * gate_stride + o_f, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(up + o_t * up_stride + o_f, mask=m, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_gate)
    b_dgate = b_d * b_up * b_s * (1.0 + b_gate * (1.0 - b_s))
    b_dup = b_d * b_gate * b_s
    tl.store(grad_gate + o_t * grad_gate_stride + o_f, b_dgate.to(grad_gate.dtype.element_ty), mask=m)
    tl.store(grad_up + o_t * grad_up_stride + o_f, b_dup.to(grad_up.dtype.element_ty), mask=m)


def blocks(width: int) -> dict[str, int]:
    """Block sizes and warps for a row width: fixed by F alone, so that no batch compiles anything new."""
    columns = min(TILE, triton.next_power_of_2(width))
    return {"BT": TILE // columns, "BF": columns, "num_warps": 4, **PINNED}


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Writes ``out`` [T, F]."""
    T, F = out.shape
    with guard(out):
        swiglu_fwd_kernel[_grid(T, F)](gate, up, out, gate.stride(0), up.stride(0), T, F=F, **blocks(F))


def backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Writes ``grad_gate`` and ``grad_up`` [T, F], which may be halves of one buffer."""
    T, F = grad.shape
    tensors = (grad, gate, up, grad_gate, grad_up)
    with guard(grad):
        swiglu_bwd_kernel[_grid(T, F)](*tensors, *(tensor.stride(0) for tensor in tensors), T, F=F, **blocks(F))


def _grid(T: int, F: int) -> tuple[int]:
    shape = blocks(F)
    return (triton.cdiv(T, shape["BT"]) * triton.cdiv(F, shape["BF"]),)


def lint_cases() -> list[TritonCase]:
    """What the ahead-of-time lint compiles: widths of real models, a small one, each dtype."""
    return [
        _case(kernel, F, dtype)
        for kernel in (swiglu_fwd_kernel, swiglu_bwd_kernel)
        for F, dtype in ((14336, "bf16"), (11008, "fp16"), (128, "bf16"), (4864, "fp32"))
    ]


def _case(kernel, F: int, dtype: str) -> TritonCase:
    strides = tuple(name for name in kernel.arg_names if name.endswith("_stride"))
    types = {
        **dict.fromkeys(("gate", "up", "out", "grad", "grad_gate", "grad_up"), f"*{dtype}"),
        **dict.fromkeys((*strides, *VARYING), "i32"),
    }
    constants = {"F": F, **blocks(F)}
    name = f"{kernel.__name__} {dtype} {constants}"
    return TritonCase(name, kernel, types, constants, strides, max_registers=80)
