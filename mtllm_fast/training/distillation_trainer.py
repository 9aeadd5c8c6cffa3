"""``SelfDistillationTrainer``: stage 1 on ``transformers.Trainer``, packed and streamed."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState

from mtllm_fast.core.errors import BatchTooLargeError
from mtllm_fast.models.flops import step_flops
from mtllm_fast.training.runs import step_of
from mtllm_fast.training.self_distillation import MTLLMForSelfDistillation
from mtllm_fast.training.teacher_cache import TeacherCache
from mtllm_fast.training.trainer import ResumableTrainer

_OF_SENTENCES = ("sequence_loss", "fvu", "fvu_student", "cosine", "norm_difference")
_OF_SPANS = ("span_loss", "span_cosine", "span_norm_difference")


class _BeginWith(TrainerCallback):
    """A line before all others in the log of a run that begins."""

    def __init__(self, line: dict[str, Any]) -> None:
        self.line = line

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            state.log_history.insert(0, self.line)


class SelfDistillationTrainer(ResumableTrainer):
    """A ``Trainer`` of ``MTLLMForSelfDistillation`` whose batches come packed.

    With ``teacher_cache`` the teacher reads a document once, whatever the number of epochs (loss of texts alone).

    ``train_dataset`` yields batches as ``DataCollatorForSelfDistillation`` makes them, for this process alone, and has
    ``state_dict`` and ``load_state_dict`` (``StreamingBatches``); ``eval_dataset`` is a list of such batches, the same
    on every process. Batches may hold any number of texts: the loss of a step is the mean over all texts (spans) of
    its batches on all processes, whatever batch a text is in.

    Logged beside the loss: its two terms, fvu (of the teacher's variance, and of the student's; over each batch, mean
    of the batches), cosine, tokens/s of both sides, achieved TFLOP/s (products and attention; nothing that
    checkpointing computes again), peak memory in GiB (of the GPU, or of the process), seconds left.
    """

    def __init__(
        self, model: MTLLMForSelfDistillation, *args: Any, teacher_cache: TeacherCache | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, *args, **kwargs)
        if teacher_cache is not None and model.span_weight:
            raise ValueError("teacher_cache holds what the teacher says of texts, not of spans: span_weight must be 0")
        self._teacher_cache = teacher_cache
        self.args.ignore_data_skip = True  # the stream knows where it was
        self._sums: dict[str, Tensor] = {}
        self._counts = {"texts": 0.0, "spans": 0.0, "tokens": 0.0, "flops": 0.0}
        self._since = (0, time.perf_counter())

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not prepared by Accelerate, which would read a batch ahead of the one whose position is saved, and cut it up.
        # Its own generator: a DataLoader draws a seed when it starts, so a resumed run would be one draw ahead.
        pin = self.args.device.type == "cuda"
        return DataLoader(self.train_dataset, batch_size=None, pin_memory=pin, generator=torch.Generator())

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [(texts(batch), spans(batch)) for batch in batches]
        whole = [sum(count) for count in zip(*counts, strict=True)] or [0, 0]
        if self.args.world_size > 1:  # two numbers a step; processes of one step wait for each other anyway
            whole = self.accelerator.reduce(torch.tensor(whole, device=device)).tolist()
        parts = len(batches) * self.args.world_size
        for batch, own in zip(batches, counts, strict=True):
            shares = [n * parts / total if total else 0.0 for n, total in zip(own, whole, strict=True)]
            batch["sequence_share"], batch["span_share"] = shares
        return batches, None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All, biases too: the method's own optimiser has one group."""
        return [name for name, _ in model.named_parameters()]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with _naming_the_batch(inputs, self.args.device):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        out = model(**self._with_teacher(model, inputs))
        self._count(inputs, out)
        return (out.loss, out) if return_outputs else out.loss

    def _with_teacher(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the teacher's states in place of its tokens, where they are kept."""
        if self._teacher_cache is None:
            return batch
        joint = self.accelerator.unwrap_model(model)
        pooled = self._teacher_cache.pooled(batch["input_ids"].cpu(), batch["cu_seqlens"].cpu(), joint.teacher_pooled)
        own = ("input_ids", "cu_seqlens", "max_seqlen")
        return {name: value for name, value in batch.items() if name not in own} | {"teacher_pooled": pooled}

    @torch.no_grad()
    def _count(self, batch: dict[str, Any], out: Any) -> None:
        """Add a batch to the sums of the next log line, without waiting for the device."""
        for names, weight in ((_OF_SENTENCES, texts(batch)), (_OF_SPANS, spans(batch))):
            for name in names:
                value = out[name].detach().double() * weight if weight else torch.zeros_like(out.loss).double()
                self._sums[name] = self._sums.get(name, 0) + value

    def floating_point_ops(self, inputs: dict[str, Any]) -> Any:
        """Of a batch; the Trainer asks once for each, with its tensors still on the host."""
        config = self.accelerator.unwrap_model(self.model).mtllm.config
        (encoder, encoder_pairs), (llm, llm_pairs) = (_tokens_and_pairs(inputs, side) for side in ("encoder_", ""))
        flops = step_flops(config.nllb_config, config.llm2vec_config, encoder, encoder_pairs, llm, llm_pairs)
        new = {"texts": texts(inputs), "spans": spans(inputs), "tokens": encoder + llm, "flops": flops}
        for name, count in new.items():
            self._counts[name] += count
        return flops

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            logs = logs | self._figures()
        super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        names = sorted(self._sums)
        host = torch.tensor(list(self._counts.values()), dtype=torch.float64, device=self.args.device)
        sums = torch.cat([torch.stack([self._sums[name] for name in names]), host])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums)
        values = sums.tolist()
        figures = dict(zip(names, values, strict=False))
        counts = dict(zip(self._counts, values[len(names) :], strict=True))
        before, start = self._since
        now, step = time.perf_counter(), self.state.global_step
        seconds = now - start
        logs = {name: figures[name] / counts["texts"] for name in _OF_SENTENCES}
        if counts["spans"]:
            logs |= {name: figures[name] / counts["spans"] for name in _OF_SPANS}
        logs["tokens_per_second"] = counts["tokens"] / seconds
        logs["tflops_per_second"] = counts["flops"] / seconds / 1e12
        logs["memory_gib"] = _peak_memory(self.args.device) / 2**30
        logs["seconds_left"] = seconds / max(1, step - before) * (self.state.max_steps - step)
        self._sums.clear()
        self._counts = dict.fromkeys(self._counts, 0.0)
        self._since = (step, now)
        return logs

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            self.restore_data(resume_from_checkpoint)
        self._since = (0 if not resume_from_checkpoint else step_of(resume_from_checkpoint), time.perf_counter())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate_first(self) -> None:
        """Evaluate before the first step, and let the log of ``train``, which starts an empty one, begin with it."""
        self.add_callback(_BeginWith({**self.evaluate(), "step": 0}))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss and its figures over ``eval_dataset``, without dropout. Every process runs all of it."""
        batches: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        sums: dict[str, Tensor | float] = {}
        counts = {name: sum(map(texts, batches)) for name in _OF_SENTENCES}
        counts |= {name: sum(map(spans, batches)) for name in _OF_SPANS}
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                size = _naming_the_batch(batch, self.args.device)
                with torch.no_grad(), self.accelerator.autocast(), size:
                    out = self.model_wrapped(**self._prepare_inputs(batch))
                for name in counts:
                    if weight := (texts if name in _OF_SENTENCES else spans)(batch):
                        sums[name] = sums.get(name, 0) + out[name].double() * weight
        finally:
            self.model.train(training)
        means = {name: float(total) / counts[name] for name, total in sums.items()}
        joint = self.accelerator.unwrap_model(self.model)
        weights = {"sequence_loss": joint.sequence_weight, "span_loss": joint.span_weight}
        means["loss"] = sum(weight * means.get(name, 0.0) for name, weight in weights.items())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@contextmanager
def _naming_the_batch(batch: dict[str, Any], device: torch.device) -> Iterator[None]:
    """An error of memory that says what was too large and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BatchTooLargeError(
            f"a batch of {texts(batch)} texts, {batch['input_ids'].numel():,} tokens for the LLM and "
            f"{batch['encoder_input_ids'].numel():,} for the encoder does not fit into the memory of {device}: lower "
            "tokens_per_batch (or documents_per_batch) or max_length, or set gradient_checkpointing or load_in_4bit"
        ) from error


def texts(batch: dict[str, Any]) -> int:
    """How many texts a batch holds."""
    return int(batch["encoder_cu_seqlens"].numel()) - 1


def spans(batch: dict[str, Any]) -> int:
    """How many aligned spans a batch holds."""
    return len(batch["spans"]) if batch.get("spans") is not None else 0


def _tokens_and_pairs(batch: dict[str, Any], side: str) -> tuple[float, float]:
    lengths = batch[f"{side}cu_seqlens"].diff().double()
    return float(lengths.sum()), float((lengths * lengths).sum())


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
