"""``mtllm-fast encode``: a table of texts to a file of embeddings, in resumable shards."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from mtllm_fast import MTLLM, __version__
from mtllm_fast.cli.check import check_exists
from mtllm_fast.core.team import join_team
from mtllm_fast.models.stack import why_not_fusable
from mtllm_fast.shards import ShardedJob, Shards, check_output, open_shards
from mtllm_fast.tables import Row, TableFacts, TextTable, open_table

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM as Model


@dataclass(frozen=True)
class EncodeJob:
    """The command's arguments."""

    source: Path
    out: Path
    src_lang: str | None
    lang_column: str | None
    model: str
    text_column: str | None
    id_column: str | None
    max_length: int
    batch_tokens: int | None
    normalize: bool
    dtype: str
    precision: str | None
    device: str | None
    shard_size: int
    overwrite: bool


def run(job: EncodeJob) -> None:
    """Check everything, load the model, encode the shards that are missing, merge. Bad input leaves no file.

    Under a launcher each process encodes a part of the shards, and the first one merges them.
    """
    team = join_team()
    if (job.src_lang is None) == (job.lang_column is None):
        raise ValueError("give the language of the texts: either --src-lang CODE or --lang-column NAME")
    check_output(job.out, job.overwrite)
    check_exists(job.model)
    if job.id_column is not None and job.out.suffix.lower() != ".parquet":
        raise ValueError("--id-column needs an OUT that ends in .parquet: .npy has no place for ids")
    if job.id_column == "embedding":
        raise ValueError("--id-column embedding: the output has a column of that name")
    table = open_table(
        job.source,
        language=job.src_lang,
        language_column=job.lang_column,
        text_column=job.text_column,
        id_column=job.id_column,
    )
    if job.out.exists() and job.out.samefile(job.source):
        raise ValueError(f"{job.out} is the input: choose another OUT")
    facts = table.scan()
    device = pick_device(job.device or team.own_gpu)
    if job.model == "tiny" and team.leads:
        typer.echo("warning: the model is the embedded tiny one, whose embeddings mean nothing; give --model", err=True)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    dtype = job.dtype if job.dtype == "auto" else getattr(torch, job.dtype)
    model = MTLLM.from_pretrained(job.model, dtype=dtype, device_map=str(device), llm_embeddings=False)
    sharded = _sharded_job(job, table, facts, model)
    if job.precision is not None or why_not_fusable(model) is None:
        model.fuse(job.precision)
    with open_shards(job.out, sharded, job.overwrite, team) as shards:
        if not shards.finished:
            _encode_missing(job, table, facts, model, shards)
        shards.finish((row.id for row in table.rows()), job.id_column or "id", facts.id_type)
    if team.leads:
        typer.echo(f"{job.out}: {facts.rows} embeddings of width {model.config.hidden_size}", err=True)


def _encode_missing(job: EncodeJob, table: TextTable, facts: TableFacts, model: Model, shards: Shards) -> None:
    mine = set(shards.mine)
    hidden = not (sys.stderr.isatty() and shards.team.leads)
    bar = tqdm(total=facts.rows, unit="text", desc="encode", disable=hidden)
    with bar, _counted_truncation():
        for index, rows in enumerate(table.chunks(job.shard_size)):
            if index in mine:
                shards.write(index, _encode(job, rows, model))
            bar.update(len(rows))


def _encode(job: EncodeJob, rows: list[Row], model: Model) -> Any:
    try:
        return model.encode(
            [row.text for row in rows],
            [row.language for row in rows],
            max_length=job.max_length,
            batch_tokens=job.batch_tokens,
            normalize_embeddings=job.normalize,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
    except torch.OutOfMemoryError as error:
        raise OSError(
            "the GPU's memory is full: run again with a smaller --batch-tokens, finished shards are kept"
        ) from error


def pick_device(name: str | None) -> torch.device:
    """The device that ``--device`` names; without a name a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be such as cuda, cuda:1 or cpu, got {name!r}") from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device must be such as cuda, cuda:1 or cpu, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch finds {torch.cuda.device_count()} GPUs; cpu works everywhere")
    return device


def _sharded_job(job: EncodeJob, table: TextTable, facts: TableFacts, model: Model) -> ShardedJob:
    """All that shapes the values. Batching and device are left out: a job may go on with others."""
    return ShardedJob(
        rows=facts.rows,
        width=model.config.hidden_size,
        dtype="float16" if model.dtype == torch.float16 else "float32",
        shard_rows=job.shard_size,
        identity={
            "version": __version__,
            "input": {"bytes": facts.bytes, "sha256": facts.sha256},
            "text_column": table.text_column,
            "id_column": table.id_column,
            "language": table.language or {"column": table.language_column},
            "max_length": job.max_length,
            "normalize": job.normalize,
            "compute_dtype": str(model.dtype).removeprefix("torch."),
            "precision": job.precision,
            "model": fingerprint(model),
        },
    )


def fingerprint(model: Model) -> str:
    """A digest of configuration, weights and tokenizer that is the same on every device."""
    digest = hashlib.sha256()
    incidental = ("_name_or_path", "dtype", "transformers_version")
    config = {key: value for key, value in model.config.to_dict().items() if key not in incidental}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(model.tokenizer.backend_tokenizer.to_str().encode())
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in model.state_dict().items():
        # The sum of the bit patterns: exact in any order, and no copy of the tensor is made.
        total = tensor.contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {total}\n".encode())
    return digest.hexdigest()


@contextmanager
def _counted_truncation() -> Iterator[None]:
    """One warning for the whole table in place of ``encode``'s one per shard."""
    logger = logging.getLogger("mtllm_fast")
    counted = 0

    def hold_back(record: logging.LogRecord) -> bool:
        nonlocal counted
        if "were truncated" not in record.msg or not isinstance(record.args, tuple):
            return True
        counted += int(record.args[0])  # type: ignore[call-overload]
        return False

    logger.addFilter(hold_back)
    try:
        yield
    finally:
        logger.removeFilter(hold_back)
        if counted:
            logger.warning("%d texts were longer than --max-length and were truncated", counted)
