"""Memory for the CPU's large temporaries that is used again instead of going back to the system.

The C library returns blocks of some megabytes as soon as they are free, and the system clears each page that it hands
out again (what that costs: ``benchmarks/fresh_memory.py``). Within ``reused()`` a block serves its next tenant once no
tensor looks at it any more, so nobody ever sees it change.
"""

from __future__ import annotations

import functools
import math
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
_WASTE = 1.25  # a block may be so many times as large as what is asked for
_NUMPY = {dtype: np.dtype(str(dtype)[6:]) for dtype in (torch.float32, torch.float64, torch.float16)}
_NUMPY[torch.bfloat16] = np.dtype("int16")  # NumPy has no such floats
_CPU = torch.device("cpu")


class _Active(threading.local):
    pool: _Pool | None = None


class _Pool:
    """Blocks that are free, newest last. With those in use they take at most twice the most ever in use at once."""

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        self.lent: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}
        self.in_use = self.most = 0  # bytes
        self.lock = threading.RLock()  # an array may die, and come back, within take() itself

    def take(self, shape: tuple[int, ...], dtype: np.dtype, nbytes: int) -> np.ndarray:
        """An array at the start of a block, which is this caller's until the array dies."""
        with self.lock:
            block = self._fitting(nbytes)
            self.in_use += block.nbytes
            self.most = max(self.most, self.in_use)
            array = np.ndarray(shape, dtype, block)
            watcher = weakref.ref(array, self._give_back)
            self.lent[id(watcher)] = watcher, block
        return array

    def _fitting(self, nbytes: int) -> np.ndarray:
        free = self.free
        for i in range(len(free) - 1, -1, -1):
            if nbytes <= free[i].nbytes <= _WASTE * nbytes:
                return free.pop(i)
        size = -(-nbytes // 8) * 9  # batches differ by a few tokens
        held = self.in_use + size + sum(block.nbytes for block in free)
        while free and held > 2 * max(self.most, self.in_use + size):
            held -= free.pop(0).nbytes
        try:
            return _new_block(size)
        except RuntimeError:  # out of memory, of which we hold some
            free.clear()
            return _new_block(nbytes)

    def _give_back(self, watcher: weakref.ref[np.ndarray]) -> None:
        with self.lock:
            _, block = self.lent.pop(id(watcher), (None, None))
            if block is not None:  # and the pool is not closed
                self.in_use -= block.nbytes
                self.free.append(block)

    def close(self) -> None:
        """Release what is free, and leave what is in use to its arrays."""
        with self.lock:
            self.free.clear()
            self.lent.clear()


def _new_block(nbytes: int) -> np.ndarray:
    """Aligned as torch's tensors are."""
    return torch.empty(nbytes, dtype=torch.uint8, device=_CPU).numpy()


_active = _Active()


@contextmanager
def reused() -> Iterator[None]:
    """Within, ``empty`` of this thread hands out memory again; at the end of the outermost one it is released.

    For what autograd does not record. What is still in use then lives on until its last tensor dies.
    """
    if _active.pool is not None:
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
    return _active.pool is not None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised CPU tensor, whatever the default dtype and device are."""
    pool = _active.pool
    if pool is not None and dtype in _NUMPY:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes >= SMALLEST:
            tensor = torch.from_numpy(pool.take(shape, _NUMPY[dtype], nbytes))
            if tensor.dtype == dtype:
                return tensor
            # A view would do, but an autograd.Function that returns one gets it marked as such.
            return torch.empty(0, dtype=dtype, device=_CPU).set_(tensor.untyped_storage(), 0, shape)  # type: ignore[call-overload, no-any-return]
    return torch.empty(shape, dtype=dtype, device=_CPU)


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(shape)``."""
    return empty(*shape, dtype=like.dtype) if like.is_cpu and is_active() else like.new_empty(shape)
