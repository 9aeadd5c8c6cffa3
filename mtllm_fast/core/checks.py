"""Checks of op arguments by metadata alone: they never read a tensor's values, so they never wait for a GPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def _shape(sizes: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Raises unless ``tensor`` has this shape; a string names a size that may be anything, e.g. ``("T", 4096)``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    actual = tensor.shape
    same = len(actual) == len(shape)
    for size, expected in zip(actual, shape, strict=False):  # no generator: this runs on every eager call
        same = same and (size == expected or isinstance(expected, str))
    if not same:
        raise ValueError(f"{op}: {name} must be {_shape(shape)}, got {_shape(actual)}")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Collection[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Raises unless all tensors lie on the device of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like {first_name}, got {tensor.device}")


def check_cu_seqlens(op: str, name: str, cu_seqlens: Tensor) -> None:
    """``cu_seqlens`` is int32 [B+1]. That it starts with 0 and never decreases is the caller's promise."""
    check_shape(op, name, cu_seqlens, ("B+1",))
    check_dtype(op, name, cu_seqlens, (torch.int32,))
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: {name} must be [B+1] and start with 0, got an empty tensor")


def check_choice(op: str, name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
