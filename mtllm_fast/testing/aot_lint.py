"""Compiles Triton kernels ahead of time for GPUs that are not there and checks the machine code.

    python -m mtllm_fast.testing.aot_lint [--arch 90 ...] [--jobs 2] [MODULE ...]

A module offers ``lint_cases()``; without names, all ops' ``triton_backend`` modules are taken. Prints one JSON object
per kernel and architecture, and exits with 1 if there is a problem. Needs Triton's compiler: TRITON_INTERPRET is off.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtllm_fast.core.aot import TritonCase
from mtllm_fast.ops import OPS
from mtllm_fast.testing.cuda_lint import disassemble

ARCHITECTURES = (80, 90, 100)
# 16 bytes at a time, in PTX: ptxas keeps the width, and disassembling takes longer than compiling.
WIDE_LOAD = re.compile(
    r"\bld\.global[\w.:]*\.(?:v4\.[a-z]32|v2\.[a-z]64)\b|\bcp\.async\.cg\.shared\.global\b|\bcp\.async\.bulk\b"
)
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel looks like; ``problems`` is empty if all is well."""

    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int
    f64_instructions: int
    wide_loads: int
    tensor_core_products: int
    problems: list[str]


def lint(case: TritonCase, arch: int) -> Report:
    """Compiles ``case`` for ``arch`` (80, 90 or 100) and checks it."""
    compiled = _compile(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = disassemble(Path(file.name), "-res-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    facts = {
        "registers": found["REG"],
        "shared": compiled.metadata.shared,
        "stack": found["STACK"] + found["LOCAL"],
        "f64_instructions": len(re.findall(r"\.f64\b", compiled.asm["ptx"])),
        "wide_loads": len(WIDE_LOAD.findall(compiled.asm["ptx"])),
        "tensor_core_products": len(re.findall(TENSOR_CORES[arch], compiled.asm["ptx"])),
    }
    return Report(case.name, arch, **facts, problems=_problems(case, facts))


def _problems(case: TritonCase, facts: dict[str, int]) -> list[str]:
    problems = []
    if facts["f64_instructions"]:
        problems.append(f"{facts['f64_instructions']} float64 instructions: a scalar argument arrives as fp64")
    if facts["stack"]:
        problems.append(f"spills: {facts['stack']} bytes of stack")
    if facts["registers"] > case.max_registers:
        problems.append(f"{facts['registers']} registers, the budget is {case.max_registers}")
    if facts["shared"] > case.max_shared:
        problems.append(f"{facts['shared']} bytes of shared memory, the budget is {case.max_shared}")
    if case.wide_loads and not facts["wide_loads"]:
        problems.append("no 128-bit loads from global memory")
    if case.tensor_cores and not facts["tensor_core_products"]:
        problems.append("no product on the tensor cores")
    return problems


def _compile(case: TritonCase, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    # What a real launch finds out about its arguments; without it the loads are scalar and the registers spill.
    multiples = [name for name in names if signature[name].startswith("*") or name in case.multiples_of_16]
    source = ASTSource(
        case.kernel,
        signature=signature,
        constexprs={name: value for name, value in case.constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    options = {name: value for name, value in case.constants.items() if name not in names}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _cases(modules: list[str]) -> list[TritonCase]:
    names = modules or [f"mtllm_fast.ops.{op}.triton_backend" for op in OPS]
    found = [name for name in names if modules or importlib.util.find_spec(name)]
    return [case for name in found for case in importlib.import_module(name).lint_cases()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)
    work = [(case, arch) for case in _cases(chosen.modules) for arch in chosen.arch if arch >= case.min_arch]
    failed = False
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for report in pool.map(lambda pair: lint(*pair), work):
            failed |= bool(report.problems)
            sys.stdout.write(json.dumps(asdict(report)) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
