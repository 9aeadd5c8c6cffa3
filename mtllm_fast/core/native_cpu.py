"""The extension for the CPU ``mtllm_fast._cpu``: loading it, the level that it runs at, and why it cannot serve."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core import native
from mtllm_fast.core.errors import CpuKernelError
from mtllm_fast.core.settings import CPU_LEVEL

LEVELS = ("baseline", "avx2", "avx512")
"""Instruction sets that the kernels are compiled for, as csrc/cpu/kernels.h numbers them."""


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mtllm_fast._cpu"), ""
    except ImportError as error:
        left_out = native.build_record().get("cpu_left_out_because", "")
        return None, f"the CPU extension was not built: {left_out or error}"


def why_not_built() -> str | None:
    """Why there is no extension for the CPU, or None if there is one."""
    return _load()[1] or None


def why_not_cpu(tensor: Tensor) -> str | None:
    """Why the extension's kernels cannot serve ``tensor``, or None if they can."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device.type}"
    if reason := why_not_built():
        return reason
    if tensor.dtype == torch.float64:
        return "its kernels compute in float32 and the states are float64"
    return None if tensor.shape[-1] else "the states have no columns"


def extension() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise CpuKernelError(reason)
    return module


def levels() -> tuple[str, ...]:
    """The levels that this build has and this processor runs, best last."""
    return tuple(name for number, name in enumerate(LEVELS) if extension().runs(number))


def heads(states: Tensor) -> Any:
    """``mtllm::cpu::Heads`` of ``[T, H, D]`` with adjacent columns; the caller keeps the tensor alive."""
    dtype = native.DTYPES[states.dtype]
    return extension().heads(dtype, states.data_ptr(), *states.stride()[:2], *states.shape)


@functools.cache
def level() -> int:
    """The number of the best level, or of the one that ``MTLLM_FAST_CPU_LEVEL`` names.

    Raises:
        CpuKernelError: this build or this processor lacks the level that was named.
    """
    wanted = CPU_LEVEL.value()
    if wanted == CPU_LEVEL.default:
        return LEVELS.index(levels()[-1])
    if wanted not in levels():
        raise CpuKernelError(f"{CPU_LEVEL.name} must be auto or one of {', '.join(levels())} here, got {wanted!r}")
    return LEVELS.index(wanted)


def check(op: str, status: int) -> None:
    """Raises for a status other than 0."""
    if status != 0:
        raise CpuKernelError(f"{op}: this build or this processor has no level {level()}")
