"""pytest hooks of the op benchmarks: deselect what cannot run here and say why, time on the device, print the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness

NOT_RUN: dict[str, str] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    runnable, deselected = [], []
    for item in items:
        why_not = getattr(getattr(item, "module", None), "why_not", None)
        params = getattr(getattr(item, "callspec", None), "params", {})
        reason = why_not(params["peer"]) if why_not and "peer" in params else None
        if reason is None:
            item.add_marker(pytest.mark.benchmark(timer=harness.timer))
            runnable.append(item)
        else:
            NOT_RUN[f"{item.module.OP} {params['peer']}"] = reason  # type: ignore[attr-defined]
            deselected.append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = runnable


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from mtllm_fast.bench.facts import facts

    machine_info["mtllm_fast"] = {**facts(harness.DEVICE), "not_run": NOT_RUN}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Each case is compiled for itself: no limit on recompilations is reached, no dynamic shape is guessed."""
    torch.compiler.reset()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for what, reason in NOT_RUN.items():
        terminalreporter.write_line(f"not run: {what}: {reason}")
    console = Console(width=max(Console().width, 100))
    for table in [*harness.TABLES, *([harness.results_table()] if harness.ROWS else [])]:
        with console.capture() as capture:
            console.print(table)
        terminalreporter.write_line(capture.get())
