"""Packed batches: T real tokens and ``cu_seqlens`` instead of a padded ``[N, L]`` grid.

A batch is packed once, after tokenisation, and unpacked once, at the end. Sentence ``b`` owns the rows
``cu_seqlens[b] : cu_seqlens[b + 1]``; rows from ``cu_seqlens[-1]`` on (a *dead tail*, which only a traced graph of
static size makes) belong to no sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """Which packed tokens make up which sentence.

    Attributes:
        cu_seqlens: int32 [B+1], offsets of the sentences in the packed tokens.
        position_ids: int64 [T], 0, 1, … within each sentence.
        max_seqlen: an upper bound of the longest sentence; a Python int, so that using it never waits for a device.
        dead_tail: whether rows after the last sentence may exist.
    """

    cu_seqlens: Tensor
    position_ids: Tensor
    max_seqlen: int
    dead_tail: bool = False


@dataclass(frozen=True, kw_only=True)
class Packing(PackedLayout):
    """Where the packed tokens lie in a padded ``[N, L]`` batch.

    Attributes:
        indices: int64 [T], position of each packed token in the flattened ``[N * L]`` grid.
        padded_shape: ``(N, L)``.
    """

    indices: Tensor
    padded_shape: tuple[int, int]

    def pack(self, padded_NL: Tensor) -> Tensor:
        """``[N, L, …] -> [T, …]``."""
        indices = self.indices.to(padded_NL.device)  # of a model over several devices, the last one's
        if self.dead_tail:
            indices = indices.clamp(max=padded_NL.shape[0] * padded_NL.shape[1] - 1)
        return padded_NL.flatten(0, 1).index_select(0, indices)

    def unpack(self, packed_T: Tensor) -> Tensor:
        """``[T, …] -> [N, L, …]``, zero at padding."""
        n, length = self.padded_shape
        if self.dead_tail:
            dead = torch.arange(packed_T.shape[0], device=packed_T.device) >= self.cu_seqlens[-1].to(packed_T.device)
            packed_T = packed_T.masked_fill(dead.view(-1, *(1,) * (packed_T.dim() - 1)), 0)
        # One more row for dead tokens that have no place in the grid.
        grid = packed_T.new_zeros((n * length + self.dead_tail, *packed_T.shape[1:]))
        grid = grid.index_copy(0, self.indices.to(packed_T.device), packed_T)
        return grid[: n * length].unflatten(0, (n, length))


def pack_token_ids(token_ids: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tokenised texts as packed inputs of ``MTLLM.forward``: ``input_ids`` [T] and ``cu_seqlens`` [B+1].

    Their sizes are marked dynamic, so that a model under ``torch.compile`` is compiled once for all lengths.

    >>> pack_token_ids([[5, 6], [7, 8, 9]])
    {'input_ids': tensor([5, 6, 7, 8, 9]), 'cu_seqlens': tensor([0, 2, 5], dtype=torch.int32)}
    """
    ends = itertools.accumulate((len(ids) for ids in token_ids), initial=0)
    packed = {
        "input_ids": torch.tensor([i for ids in token_ids for i in ids], dtype=torch.int64, device=device),
        "cu_seqlens": torch.tensor(list(ends), dtype=torch.int32, device=device),
    }
    for tensor in packed.values():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return packed


def position_ids_from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Position of each packed token in its sentence: int64 [T], with no host synchronisation.

    >>> position_ids_from_cu_seqlens(torch.tensor([0, 2, 5], dtype=torch.int32), 5)
    tensor([0, 1, 0, 1, 2])
    """
    rows = torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, rows, right=True) - 1]
    return (rows - starts).long()


def right_padded(layout: PackedLayout) -> Packing:
    """The padded grid ``[B, max_seqlen]`` of tokens that are packed already. No host synchronisation."""
    rows = torch.arange(layout.position_ids.shape[0], device=layout.cu_seqlens.device, dtype=torch.int32)
    sentence = torch.searchsorted(layout.cu_seqlens, rows, right=True).long() - 1
    count = layout.cu_seqlens.shape[0] - 1
    return Packing(
        cu_seqlens=layout.cu_seqlens,
        position_ids=layout.position_ids,
        max_seqlen=layout.max_seqlen,
        indices=torch.where(
            sentence < count, sentence * layout.max_seqlen + layout.position_ids, count * layout.max_seqlen
        ),
        padded_shape=(count, layout.max_seqlen),
        dead_tail=layout.dead_tail,
    )


def packing_from_mask(attention_mask: Tensor) -> Packing:
    """Plan the packing of a padded batch from its mask ``[N, L]`` (1 = real token), left or right padded.

    The mask is read on the host: the one transfer that packing a padded device batch needs, since the number of real
    tokens decides shapes. Under ``torch.compile`` nothing is read: the plan then has the static size ``T = N * L``,
    real tokens first, padding in the dead tail.

    Raises:
        ValueError: the mask is not ``[N, L]``, holds anything but 0 and 1, has padding between two real tokens, or
            leaves a sentence without any token.
    """
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [N, L], got shape {list(attention_mask.shape)}")
    if torch.compiler.is_compiling():
        return _static_packing(attention_mask)
    mask = attention_mask.cpu()
    binary = mask.bool()
    if not torch.equal(binary.to(mask.dtype), mask):
        raise ValueError("attention_mask must hold 0 and 1 only")
    n, length = binary.shape
    lengths = binary.sum(1)
    _check_no_hole(binary, lengths)
    cu_seqlens = torch.zeros(n + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    indices = binary.reshape(-1).nonzero().squeeze(1)
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    position_ids = torch.arange(indices.numel()) - starts
    device = attention_mask.device
    return Packing(
        cu_seqlens=cu_seqlens.to(device, non_blocking=True),
        position_ids=position_ids.to(device, non_blocking=True),
        max_seqlen=int(lengths.max()) if n else 0,
        indices=indices.to(device, non_blocking=True),
        padded_shape=(n, length),
    )


def _check_no_hole(mask: Tensor, lengths: Tensor) -> None:
    if mask.numel() == 0:
        return
    empty = (lengths == 0).nonzero()
    if empty.numel():
        raise ValueError(f"attention_mask row {int(empty[0])} has no real token; every sentence needs at least one")
    first = mask.int().argmax(1)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    holes = (last - first + 1 != lengths).nonzero()
    if holes.numel():
        raise ValueError(
            f"attention_mask row {int(holes[0])} has padding between real tokens; pad on the left or on the right"
        )


def _static_packing(attention_mask: Tensor) -> Packing:
    n, length = attention_mask.shape
    mask = attention_mask.bool()
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Packing(
        cu_seqlens=cu_seqlens,
        position_ids=position_ids_from_cu_seqlens(cu_seqlens, n * length).clamp(max=length - 1),
        max_seqlen=length,
        dead_tail=True,
        indices=torch.argsort((~mask).reshape(-1).to(torch.uint8), stable=True),
        padded_shape=(n, length),
    )
