"""``finetune``: an LLM learns a task in English, by LoRA and a head; the teacher of stage 2."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from mtllm_fast.core.digests import contents
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.model import TaskModel, load_llm, load_llm_tokenizer, save_result
from mtllm_fast.tasks.training import (
    LoraArguments,
    Rows,
    TaskArguments,
    TaskResult,
    TaskTrainer,
    task_training_arguments,
    write_dev,
)
from mtllm_fast.training.runs import Run, write_json
from mtllm_fast.training.stacks import add_lora

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class FinetuneArguments(LoraArguments, TaskArguments):
    """What ``finetune`` is to do; how the Trainer does it, say ``transformers.TrainingArguments``."""

    llm: str = field(default="tiny", metadata={"help": "Decoder LLM: folder or hub id (see prepare-llm); or tiny."})
    llm_tokenizer: str | None = field(default=None, metadata={"help": "Folder or id. (default: llm)"})
    train: str | None = field(default=None, metadata={"help": "Training rows: .csv, .tsv, .jsonl or .parquet."})
    dev: str | None = field(default=None, metadata={"help": "Rows to choose the best epoch by."})
    dtype: str = field(default="auto", metadata={"help": "Of frozen weights: auto, float32 or bfloat16."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew in an output_dir that holds a run."})


def finetune(arguments: FinetuneArguments, trainer_arguments: TrainingArguments | None = None) -> TaskResult:
    """Train LoRA and a head without bias on labelled rows; texts are read by the LLM's own tokenizer.

    With ``dev`` every epoch is scored, and the best one is kept; its predictions are written. An ``output_dir`` that
    holds a run of the same arguments is resumed. See ``Task`` for the three kinds of task.

    Args:
        arguments: what to train on what.
        trainer_arguments: how; default: the task's recipe (``task_training_arguments``), in ``./finetuned``.

    Raises:
        ValueError: data or arguments that do not fit the task, named with file and row.
        FileExistsError: ``output_dir`` holds another run.

    Example:

        >>> import json, pathlib, tempfile
        >>> from mtllm_fast import FinetuneArguments, finetune, task_training_arguments
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = pathlib.Path(folder, "train.jsonl")
        ...     made = ({"text": text, "label": text[:4]} for text in ("good one", "evil two"))
        ...     _ = rows.write_text("".join(json.dumps(row) + chr(10) for row in made))
        ...     arguments = FinetuneArguments(kind="sequence", text_columns=["text"], labels=["good", "evil"],
        ...                                   train=str(rows), dev=str(rows))
        ...     task, quick = arguments.resolve(), {"max_steps": 1, "disable_tqdm": True}
        ...     how = task_training_arguments(task, folder + "/out", True, **quick)
        ...     result = finetune(arguments, how)
        >>> sorted(result.metrics)
        ['accuracy', 'macro_f1']
    """
    task = arguments.resolve()
    if arguments.train is None:
        raise ValueError("train is missing: a file of rows")
    how: Any = trainer_arguments or task_training_arguments(task, "finetuned", arguments.dev is not None)
    examples = arguments.read(arguments.train, task)
    dev = None if arguments.dev is None else arguments.read(arguments.dev, task)
    settings = {n: v for n, v in asdict(arguments).items() if n != "overwrite"}
    run = Run.of("finetune", {**settings, **contents(llm=arguments.llm, train=arguments.train, dev=arguments.dev)}, how)
    checkpoint = run.checkpoint(arguments.overwrite)
    set_seed(how.seed)
    name = arguments.llm_tokenizer or (None if arguments.llm == "tiny" else arguments.llm)
    collate = TaskCollator(task, load_llm_tokenizer(name), reads_languages=False)
    model = TaskModel(load_llm(arguments.llm, arguments.dtype), task)
    model.tower.requires_grad_(False)
    wrapped = add_lora(model.llm, r=arguments.lora_r, alpha=arguments.lora_alpha, dropout=arguments.lora_dropout)
    trainer = TaskTrainer(model, how, data_collator=collate, train_dataset=Rows(examples), eval_dataset=dev)
    run.begin(arguments.overwrite)
    trainer.train_from(checkpoint)
    facts = {"kind": "llm", "base": arguments.llm, "tokenizer": name}
    output, metrics = Path(how.output_dir), {}
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if how.should_save:
        save_result(trained, wrapped, facts, output / "final")
        metrics = {} if dev is None else write_dev(trained, collate, dev, output)
        write_json(output / "log.json", trainer.state.log_history)
    return TaskResult(output, list(trainer.state.log_history), metrics)
