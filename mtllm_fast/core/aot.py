"""What an op declares so that the machine code of its kernels can be checked without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class TritonCase(NamedTuple):
    """One specialisation of one Triton kernel, as a real launch would compile it."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    """Argument name -> Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``), at least for all that are not constants."""
    constants: Mapping[str, Any]
    """What the launch passes by name: constexpr arguments, ``num_warps`` and other options."""
    multiples_of_16: tuple[str, ...] = ()
    """Integer arguments that a real launch finds divisible by 16; pointers always are."""
    max_registers: int = 255
    max_shared: int = 48 * 1024
    wide_loads: bool = True
    """Whether the kernel must read global memory 16 bytes at a time."""
    tensor_cores: bool = False
    """Whether it must multiply on the tensor cores: mma on sm_80, wgmma on sm_90, tcgen05 on sm_100."""
    min_arch: int = 80
    """The oldest architecture that has its instructions; 8-bit floats need 89."""


class CudaCase(NamedTuple):
    """The kernels of the CUDA extension whose mangled name matches ``pattern``, in every architecture."""

    pattern: str
    max_registers: int
    must_contain: tuple[str, ...] = ()
    """Regular expressions of instructions that the machine code must contain, e.g. 16-byte loads."""
