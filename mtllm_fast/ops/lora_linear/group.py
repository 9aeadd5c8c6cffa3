"""What the parts of ``lora_linear`` hand to one another: adapters, and how to compute x again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


class Adapter(NamedTuple):
    """One projection's low-rank branch: a ``[r, K]``, b ``[N, r]``, and the factor that PEFT calls scaling."""

    a: Tensor
    b: Tensor
    scale: float = 1.0


class RmsNormed(NamedTuple):
    """x = states · rstd · weight: states ``[T, K]``, rstd ``[T]`` in float32, weight ``[K]``."""

    states: Tensor
    rstd: Tensor
    weight: Tensor


class Gated(NamedTuple):
    """x = silu(gate) · up, both ``[T, K]``; rows may be strided."""

    gate: Tensor
    up: Tensor


SOURCES: dict[str, type] = {"rms_norm": RmsNormed, "swiglu": Gated}
"""By the name that the registered op takes."""


class Group(NamedTuple):
    """The adapters of projections of one x, and their dropout."""

    a: Sequence[Tensor]  # [r_g, K]
    b: Sequence[Tensor]  # [N_g, r_g]
    scales: Sequence[float]
    at: Sequence[int]  # the first of an adapter's columns of y
    dropout: float
    seed: Tensor | None  # int64 [1] on the CPU

    @property
    def ranks(self) -> list[int]:
        return [a.shape[0] for a in self.a]

    @property
    def rank_starts(self) -> list[int]:
        """Where each adapter's columns of the low-rank states ``[T, Σ r]`` start; the last one is their number."""
        return [0, *accumulate(self.ranks)]

    @property
    def columns(self) -> list[slice]:
        """Of y."""
        return [slice(at, at + b.shape[0]) for at, b in zip(self.at, self.b, strict=True)]

    def covers(self, width: int) -> bool:
        """Whether every column of y has an adapter."""
        return sum(b.shape[0] for b in self.b) == width

    def parameters(self) -> int:
        return sum(t.numel() for t in (*self.a, *self.b))

    def views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(one like each a, one like each b) of a buffer of ``parameters()`` elements."""
        pieces = flat.split([t.numel() for t in (*self.a, *self.b)])
        shaped = [piece.view(t.shape) for piece, t in zip(pieces, (*self.a, *self.b), strict=True)]
        return shaped[: len(self.a)], shaped[len(self.a) :]
