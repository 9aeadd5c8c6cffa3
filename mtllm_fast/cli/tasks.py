"""``mtllm-fast finetune``, ``preembed`` and ``distill-task``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from mtllm_fast.cli.parsing import log_to_stderr, parse, value_of
from mtllm_fast.tasks.distill import DistillTaskArguments, distill_task
from mtllm_fast.tasks.finetune import FinetuneArguments, finetune
from mtllm_fast.tasks.model import read_facts
from mtllm_fast.tasks.presets import TASKS, Task
from mtllm_fast.tasks.training import TaskResult, recipe


def run_finetune(words: Sequence[str]) -> None:
    """Parse the command's words, train, and say where the results are."""
    log_to_stderr()
    name = value_of(words, "task")
    defaults = recipe(TASKS.get(str(name), TASKS["xnli"]), value_of(words, "dev") is not None)
    text = "Stage 2: fine-tune an LLM on labelled rows by LoRA and a head; the teacher of distill-task."
    arguments, how = parse(words, FinetuneArguments, "finetune", text, output_dir="finetuned", **defaults)
    _show(finetune(arguments, how), how.process_index)


def run_distill_task(words: Sequence[str]) -> None:
    """Parse the command's words, train, and say where the results are."""
    log_to_stderr()
    teacher = value_of(words, "teacher")
    if teacher is None:
        raise ValueError("give the teacher: OUTPUT_DIR/final of finetune")
    task = Task.from_dict(read_facts(Path(teacher))["task"])
    defaults = recipe(task, value_of(words, "dev") is not None)
    text = "Stage 2: a stack learns to say of a task's rows what the fine-tuned LLM says."
    arguments, how = parse(words, DistillTaskArguments, "distill-task", text, output_dir="distilled-task", **defaults)
    _show(distill_task(arguments, how), how.process_index)


def _show(result: TaskResult, process: int) -> None:
    if process == 0:
        typer.echo(f"result: {result.output_dir}/final")
        for name, value in sorted(result.metrics.items()):
            typer.echo(f"dev {name}: {value:.4f}")
