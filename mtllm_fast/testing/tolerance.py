"""The error rule: a fast path may err against float64 truth by a stated multiple of what plain torch errs.

    error(fast, truth) <= factor(dtype) * error(plain torch at the same dtype, truth) + floor(dtype)

both for the whole tensor (relative Frobenius error) and for its worst element (relative to the largest true element,
with twice the factor), so that one wrong element does not drown in a large tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    factor: float
    floor: float


RULES = {
    torch.float64: Rule(4.0, 1e-13),
    torch.float32: Rule(4.0, 2e-6),
    torch.bfloat16: Rule(1.5, 0.0),
    torch.float16: Rule(1.5, 0.0),
}

INTERPRETED_RULES = {**RULES, torch.bfloat16: Rule(3.0, 0.0)}
"""Triton's interpreter truncates to bfloat16 where a GPU rounds: twice the error."""


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of ``truth``; infinite if ``value`` is not finite."""
    return _ratio(lambda x: x.norm(), value, truth)


def worst_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest element of ``truth``; infinite if ``value`` is not finite."""
    return _ratio(lambda x: x.abs().amax(), value, truth)


def assert_as_accurate(
    fast: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    rules: Mapping[torch.dtype, Rule] = RULES,
) -> None:
    """Raises AssertionError, naming every tensor of ``fast`` that breaks the rule; the mappings have the same names."""
    assert fast.keys() == plain.keys() == truth.keys(), f"{[*fast]}, {[*plain]} and {[*truth]} must be the same names"
    lines = []
    for name, value in fast.items():
        factor, floor = rules[value.dtype]
        assert value.shape == truth[name].shape, f"{name}: {list(value.shape)}, must be {list(truth[name].shape)}"
        for kind, error, multiple in (("error", relative_error, factor), ("worst element", worst_error, 2 * factor)):
            ours, theirs = error(value, truth[name]), error(plain[name], truth[name])
            if not ours <= multiple * theirs + floor:
                allowed = f"{multiple:g} * {theirs:.2e} + {floor:g}"
                lines.append(
                    f"{name} ({str(value.dtype).removeprefix('torch.')}): {kind} {ours:.2e}, allowed {allowed}"
                )
    assert not lines, "less accurate than plain torch allows:\n  " + "\n  ".join(lines)


def _ratio(norm, value: Tensor, truth: Tensor) -> float:  # type: ignore[no-untyped-def]
    if value.numel() == 0:
        return 0.0
    value, truth = value.detach().double(), truth.detach().double()
    if not value.isfinite().all():
        return float("inf")
    difference, scale = norm(value - truth).item(), norm(truth).item()
    return difference / scale if scale else (float("inf") if difference else 0.0)
