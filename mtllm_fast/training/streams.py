"""Documents for training: read as a stream, in an order that a resumed run continues exactly where it stopped.

All processes read the same order and process r of W takes documents r, r + W, …, so that nothing is lost or doubled and
no process has to ask another. To shuffle, files are permuted, and documents within blocks of consecutive ones; both
permutations follow from the seed, the epoch and the block's number. (The buffers that ``datasets`` shuffles in start
empty after a restart, and the order is another one.) Resuming reads the block's file again up to the block.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_fast.core.digests import fingerprint
from mtllm_fast.tables import TABLE_SUFFIXES, open_records, shown

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Any


@dataclass(frozen=True)
class _File:
    """One table on disk."""

    path: Path
    column: str

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self) -> list[Any]:
        return [self.path.name, self.column, fingerprint(self.path)]

    def texts(self, start: int) -> Iterator[str]:
        column = "text" if self.path.suffix.lower() == ".txt" else self.column
        for line, record in itertools.islice(open_records(self.path, [column]), start, None):
            yield _text(record[column], f"{self.path}, row {line}", column)


@dataclass(frozen=True)
class _Dataset:
    """A ``datasets.Dataset`` or ``IterableDataset``."""

    dataset: Any
    column: str
    name: str

    def fingerprint(self) -> list[Any]:
        first = repr(next(iter(self.dataset), None))
        split = str(getattr(self.dataset, "split", None))
        return [self.name, self.column, split, hashlib.sha256(first.encode()).hexdigest()]

    def texts(self, start: int) -> Iterator[str]:
        rows = self.dataset.skip(start) if start else self.dataset
        for number, row in enumerate(rows, start):
            if self.column not in row:
                raise ValueError(f"{self.name}: no column {self.column!r}; the columns are {', '.join(map(repr, row))}")
            yield _text(row[self.column], f"{self.name}, row {number + 1}", self.column)


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} must hold text, got {shown(value)}")
    return value


class DocumentStream:
    """An iterator of documents with a position; see ``open_documents``.

    Attributes:
        skipped: empty texts that were passed over, over all processes' documents.
        dropped: documents at the end of the last epoch that could not be shared evenly.
    """

    def __init__(
        self, parts: list[Any], *, seed: int | None, block: int, rank: int, world_size: int, epochs: int | None
    ) -> None:
        self._parts, self._seed, self._block_size = parts, seed, block
        self._rank, self._world_size, self._epochs = rank, world_size, epochs
        self._fingerprint = hashlib.sha256(repr([part.fingerprint() for part in parts]).encode()).hexdigest()
        # Where the block begins that is being read (epoch, part in the epoch's order, row), its number in the epoch,
        # how many of its documents are used, and how many documents there were before it in all.
        self._epoch = self._part = self._row = self._number = self._used = self._before = 0
        self._own = ""
        self.skipped = self.dropped = 0

    @property
    def ends_unevenly(self) -> bool:
        """Whether it ends, and other processes read documents of other lengths: batches by tokens end apart."""
        return self._epochs is not None and self._world_size > 1

    def __iter__(self) -> Iterator[str]:
        while self._epochs is None or self._epoch < self._epochs:
            start = self._before
            yield from self._one_epoch()
            if self._before == start:
                raise ValueError(f"{self._parts[0].name}: an epoch holds no document")
        self.dropped = self._before % self._world_size

    def _one_epoch(self) -> Iterator[str]:
        order = self._order(len(self._parts), -1)
        while self._part < len(order):
            part = self._parts[order[self._part]]
            rows = part.texts(self._row)
            while block := list(itertools.islice(rows, self._block_size)):
                yield from self._one_block(block)
                self._row, self._number, self._used = self._row + len(block), self._number + 1, 0
            self._part, self._row = self._part + 1, 0
        self._epoch, self._part, self._number = self._epoch + 1, 0, 0

    def _one_block(self, block: list[str]) -> Iterator[str]:
        documents = [block[i] for i in self._order(len(block), self._number) if block[i].strip()]
        if self._used == 0:
            self.skipped += len(block) - len(documents)
        for number in range(self._used, len(documents)):
            self._used = number + 1
            turn = (self._before + number) % self._world_size
            if turn == self._rank:
                self._own = documents[number]
            if turn == self._world_size - 1:  # when every process has one, so that all get as many
                yield self._own
        self._before += len(documents)

    def _order(self, count: int, number: int) -> list[int]:
        if self._seed is None:
            return list(range(count))
        key = [self._seed, self._epoch, number + 1]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(count).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last document that was given out, as JSON values."""
        position = {name: getattr(self, f"_{name}") for name in _POSITION}
        return {**position, "skipped": self.skipped, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; the next iterator starts there.

        Raises:
            ValueError: a position in other documents, or of another order of them.
        """
        identity = self._identity()
        different = [name for name, value in identity.items() if state.get(name) != value]
        if different:
            changes = "; ".join(f"{name} was {state.get(name)!r}, is {identity[name]!r}" for name in different)
            raise ValueError(f"the position is one in other documents than {self._parts[0].name} …: {changes}")
        for name in _POSITION:
            setattr(self, f"_{name}", state[name])
        self.skipped = state["skipped"]

    def _identity(self) -> dict[str, Any]:
        own = {"documents": self._fingerprint, "seed": self._seed, "block": self._block_size}
        return {**own, "world_size": self._world_size}


_POSITION = ("epoch", "part", "row", "number", "used", "before")


def open_documents(
    source: Source,
    *,
    text_column: str = "text",
    split: str = "train",
    seed: int | None = None,
    block: int = 8192,
    rank: int = 0,
    world_size: int = 1,
    epochs: int | None = None,
) -> DocumentStream:
    """Stream the texts of local tables or of a dataset. Empty texts are passed over and counted.

    Args:
        source: a file (``.txt``: a document per line; ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``), a folder of them,
            a pattern, a list of all these, the name of a dataset for ``datasets.load_dataset(..., streaming=True)``,
            or a ``datasets`` object.
        text_column: where the text lies; a ``.txt`` has no columns.
        split: of a dataset that is named.
        seed: shuffle, another way in each epoch; None: the files' order.
        block: how many consecutive documents are shuffled together; they are held in memory.
        rank, world_size: this process takes documents rank, rank + world_size, …
        epochs: how often to go through the documents; None: for ever. The last epoch ends with as many documents for
            every process; the rest (``dropped``) goes to none.

    Raises:
        FileNotFoundError: no such file, or none that the pattern matches.
        ValueError: a suffix, an empty file, a missing column, a text that is none, no document at all: with file and
            row, before the first document is asked for where the first row shows it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "texts.txt")
    ...     _ = path.write_text("one\\ntwo\\n\\nthree\\n")
    ...     stream = open_documents(path, epochs=1)
    ...     first = next(iter(stream))
    ...     again = open_documents(path, epochs=1)
    ...     again.load_state_dict(stream.state_dict())
    ...     first, list(again), again.skipped
    ('one', ['two', 'three'], 1)
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be one of 0 … world_size - 1, got {rank} of {world_size}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, or None, got {epochs}")
    parts = _parts(source, text_column, split)
    for part in parts:
        _check_start(part)
    stream = DocumentStream(parts, seed=seed, block=block, rank=rank, world_size=world_size, epochs=epochs)
    texts = (text for part in parts for text in part.texts(0))
    found = sum(1 for _ in itertools.islice((text for text in texts if text.strip()), world_size))
    if found < world_size:
        raise ValueError(
            f"{parts[0].name}{' …' if len(parts) > 1 else ''}: {found} documents for {world_size} processes"
        )
    return stream


