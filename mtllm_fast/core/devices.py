"""Facts about this machine, each looked up once and only when asked for: importing this file touches no device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor


@functools.cache
def compute_capability(index: int) -> tuple[int, int]:
    """(major, minor) of CUDA device ``index``, e.g. (9, 0) for an H200."""
    return torch.cuda.get_device_capability(index)


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run on the CPU as Python. Triton reads this variable itself, when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(tensor: Tensor) -> str | None:
    """Why Triton cannot serve ``tensor``'s device, or None if it can."""
    if not _triton_installed():
        return "triton is not installed"
    if tensor.device.type == "cpu":
        return None if triton_is_interpreted() else "the tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device.type}"
    if torch.version.hip is None and compute_capability(tensor.device.index) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


def guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes ``tensor``'s device current for a kernel launch; free on the CPU and when it is current already."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
