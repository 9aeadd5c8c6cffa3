"""Every environment variable of the package, with its default and effect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Setting(NamedTuple):
    name: str
    default: str
    effect: str

    def value(self) -> str:
        return os.environ.get(self.name) or self.default


CUDA = Setting(
    "MTLLM_FAST_CUDA", "auto", "build: 1 requires the CUDA extension, 0 leaves it out, auto builds it with nvcc"
)
CUDA_ARCHS = Setting(
    "MTLLM_FAST_CUDA_ARCHS", "80-real;90a-real;100-real", "build: GPU architectures, as CMake writes them"
)
CPU = Setting(
    "MTLLM_FAST_CPU", "auto", "build: 1 requires the CPU extension, 0 leaves it out, auto builds it with a C++ compiler"
)
CPU_LEVEL = Setting(
    "MTLLM_FAST_CPU_LEVEL",
    "auto",
    "instruction set of the CPU extension: baseline, avx2 or avx512; auto takes the best",
)
CACHE = Setting("MTLLM_FAST_CACHE", "~/.cache/mtllm_fast", "folder of generated files (the tiny checkpoint)")
BACKEND = Setting(
    "MTLLM_FAST_BACKEND",
    "auto",
    "backend that serves wherever an op has it and it can, in place of auto's choice: cuda, triton, cpu or reference",
)

SETTINGS = (BACKEND, CUDA, CUDA_ARCHS, CPU, CPU_LEVEL, CACHE)


def cache_dir() -> Path:
    """The folder for generated files; made by whoever writes there."""
    return Path(CACHE.value()).expanduser()
