"""Embeddings written in numbered shards beside the output, so that a killed job goes on where it stopped.

``OUT.partial/`` holds a manifest (what is computed from what) and one file per finished shard. Every file appears under
its name complete or not at all (written aside, synced, renamed), and OUT itself only when all shards are there. A shard
covers a fixed range of rows, so nothing can be lost, doubled or moved, whenever the process dies.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from mtllm_fast.core.team import Team

logger = logging.getLogger("mtllm_fast")

OUTPUT_SUFFIXES = (".npy", ".parquet", ".safetensors")
_MANIFEST = "manifest.json"
_SHARDS = "[0-9]*.npy"
_UNFINISHED = ".tmp"
ALONE = Team()


@dataclass(frozen=True)
class ShardedJob:
    """What a job computes. A work folder of another job is refused, so everything that shapes the values belongs here.

    Attributes:
        rows: N, the rows of the input and of the output.
        width: D, the columns of the output.
        dtype: NumPy name of the output's type.
        shard_rows: rows per shard (the last one has the rest).
        identity: JSON values that tell the input, the model and the options apart from others.
    """

    rows: int
    width: int
    dtype: str
    shard_rows: int
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shape(self, index: int) -> tuple[int, int]:
        return min(self.shard_rows, self.rows - index * self.shard_rows), self.width

    def manifest(self) -> dict[str, Any]:
        own = {"rows": self.rows, "width": self.width, "dtype": self.dtype, "shard_rows": self.shard_rows}
        return {**own, **self.identity}


def check_output(out: Path, overwrite: bool) -> None:
    """Raises, before anything is computed or written, when ``out`` cannot become the output.

    Raises:
        ValueError: an unknown suffix.
        FileNotFoundError, IsADirectoryError: its folder does not exist, or it is one.
        FileExistsError: it exists, no job on it is unfinished, and ``overwrite`` is False.
    """
    if out.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"{out}: must end in {' or '.join(OUTPUT_SUFFIXES)}, got {out.suffix or 'no suffix'}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: its folder {out.parent} does not exist")
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder")
    if out.exists() and not overwrite and not work_folder(out).exists():
        raise _exists(out)


def _exists(out: Path) -> FileExistsError:
    return FileExistsError(f"{out} exists; --overwrite replaces it")


def work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def open_shards(out: Path, job: ShardedJob, overwrite: bool = False, team: Team = ALONE) -> Iterator[Shards]:
    """Start or resume ``job``; one team of processes at a time.

    Args:
        out: the output, see :func:`check_output`.
        job: what is computed.
        overwrite: throw an unfinished job's shards away instead of resuming.
        team: the processes that share it, all on one file system: process 0 finds out what is missing.

    Raises:
        ValueError: the work folder belongs to another job; the message says what differs.
        BlockingIOError: another process is at work on it.
    """
    folder = work_folder(out)
    shards = Shards(out, folder, job, team)
    if not team.leads:
        shards.finished, shards._to_write = team.share(None)
        yield shards
        return
    folder.mkdir(exist_ok=True)
    with _locked(folder):
        shards._start(overwrite)
        _, shards._to_write = team.share((shards.finished, shards.missing))
        yield shards


class Shards:
    """The shards of one job: which are missing, writing one, merging them all. See :func:`open_shards`."""

    def __init__(self, out: Path, folder: Path, job: ShardedJob, team: Team = ALONE) -> None:
        self.out, self.folder, self.job, self.team = out, folder, job, team
        self.finished = False  # OUT was complete; there is nothing to write or merge
        self._files: dict[int, Path] = {}
        self._to_write: list[int] = []  # by the whole team

    @property
    def mine(self) -> list[int]:
        """Shards that this process is to write: every so-manieth of those that were missing when the job was opened."""
        return self._to_write[self.team.rank :: self.team.size]

    def finish(self, ids: Iterable[str | int] = (), id_name: str = "id", id_type: type = int) -> None:
        """``merge``, by process 0, once every process of the team has written its shards; all wait for it."""
        if self.team.size > 1 and not self.finished:
            self.team.wait()
            if self.team.leads:
                self._find_shards()
        if self.team.leads and not self.finished:
            self.merge(ids, id_name, id_type)
        self.team.wait()  # of a process that ended early its launcher would think that it had failed the others

    @property
    def missing(self) -> list[int]:
        if self.finished:
            return []
        return [index for index in range(self.job.shards) if index not in self._files]

    def write(self, index: int, values: np.ndarray) -> None:
        """Shard ``index``: ``values`` [rows of the shard, D]."""
        values = np.ascontiguousarray(values)
        if values.shape != self.job.shape(index) or values.dtype != self.job.dtype:
            raise ValueError(
                f"shard {index} must be {self.job.dtype} {list(self.job.shape(index))}, "
                f"got {values.dtype} {list(values.shape)}"
            )
        path = self.folder / _shard_name(index, values)
        _write_whole(path, lambda file: np.save(file, values))
        self._files[index] = path

    def merge(self, ids: Iterable[str | int], id_name: str = "id", id_type: type = int) -> None:
        """Write OUT from all shards, one shard in memory at a time, and remove the work folder.

        Args:
            ids: N ids in the input's order, read only for ``.parquet``.
            id_name: name of the id column in a ``.parquet``.
            id_type: ``str`` or ``int``.
        """
        if self.missing:
            raise ValueError(f"shards {self.missing[:8]} of {self.job.shards} are missing: write them before merging")
        if self.out.suffix.lower() == ".npy":
            _write_whole(self.out, self._write_npy, aside=self.folder)
        elif self.out.suffix.lower() == ".safetensors":
            _write_whole(self.out, self._write_safetensors, aside=self.folder)
        else:
            _write_whole(self.out, lambda file: self._write_parquet(file, ids, id_name, id_type), aside=self.folder)
        # Should the process die while the folder is removed, the next one knows that there is nothing left to do.
        self._write_manifest(merged=True)
        self._remove()

    def _start(self, overwrite: bool) -> None:
        manifest = self._read_manifest()
        merged = manifest.pop("merged", False) and self.out.exists()
        wanted = json.loads(json.dumps(self.job.manifest()))
        if manifest and not overwrite:
            different = [key for key in {**wanted, **manifest} if wanted.get(key) != manifest.get(key)]
            if different:
                changes = "; ".join(f"{key} was {manifest.get(key)!r}, is {wanted.get(key)!r}" for key in different)
                raise ValueError(f"{self.folder} holds the work of another job: {changes}. --overwrite starts anew")
            self.finished = merged
            if merged:
                self._remove()
            else:
                self._find_shards()
        elif self.out.exists() and not overwrite:  # died between the last file of the work folder and the folder
            self._remove()
            raise _exists(self.out)
        else:
            self._remove_files()
            self._write_manifest()

    def _find_shards(self) -> None:
        """Take every shard that has its shape, and the last one if its checksum fits; remove what is not taken."""
        for path in sorted(self.folder.glob(_SHARDS)):
            index = int(path.name.split(".")[0])
            if index < self.job.shards and self._fits(path, index):
                self._files[index] = path
        if self._files:
            last = max(self._files)
            try:
                self._read(last)
            except ValueError:
                logger.warning("%s is damaged and is computed again", self._files.pop(last))
        for path in self._own_files():
            if path.name != _MANIFEST and path not in self._files.values():
                path.unlink()

    def _fits(self, path: Path, index: int) -> bool:
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError):  # shorter than its header says
            return False
        return values.shape == self.job.shape(index) and values.dtype == self.job.dtype

    def _read(self, index: int) -> np.ndarray:
        path = self._files[index]
        values = np.load(path, allow_pickle=False)
        if path.name != _shard_name(index, values):
            raise ValueError(f"{path} is damaged: delete it and start again, the other shards are kept")
        return values

    def _write_npy(self, file: IO[bytes]) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(self.job.dtype)),
            "fortran_order": False,
            "shape": (self.job.rows, self.job.width),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for index in range(self.job.shards):
            file.write(self._read(index).data)

    def _write_safetensors(self, file: IO[bytes]) -> None:
        """One tensor ``rows`` ``[N, D]``, one shard in memory at a time, and the job's manifest as metadata."""
        size = self.job.rows * self.job.width * np.dtype(self.job.dtype).itemsize
        kind = {"float32": "F32", "float16": "F16", "float64": "F64"}[self.job.dtype]
        tensor = {"dtype": kind, "shape": [self.job.rows, self.job.width], "data_offsets": [0, size]}
        header = {"rows": tensor, "__metadata__": {"manifest": json.dumps(self.job.manifest())}}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # readers map the data, which begin on a boundary of eight
        file.write(len(text).to_bytes(8, "little") + text)
        for index in range(self.job.shards):
            file.write(self._read(index).data)

    def _write_parquet(self, file: IO[bytes], ids: Iterable[str | int], id_name: str, id_type: type) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema(
            {
                id_name: pyarrow.string() if id_type is str else pyarrow.int64(),
                "embedding": pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(self.job.dtype)), self.job.width),
            }
        )
        remaining = iter(ids)
        # Floats of embeddings neither repeat nor compress: plain pages are smaller and faster.
        with pyarrow.parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
            for index in range(self.job.shards):
                values = self._read(index)
                column = pyarrow.array(list(islice(remaining, len(values))), schema.field(0).type)
                embeddings = pyarrow.FixedSizeListArray.from_arrays(values.reshape(-1), type=schema.field(1).type)
                writer.write_table(pyarrow.table([column, embeddings], schema=schema))

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / _MANIFEST
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        foreign = {path.name for path in self.folder.iterdir()} - {path.name for path in self._own_files()}
        if foreign:
            raise ValueError(f"{self.folder} exists and is no work folder of mtllm-fast: move it away")
        return {}

    def _write_manifest(self, merged: bool = False) -> None:
        text = json.dumps({**self.job.manifest(), **({"merged": True} if merged else {})}, indent=1)
        _write_whole(self.folder / _MANIFEST, lambda file: file.write(text.encode("utf-8")))

    def _own_files(self) -> list[Path]:
        patterns = (_SHARDS, f"*{_UNFINISHED}", _MANIFEST)  # the manifest last: it says whose the others are
        return [path for pattern in patterns for path in self.folder.glob(pattern)]

    def _remove_files(self) -> None:
        for path in self._own_files():
            path.unlink()

    def _remove(self) -> None:
        self._remove_files()
        self.folder.rmdir()


def _shard_name(index: int, values: np.ndarray) -> str:
    return f"{index:08d}.{zlib.crc32(values.data):08x}.npy"


def _write_whole(path: Path, write: Callable[[IO[bytes]], Any], aside: Path | None = None) -> None:
    """``path`` gets its new contents whole or keeps its old ones; written in ``aside`` (same file system) first."""
    unfinished = (aside or path.parent) / (path.name + _UNFINISHED)
    with open(unfinished, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """An advisory lock on the folder, gone with the process however it ends."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder}: another process is at work on this output") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): do not start the same job twice at a time", folder, error)
        yield
    finally:
        os.close(handle)
