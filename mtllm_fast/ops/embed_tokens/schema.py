"""What torch sees of ``embed_tokens``: a registered op with a fake and a gradient, and the launcher behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import savable
from mtllm_fast.core.registered import register, register_gradient, touched_bytes

MAX_WIDTH = 16384  # of the kernel, which takes whole rows


def why_not_kernels(weight: Tensor, table: Tensor) -> str | None:
    if torch.float64 in (weight.dtype, table.dtype):
        return "its kernel computes in float32 and weight or table is float64"
    if not 0 < weight.shape[1] <= MAX_WIDTH:
        return f"its kernel takes widths from 1 to {MAX_WIDTH} and the rows have {weight.shape[1]}"
    return None


BACKENDS = Backends(
    "embed_tokens",
    {
        "triton": lambda weight, table: why_not_triton(weight) or why_not_kernels(weight, table),
        "reference": lambda weight, table: None,
    },
)


def launch_forward(
    input_ids: Tensor,
    weight: Tensor,
    position_ids: Tensor,
    table: Tensor,
    scale: float,
    offset: int,
    padding_idx: int | None,
    backend: str,
) -> Tensor:
    """[T, d]"""
    if weight.is_cpu:
        _check_range("input_ids", input_ids, 0, weight.shape[0])
        _check_range("position_ids", position_ids, -offset, table.shape[0] - offset)
    module = BACKENDS.load(backend, weight, table)
    return module.forward(
        input_ids.contiguous(), weight.contiguous(), position_ids.contiguous(), table.contiguous(), scale, offset
    )


def _check_range(name: str, ids: Tensor, first: int, end: int) -> None:
    """On a CPU alone, where nobody has to wait for the values."""
    if ids.numel() == 0:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < first or high >= end:
        bad = low if low < first else high
        raise IndexError(f"embed_tokens: {name} must be {first} … {end - 1}, got {bad}")


def _fake_forward(
    input_ids: Tensor,
    weight: Tensor,
    position_ids: Tensor,
    table: Tensor,
    scale: float,
    offset: int,
    padding_idx: int | None,
    backend: str,
) -> Tensor:
    return weight.new_empty(input_ids.shape[0], weight.shape[1])


def _moved_bytes(arguments: Sequence[Any], result: Tensor) -> int:
    """Of the weight the rows of the tokens; of the table no row more than once, which a cache sees to."""
    input_ids, _, position_ids, table = arguments[:4]
    table_rows = min(table.shape[0], input_ids.shape[0]) * table.shape[1] * table.element_size()
    return touched_bytes(input_ids, position_ids) + 2 * touched_bytes(result) + table_rows


forward_op = register(
    "embed_tokens",
    "(Tensor input_ids, Tensor weight, Tensor position_ids, Tensor table, float scale, int offset, int? padding_idx,"
    " str backend) -> Tensor",
    launch_forward,
    _fake_forward,
    moved_bytes=_moved_bytes,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input_ids, weight, _, _, ctx.scale, _, padding_idx, _ = inputs
    ctx.save_for_backward(savable(input_ids))
    ctx.rows, ctx.padding_idx = weight.shape[0], -1 if padding_idx is None else padding_idx


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    (grad,), (input_ids,) = grads, ctx.saved_tensors
    # The gradient of nn.Embedding, which adds up the rows of equal tokens in a fixed order.
    grad_weight = torch.ops.aten.embedding_dense_backward(grad * ctx.scale, input_ids, ctx.rows, ctx.padding_idx, False)
    return None, grad_weight, *(None,) * 6


EagerEmbedTokens = register_gradient("embed_tokens", launch_forward, _setup_context, _backward)
