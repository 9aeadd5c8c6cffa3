"""The native build without and with a compiler, and the machine code that it made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mtllm_fast.core import native
from mtllm_fast.ops.norm_pool import cuda_backend
from mtllm_fast.testing import cuda_lint

ROOT = Path(__file__).parents[1]
needs_extension = pytest.mark.skipif(native.why_not_built() is not None, reason=native.why_not_built() or "")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the build reads, with an empty package."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "mtllm_fast").mkdir()
    (tmp_path / "mtllm_fast" / "__init__.py").touch()
    return tmp_path


def build(project: Path, command: str = "build", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py where ``import torch`` raises and pybind11 has no headers of its own; torch has."""
    for package in ("torch", "pybind11"):
        (project / "fakes" / package).mkdir(parents=True, exist_ok=True)
        (project / "fakes" / package / "__init__.py").write_text("raise AssertionError('imported by the build')")
    headers = project / "fakes" / "torch" / "include" / "pybind11"
    headers.mkdir(parents=True, exist_ok=True)
    (headers / "pybind11.h").touch()
    return subprocess.run(
        [sys.executable, "setup.py", command], cwd=project, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(project / "fakes"), "MTLLM_FAST_CPU": "0", **environment},
    )  # fmt: skip


def fake_tools(project: Path, cmake_exit: int = 0) -> dict[str, str]:
    """An nvcc that knows three architectures, and a cmake that writes its arguments down."""
    tools = project / "tools"
    tools.mkdir()
    (tools / "nvcc").write_text("#!/bin/sh\nprintf 'sm_80\\nsm_90\\nsm_120\\n'\n")
    (tools / "cmake").write_text(f'#!/bin/sh\necho "$@" >> {tools}/calls\nexit {cmake_exit}\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {"CUDACXX": str(tools / "nvcc"), "PATH": f"{tools}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MTLLM_FAST_CUDA": "0"}, "MTLLM_FAST_CUDA=0"),
        ({"CUDACXX": "/nowhere/nvcc"}, "no nvcc found (looked for /nowhere/nvcc)"),
        ({"CUDACXX": "/nowhere/nvcc", "MTLLM_FAST_CUDA": "auto"}, "no nvcc found (looked for /nowhere/nvcc)"),
    ],
)
@pytest.mark.parametrize("command", ["build", "build_ext"])
def test_builds_without_cuda_and_says_so(project: Path, command: str, environment: dict[str, str], reason: str) -> None:
    done = build(project, command, **environment)
    assert done.returncode == 0, done.stderr
    assert f"mtllm-fast: CUDA extension left out: {reason}" in done.stderr
    (record,) = project.glob("build/**/_build_info.json")
    info = json.loads(record.read_text())
    assert info["cuda_extension"] is False
    assert info["cuda_left_out_because"] == reason


def test_demanding_cuda_without_nvcc_fails(project: Path) -> None:
    done = build(project, MTLLM_FAST_CUDA="1", CUDACXX="/nowhere/nvcc")
    assert done.returncode != 0
    assert "MTLLM_FAST_CUDA=1, but no nvcc found (looked for /nowhere/nvcc)" in done.stderr


def test_unknown_mode_fails(project: Path) -> None:
    done = build(project, MTLLM_FAST_CUDA="yes")
    assert done.returncode != 0
    assert "MTLLM_FAST_CUDA must be 0, 1 or auto, got 'yes'" in done.stderr


def test_what_cmake_is_told(project: Path) -> None:
    done = build(project, "build_ext", **fake_tools(project))
    assert done.returncode == 0, done.stderr
    configure, compile_, install = (project / "tools" / "calls").read_text().splitlines()
    assert "-DMTLLM_CPU=OFF -DMTLLM_CUDA=ON " in configure
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real" in configure
    assert "100-real" not in configure
    assert "does not know 100-real: left out" in done.stderr
    assert f"-DPYBIND11_INCLUDE_DIR={project}/fakes/torch/include" in configure
    assert compile_.startswith("--build")
    assert install.startswith("--install")


def test_architectures_can_be_chosen(project: Path) -> None:
    done = build(project, "build_ext", **fake_tools(project), MTLLM_FAST_CUDA_ARCHS="120-real")
    assert done.returncode == 0, done.stderr
    assert "-DCMAKE_CUDA_ARCHITECTURES=120-real\n" in (project / "tools" / "calls").read_text()


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_a_compile_error_is_never_swallowed(project: Path, mode: str) -> None:
    done = build(project, "build_ext", **fake_tools(project, cmake_exit=1), MTLLM_FAST_CUDA=mode)
    assert done.returncode != 0
    assert "failed; MTLLM_FAST_CUDA=0 leaves CUDA out" in done.stderr


@pytest.fixture(scope="module")
def machine_code() -> list[cuda_lint.KernelCode]:
    return cuda_lint.kernels(Path(native.extension().__file__))


@needs_extension
def test_machine_code(machine_code: list[cuda_lint.KernelCode]) -> None:
    cases = cuda_lint.cuda_cases()
    problems = {(code.kernel, code.arch): cuda_lint.problems(code, cases) for code in machine_code}
    assert not {kernel: problem for kernel, problem in problems.items() if problem}
    built = {f"sm_{architecture.removesuffix('-real')}" for architecture in native.architectures()}
    for case in cases:
        found = {code.arch for code in machine_code if cuda_lint.describes(case, code)}
        assert found == built, f"{case.pattern} describes no kernel for {built - found}"


@needs_extension
def test_the_lint_finds_defects(machine_code: list[cuda_lint.KernelCode]) -> None:
    case = cuda_backend.LINT_CASES[0]
    strict = [case._replace(max_registers=20, must_contain=("HGMMA",))]
    for code in machine_code:
        if cuda_lint.describes(case, code):
            expected = [f"{code.registers} registers, the budget is 20", "no instruction matches HGMMA"]
        else:
            expected = ["0 lint cases describe this kernel, there must be one"]
        assert cuda_lint.problems(code, strict) == expected
    spilled = replace(machine_code[0], stack=8, sass="STL [R1], R2 ;")
    assert "spills: 8 bytes of stack, 1 accesses" in cuda_lint.problems(spilled, cuda_lint.cuda_cases())


@needs_extension
def test_the_extension_is_on_its_own() -> None:
    """It imports without torch and without a GPU, exports one symbol, and reports an error instead of dying."""
    path = native.extension().__file__
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.norm_pool_forward(0, 0, 1, 0, True, 0, 0, 0, 0, 4, 1, 0, 8, 1e-5, 0, 0), module.status_message(-1))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "-1 an argument is outside of what this kernel supports\n"
    if shutil.which("nm"):
        symbols = subprocess.run(
            ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__cuda"]


def test_a_gpu_that_the_binary_does_not_cover_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "architectures", lambda: ("80-real", "90a-real", "100-real", "120"))
    native._runs_on.cache_clear()
    runs = {
        capability: native._runs_on(capability)
        for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0))
    }
    native._runs_on.cache_clear()
    assert [capability for capability, able in runs.items() if not able] == [(7, 5), (11, 0)]
