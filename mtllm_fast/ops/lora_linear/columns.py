"""Gradients of neighbouring columns of one matrix, back in one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merged(grads: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """``[T, Σ sizes]`` from ``[T, size]`` each; None is zero.

    Without a copy where a kernel has written them into one buffer, side by side.
    """
    first = next(grad for grad in grads if grad is not None)
    if len(grads) == 1:
        return first
    present = [first.new_zeros(first.shape[0], n) if g is None else g for g, n in zip(grads, sizes, strict=True)]
    if _side_by_side(present):
        return present[0].as_strided((first.shape[0], sum(sizes)), present[0].stride(), present[0].storage_offset())
    return torch.cat(present, dim=1)


def _side_by_side(grads: Sequence[Tensor]) -> bool:
    expected, first = grads[0].storage_offset(), grads[0]
    for grad in grads:
        same_buffer = grad.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same_buffer or grad.stride() != first.stride() or grad.storage_offset() != expected:
            return False
        expected += grad.shape[1]
    return first.stride(1) == 1 and first.stride(0) >= expected - first.storage_offset()
