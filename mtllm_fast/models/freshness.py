"""Whether weights that something was derived from have changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_PLACES = 8
_BYTES = 64  # a cache line: what one look at memory brings anyway


def checksum(tensor: Tensor, sample: int | None = None) -> int:
    """Of the memory as integers: sums of the rows and columns of a square, weighted by their number, so that moving
    values about shows too; or the plain sum of about ``sample`` of them."""
    memory = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = memory.numel() % 8 == 0 and memory.data_ptr() % 8 == 0
    words = memory.view(torch.int64) if whole else memory
    if sample:
        return int(words[:: max(1, words.numel() // sample)].sum(dtype=torch.int64))
    width = 1 << (words.numel().bit_length() // 2)
    body = words.numel() // width * width
    square = words[:body].view(-1, width)
    sums = torch.cat([square.sum(0, dtype=torch.int64), square.sum(1, dtype=torch.int64), words[body:].to(torch.int64)])
    return int((sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum())


class Sample:
    """A few bytes of each of many tensors, as they were; to compare those on a GPU waits for it.

    Weights that nobody reads lie in memory that no cache holds, so each place looked at costs a fraction of a
    microsecond, and the Python of one tensor several: the views are made once and read together.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        found = [view for tensor in tensors if (view := _places(tensor)) is not None]
        kinds = dict.fromkeys((view.device, view.dim()) for view in found)
        self._views = [[view for view in found if (view.device, view.dim()) == kind] for kind in kinds]
        self._values = self._read()

    def unchanged(self) -> bool:
        """Whether the memory that the tensors had holds what it held; whether they still have it is not asked."""
        return all(map(torch.equal, self._read(), self._values))

    def _read(self) -> list[Tensor]:
        return [torch.cat(views) for views in self._views]


def _places(tensor: Tensor) -> Tensor | None:
    """Live bytes ``[places, _BYTES]`` of a tensor, all ``[bytes]`` of a small one; None without data."""
    if tensor.is_meta or tensor.numel() == 0:
        return None
    storage, start = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    count = min(tensor.nbytes, storage.nbytes() - start)
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (count,), (1,))
    if count < _PLACES * _BYTES:
        return memory
    return memory.unfold(0, _BYTES, (count - _BYTES) // (_PLACES - 1))[:_PLACES]
