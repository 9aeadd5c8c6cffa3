"""Metadata is in pyproject.toml; this file drives CMake for the extensions ``_cpu`` and ``_cuda``.

MTLLM_FAST_CUDA        auto (default): build with nvcc, else say what was left out. 1: fail without nvcc. 0: leave out.
MTLLM_FAST_CPU         the same for the CPU extension, which needs a C++ compiler.
MTLLM_FAST_CUDA_ARCHS  CMake's CUDA_ARCHITECTURES (default: those of DEFAULT_ARCHITECTURES that nvcc knows).
CUDACXX                the nvcc to use; when it is set, no other place is searched.
CXX                    the C++ compiler to use, likewise.

A compile error always fails the build. Neither torch nor a GPU is needed, and torch is never imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("80-real", "90a-real", "100-real")


def nvcc_candidates() -> list[str]:
    if os.environ.get("CUDACXX"):
        return [os.environ["CUDACXX"]]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [f"{home}/bin/nvcc" for home in homes] + ["nvcc", "/usr/local/cuda/bin/nvcc"]


def compiler_candidates() -> list[str]:
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]


def plan(setting: str, what: str, candidates: list[str], advice: str) -> tuple[str | None, str]:
    """The compiler to build with, or None and the reason why the extension is left out."""
    mode = os.environ.get(setting, "auto")
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"{setting} must be 0, 1 or auto, got {mode!r}")
    if mode == "0":
        return None, f"{setting}=0"
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found, ""
    reason = f"no {what} found (looked for {', '.join(candidates)})"
    if mode == "1":
        raise SystemExit(f"mtllm-fast: {setting}=1, but {reason}. {advice}")
    return None, reason


def architectures(nvcc: str) -> list[str]:
    if chosen := os.environ.get("MTLLM_FAST_CUDA_ARCHS"):
        return chosen.split(";")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    kept = [arch for arch in DEFAULT_ARCHITECTURES if f"sm_{arch.split('-')[0].rstrip('a')}" in known]
    if dropped := sorted(set(DEFAULT_ARCHITECTURES) - set(kept)):
        print(f"mtllm-fast: {nvcc} does not know {', '.join(dropped)}: left out", file=sys.stderr)
    return kept


def pybind11_include() -> Path:
    """pybind11's headers: the package's own, else the copy inside torch (found without importing torch)."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (Path(spec.origin).parent / folder / "pybind11" / "pybind11.h").exists():
            return Path(spec.origin).parent / folder
    raise SystemExit("mtllm-fast: pybind11's headers were found neither in pybind11 nor in torch: pip install pybind11")


def tool(name: str) -> str | None:
    """An executable in PATH, else one of this Python environment (which need not be activated)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def build_extensions(package: Path) -> None:
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        raise SystemExit("mtllm-fast: the extensions need cmake: pip install cmake ninja")
    # Not setuptools' temporary folder: this one survives, so that a second editable install compiles only what changed.
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "MTLLM_CPU": "ON" if COMPILER else "OFF",
        "MTLLM_CUDA": "ON" if NVCC else "OFF",
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_INCLUDE_DIR": str(pybind11_include()),
    }
    if COMPILER:
        options["CMAKE_CXX_COMPILER"] = COMPILER
    if NVCC:
        options |= {"CMAKE_CUDA_COMPILER": NVCC, "CMAKE_CUDA_ARCHITECTURES": ";".join(architectures(NVCC))}
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    flags = [f"-D{name}={value}" for name, value in options.items()]
    for arguments in (
        ["-S", str(ROOT), "-B", str(build), *generator, *flags],
        ["--build", str(build), "--parallel"],
        ["--install", str(build), "--prefix", str(package)],
    ):
        if subprocess.run([cmake, *arguments]).returncode:
            leave_out = " and ".join(
                [
                    f"MTLLM_FAST_{name}=0 leaves {name} out"
                    for name, built in (("CUDA", NVCC), ("CPU", COMPILER))
                    if built
                ]
            )
            raise SystemExit(f"mtllm-fast: cmake {' '.join(arguments)} failed; {leave_out}")


NVCC, NO_CUDA_BECAUSE = plan("MTLLM_FAST_CUDA", "nvcc", nvcc_candidates(), "Install the CUDA toolkit or set CUDACXX.")
COMPILER, NO_CPU_BECAUSE = plan(
    "MTLLM_FAST_CPU", "C++ compiler", compiler_candidates(), "Install g++ or clang++ or set CXX."
)
EXTENSIONS = (("cuda", NVCC, NO_CUDA_BECAUSE), ("cpu", COMPILER, NO_CPU_BECAUSE))


def record(package: Path) -> None:
    """Leave beside the code what ``mtllm-fast env`` needs to say why there is no extension."""
    package.mkdir(parents=True, exist_ok=True)
    info: dict[str, bool | str] = {}
    for name, compiler, reason in EXTENSIONS:
        info |= {f"{name}_extension": compiler is not None, f"{name}_left_out_because": reason}
        if compiler is None:
            print(f"mtllm-fast: {name.upper()} extension left out: {reason}", file=sys.stderr)
            for stale in package.glob(f"_{name}*.so"):
                stale.unlink()
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        record((ROOT if self.editable_mode else Path(self.build_lib)) / "mtllm_fast")


class BuildExtensions(build_ext):
    def run(self) -> None:
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "mtllm_fast"
        record(package)
        if NVCC or COMPILER:
            build_extensions(package)


setup(
    ext_modules=[Extension(f"mtllm_fast._{name}", sources=[]) for name, compiler, _ in EXTENSIONS if compiler],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildExtensions},
)
