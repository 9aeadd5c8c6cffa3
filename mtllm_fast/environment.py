"""What this installation can do: versions, GPU, and for every backend whether it works here, or why not.

    mtllm-fast env, or python -m mtllm_fast.environment

Imports nothing but the standard library until it is asked, and reports a missing or broken torch instead of failing.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("mtllm-fast", "torch", "triton", "flash-attn", "transformers", "tokenizers", "safetensors", "accelerate"),
    *("huggingface_hub", "peft", "bitsandbytes", "datasets", "numpy", "pyarrow"),
)

Section = dict[str, str]


def environment() -> dict[str, Section]:
    """Facts by section (``versions``, ``hardware``, both extensions, one per op, ``settings``), all as text.

    >>> environment()["versions"]["python"] == platform.python_version()
    True
    """
    sections = {"versions": _versions(), "hardware": {"cpu": f"{_cpu_name()}, {os.cpu_count()} CPUs"}}
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        sections["versions"]["torch"] = f"cannot be imported: {type(error).__name__}: {error}"
        return sections
    sections["hardware"].update(_gpus(torch))
    sections["cuda extension"] = _extension()
    sections["cpu extension"] = _cpu_extension()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sections.update({f"backends of {op}": _backends(op, example(torch, device)) for op, example in EXAMPLES.items()})
    sections["settings"] = _settings()
    return sections


def _norm_pool(torch: Any, device: str) -> dict[str, Any]:
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, device=device)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    return {"hidden_states": hidden, "weight": hidden[0], "cu_seqlens": cu_seqlens, "eps": 1e-5}


def _distillation_loss(torch: Any, device: str) -> dict[str, Any]:
    side = _norm_pool(torch, device)
    teacher = {f"teacher_{name}": value for name, value in side.items()}
    teacher["teacher_states"] = teacher.pop("teacher_hidden_states")
    return side | teacher


def _swiglu(torch: Any, device: str) -> dict[str, Any]:
    return {"gate": torch.randn(5, 64, dtype=torch.bfloat16, device=device)}


def _varlen_attention(torch: Any, device: str) -> dict[str, Any]:
    heads = torch.randn(5, 2, 64, dtype=torch.bfloat16, device=device)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    return {"q": heads, "k": heads, "v": heads, "cu_seqlens": cu_seqlens, "max_seqlen": 3}


def _rms_norm(torch: Any, device: str) -> dict[str, Any]:
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, device=device)
    return {"hidden_states": hidden, "weight": hidden[0], "eps": 1e-5, "residual": hidden}


def _rope(torch: Any, device: str) -> dict[str, Any]:
    heads = torch.randn(5, 2, 64, dtype=torch.bfloat16, device=device)
    return {"q": heads, "k": heads, "cos": heads[:, 0], "sin": heads[:, 1]}


def _stack_projection(torch: Any, device: str) -> dict[str, Any]:
    from mtllm_fast.ops.stack_projection import StackWeights

    square = torch.randn(64, 64, dtype=torch.bfloat16, device=device)
    weights = StackWeights(up=square, norm=square[0], q=square, k=square, v=square, head_dim=64, eps=1e-5)
    return {"encoder_states": square, "weights": weights, "cos": square, "sin": square, "form": "absorbed"}


def _layer_norm(torch: Any, device: str) -> dict[str, Any]:
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, device=device)
    return {"hidden_states": hidden, "weight": hidden[0], "bias": hidden[1], "eps": 1e-5, "residual": hidden}


def _bias_relu(torch: Any, device: str) -> dict[str, Any]:
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, device=device)
    return {"x": hidden, "bias": hidden[0]}


def _lora_linear(torch: Any, device: str) -> dict[str, Any]:
    x = torch.randn(16, 64, dtype=torch.bfloat16, device=device)
    return {"x": x, "weight": x, "adapters": [(x[:8], x[:, :8].contiguous(), 2.0)]}


def _embed_tokens(torch: Any, device: str) -> dict[str, Any]:
    weight, ids = torch.randn(5, 64, dtype=torch.bfloat16, device=device), torch.arange(3, device=device)
    return {"input_ids": ids, "weight": weight, "position_ids": ids, "table": weight, "scale": 8.0, "offset": 2}


def _token_kl_loss(torch: Any, device: str) -> dict[str, Any]:
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, device=device)
    return {"hidden_states": hidden, "teacher_hidden_states": hidden.flip(0), "weight": hidden.repeat(20, 1)}


def _quantize_rows(torch: Any, device: str) -> dict[str, Any]:
    return {"x": torch.randn(5, 64, dtype=torch.bfloat16, device=device)}


EXAMPLES: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "bias_relu": _bias_relu,
    "distillation_loss": _distillation_loss,
    "embed_tokens": _embed_tokens,
    "layer_norm": _layer_norm,
    "lora_linear": _lora_linear,
    "norm_pool": _norm_pool,
    "quantize_rows": _quantize_rows,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "stack_projection": _stack_projection,
    "swiglu": _swiglu,
    "token_kl_loss": _token_kl_loss,
    "varlen_attention": _varlen_attention,
}
"""For each op, the arguments of a small call: every backend that claims to serve it is really run."""


def _backends(op: str, arguments: dict[str, Any]) -> Section:
    from mtllm_fast.ops import explain

    function = getattr(importlib.import_module(f"mtllm_fast.ops.{op}"), op)
    explanation = explain(op, **arguments)
    found = {}
    for backend, reason in explanation.why_not.items():
        if reason is None:
            try:
                result = function(**arguments, backend=backend)
                for output in result if isinstance(result, tuple) else (result,):
                    output.float().sum().item()  # waits for the kernel
            except Exception as error:  # a kernel that the driver refuses, a library built for another torch
                reason = f"{type(error).__name__}: {error}"
        auto = ", and is what auto takes" if backend == explanation.chosen else ""
        found[backend] = f"no: {reason}" if reason else f"works{auto}"
    return found


def _versions() -> Section:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _gpus(torch: Any) -> Section:
    if not torch.cuda.is_available():
        why = "torch sees none" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
        return {"gpu": f"none: {why}"}
    found = {"driver": _driver(), "cuda of torch": torch.version.cuda or f"ROCm {torch.version.hip}"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        found[f"gpu {index}"] = f"{gpu.name}, {memory}, {capability}, {gpu.multi_processor_count} multiprocessors"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "unknown (no nvidia-smi)"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return done.stdout.split("\n")[0]


def _extension() -> Section:
    from mtllm_fast.core import native

    if reason := native.why_not_built():
        return {"built": f"no: {reason}"}
    major, minor = divmod(native.extension().cuda_version // 10, 100)
    return {"built": f"yes, with CUDA {major}.{minor}", "architectures": ", ".join(native.architectures())}


def _cpu_extension() -> Section:
    from mtllm_fast.core import native_cpu

    if reason := native_cpu.why_not_built():
        return {"built": f"no: {reason}"}
    chosen = native_cpu.LEVELS[native_cpu.level()]
    return {"built": "yes", "levels": f"{', '.join(native_cpu.levels())}; {chosen} is used"}


def _settings() -> Section:
    from mtllm_fast.core.settings import SETTINGS

    return {setting.name: f"{setting.value()} ({setting.effect})" for setting in SETTINGS}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main() -> None:
    for title, facts in environment().items():
        sys.stdout.write(f"{title}\n" + "".join(f"  {name}: {text}\n" for name, text in facts.items()))


if __name__ == "__main__":
    main()
