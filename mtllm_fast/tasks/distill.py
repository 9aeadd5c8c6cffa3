"""``distill_task``: a stack learns to say of a task's texts what the fine-tuned LLM says (stage 2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import set_seed

from mtllm_fast.core.digests import contents
from mtllm_fast.core.errors import CheckpointError
from mtllm_fast.models import (
    MTLLM,
    MTLLMForMultipleChoice,
    MTLLMForSequenceClassification,
    MTLLMForTokenClassification,
)
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.examples import read_examples
from mtllm_fast.tasks.model import TaskModel, read_facts, save_result
from mtllm_fast.tasks.preembed import States
from mtllm_fast.tasks.presets import Task
from mtllm_fast.tasks.training import (
    LoraArguments,
    Rows,
    TaskResult,
    TaskTrainer,
    task_training_arguments,
    write_dev,
)
from mtllm_fast.training.checkpoints import MANIFEST, begin, finish
from mtllm_fast.training.runs import Run, write_json
from mtllm_fast.training.stacks import add_lora, merge_lora

if TYPE_CHECKING:
    from transformers import TrainingArguments

_HEADS = {
    "sequence": MTLLMForSequenceClassification,
    "choice": MTLLMForMultipleChoice,
    "tokens": MTLLMForTokenClassification,
}


@dataclass
class DistillTaskArguments(LoraArguments):
    """What ``distill_task`` is to do; how the Trainer does it, say ``transformers.TrainingArguments``."""

    model: str = field(default="tiny", metadata={"help": "The stack: OUTPUT_DIR/merged of distill, or a hub id."})
    teacher: str = field(default="", metadata={"help": "OUTPUT_DIR/final of finetune: its task and its head."})
    states: str = field(default="", metadata={"help": "What preembed wrote."})
    train: str = field(default="", metadata={"help": "The rows that preembed read."})
    dev: str | None = field(default=None, metadata={"help": "Rows to choose the best epoch by."})
    language: str = field(default="eng_Latn", metadata={"help": "Language of train and dev."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens per text. (default: the teacher's)"})
    train_up_proj: bool = field(default=False, metadata={"help": "Train up_proj too; the published recipe does not."})
    dtype: str = field(default="auto", metadata={"help": "Of frozen weights: auto, float32 or bfloat16."})
    merge: bool = field(default=False, metadata={"help": "At the end, also write OUTPUT_DIR/merged, adapters merged."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew in an output_dir that holds a run."})


def distill_task(arguments: DistillTaskArguments, trainer_arguments: TrainingArguments | None = None) -> TaskResult:
    """Train LoRA in the stack's LLM so that its pooled states are the teacher's: ``mean((student - teacher)²)``.

    The head is the teacher's and does not move; ``up_proj`` does not either, as in the published recipe. The states are
    those that ``preembed`` wrote of the same rows.

    Raises:
        CheckpointError: a teacher or states that are none, or of other data.
        ValueError: rows that do not fit the task, a teacher of another width than the stack's LLM.
        FileExistsError: ``output_dir`` holds another run.
    """
    teacher = Path(arguments.teacher)
    task = Task.from_dict(read_facts(teacher)["task"])
    if arguments.max_length is not None:
        task = Task.from_dict({**task.to_dict(), "max_length": arguments.max_length})
    how: Any = trainer_arguments or task_training_arguments(task, "distilled-task", arguments.dev is not None)
    free = ("overwrite", "merge")
    examples = read_examples(arguments.train, task, language=arguments.language)
    dev = None if arguments.dev is None else read_examples(arguments.dev, task, language=arguments.language)
    settings = {n: v for n, v in asdict(arguments).items() if n not in free}
    read = contents(model=arguments.model, teacher=teacher / MANIFEST, train=arguments.train, dev=arguments.dev)
    run = Run.of("distill-task", {**settings, **read}, how)
    checkpoint = run.checkpoint(arguments.overwrite)
    states = States(arguments.states, teacher, arguments.train, [example.units for example in examples])
    set_seed(how.seed)
    stack = MTLLM.from_pretrained(arguments.model, dtype=arguments.dtype, llm_embeddings=False)
    model = student(stack, task, teacher)
    wrapped = add_lora(model.adapted, r=arguments.lora_r, alpha=arguments.lora_alpha, dropout=arguments.lora_dropout)
    if arguments.train_up_proj:
        stack.up_proj.float().requires_grad_(True)
    collate = TaskCollator(task, stack.tokenizer, reads_languages=True)
    trainer = TaskTrainer(model, how, data_collator=collate, train_dataset=Rows(examples, states), eval_dataset=dev)
    run.begin(arguments.overwrite)
    trainer.train_from(checkpoint)
    output, metrics = Path(how.output_dir), {}
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if how.should_save:
        save_result(trained, wrapped, {"kind": "stack", "base": arguments.model, "tokenizer": None}, output / "final")
        metrics = {} if dev is None else write_dev(trained, collate, dev, output)
        write_json(output / "log.json", trainer.state.log_history)
        if arguments.merge:
            merge(trained, wrapped, output / "merged")
    return TaskResult(output, list(trainer.state.log_history), metrics)


def student(stack: MTLLM, task: Task, teacher: Path) -> TaskModel:
    """The stack under the teacher's head, everything frozen; ``add_lora`` adds what is trained."""
    model = TaskModel(stack, task)
    weight = load_file(teacher / "head.safetensors")["score.weight"]
    if weight.shape != model.score.weight.shape:
        raise ValueError(
            f"{teacher}: its head takes states of {weight.shape[1]}, the stack's LLM has {model.score.weight.shape[1]}"
        )
    with torch.no_grad():
        model.score.weight.copy_(weight)
    model.requires_grad_(False)
    return model


def merge(model: TaskModel, wrapped: Any, folder: Path) -> None:
    """A head of the library in the published layout, adapters merged in float32; the model is used up.

    Raises:
        CheckpointError: the merged weights are not those of the head.
    """
    stack: Any = model.tower
    dtype = merge_lora(stack, wrapped)
    config = type(stack.config).from_dict(stack.config.to_dict())
    config.num_labels = len(model.task.labels)
    config.id2label = dict(enumerate(model.task.labels))
    config.label2id = {name: i for i, name in enumerate(model.task.labels)}
    with torch.device("meta"):
        head = _HEADS[model.task.kind](config)
    head.model, head.score = stack, model.score.to(dtype)
    if any(parameter.is_meta for parameter in head.parameters()):
        raise CheckpointError(f"{folder}: the merged model is not whole")
    begun = begin(folder)
    head.save_pretrained(begun)
    stack.tokenizer.save_pretrained(begun)
    finish(folder)
