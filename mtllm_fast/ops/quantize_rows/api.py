"""``quantize_rows`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_registered_op
from mtllm_fast.ops.quantize_rows import schema

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(
    x: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Rows as 8-bit floats with a scale each: ``q[t] = e4m3(x[t] / scale[t])``, ``scale[t] = max_k |x[t, k]| / 448``.

    448 is the largest value of e4m3 (3 bits of mantissa; Micikevicius et al., "FP8 Formats for Deep Learning", 2022),
    so nothing overflows, and rounding is to the nearest, ties to even: an element errs by at most 1/16 of itself, or by
    2^-10 of ``scale`` where it is small. One scale per token keeps an outlier in its own row; one per row of a weight
    is one per output channel. What ``torch._scaled_mm`` multiplies: ``x wᵀ ≈ scale_x (q_x q_wᵀ) scale_wᵀ``.

    What an LLM computes right before such a product can be part of the same pass, which then writes no other result:
    ``rms_norm(x, norm_weight, eps=eps, residual=residual)``, or ``swiglu(x)`` of a merged gate and up. The values are
    rounded to the dtype of x in between, as if they had been written; the norm may add up in another order.

    A row of zeros gives zeros; the scale is at least ``2^-100 / 448``. A row that holds NaN or an infinity becomes NaN,
    scale and values, and so does its product. Deterministic; not differentiable (its gradient raises).

    Args:
        x: ``[T, K]`` (``gated``: ``[T, 2 K]``, gate, then up), fp32, bf16 or fp16; rows may be strided.
        norm_weight, eps: ``[K]``, the gain of an RMSNorm before, and what is added to its mean square.
        residual: like x, added to it before the norm.
        gated: whether the rows are ``silu(gate) ⊙ up``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        ``q`` ``[T, K]`` float8_e4m3fn and ``scale`` ``[T, 1]`` float32, both contiguous; with a residual also the sum
        ``[T, K]`` in the dtype of x.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong, or they do not go together.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> q, scale = quantize_rows(torch.tensor([[7.0, -1.0, 0.3], [0.0, 0.0, 0.0]]))
    >>> q.float()
    tensor([[448., -64.,  20.],
            [  0.,   0.,   0.]])
    >>> q.float() * scale
    tensor([[ 7.0000, -1.0000,  0.3125],
            [ 0.0000,  0.0000,  0.0000]])
    >>> q, scale = quantize_rows(torch.tensor([[1.0, 2.0, 3.0, 1.0]]), gated=True)
    >>> q.float() * scale
    tensor([[2.1932, 1.7232]])
    """
    _check(x, norm_weight, eps, residual, gated)
    tensors = [tensor for tensor in (x, norm_weight, residual) if tensor is not None]
    quantize = schema.quantize_op if needs_registered_op(*tensors) else schema.launch
    q, scale, summed = quantize(x, norm_weight, residual, eps or 0.0, gated, backend)
    return (q, scale) if residual is None else (q, scale, summed)


def explain(
    x: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Which backend serves this call of ``quantize_rows``, and why the others do not."""
    _check(x, norm_weight, eps, residual, gated)
    return schema.BACKENDS.explain(backend, x, gated or norm_weight is not None, gated)


def _check(x: Tensor, norm_weight: Tensor | None, eps: float | None, residual: Tensor | None, gated: bool) -> None:
    check_shape("quantize_rows", "x", x, ("T", "K"))
    check_dtype("quantize_rows", "x", x, _FLOATS)
    if gated and (norm_weight is not None or residual is not None or x.shape[1] % 2):
        given = [name for name, value in (("norm_weight", norm_weight), ("residual", residual)) if value is not None]
        raise ValueError(
            f"quantize_rows: gated takes x [T, 2 K] alone, got {list(x.shape)} {' and '.join(given)}".rstrip()
        )
    if (norm_weight is None) != (eps is None):
        other = "no" if norm_weight is None else "a"
        raise ValueError(f"quantize_rows: norm_weight and eps go together, got eps={eps} and {other} norm_weight")
    if norm_weight is None:
        if residual is not None:
            raise ValueError("quantize_rows: residual is added before a norm, got no norm_weight")
        return
    check_shape("quantize_rows", "norm_weight", norm_weight, (x.shape[1],))
    check_dtype("quantize_rows", "norm_weight", norm_weight, _FLOATS)
    check_same_device("quantize_rows", x=x, norm_weight=norm_weight)
    if residual is not None:
        check_shape("quantize_rows", "residual", residual, x.shape)
        check_dtype("quantize_rows", "residual", residual, (x.dtype,))
        check_same_device("quantize_rows", x=x, residual=residual)
