"""Triton kernels with one defect each, to see that the ahead-of-time lint finds it."""

from __future__ import annotations

import triton
import triton.language as tl

from mtllm_fast.core.aot import TritonCase


@triton.jit
def rms_norm_kernel(x, y, stride_x, eps, D: tl.constexpr, rows: tl.constexpr):
    o_row = tl.program_id(0) * rows + tl.arange(0, rows)
    o_d = tl.arange(0, D)
    b_x = tl.load(x + o_row[:, None] * stride_x + o_d[None, :]).to(tl.float32)
    b_rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps)
    tl.store(y + o_row[:, None] * D + o_d[None, :], (b_x * b_rstd[:, None]).to(y.dtype.element_ty))


def _case(name: str, eps: str = "fp32", rows: int = 1, num_warps: int = 4, **options) -> TritonCase:
    types = {"x": "*bf16", "y": "*bf16", "stride_x": "i32", "eps": eps}
    constants = {"D": 2048, "rows": rows, "num_warps": num_warps}
    return TritonCase(name, rms_norm_kernel, types, constants, **{"multiples_of_16": ("stride_x",), **options})


def lint_cases() -> list[TritonCase]:
    return [
        _case("good"),
        _case("float64 eps", eps="fp64"),
        _case("unaligned rows", rows=2, multiples_of_16=()),
        _case("spills", rows=16, num_warps=1),
        _case("too many registers", rows=4, max_registers=32),
        _case("too much shared memory", max_shared=0),
    ]
