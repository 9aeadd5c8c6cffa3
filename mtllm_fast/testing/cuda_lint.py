"""Checks the machine code of the built CUDA extension: spills, registers, 16-byte loads. Needs no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mtllm_fast.core.aot import CudaCase
from mtllm_fast.ops import OPS

WIDE_LOAD = re.compile(r"\b(?:LDG|LDGSTS)(?:\.\w+)*\.128\b|\bUTMALDG\b|\bUBLKCP\b")
LOCAL_ACCESS = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class KernelCode:
    """What one kernel of one architecture compiled to."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    sass: str = field(repr=False)


def cuobjdump() -> str:
    """The disassembler of the CUDA toolkit, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("cuobjdump is in neither PATH nor Triton: install the CUDA toolkit or triton")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def disassemble(binary: Path, option: str) -> str:
    """What ``cuobjdump OPTION`` prints for a cubin or an extension module."""
    tool = cuobjdump()
    # cuobjdump calls nvdisasm, which lies beside it.
    environment = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ.get('PATH', '')}"}
    return subprocess.run([tool, option, binary], capture_output=True, text=True, check=True, env=environment).stdout


def cuda_cases() -> list[CudaCase]:
    """The ``LINT_CASES`` of all ops' CUDA backends."""
    names = [f"mtllm_fast.ops.{op}.cuda_backend" for op in OPS]
    return [
        case for name in names if importlib.util.find_spec(name) for case in importlib.import_module(name).LINT_CASES
    ]


def kernels(binary: Path) -> list[KernelCode]:
    """The machine code of every kernel in an extension module, for every architecture."""
    sass = {(arch, kernel): text for arch, kernel, text in _functions(disassemble(binary, "-sass"))}
    return [
        KernelCode(kernel, arch, registers, shared, stack, sass[arch, kernel])
        for arch, kernel, registers, shared, stack in _usage(disassemble(binary, "-res-usage"))
    ]


def describes(case: CudaCase, code: KernelCode) -> bool:
    return re.search(case.pattern, code.kernel) is not None


def problems(code: KernelCode, cases: list[CudaCase]) -> list[str]:
    """What is wrong with a kernel, in words; it must be described by exactly one case."""
    mine = [case for case in cases if describes(case, code)]
    if len(mine) != 1:
        return [f"{len(mine)} lint cases describe this kernel, there must be one"]
    found = []
    if code.stack or LOCAL_ACCESS.search(code.sass):
        found.append(f"spills: {code.stack} bytes of stack, {len(LOCAL_ACCESS.findall(code.sass))} accesses")
    if code.registers > mine[0].max_registers:
        found.append(f"{code.registers} registers, the budget is {mine[0].max_registers}")
    found += [f"no instruction matches {wanted}" for wanted in mine[0].must_contain if not re.search(wanted, code.sass)]
    return found


def _usage(text: str) -> Iterator[tuple[str, str, int, int, int]]:
    """(architecture, kernel, registers, shared memory, stack and local memory)"""
    arch = kernel = ""
    for line in text.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\S+):", line):
            kernel = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            yield arch, kernel, registers, shared, stack + local


def _functions(sass: str) -> Iterator[tuple[str, str, str]]:
    for section in sass.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (sm_\w+)", section)
        assert arch is not None, section[:200]
        for function in section.split("Function : ")[1:]:
            name, _, body = function.partition("\n")
            yield arch[1], name.strip(), body
