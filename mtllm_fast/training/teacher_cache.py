"""What the teacher said of a document before: for runs that see their documents more than once.

The teacher is a third of a step. Its pooled state of a document depends on nothing that is trained, so it is written
down under a hash of the document's tokens. The file only grows; a record that a killed process left half written, or
whose checksum is wrong, ends it.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

_HASH = 16
_CHECKSUM = 4


class TeacherCache:
    """Pooled states ``[D]`` in float32, on disk and by document.

    Args:
        path: a file for this process and this teacher alone; made if it is not there.
        width: D.
        identity: what the teacher is; another one's file is refused.

    Raises:
        ValueError: a file of another width or teacher.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = TeacherCache(Path(folder, "teacher"), 2, "some LLM")
    ...     tokens, bounds = torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3])
    ...     said = cache.pooled(tokens, bounds, lambda ids, cu_seqlens: torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    ...     again = TeacherCache(Path(folder, "teacher"), 2, "some LLM").pooled(tokens, bounds, lambda *_: None)
    >>> torch.equal(said, again)
    True
    """

    def __init__(self, path: Path, width: int, identity: str) -> None:
        self._path, self._width = path, width
        self._size = _HASH + 4 * width + _CHECKSUM
        header = hashlib.sha256(f"{width} {identity}".encode()).digest()
        self._rows: dict[bytes, int] = {}
        if path.exists() and path.stat().st_size >= len(header):  # shorter: killed while it was made
            if path.open("rb").read(len(header)) != header:
                raise ValueError(f"{path} holds the states of another teacher: choose another file")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(header)
        self._start = len(header)
        self._read()

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self) -> None:
        with self._path.open("rb+") as file:
            file.seek(self._start)
            while len(record := file.read(self._size)) == self._size and self._is_whole(record):
                self._rows[record[:_HASH]] = len(self._rows)
            file.truncate(self._start + len(self._rows) * self._size)

    def _is_whole(self, record: bytes) -> bool:
        return zlib.crc32(record[:-_CHECKSUM]).to_bytes(_CHECKSUM, "little") == record[-_CHECKSUM:]

    def pooled(self, input_ids: Tensor, cu_seqlens: Tensor, teacher: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """States ``[B, D]`` of a packed batch on the host; ``teacher(ids, cu_seqlens)`` says the unknown ones."""
        documents = torch.split(input_ids, cu_seqlens.diff().tolist())
        keys = [hashlib.blake2b(document.numpy().tobytes(), digest_size=_HASH).digest() for document in documents]
        unknown = {key: document for key, document in zip(keys, documents, strict=True) if key not in self._rows}
        if unknown:
            lengths = torch.tensor([0, *(len(document) for document in unknown.values())])
            states = teacher(torch.cat(list(unknown.values())), lengths.cumsum(0).int())
            self._append(list(unknown), states.float().cpu().numpy())
        with self._path.open("rb") as file:
            return torch.from_numpy(np.stack([self._row(file, key) for key in keys]))

    def _append(self, keys: Sequence[bytes], states: np.ndarray) -> None:
        with self._path.open("ab") as file:
            for key, state in zip(keys, states, strict=True):
                record = key + state.astype("<f4").tobytes()
                file.write(record + zlib.crc32(record).to_bytes(_CHECKSUM, "little"))
                self._rows[key] = len(self._rows)
            file.flush()
            os.fsync(file.fileno())

    def _row(self, file: IO[bytes], key: bytes) -> np.ndarray:
        file.seek(self._start + self._rows[key] * self._size + _HASH)
        return np.frombuffer(file.read(4 * self._width), dtype="<f4").astype(np.float32)
