"""``python -m benchmarks.transfer``: the whole study in one command."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.transfer import report
from benchmarks.transfer.costs import costs_of
from benchmarks.transfer.jobs import quiet, run
from benchmarks.transfer.languages import ENGLISH
from benchmarks.transfer.leaks import leaks
from benchmarks.transfer.presets import PRESETS
from benchmarks.transfer.study import Study
from mtllm_fast.bench.facts import facts
from mtllm_fast.core.settings import BACKEND
from mtllm_fast.training.runs import write_json


def main(
    preset: Annotated[str, typer.Option(help=f"How large: {', '.join(PRESETS)}.")] = "micro",
    output_dir: Annotated[Path, typer.Option(help="Folder of everything; a killed run goes on in it.")] = Path(
        "transfer"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Processes; each takes its share of the cores.")] = 2,
) -> None:
    """Make a world and its models, run every system, and write OUTPUT_DIR/report.json, report.md and two plots."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"must be one of {', '.join(PRESETS)}, got {preset!r}", param_hint="--preset")
    quiet(1)
    study, start = Study(output_dir, PRESETS[preset]), time.perf_counter()
    new = study.claim()
    machine = facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # as the commands choose
    records = run(study, workers)
    accounts = study.accounts()
    record = {
        "schema": 1, "benchmark": "transfer", "preset": preset, "paragraphs": study.preset.paragraphs, **machine,
        "chance": {task.name: task.chance for task in study.tasks()}, **accounts,
        "backend": BACKEND.value(), "mt": study.mt_quality(),
        "leaks": {
            task.name: leaks(task, Path(study.rows(task, "train")), Path(study.rows(task, f"test-{ENGLISH.name}")))
            for task in study.tasks()
        },
        "accuracy": report.summarise(records), "costs": costs_of(study),
        "seconds": time.perf_counter() - start if new else None,  # the last: of everything before it
    }  # fmt: skip
    write_json(output_dir / "report.json", record)
    write_json(output_dir / "records.json", records)
    lines = report.table(record)
    (output_dir / "report.md").write_text("\n".join(lines), encoding="utf-8")
    report.plot_data(record, output_dir / "data.png")
    report.plot_costs(record, output_dir / "costs.png")
    print("\n".join(lines))
    print(json.dumps({"leaks": record["leaks"], "mt": record["mt"], "seconds": record["seconds"]}, indent=1))


if __name__ == "__main__":
    typer.run(main)
