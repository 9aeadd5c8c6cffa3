"""Without a GPU, Triton kernels run under its interpreter; on one, the same tests run the compiled kernels."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small, and test workers share the cores
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU does not initialise CUDA

import shutil
from pathlib import Path

import emulated_cuda
import pytest
import torch

from mtllm_fast.core import native, native_cpu

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of Triton


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name. Where there is no GPU, "cuda" is csrc compiled for the CPU (see tests/emulated_cuda)."""
    if request.param == "cuda" and HAS_GPU and native.why_not_built():
        pytest.skip(str(native.why_not_built()))
    if request.param == "cpu" and (HAS_GPU or native_cpu.why_not_built()):
        pytest.skip(native_cpu.why_not_built() or "tensors are on the GPU")
    if request.param == "cuda" and not HAS_GPU:
        compiler = shutil.which("c++")
        if compiler is None:
            pytest.skip("neither a GPU nor a C++ compiler to emulate one")
        module = emulated_cuda.build(compiler, Path(__file__).parents[1] / "build")
        monkeypatch.setattr(native, "extension", lambda: module)
        monkeypatch.setattr(native, "why_not_cuda", lambda tensor: None)
        monkeypatch.setattr(native, "stream", lambda tensor: 0)
    return request.param


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU if there is one."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def absorbed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Absorb the first stage from the first token on; for each call that did, whether it had a composite."""
    from mtllm_fast.models import stack

    calls = []
    projection = stack.stack_projection

    def counted(*args, **options):
        calls.append(options["composite"] is not None)
        return projection(*args, **options)

    monkeypatch.setattr(stack, "break_even_tokens", lambda *sizes: 0)
    monkeypatch.setattr(stack, "stack_projection", counted)
    return calls
