"""What fine-tuning and task distillation share: arguments of a task, the Trainer, and where results go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.examples import Example, read_examples
from mtllm_fast.tasks.model import TaskModel
from mtllm_fast.tasks.predict import predict, score, write_predictions
from mtllm_fast.tasks.presets import TASKS, Task, get_task
from mtllm_fast.training.runs import write_json
from mtllm_fast.training.trainer import ResumableTrainer


@dataclass
class TaskArguments:
    """A preset, or columns of one's own; the options beside a preset replace what it says."""

    task: str | None = field(default=None, metadata={"help": f"Preset: {', '.join(TASKS)}."})
    kind: str | None = field(default=None, metadata={"help": "Without a preset: sequence, choice or tokens."})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "Columns of the text(s)."})
    choice_columns: list[str] = field(default_factory=list, metadata={"help": "Columns of the choices."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label. (default: label)"})
    labels: list[str] = field(default_factory=list, metadata={"help": "Names of the classes, in order."})
    first_label: int | None = field(default=None, metadata={"help": "Number of the first class, where data hold some."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens per text. (default: the preset's)"})
    language: str = field(default="eng_Latn", metadata={"help": "Language of the rows."})
    language_column: str | None = field(default=None, metadata={"help": "Column of each row's language instead."})
    id_column: str | None = field(default=None, metadata={"help": "Column of ids. (default: the row's number)"})

    def resolve(self) -> Task:
        """The task.

        Raises:
            ValueError: neither a preset nor a kind with its columns; columns that do not fit the kind.
        """
        if self.task is None and (self.kind is None or not self.text_columns):
            raise ValueError(f"give a task ({', '.join(TASKS)}), or kind, text_columns and labels")
        first = self.first_label
        if first is None:
            first = 0 if self.task is None else get_task(self.task).first_label
        numbers = tuple(map(str, range(first, first + len(self.choice_columns))))
        if self.task is not None:
            task = get_task(self.task)
        else:
            task = Task(
                "custom", str(self.kind), tuple(self.text_columns), self.label_column or "label",
                tuple(self.labels) or numbers, tuple(self.choice_columns),
            )  # fmt: skip
        changes: dict[str, Any] = {
            "text": tuple(self.text_columns), "choices": tuple(self.choice_columns), "label": self.label_column,
            "labels": tuple(self.labels), "max_length": self.max_length,
        }  # fmt: skip
        given = {name: value for name, value in changes.items() if value}
        if self.first_label is not None:
            given["first_label"] = self.first_label
        if task.kind == "choice" and not self.labels:
            count = len(self.choice_columns) or len(task.choices)
            given["labels"] = tuple(map(str, range(first, first + count)))
        return replace(task, **given)

    def read(self, path: str | os.PathLike[str], task: Task, labelled: bool = True) -> list[Example]:
        return read_examples(
            path, task, language=self.language, language_column=self.language_column, id_column=self.id_column,
            labelled=labelled,
        )  # fmt: skip


@dataclass
class LoraArguments:
    """LoRA in all linear layers of the LLM, as in stage 1."""

    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's alpha."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA's dropout."})


class Rows(Dataset[Any]):
    """Examples, each with the teacher's states where there are some."""

    def __init__(self, examples: Sequence[Example], states: Sequence[Any] | None = None) -> None:
        self.examples, self.states = examples, states

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index], None if self.states is None else self.states[index]


class TaskTrainer(ResumableTrainer):
    """A ``Trainer`` of ``TaskModel``; its evaluation: accuracy and macro-F1 of ``eval_dataset``, a list of examples."""

    data_collator: Any

    def __init__(self, model: TaskModel, args: Any, **kwargs: Any) -> None:
        if args.fsdp:
            raise ValueError("stage 2 predicts and saves in one process: use DDP (torchrun alone), not FSDP")
        super().__init__(model, args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            found = score(predict(model, self.data_collator, examples))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def task_training_arguments(task: Task, output_dir: str | os.PathLike[str], dev: bool, **overrides: Any) -> Any:
    """``transformers.TrainingArguments`` of a task's recipe, each of which ``overrides`` may replace."""
    from transformers import TrainingArguments

    return TrainingArguments(**{"output_dir": os.fspath(output_dir), **recipe(task, dev), **overrides})


def recipe(task: Task, dev: bool) -> dict[str, Any]:
    """Of ``TrainingArguments``, what a task's recipe sets; with dev data the best epoch is kept."""
    best = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    return {
        "num_train_epochs": task.epochs,
        "learning_rate": task.learning_rate,
        "per_device_train_batch_size": task.batch_size,
        "warmup_steps": task.warmup,
        "lr_scheduler_type": "linear",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,  # a row is an example, whatever its columns were
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": False,
        **(best if dev else {}),
    }


@dataclass(frozen=True)
class TaskResult:
    """What a command of stage 2 wrote: ``final/`` (``merged/``), ``predictions.jsonl`` and ``metrics.json`` of dev."""

    output_dir: Path
    log: list[dict[str, Any]]
    metrics: dict[str, float]


def write_dev(model: TaskModel, collate: TaskCollator, dev: Sequence[Example], output: Path) -> dict[str, float]:
    """Predictions and scores of the dev data, whole or not at all."""
    predictions = predict(model, collate, dev)
    metrics = score(predictions)
    write_predictions(predictions, model.task.labels, output / "predictions.jsonl")
    write_json(output / "metrics.json", metrics)
    return metrics
