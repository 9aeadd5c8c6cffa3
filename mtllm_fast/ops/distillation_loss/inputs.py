"""What every backend of ``distillation_loss`` is handed: two sides, the spans between them, and the options."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("mse", "smooth_l1", "cosine")
REDUCTIONS = ("mean", "sum")
# The monitored figures, in the order of the tensor that backends return.
FIGURES = (
    "sequence_loss",
    "span_loss",
    "fvu",
    "fvu_student",
    "cosine",
    "norm_difference",
    "span_cosine",
    "span_norm_difference",
)


TokenSpans = tuple[Tensor, Tensor]  # see spans_of_tokens


class Side(NamedTuple):
    """The packed tokens of one model, and how a token's state becomes the vector y that is compared.

    ``y_t = weight ⊙ h_t · rsqrt(mean(h_t²) + eps)``, or ``y_t = h_t`` where ``weight`` is None.
    """

    states: Tensor  # [T, D]; columns adjacent
    weight: Tensor | None  # [D]
    eps: float
    cu_seqlens: Tensor  # int32 [B + 1]


class Vectors(NamedTuple):
    """A teacher that is known already."""

    pooled: Tensor  # [B, D]
    spans: Tensor | None  # [S, D]


class Spans(NamedTuple):
    """S bags of packed tokens on each side, in CSR form; int64. The teacher's are None where its vectors are known."""

    indices: Tensor  # [K] of the student's tokens
    offsets: Tensor  # [S + 1]
    teacher_indices: Tensor | None
    teacher_offsets: Tensor | None


class Options(NamedTuple):
    sequence_weight: float
    span_weight: float
    kind: str
    beta: float
    reduction: str


class Forward(NamedTuple):
    """What the forward leaves behind; all in the wide dtype."""

    loss: Tensor  # []
    figures: Tensor  # [len(FIGURES)], without a gradient
    grad_pooled: Tensor  # [B, D]: the gradient of the loss in the student's pooled vectors
    span_scale: Tensor  # []: what the loss of one span counts for in the loss


def spans_of_tokens(spans: Spans, num_tokens: int) -> TokenSpans:
    """The other way round: (offsets int64 [T + 1], spans int64 [K]), for each of the student's tokens its spans.

    A token's spans come in their order, so that sums over them are the same every time.
    """
    token, order = spans.indices, None
    if token.is_cuda or bool((token.diff() < 0).any()):  # spans as words have them are in order; a GPU is not asked
        token, order = token.sort(stable=True)
    offsets = torch.searchsorted(token, torch.arange(num_tokens + 1, device=token.device))
    occurrence = torch.arange(len(token), device=token.device) if order is None else order
    return offsets, torch.searchsorted(spans.offsets, occurrence, right=True) - 1
