"""Builds csrc for the CPU, so that the CUDA kernels' results are tested where there is no GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
LAUNCH = re.compile(r"(\w+<[^<>;]*>)<<<(.*?)>>>\((.*?)\);", re.DOTALL)


def _pybind11_include() -> Path:
    """pybind11's headers, or the copy of them in torch."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (include := Path(spec.origin).parent / "include").is_dir():
            return include
    raise FileNotFoundError("pybind11")


def build(compiler: str, cache: Path) -> ModuleType:
    """The extension module ``_cuda`` compiled for the CPU; compiled again only if a source has changed."""
    sources = sorted(path for folder in (CSRC, HERE) for path in folder.rglob("*.*") if path.suffix != ".pyc")
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = cache / f"emulated-{key}" / f"_cuda{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        own = target.parent / str(os.getpid())  # another test worker may be building the same
        own.mkdir()
        for path in CSRC.glob("*.cu"):
            text = LAUNCH.sub(r"emulated::launch(\2, [=] { \1(\3); });", path.read_text())
            (own / f"{path.stem}.cpp").write_text(text)
        includes = [HERE, CSRC / "include", _pybind11_include(), sysconfig.get_path("include")]
        command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-w"]
        command += ['-DMTLLM_ARCHITECTURES="emulated"', *(f"-I{include}" for include in includes)]
        subprocess.run([*command, *own.glob("*.cpp"), CSRC / "bindings.cpp", "-o", own / target.name], check=True)
        (own / target.name).rename(target)
    spec = importlib.util.spec_from_file_location("_cuda", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
