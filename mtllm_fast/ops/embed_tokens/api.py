"""``embed_tokens`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.embed_tokens import schema

_INTEGERS = (torch.int64, torch.int32)


def embed_tokens(
    input_ids: Tensor,
    weight: Tensor,
    position_ids: Tensor,
    table: Tensor,
    *,
    scale: float,
    offset: int,
    padding_idx: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled token embeddings plus positions, in one pass: ``scale · weight[id] + table[position + offset]``.

    The entry of a Transformer encoder (Vaswani et al., 2017) on packed tokens: the rows of a vocabulary times √d, and
    of a constant table of sinusoids, which starts at ``offset`` (fairseq's: ``pad_token_id + 1``). Computed in float32
    and rounded once. Deterministic. Differentiable in ``weight``, once.

    Args:
        input_ids: ``[T]`` int64 or int32, rows of ``weight``.
        weight: ``[V, d]``, fp32, bf16, fp16 or fp64.
        position_ids: ``[T]`` int64 or int32, the place of each token in its own sentence.
        table: ``[P, d]``, of any of these dtypes; a constant.
        scale: of the token embeddings.
        offset: row of ``table`` that belongs to position 0.
        padding_idx: a token whose row of ``weight`` gets no gradient, as ``nn.Embedding`` has it; the output of such a
            token is no different.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        ``[T, d]`` in the dtype of ``weight``. On a GPU nobody waits to look at ids: where ``nn.Embedding`` stops the
        device for one out of range, the kernel reads nothing and returns a row of NaN.

    Raises:
        IndexError: on a CPU, an id or a position is out of range.
        ValueError, TypeError: an argument's shape, dtype or device is wrong, or ``table`` needs a gradient.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> weight, table = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
    >>> embed_tokens(torch.tensor([1, 0]), weight, torch.tensor([0, 1]), table, scale=10.0, offset=1)
    tensor([[30.5000, 40.0000],
            [10.0000, 20.5000]])
    """
    _check(input_ids, weight, position_ids, table)
    arguments = (input_ids, weight, position_ids, table, scale, offset, padding_idx, backend)
    if watched(input_ids, weight, position_ids, table):
        return schema.forward_op(*arguments)
    if needs_grad(weight):
        return schema.EagerEmbedTokens.apply(*arguments)
    return schema.launch_forward(*arguments)


def explain(
    input_ids: Tensor,
    weight: Tensor,
    position_ids: Tensor,
    table: Tensor,
    *,
    scale: float,
    offset: int,
    padding_idx: int | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend serves this call of ``embed_tokens``, and why the others do not."""
    _check(input_ids, weight, position_ids, table)
    return schema.BACKENDS.explain(backend, weight, table)


def _check(input_ids: Tensor, weight: Tensor, position_ids: Tensor, table: Tensor) -> None:
    check_shape("embed_tokens", "input_ids", input_ids, ("T",))
    check_dtype("embed_tokens", "input_ids", input_ids, _INTEGERS)
    check_shape("embed_tokens", "weight", weight, ("V", "d"))
    check_dtype("embed_tokens", "weight", weight, FLOATS)
    check_shape("embed_tokens", "position_ids", position_ids, (input_ids.shape[0],))
    check_dtype("embed_tokens", "position_ids", position_ids, _INTEGERS)
    check_shape("embed_tokens", "table", table, ("P", weight.shape[1]))
    check_dtype("embed_tokens", "table", table, FLOATS)
    check_same_device("embed_tokens", weight=weight, input_ids=input_ids, position_ids=position_ids, table=table)
    if needs_grad(table):
        raise ValueError("embed_tokens: table must be a constant, got one that requires a gradient; detach it")
