"""Memory for the CPU's large temporaries that is used again instead of going back to the system.

The C library returns blocks of some megabytes as soon as they are free, and the system clears each page that it hands
out again: of a float32 forward of packed sentences that was a fifth of the time. Within ``reused()`` a block
serves its next tenant once no tensor looks at it any more, so nobody ever sees it change.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

SMALLEST = 1 << 17  # bytes; below, the C library keeps what is freed
_WASTE = 1.5  # a block may be so many times as large as what is asked for
_active = threading.local()


class _Pool:
    """Blocks that are free, oldest first. Together with those in use they take at most twice what was ever in use."""

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        self.in_use = self.most = 0  # bytes
        self.closed = False
        self.lock = threading.RLock()  # a finaliser may run within take() itself

    def take(self, nbytes: int) -> np.ndarray:
        """The first ``nbytes`` of a block that is this caller's until the array dies."""
        with self.lock:
            block = self._fitting(nbytes)
            self.in_use += block.nbytes
            self.most = max(self.most, self.in_use)
        lent = block[:nbytes]
        weakref.finalize(lent, self.give_back, block).atexit = False
        return lent

    def _fitting(self, nbytes: int) -> np.ndarray:
        fits = [i for i, block in enumerate(self.free) if nbytes <= block.nbytes <= _WASTE * nbytes]
        if fits:
            return self.free.pop(min(fits, key=lambda i: self.free[i].nbytes))
        size = -(-nbytes // 8) * 9  # batches differ by a few tokens
        held = self.in_use + size + sum(block.nbytes for block in self.free)
        while self.free and held > 2 * max(self.most, self.in_use + size):
            held -= self.free.pop(0).nbytes
        return torch.empty(size, dtype=torch.uint8, device="cpu").numpy()

    def give_back(self, block: np.ndarray) -> None:
        with self.lock:
            self.in_use -= block.nbytes
            if not self.closed:
                self.free.append(block)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.free.clear()


@contextmanager
def reused() -> Iterator[None]:
    """Within, ``empty`` of this thread hands out memory again; at the end of the outermost one it is released.

    For what autograd does not record. What is still in use then lives on until its last tensor dies.
    """
    if getattr(_active, "pool", None) is not None:
        yield
        return
    _active.pool = pool = _Pool()
    try:
        yield
    finally:
        _active.pool = None
        pool.close()


def reusing(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` within ``reused()``, unless autograd or torch.compile records it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return function(*args, **kwargs)
        with reused():
            return function(*args, **kwargs)

    return run


def is_active() -> bool:
    """Whether this thread is within ``reused()``."""
    return getattr(_active, "pool", None) is not None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised CPU tensor, whatever the default dtype and device are."""
    pool: _Pool | None = getattr(_active, "pool", None)
    if pool is not None:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes >= SMALLEST:
            storage = torch.from_numpy(pool.take(nbytes)).untyped_storage()
            tensor = torch.empty(0, dtype=dtype, device="cpu")
            return tensor.set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]
    return torch.empty(shape, dtype=dtype, device="cpu")


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(shape)``."""
    return empty(*shape, dtype=like.dtype) if like.is_cpu and is_active() else like.new_empty(shape)
