"""Every Triton kernel, compiled for GPUs that are not there; and the lint itself, on kernels with a defect each."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mtllm_fast.ops

pytest.importorskip("triton", reason="Triton's compiler is not installed")


FOR_NEWER_GPUS = {"quantize_rows_kernel"}  # 8-bit floats come with sm_89


def run_lint(*arguments: str) -> tuple[int, list[dict]]:
    # In a process of its own: in this one, Triton interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mtllm_fast.testing.aot_lint", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def kernels_of_the_package() -> set[str]:
    """The functions that a backend launches: ``@triton.jit`` and named ``..._kernel``."""
    names = set()
    for path in Path(mtllm_fast.ops.__file__).parent.glob("*/triton_backend.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        names |= {f.name for f in functions if f.decorator_list and f.name.endswith("_kernel")}
    return names


@pytest.mark.slow
def test_every_kernel_on_every_architecture() -> None:
    code, reports = run_lint()
    problems = [(report["kernel"], report["arch"], report["problems"]) for report in reports if report["problems"]]
    assert not problems
    assert code == 0
    for arch, missing in ((80, FOR_NEWER_GPUS), (90, set()), (100, set())):
        found = {report["kernel"].split()[0] for report in reports if report["arch"] == arch}
        assert found == kernels_of_the_package() - missing


@pytest.mark.slow
def test_the_lint_finds_defects() -> None:
    code, reports = run_lint("bad_kernels", "--arch", "90")
    assert code == 1
    found = {report["kernel"]: " ".join(report["problems"]) for report in reports}
    expected = {
        "good": "",
        "float64 eps": "float64 instructions",
        "unaligned rows": "no 128-bit loads",
        "spills": "bytes of stack",
        "too many registers": "registers, the budget is 32",
        "too much shared memory": "bytes of shared memory, the budget is 0",
    }
    assert found.keys() == expected.keys()
    assert not found.pop("good")
    assert all(expected[name] in problem for name, problem in found.items()), found
