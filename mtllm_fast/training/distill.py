"""``distill``: stage 1 of MT-LLM from texts to a stack, resumable."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from mtllm_fast.core.digests import contents
from mtllm_fast.training.batching import StreamingBatches
from mtllm_fast.training.collator import DataCollatorForSelfDistillation
from mtllm_fast.training.curve import plot_curve
from mtllm_fast.training.distillation_trainer import SelfDistillationTrainer
from mtllm_fast.training.recipes import DistillArguments
from mtllm_fast.training.runs import Run, write_json
from mtllm_fast.training.self_distillation import MTLLMForSelfDistillation
from mtllm_fast.training.stacks import (
    add_lora,
    build_stack,
    initialise,
    load_tokenizers,
    save_merged,
    save_result,
)
from mtllm_fast.training.streams import DocumentStream, open_documents
from mtllm_fast.training.teacher_cache import TeacherCache
from mtllm_fast.training.trainer import whole_weights

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger("mtllm_fast")

# What may differ between a run and its resumption: it shapes no number.
_FREE = {"merge", "overwrite"}


@dataclass(frozen=True)
class DistillResult:
    """What ``distill`` wrote.

    Attributes:
        output_dir: ``final/`` (adapter, ``up_proj.safetensors``), ``merged/`` if asked for, ``log.json``, ``curve.png``
            (with matplotlib), and the last checkpoints.
        steps: how many there were, resumed ones included.
        log: every line that the Trainer logged.
        metrics: of ``eval_data`` at the end; empty without.
    """

    output_dir: Path
    steps: int
    log: list[dict[str, Any]]
    metrics: dict[str, float]


def training_arguments(arguments: DistillArguments, output_dir: str | os.PathLike[str], **overrides: Any) -> Any:
    """``transformers.TrainingArguments`` of a recipe, each of which ``overrides`` may replace."""
    from transformers import TrainingArguments

    return TrainingArguments(**{"output_dir": os.fspath(output_dir), **arguments.recipe.trainer, **overrides})


def distill(arguments: DistillArguments, trainer_arguments: TrainingArguments | None = None) -> DistillResult:
    """Train ``up_proj`` and LoRA so that the stack says of a text what its LLM says of it (arXiv 2406.12739, stage 1).

    An ``output_dir`` that holds a run of the same arguments is resumed from its newest whole checkpoint; on a CPU what
    comes out is the same bit for bit. Started by ``torchrun`` or ``accelerate launch``, every process takes its part of
    the documents and of each step's batch.

    Args:
        arguments: what to train on what.
        trainer_arguments: how: steps, learning rate, precision, reporting, FSDP, …; see ``training_arguments``, which
            makes those of the recipe (default, in ``./distilled``).

    Returns:
        DistillResult: where everything is, and the log.

    Raises:
        ValueError: arguments that do not fit together; data without the column, without texts, …
        FileExistsError: ``output_dir`` holds a run with other arguments.
        BatchTooLargeError: a step does not fit into memory.

    Example:

        >>> import tempfile
        >>> from mtllm_fast import DistillArguments, distill, training_arguments
        >>> arguments = DistillArguments(preset="tiny", documents_per_batch=2, init_documents=8, eval_documents=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     how = training_arguments(arguments, folder, max_steps=1, disable_tqdm=True)
        ...     result = distill(arguments, how)
        >>> result.steps, result.metrics["eval_fvu"] > 0
        (1, True)
    """
    arguments.check()
    how: Any = trainer_arguments or training_arguments(arguments, "distilled")
    settings = {name: value for name, value in asdict(arguments).items() if name not in _FREE}
    parts = contents(encoder=arguments.encoder, llm=arguments.llm, model=arguments.model)
    run = Run.of("distill", {**settings, **parts}, how)
    checkpoint = run.checkpoint(arguments.overwrite)
    if arguments.merge and how.fsdp:
        raise ValueError("merge needs whole weights: give the same command again with merge, in one process")
    if arguments.teacher_cache and (how.fsdp or how.world_size > 1):
        raise ValueError("teacher_cache serves one process: with several, each sees other documents in every epoch")
    per_batch = arguments.documents_per_process(how.world_size, how.gradient_accumulation_steps)
    documents = _documents(arguments, how)
    held_out = _held_out(arguments)
    set_seed(how.seed)  # LoRA's first weights are drawn before the Trainer, which would do it, is there
    model = build_stack(arguments)
    if str(model.dtype) == "torch.bfloat16" and not how.bf16:
        raise ValueError("the frozen weights are bfloat16: set bf16 (autocast), or dtype=float32")
    if how.device.type == "cuda" and not (how.fsdp or arguments.load_in_4bit):
        model.to(how.device)  # the Trainer would do it, after least squares
    tokenizers = load_tokenizers(arguments, model)
    if checkpoint is None:
        initialise(arguments, model, _first_documents(arguments), tokenizers)
    wrapped = add_lora(model.llm2vec, r=arguments.lora_r, alpha=arguments.lora_alpha, dropout=arguments.lora_dropout)
    model.up_proj.float()
    weights = _loss_weights(arguments)
    joint = MTLLMForSelfDistillation(model, sequence_weight=weights[0], span_weight=weights[1])
    collate = DataCollatorForSelfDistillation(
        *tokenizers, src_lang=arguments.src_lang, max_length=arguments.max_length,
        spans=weights[1] > 0, only_overlapping_tokens=not arguments.all_spans,
    )  # fmt: skip
    batches = StreamingBatches(
        documents, collate, documents_per_batch=per_batch, tokens_per_batch=arguments.tokens_per_batch
    )
    eval_batches = [collate(held_out[i : i + 32]) for i in range(0, len(held_out), 32)]
    run.begin(arguments.overwrite)
    cache = _teacher_cache(arguments, how, model) if arguments.teacher_cache else None
    trainer = SelfDistillationTrainer(
        joint, how, train_dataset=batches, eval_dataset=eval_batches or None, teacher_cache=cache
    )
    if eval_batches and checkpoint is None and not how.fsdp:  # which shards, and takes to the GPU, in train()
        trainer.evaluate_first()  # the curve begins where least squares ended
    trainer.train_from(checkpoint)
    metrics = _last_metrics(trainer) if eval_batches else {}
    return _finish(arguments, trainer, wrapped, tokenizers[1], metrics)


def _teacher_cache(arguments: DistillArguments, how: TrainingArguments, model: Any) -> TeacherCache:
    """One for each process, which sees documents of its own."""
    path = Path(str(how.output_dir)) / f"teacher-{how.process_index:05d}-of-{how.world_size:05d}.states"
    llm = arguments.llm or arguments.model
    identity = f"{llm} {contents(llm=llm)} {arguments.dtype} {arguments.load_in_4bit} {arguments.max_length}"
    return TeacherCache(path, model.config.hidden_size, identity)


def _last_metrics(trainer: SelfDistillationTrainer) -> dict[str, float]:
    """Of the last step, evaluated unless the Trainer did so."""
    for line in trainer.state.log_history:
        if line["step"] == trainer.state.global_step and "eval_loss" in line:
            return {name: value for name, value in line.items() if name.startswith("eval_")}
    return trainer.evaluate()


def _loss_weights(arguments: DistillArguments) -> tuple[float, float]:
    """Of texts and of spans."""
    recipe, texts, spans = arguments.recipe, arguments.sequence_weight, arguments.span_weight
    return recipe.sequence_weight if texts is None else texts, recipe.span_weight if spans is None else spans


def _documents(arguments: DistillArguments, how: TrainingArguments) -> DocumentStream:
    seed = how.data_seed if how.data_seed is not None else how.seed
    return open_documents(
        _sources(arguments), text_column=arguments.text_column, split=arguments.split,
        seed=seed if arguments.shuffle else None, rank=how.process_index, world_size=how.world_size,
    )  # fmt: skip


def _sources(arguments: DistillArguments) -> Any:
    if arguments.data:
        return arguments.data if len(arguments.data) > 1 else arguments.data[0]
    from mtllm_fast.tiny import tiny_documents

    return _as_dataset(tiny_documents()[: -arguments.eval_documents])


def _as_dataset(texts: list[str]) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError("training needs datasets: pip install 'mtllm-fast[train]'") from None
    return datasets.Dataset.from_dict({"text": texts})


def _first_documents(arguments: DistillArguments) -> Iterable[str]:
    """In their order, the same on every process."""
    return open_documents(_sources(arguments), text_column=arguments.text_column, split=arguments.split, epochs=1)


def _held_out(arguments: DistillArguments) -> list[str]:
    if not arguments.eval_data:
        from mtllm_fast.tiny import tiny_documents

        return [] if arguments.data else tiny_documents()[-arguments.eval_documents :]
    source = arguments.eval_data if len(arguments.eval_data) > 1 else arguments.eval_data[0]
    split = arguments.eval_split or arguments.split
    if arguments.eval_data == arguments.data and split == arguments.split:
        logger.warning("eval_data is data itself: its figures are of documents that are trained on")
    stream = iter(open_documents(source, text_column=arguments.text_column, split=split, epochs=1))
    return [text for text, _ in zip(stream, range(arguments.eval_documents), strict=False)]


def _finish(
    arguments: DistillArguments, trainer: SelfDistillationTrainer, wrapped: Any, encoder_tokenizer: Any,
    metrics: dict[str, float],
) -> DistillResult:  # fmt: skip
    output, log = Path(trainer.args.output_dir), list(trainer.state.log_history)
    weights = whole_weights(trainer.model)
    if trainer.args.should_save:
        save_result(arguments, wrapped, weights, output)
        write_json(output / "log.json", log)
        plot_curve(log, output / "curve.png")
        if arguments.merge:
            save_merged(trainer.accelerator.unwrap_model(trainer.model).mtllm, wrapped, encoder_tokenizer, output)
    return DistillResult(output, trainer.state.global_step, log, metrics)
