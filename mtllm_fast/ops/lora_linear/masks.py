"""Dropout masks as a function of (seed, token, column, adapter): made again in the backward, never stored.

    base  = mix(low half of the seed + (g // 2) φ)                    for a pair of adapters g
    key_0 = mix(token + base),  key_1 = mix(key_0 xor high half of the seed)        for a token
    h     = mix(column φ + key_0), with key_1 xor-ed in between the two products
    adapter g keeps the element if h (g even) or 2¹⁶ h (g odd), a signed number of 32 bits, is at least p 2³² − 2³¹

``mix`` is the 32-bit integer hash of Chris Wellons ("Prospecting for hash functions", 2018; lowbias32: every input bit
flips every output bit with a probability within 0.2 % of one half), φ is 2³² over the golden ratio. An element of x
takes 9 integer operations for two adapters; ten rounds of Philox take about 20 for one, which for three adapters is
more time than an H100 takes to read x. On a CPU it takes a quarter of the time of torch's own generator. p is rounded
to a multiple of 2⁻¹⁶, and what is kept is scaled by one over the rounded share that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 2**16


def draw_seed() -> Tensor:
    """int64 [1], from torch's default generator: no GPU is asked, and checkpointing restores its state."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")


def threshold_of(dropout: float) -> int:
    """p 2¹⁶, a whole number."""
    return min(round(dropout * ROUNDING), ROUNDING - 1)


def kept_scale(dropout: float) -> float:
    return ROUNDING / (ROUNDING - threshold_of(dropout))


def halves(seed: Tensor) -> tuple[int, int]:
    """(low, high) half of a seed as signed 32-bit numbers, as kernels take them."""
    value = int(seed)
    return _signed(value & 0xFFFFFFFF), value >> 32


def keep_masks(
    seed: Tensor, adapters: int, rows: slice, columns: int, dropout: float, device: torch.device
) -> list[Tensor]:
    """For each adapter, bool [rows, columns]: what dropout keeps of these tokens of x."""
    low, high = halves(seed)
    least = threshold_of(dropout) * 2**16 - 2**31
    column = torch.arange(columns, dtype=torch.int32, device=device) * _PHI
    masks: list[Tensor] = []
    for pair in range(0, adapters, 2):
        base = int(_mixed(torch.tensor([_signed(low + pair // 2 * _PHI)], dtype=torch.int32)))
        key_0 = _mixed(torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device) + base)[:, None]
        key_1 = _mixed(key_0 ^ high)
        h = column + key_0
        scratch = torch.empty_like(h)
        both = pair + 1 < adapters
        _mix(h, scratch, key_1, last=both)
        masks.append(h >= least)
        if both:
            masks.append(h.bitwise_left_shift_(16) >= least)
    return masks


def _signed(value: int) -> int:
    """The 32-bit number with the same bits."""
    return (value + 2**31) % 2**32 - 2**31


_PHI = _signed(0x9E3779B9)
_FIRST, _SECOND = 0x7FEB352D, _signed(0x846CA68B)


def _mixed(h: Tensor) -> Tensor:
    _mix(h, torch.empty_like(h), None)
    return h


def _mix(h: Tensor, scratch: Tensor, key: Tensor | None, last: bool = True) -> None:
    """Of int32, whose products wrap around; in place. The last step leaves the upper half as it is."""
    h.bitwise_xor_(_shifted(h, 16, scratch)).mul_(_FIRST)
    if key is not None:
        h.bitwise_xor_(key)
    h.bitwise_xor_(_shifted(h, 15, scratch)).mul_(_SECOND)
    if last:
        h.bitwise_xor_(_shifted(h, 16, scratch))


def _shifted(h: Tensor, bits: int, scratch: Tensor) -> Tensor:
    """``h >> bits`` of the unsigned numbers with the same bits, in ``scratch``."""
    return torch.bitwise_right_shift(h, bits, out=scratch).bitwise_and_((1 << (32 - bits)) - 1)
