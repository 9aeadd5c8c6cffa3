"""``rms_norm`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.rms_norm import schema


def rms_norm(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    return_rstd: bool = False,
    backend: str = "auto",
) -> Any:
    """RMSNorm over the last dimension, with the residual addition before it: ``weight ⊙ x · rsqrt(mean(x²) + eps)``.

    ``x`` is ``hidden_states``, or ``summed = hidden_states + residual``, rounded once to the dtype of the states. The
    mean square is that of the rounded sum, as in Hugging Face's layers: the next residual addition and the backward
    see the same numbers. The rest is float32 (float64 for float64 states) and rounded once at the end, where Hugging
    Face's LlamaRMSNorm also rounds before the gain. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Differentiable once in ``hidden_states``, ``residual`` and ``weight``; deterministic; a frozen weight costs nothing.
    The backward keeps ``x`` and one float32 number per row. Autocast changes nothing.

    Args:
        hidden_states: ``[..., D]``, at least 2-D, fp32, bf16, fp16 or fp64. ``[T, D]`` and ``[T, H, D]`` (a norm of
            each head, also of heads that lie in a wider buffer) are read in place, whatever the strides of T and H.
        weight: ``[D]``, the gain, of any of these dtypes.
        eps: added to the mean square.
        residual: of the shape, dtype and device of ``hidden_states``, or None.
        return_rstd: also return ``rsqrt(mean(x²) + eps)``, from which ``lora_linear`` computes the normed states again.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        The normed states, contiguous, in the dtype of ``hidden_states``. A tuple, if more is returned: with a residual
        ``summed`` comes next, with ``return_rstd`` ``rstd`` ``[...]`` in float32 (float64) last, without a gradient.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> hidden = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    >>> rms_norm(hidden, torch.ones(2), eps=0.0)
    tensor([[0.8485, 1.1314],
            [1.0000, 1.0000]])
    >>> normed, summed = rms_norm(hidden, torch.ones(2), eps=0.0, residual=torch.ones(2, 2))
    >>> summed
    tensor([[4., 5.],
            [2., 2.]])
    """
    _check(hidden_states, weight, residual)
    arguments = (hidden_states, weight, residual, eps, backend)
    tensors = (hidden_states, weight) if residual is None else (hidden_states, weight, residual)
    if watched(*tensors):
        normed, summed, rstd = schema.forward_op(*arguments)
    elif needs_grad(*tensors):
        normed, summed, rstd = schema.EagerRMSNorm.apply(*arguments)
    else:
        normed, summed, rstd = schema.launch_forward(*arguments)
    found = (normed,) if residual is None else (normed, summed)
    found = (*found, rstd) if return_rstd else found
    return found if len(found) > 1 else normed


def explain(
    hidden_states: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None, backend: str = "auto"
) -> Explanation:
    """Which backend serves this call of ``rms_norm``, and why the others do not."""
    _check(hidden_states, weight, residual)
    return schema.BACKENDS.explain(backend, hidden_states)


def _check(hidden_states: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"rms_norm: hidden_states must be a tensor, got {type(hidden_states).__name__}")
    if hidden_states.dim() < 2:
        raise ValueError(f"rms_norm: hidden_states must be [..., T, D], got {list(hidden_states.shape)}")
    check_dtype("rms_norm", "hidden_states", hidden_states, FLOATS)
    check_shape("rms_norm", "weight", weight, (hidden_states.shape[-1],))
    check_dtype("rms_norm", "weight", weight, FLOATS)
    check_same_device("rms_norm", hidden_states=hidden_states, weight=weight)
    if residual is not None:
        check_shape("rms_norm", "residual", residual, hidden_states.shape)
        check_dtype("rms_norm", "residual", residual, (hidden_states.dtype,))
        check_same_device("rms_norm", hidden_states=hidden_states, residual=residual)
