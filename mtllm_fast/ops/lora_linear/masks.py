"""Dropout masks as a function of (seed, token, column, adapter): made again in the backward, never stored.

    base  = mix(low half of the seed + (g // 2) φ)                    for a pair of adapters g
    key_0 = mix(token + base),  key_1 = mix(key_0 xor high half of the seed)        for a token
    h     = mix(column φ + key_0), with key_1 xor-ed in between the two products
    adapter g keeps the element if the g % 2-th half of h is at least p 2¹⁶

``mix`` is the 32-bit integer hash of Chris Wellons ("Prospecting for hash functions", 2018; lowbias32: every input bit
flips every output bit with a probability within 0.2 % of one half), φ is 2³² over the golden ratio. An element of x
takes 7 integer operations for two adapters; ten rounds of Philox take about 20 for one, which for three adapters is
more time than an H100 takes to read x. On a CPU it takes a quarter of the time of torch's own generator. p is rounded
to a multiple of 2⁻¹⁶, and what is kept is scaled by one over the rounded share that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 2**16
_BLOCK_ELEMENTS = 2**18  # of a block of rows that stays in a core's cache


def draw_seed() -> Tensor:
    """int64 [1], from torch's default generator: no GPU is asked, and checkpointing restores its state."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device="cpu")


def threshold_of(dropout: float) -> int:
    """An element is kept if its 16 bits are at least this."""
    return min(round(dropout * ROUNDING), ROUNDING - 1)


def kept_scale(dropout: float) -> float:
    return ROUNDING / (ROUNDING - threshold_of(dropout))


def halves(seed: Tensor) -> tuple[int, int]:
    """(low, high) half of a seed as signed 32-bit numbers, as kernels take them."""
    value = int(seed)
    return _signed(value & 0xFFFFFFFF), value >> 32


def keep_mask(seed: Tensor, adapter: int, tokens: int, columns: int, dropout: float, device: torch.device) -> Tensor:
    """bool [tokens, columns]: what dropout keeps of x for an adapter."""
    low, high = halves(seed)
    base = _mix(torch.tensor([_signed(low + adapter // 2 * _PHI)], dtype=torch.int32))
    key_0 = _mix(torch.arange(tokens, dtype=torch.int32) + base)
    key_1 = _mix(key_0 ^ high).to(device)[:, None]
    key_0 = key_0.to(device)[:, None]
    column = torch.arange(columns, dtype=torch.int32, device=device) * _PHI
    keep = torch.empty(tokens, columns, dtype=torch.bool, device=device)
    rows = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, tokens, rows):
        block = slice(start, start + rows)
        h = _mix(column + key_0[block], key_1[block])
        h = _shifted(h, 16) if adapter % 2 else h.bitwise_and_(0xFFFF)
        torch.ge(h, threshold_of(dropout), out=keep[block])
    return keep


def _signed(value: int) -> int:
    """The 32-bit number with the same bits."""
    return (value + 2**31) % 2**32 - 2**31


_PHI = _signed(0x9E3779B9)
_FIRST, _SECOND = 0x7FEB352D, _signed(0x846CA68B)


def _mix(h: Tensor, key: Tensor | None = None) -> Tensor:
    """Of int32, whose products wrap around; ``h`` is overwritten."""
    h.bitwise_xor_(_shifted(h, 16)).mul_(_FIRST)
    if key is not None:
        h.bitwise_xor_(key)
    h.bitwise_xor_(_shifted(h, 15)).mul_(_SECOND)
    return h.bitwise_xor_(_shifted(h, 16))


def _shifted(h: Tensor, bits: int) -> Tensor:
    """``h >> bits`` of the unsigned numbers with the same bits."""
    return (h >> bits).bitwise_and_((1 << (32 - bits)) - 1)
