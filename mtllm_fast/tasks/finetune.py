"""``finetune``: an LLM (the teacher of stage 2), a stack or an encoder learns a task, by LoRA and a head."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import set_seed

from mtllm_fast.core.digests import contents
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.model import TaskModel, load_tower, save_result
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


class Base(NamedTuple):
    """What a task is put on: its kind (see ``load_tower``), folder or hub id, and an LLM's tokenizer."""

    kind: str
    path: str
    tokenizer: str | None


@dataclass
class FinetuneArguments(LoraArguments, TaskArguments):
    """What ``finetune`` is to do; how the Trainer does it, say ``transformers.TrainingArguments``."""

    llm: str = field(default="tiny", metadata={"help": "Decoder LLM: folder or hub id (see prepare-llm); or tiny."})
    model: str | None = field(default=None, metadata={"help": "In place of llm: a stack, whose LLM is trained."})
    encoder: str | None = field(default=None, metadata={"help": "In place of llm: an NLLB model's encoder alone."})
    llm_tokenizer: str | None = field(default=None, metadata={"help": "Folder or id. (default: llm)"})
    train: str | None = field(default=None, metadata={"help": "Training rows: .csv, .tsv, .jsonl or .parquet."})
    dev: str | None = field(default=None, metadata={"help": "Rows to choose the best epoch by."})
    dtype: str = field(default="auto", metadata={"help": "Of frozen weights: auto, float32 or bfloat16."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew in an output_dir that holds a run."})

    def base(self) -> Base:
        """What learns.

        Raises:
            ValueError: more than one was given.
        """
        given = [name for name in ("model", "encoder") if getattr(self, name) is not None]
        if len(given) + (self.llm != "tiny") > 1:
            raise ValueError(f"give one of llm, model and encoder; {', '.join(given)} and llm={self.llm!r} came")
        if given and self.llm_tokenizer is not None:
            raise ValueError(f"llm_tokenizer is an LLM's: {given[0]} brings its own")
        if self.model is not None:
            return Base("stack", self.model, None)
        if self.encoder is not None:
            return Base("encoder", self.encoder, None)
        return Base("llm", self.llm, self.llm_tokenizer or (None if self.llm == "tiny" else self.llm))


def finetune(arguments: FinetuneArguments, trainer_arguments: TrainingArguments | None = None) -> TaskResult:
    """Train LoRA and a head without bias on labelled rows; texts are read by the model's own tokenizer.

    What learns is an LLM, which stage 2 makes the teacher of a stack; or, to compare with, a stack on labels (its
    encoder and ``up_proj`` stay) or a translation encoder alone.

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
    task, base = arguments.resolve(), arguments.base()
    if arguments.train is None:
        raise ValueError("train is missing: a file of rows")
    how: Any = trainer_arguments or task_training_arguments(task, "finetuned", arguments.dev is not None)
    examples = arguments.read(arguments.train, task)
    dev = None if arguments.dev is None else arguments.read(arguments.dev, task)
    settings = {n: v for n, v in asdict(arguments).items() if n != "overwrite"}
    run = Run.of("finetune", {**settings, **contents(base=base.path, train=arguments.train, dev=arguments.dev)}, how)
    checkpoint = run.checkpoint(arguments.overwrite)
    set_seed(how.seed)
    tower, tokenizer = load_tower(base.kind, base.path, base.tokenizer, arguments.dtype)
    collate = TaskCollator(task, tokenizer, reads_languages=base.kind != "llm")
    model = TaskModel(tower, task)
    model.tower.requires_grad_(False)
    wrapped = add_lora(model.adapted, r=arguments.lora_r, alpha=arguments.lora_alpha, dropout=arguments.lora_dropout)
    trainer = TaskTrainer(model, how, data_collator=collate, train_dataset=Rows(examples), eval_dataset=dev)
    run.begin(arguments.overwrite)
    trainer.train_from(checkpoint)
    facts = {"kind": base.kind, "base": base.path, "tokenizer": base.tokenizer}
    output, metrics = Path(how.output_dir), {}
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if how.should_save:
        save_result(trained, wrapped, facts, output / "final")
        metrics = {} if dev is None else write_dev(trained, collate, dev, output)
        write_json(output / "log.json", trainer.state.log_history)
    return TaskResult(output, list(trainer.state.log_history), metrics)
