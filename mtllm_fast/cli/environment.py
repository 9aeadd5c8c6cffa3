"""``mtllm-fast env``: the facts of ``mtllm_fast.environment`` as a table or JSON, and the check of a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from mtllm_fast.environment import WORKS, facts


def show(model: str | None, as_json: bool) -> bool:
    """Print everything; False when the checked model has problems."""
    found = facts()
    problems: list[str] = []
    if model is not None:
        from mtllm_fast.cli.check import check_model

        problems = check_model(model)
        found["model"] = {"name": model, "problems": problems}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    return not problems


def _print(found: dict[str, Any]) -> None:
    console = Console()
    table = Table(show_header=False, box=None)
    for name, version in {"python": found["python"], **found["packages"]}.items():
        table.add_row(name, version)
    gpus = found["gpu"] if isinstance(found["gpu"], list) else [found["gpu"]]
    for gpu in gpus:
        table.add_row("GPU", gpu if isinstance(gpu, str) else " ".join(map(str, gpu.values())))
    table.add_row("CUDA extension", found["cuda_extension"])
    for name, state in found["backends"].items():
        table.add_row(f"backend {name}", state if state == WORKS else f"no: {state}")
    console.print(table)
    if "model" in found:
        console.print(f"\n{found['model']['name']}: {'no problems' if not found['model']['problems'] else 'problems'}")
        for problem in found["model"]["problems"]:
            console.print(f"  - {problem}", markup=False)
