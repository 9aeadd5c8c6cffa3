"""``norm_pool`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_choice, check_cu_seqlens, check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.norm_pool import schema

POOLINGS = ("mean", "cls", "eos")


def norm_pool(
    hidden_states: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    *,
    eps: float,
    pooling: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """RMSNorm of packed tokens, pooled per sentence: ``pooled[b] = mean_t(weight ⊙ h_t · rsqrt(mean(h_t²) + eps))``.

    The last norm of an LLM (Zhang and Sennrich, 2019) fused with pooling, so that no normed ``[T, D]`` tensor exists.
    Accumulates in float32 and rounds once. Deterministic. Differentiable once in ``hidden_states`` and ``weight``.
    Under autocast it keeps the dtype of ``hidden_states``, as torch's own norms do.

    Args:
        hidden_states: ``[T, D]``, fp32, bf16, fp16 or fp64; rows may be strided. The tokens of all sentences, packed.
        weight: ``[D]``, the norm's gain, of any of these dtypes.
        cu_seqlens: ``[B + 1]`` int32, on the same device: where each sentence starts, from 0 on, never decreasing.
            Tokens after the last entry belong to no sentence: they are not read, and their gradient is zero.
        eps: added to the mean square.
        pooling: ``"mean"`` over the tokens of a sentence, its first (``"cls"``) or its last one (``"eos"``).
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``mtllm_fast.explain`` tells what
            auto takes.

    Returns:
        ``[B, D]`` in the dtype of ``hidden_states``; zeros for an empty sentence.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> hidden = torch.tensor([[3.0, 4.0], [6.0, 8.0], [1.0, 1.0]])
    >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> norm_pool(hidden, torch.ones(2), cu_seqlens, eps=0.0)
    tensor([[0.8485, 1.1314],
            [1.0000, 1.0000]])
    """
    _check(hidden_states, weight, cu_seqlens, pooling)
    arguments = (hidden_states, weight, cu_seqlens, eps, pooling, needs_grad(weight), backend)
    if watched(hidden_states, weight, cu_seqlens):
        return schema.forward_op(*arguments)[0]
    if needs_grad(hidden_states, weight):
        return schema.EagerNormPool.apply(*arguments)[0]
    return schema.launch_forward(*arguments)[0]


def explain(
    hidden_states: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    *,
    eps: float,
    pooling: str = "mean",
    backend: str = "auto",
) -> Explanation:
    """Which backend serves this call of ``norm_pool``, and why the others do not."""
    _check(hidden_states, weight, cu_seqlens, pooling)
    return schema.BACKENDS.explain(backend, hidden_states)


def _check(hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, pooling: str) -> None:
    check_shape("norm_pool", "hidden_states", hidden_states, ("T", "D"))
    check_shape("norm_pool", "weight", weight, (hidden_states.shape[1],))
    check_cu_seqlens("norm_pool", "cu_seqlens", cu_seqlens)
    check_dtype("norm_pool", "hidden_states", hidden_states, FLOATS)
    check_dtype("norm_pool", "weight", weight, FLOATS)
    check_same_device("norm_pool", hidden_states=hidden_states, weight=weight, cu_seqlens=cu_seqlens)
    check_choice("norm_pool", "pooling", pooling, POOLINGS)
