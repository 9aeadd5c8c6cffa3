"""The CUDA C++ kernels of ``stack_projection`` (csrc/stack_projection.cu).

Up to 64 tokens: one kernel that reads every weight once, whatever the number of tokens up to 32, then the epilogue; two
launches. More tokens: the framework's products (the one of qkv with its float32 accumulators), then the same epilogue.
Floor at T=32, d=1024, D=4096, N=6144, bf16: 21 MB of weights, 5 µs at 4.3 TB/s; the float32 products in between stay in
the L2 cache. Not yet measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.core import native
from mtllm_fast.core.aot import CudaCase
from mtllm_fast.core.devices import guard
from mtllm_fast.ops.stack_projection.composite import FEW_TOKENS, wide_mm

_TILE = 32  # kRows: columns of x per sum of squares

LINT_CASES = (
    # All of a block's weights are in flight in registers: 16 loads of 16 bytes per lane before the first product.
    CudaCase(r"stack_products_kernel", max_registers=168, must_contain=(r"LDG\.E(\.\w+)*\.128", r"HMMA\.16816\.F32")),
    CudaCase(r"stack_(epilogue|backward)_kernel", max_registers=64, must_contain=(r"LDG\.E(\.\w+)*\.128",)),
)


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
    """(x [T, D], qkv [T, N], rstd [T]); ``head_norms`` is None (the backend cannot serve them)."""
    e = encoder_states
    (T, d), D, N = e.shape, up_weight.shape[0], weight.shape[0]
    qkv, rstd = e.new_empty(T, N), torch.empty(T, dtype=torch.float32, device=e.device)
    dtype, stream = native.DTYPES[e.dtype], native.stream(e)
    shape = native.extension().stack_shape(T, D, N, num_rotated, head_dim, eps)
    if T <= FEW_TOKENS:
        x = e.new_empty(T, D)
        raw = torch.empty(T, N, dtype=torch.float32, device=e.device)
        squares = torch.empty(-(-D // _TILE), T, dtype=torch.float32, device=e.device)
        up_bias = _readable(up_bias, e)
        with guard(e):
            status = native.extension().stack_products(
                dtype, e.data_ptr(), d, up_weight.data_ptr(), native.address(up_bias),
                up_bias is not None and up_bias.dtype == torch.float32, weight.data_ptr(), native.address(residual),
                x.data_ptr(), raw.data_ptr(), squares.data_ptr(), shape, stream,
            )  # fmt: skip
        native.check("stack_projection products", status)
    else:
        x, squares = F.linear(e, up_weight, None if up_bias is None else up_bias.to(e.dtype)), None
        raw = wide_mm(e, weight.t())  # in float32: the composite's bias may nearly cancel it
        if residual is not None:
            raw += wide_mm(e, residual.t())
    tables, kept = _rope_tables(cos, sin, position_ids, e)
    with guard(e):
        status = native.extension().stack_epilogue(
            dtype, x.data_ptr(), native.address(squares), raw.data_ptr(), bias.data_ptr(), native.address(qkv_bias),
            tables, qkv.data_ptr(), rstd.data_ptr(), shape, stream,
        )  # fmt: skip
    del kept
    native.check("stack_projection epilogue", status)
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
    grad_hidden, grad_raw = torch.empty_like(x), torch.empty_like(qkv)
    tables, kept = _rope_tables(cos, sin, position_ids, x)
    shape = native.extension().stack_shape(*x.shape, qkv.shape[1], num_rotated, head_dim, 0.0)
    with guard(x):
        status = native.extension().stack_backward(
            native.DTYPES[x.dtype], grad_x.data_ptr(), grad_qkv.data_ptr(), x.data_ptr(), qkv.data_ptr(),
            rstd.data_ptr(), native.address(qkv_bias), tables, grad_hidden.data_ptr(), grad_raw.data_ptr(), shape,
            native.stream(x),
        )  # fmt: skip
    del kept
    native.check("stack_projection backward", status)
    return grad_hidden, grad_raw


def _rope_tables(
    cos: Tensor | None, sin: Tensor | None, position_ids: Tensor | None, like: Tensor
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The tables as the kernels read them, and the tensors that must live until the launch."""
    cos, sin = (_readable(table, like) for table in (cos, sin))
    stride = 0 if cos is None else cos.stride(0)
    wide = cos is not None and cos.dtype == torch.float32
    tables = native.extension().rope_tables(
        native.address(cos), native.address(sin), stride, wide, native.address(position_ids)
    )
    return tables, (cos, sin, position_ids)


def _readable(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype in (like.dtype, torch.float32) else tensor.float()
