"""Where a result was measured: the time, the commit, the environment, the processor and its threads."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import Any

import torch

from mtllm_fast.environment import environment


def execution(device: torch.device) -> dict[str, Any]:
    """What decides a speed beside the versions: threads and instruction set, or the GPU."""
    found: dict[str, Any] = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def git_commit() -> str | None:
    """Commit of the checkout that the package is imported from, ``-dirty`` with local changes; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30, check=True)
        # Only tracked files: results that a run writes do not make its code dirty.
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def facts(device: torch.device) -> dict[str, Any]:
    """Everything above, the time in UTC, and what ``mtllm-fast env`` says: versions, hardware, backends."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "environment": environment(),
        "execution": execution(device),
    }
