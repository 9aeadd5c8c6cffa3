"""The CUDA extension ``mtllm_fast._cuda``: loading it, launching from it, and why it cannot serve."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core.devices import compute_capability
from mtllm_fast.core.errors import CudaKernelError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""``mtllm::DType`` of csrc/include/mtllm/status.h."""


def build_record() -> dict[str, Any]:
    """What setup.py wrote down: which extensions were built, and why not."""
    record = Path(__file__).parents[1] / "_build_info.json"
    return json.loads(record.read_text()) if record.exists() else {}


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mtllm_fast._cuda"), ""
    except ImportError as error:
        left_out = build_record().get("cuda_left_out_because", "")
        return None, f"the CUDA extension was not built: {left_out or error}"


def why_not_built() -> str | None:
    """Why there is no CUDA extension, or None if there is one."""
    return _load()[1] or None


def extension() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise CudaKernelError(reason)
    return module


def architectures() -> tuple[str, ...]:
    """What the extension was built for, e.g. ``("80-real", "90a-real", "100-real")``."""
    return tuple(extension().architectures.split(","))


@functools.cache
def _runs_on(capability: tuple[int, int]) -> bool:
    for architecture in architectures():
        name, _, kind = architecture.partition("-")
        built = divmod(int(name.rstrip("af")), 10)
        same_major = (
            built[0] == capability[0] and built[1] <= capability[1]
        )  # machine code runs within its major version
        if built == capability if name.endswith("a") else same_major or (kind != "real" and built <= capability):
            return True
    return False


def why_not_cuda(tensor: Tensor) -> str | None:
    """Why the extension's kernels cannot serve ``tensor``'s device, or None if they can."""
    if not tensor.is_cuda:
        return f"the tensors are on {tensor.device.type}"
    module, reason = _load()
    if module is None:
        return reason
    capability = compute_capability(tensor.device.index)
    if not _runs_on(capability):
        needed = f"{capability[0]}{capability[1]}-real"
        return f"it was built for {', '.join(architectures())}; rebuild with MTLLM_FAST_CUDA_ARCHS={needed}"
    return None


def stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def address(tensor: Tensor | None) -> int:
    """Of its first element; 0, a null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check(op: str, status: int) -> None:
    """Raises for a status other than 0."""
    if status != 0:
        raise CudaKernelError(f"{op}: {extension().status_message(status)}")
