"""An output folder belongs to one run: started, resumed from its newest whole checkpoint, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mtllm_fast.core.errors import CheckpointError
from mtllm_fast.training.checkpoints import all_checkpoints, newest

logger = logging.getLogger("mtllm_fast")

SETTINGS = "run_settings.json"
RESULTS = ("final", "merged")
_FILES = (SETTINGS, "log.json", "curve.png", "predictions.jsonl", "metrics.json")
# Of transformers.TrainingArguments, what shapes the numbers of a run.
_TRAINER = (
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "seed", "data_seed",
    "bf16", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "fp16", "lr_scheduler_kwargs", "optim_args", "dataloader_drop_last",
    "load_best_model_at_end", "metric_for_best_model",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run in ``output_dir`` with the settings that shape its numbers."""

    output_dir: Path
    settings: dict[str, Any]
    writes: bool
    """Whether this process is the one that writes."""

    @classmethod
    def of(cls, command: str, arguments: dict[str, Any], how: Any) -> Run:
        """``arguments``: all that shapes a number, JSON values; ``how``: the Trainer's."""
        trainer = {name: getattr(how, name) for name in _TRAINER}
        settings = {"command": command, **arguments, **trainer}
        return cls(Path(how.output_dir), json.loads(json.dumps(settings, default=str)), how.should_save)

    def checkpoint(self, overwrite: bool) -> Path | None:
        """The newest whole checkpoint of this very run; None: there is nothing yet.

        Raises:
            FileExistsError: the folder holds another run; the message says what differs.
            CheckpointError: it holds this one, and every checkpoint is damaged.
        """
        if overwrite:  # begin() discards it, once the new run is known to be possible
            return None
        file = self.output_dir / SETTINGS
        worth = all_checkpoints(self.output_dir) or any((self.output_dir / name).exists() for name in RESULTS)
        if not worth:  # a run that ended before its first checkpoint may be started anew with other arguments
            return None
        if not file.exists():
            raise FileExistsError(f"{self.output_dir} holds a result of something else: choose another output_dir")
        before = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in {**self.settings, **before} if self.settings.get(name) != before.get(name)]
        if different:
            changes = "; ".join(f"{n} was {before.get(n)!r}, is {self.settings.get(n)!r}" for n in different)
            raise FileExistsError(f"{self.output_dir} holds another run: {changes}. overwrite starts anew")
        found = newest(self.output_dir)
        if found.path is None and found.rejected:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in found.rejected.items())
            raise CheckpointError(f"{self.output_dir}: no checkpoint is whole ({reasons}). overwrite starts anew")
        if found.path is not None:
            logger.warning("resuming from %s", found.path)
        return found.path

    def begin(self, overwrite: bool) -> None:
        """Take the folder, and discard what it holds if the run is to ``overwrite``; every process waits for that."""
        if self.writes:
            if overwrite:
                self._discard()
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.output_dir / SETTINGS, self.settings)
        PartialState().wait_for_everyone()

    def _discard(self) -> None:
        for path in (*all_checkpoints(self.output_dir), *(self.output_dir / name for name in RESULTS)):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.output_dir.glob("teacher-*.states"):  # of a teacher that may be another now
            path.unlink()
        for name in _FILES:
            (self.output_dir / name).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def step_of(checkpoint: Path | str) -> int:
    """``checkpoint-12`` -> 12."""
    return int(str(checkpoint).rpartition("-")[2])
