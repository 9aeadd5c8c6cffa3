"""``preembed``: what a fine-tuned LLM says of its training rows, once, in a memory-mapped file."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from mtllm_fast.core.digests import digest
from mtllm_fast.core.errors import CheckpointError
from mtllm_fast.core.team import join_team
from mtllm_fast.shards import ShardedJob, check_output, open_shards
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.examples import Example, read_examples
from mtllm_fast.tasks.model import Loaded, load_result, read_facts
from mtllm_fast.tasks.presets import Task
from mtllm_fast.training.checkpoints import MANIFEST


@dataclass
class PreembedArguments:
    """What ``preembed`` is to do."""

    teacher: str = field(default="", metadata={"help": "OUTPUT_DIR/final of finetune."})
    data: str = field(default="", metadata={"help": "The rows that the student will learn from."})
    out: str = field(default="states.safetensors", metadata={"help": "File to write."})
    language: str = "eng_Latn"
    dtype: str = "auto"
    device: str | None = None
    batch_rows: int = 32
    shard_size: int = 4096
    overwrite: bool = False


def preembed(arguments: PreembedArguments) -> Path:
    """Write the teacher's pooled states of all rows: one vector per text, choice or word, in the rows' order.

    The file holds one float32 tensor ``rows`` ``[units, D]`` (words beyond ``max_length`` are NaN) and says which
    teacher and data it is of. Killed at any moment, the same call goes on where it stopped. Under ``torchrun`` each
    process computes a part of it.

    Raises:
        CheckpointError: ``teacher`` is no result of ``finetune``, or damaged.
        FileExistsError: ``out`` exists, and ``overwrite`` is not set.
        ValueError: rows that do not fit the teacher's task, states that are not finite, a size below 1, or unfinished
            work of another teacher or data.
    """
    for name in ("batch_rows", "shard_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"out must end in .safetensors, got {out.name!r}")
    team = join_team()
    check_output(out, arguments.overwrite)
    teacher = Path(arguments.teacher)
    task = Task.from_dict(read_facts(teacher)["task"])
    examples = read_examples(arguments.data, task, language=arguments.language)
    loaded = load_result(teacher, dtype=arguments.dtype, device=arguments.device or team.own_gpu)
    collate = TaskCollator(task, loaded.tokenizer, reads_languages=loaded.facts["kind"] != "llm")
    bounds = [0, *itertools.accumulate(example.units for example in examples)]
    width = loaded.model.tower.config.hidden_size
    identity = {"teacher": digest(teacher / MANIFEST), "data": digest(arguments.data), "language": arguments.language}
    job = ShardedJob(
        bounds[-1], width, "float32", arguments.shard_size, {**identity, "dtype_of_model": arguments.dtype}
    )
    with open_shards(out, job, arguments.overwrite, team) as shards:
        for index in tqdm(shards.mine, desc="shards", disable=None if team.leads else True):
            start = index * job.shard_rows
            rows = job.shape(index)[0]
            shards.write(index, _states(loaded, collate, examples, bounds, start, start + rows, arguments.batch_rows))
        shards.finish()
    return out


@torch.no_grad()
def _states(
    loaded: Loaded, collate: TaskCollator, examples: Sequence[Example], bounds: Sequence[int], start: int, end: int,
    batch_rows: int,
) -> np.ndarray:  # fmt: skip
    """Vectors start … end; texts that lie across a shard's bounds are computed for both."""
    inside = [i for i in range(len(examples)) if bounds[i] < end and bounds[i + 1] > start]
    values = np.full(
        (bounds[inside[-1] + 1] - bounds[inside[0]], loaded.model.tower.config.hidden_size), np.nan, np.float32
    )
    first = bounds[inside[0]]
    for at in range(0, len(inside), batch_rows):
        chosen = inside[at : at + batch_rows]
        batch = {k: v for k, v in collate([examples[i] for i in chosen]).items() if k not in ("labels", "states")}
        states = loaded.model(**batch).states.float().cpu().numpy()
        if not np.isfinite(states).all():
            raise ValueError(
                f"the teacher's states of rows {chosen[0]} … {chosen[-1]} are not finite: try a wider dtype"
            )
        kept = [flag for i in chosen for flag in collate.kept_units(examples[i])]
        places = np.arange(bounds[chosen[0]] - first, bounds[chosen[-1] + 1] - first)[np.array(kept)]
        values[places] = states
    return values[start - first : end - first]


class States(Sequence[Any]):
    """A file of ``preembed``, memory-mapped: item i is a tensor ``[units of example i, D]``.

    Raises:
        CheckpointError: no such file, of another teacher or data, or with another number of vectors.
    """

    def __init__(self, path: str | os.PathLike[str], teacher: Path, data: str | os.PathLike[str], units: Sequence[int]):
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file; preembed writes it")
        try:
            self._file = safe_open(os.fspath(path), framework="pt")
            manifest = json.loads(self._file.metadata()["manifest"])
            self._rows = self._file.get_slice("rows")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a file of preembed ({error})") from error
        for name, now in (("teacher", digest(teacher / MANIFEST)), ("data", digest(data))):
            if manifest.get(name) != now:
                raise CheckpointError(f"{path} is of another {name} than {teacher if name == 'teacher' else data}")
        self._bounds = [0, *itertools.accumulate(units)]
        if self._rows.get_shape()[0] != self._bounds[-1]:
            raise CheckpointError(f"{path} holds {self._rows.get_shape()[0]} vectors, the rows have {self._bounds[-1]}")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._bounds[index] : self._bounds[index + 1]]
