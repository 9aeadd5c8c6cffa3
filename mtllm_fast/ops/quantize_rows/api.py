"""``quantize_rows`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_shape
from mtllm_fast.core.dispatch import needs_registered_op
from mtllm_fast.ops.quantize_rows import schema

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rows as 8-bit floats with a scale each: ``q[t] = e4m3(x[t] / scale[t])``, ``scale[t] = max_k |x[t, k]| / 448``.

    448 is the largest value of e4m3 (3 bits of mantissa; Micikevicius et al., "FP8 Formats for Deep Learning", 2022),
    so nothing overflows, and rounding is to the nearest, ties to even: an element errs by at most 1/16 of itself, or by
    2^-10 of ``scale`` where it is small. One scale per token keeps an outlier in its own row; one per row of a weight
    is one per output channel. What ``torch._scaled_mm`` multiplies: ``x wᵀ ≈ scale_x (q_x q_wᵀ) scale_wᵀ``.

    A row of zeros gives zeros; the scale is at least ``2^-100 / 448``. A row that holds NaN or an infinity becomes NaN,
    scale and values, and so does its product. Deterministic; not differentiable (its gradient raises).

    Args:
        x: ``[T, K]``, fp32, bf16 or fp16; rows may be strided.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        ``q`` ``[T, K]`` float8_e4m3fn and ``scale`` ``[T, 1]`` float32, both contiguous.

    Raises:
        ValueError, TypeError: x's shape or dtype is wrong.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> q, scale = quantize_rows(torch.tensor([[7.0, -1.0, 0.3], [0.0, 0.0, 0.0]]))
    >>> q.float()
    tensor([[448., -64.,  20.],
            [  0.,   0.,   0.]])
    >>> q.float() * scale
    tensor([[ 7.0000, -1.0000,  0.3125],
            [ 0.0000,  0.0000,  0.0000]])
    """
    _check(x)
    return schema.quantize_op(x, backend) if needs_registered_op(x) else schema.launch(x, backend)


def explain(x: Tensor, *, backend: str = "auto") -> Explanation:
    """Which backend serves this call of ``quantize_rows``, and why the others do not."""
    _check(x)
    return schema.BACKENDS.explain(backend, x)


def _check(x: Tensor) -> None:
    check_shape("quantize_rows", "x", x, ("T", "K"))
    check_dtype("quantize_rows", "x", x, _FLOATS)