def _check_start(part: Any) -> None:
    if next(part.texts(0), None) is None:
        raise ValueError(f"{part.name}: holds no row")


def _parts(source: Source, column: str, split: str) -> list[Any]:
    if not isinstance(source, str | os.PathLike) and hasattr(source, "features"):
        return [_Dataset(source, column, type(source).__name__)]
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not sources:
        raise ValueError("source names no file")
    if len(sources) == 1 and isinstance(sources[0], str) and _is_dataset_name(sources[0]):
        return [_Dataset(_load_dataset(sources[0], split), column, sources[0])]
    return [_File(path, column) for one in sources for path in _files(Path(one))]


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in TABLE_SUFFIXES and p.is_file())
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise FileNotFoundError(
            f"{path}: no such file, and no dataset's name or pattern of {', '.join(TABLE_SUFFIXES)}"
        )
    for file in found:
        open_records(file, [])
    return found


def _is_dataset_name(name: str) -> bool:
    """``owner/name`` or ``name``, as the hub spells them, where no file is meant."""
    plain = not any(sign in name for sign in "*?[") and not name.startswith((".", "/", "~"))
    return (
        plain and name.count("/") <= 1 and not Path(name).exists() and Path(name).suffix.lower() not in TABLE_SUFFIXES
    )


def _load_dataset(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"the dataset {name!r} needs datasets: pip install 'mtllm-fast[train]'") from None
    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise FileNotFoundError(f"{name}: no such file, and no dataset that can be loaded ({error})") from error
