"""``layer_norm`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.layer_norm import schema


def layer_norm(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    sum_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm after a residual sum: ``(s − mean(s)) / √(var(s) + eps) ⊙ weight + bias`` with ``s = h + residual``.

    LayerNorm (Ba, Kiros and Hinton, 2016) as a pre-norm layer needs it: the sum and its norm are made in one pass. The
    sum is rounded to its dtype before it is normed, as a module that stores it does; mean and variance (about the mean)
    accumulate in float32. Deterministic. Differentiable once. Under autocast it keeps the dtype of ``hidden_states``.

    Args:
        hidden_states: ``[T, d]``, fp32, bf16, fp16 or fp64; rows may be strided.
        weight: ``[d]``, of any of these dtypes.
        bias: ``[d]``, of any of these dtypes.
        eps: added to the variance.
        residual: ``[T, d]``, in the dtype of ``hidden_states``.
        sum_bias: ``[d]``, of any of these dtypes; added to the returned sum alone, not to what is normed: the bias of a
            later projection whose product is accumulated onto the sum in place (``sum.addmm_(x, w.t())``), which saves
            a pass. For inference only.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        The normed states ``[T, d]`` in the dtype of ``hidden_states``; with ``residual`` or ``sum_bias`` a pair of them
        and ``s + sum_bias`` ``[T, d]``.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong, or ``sum_bias`` meets a gradient.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> hidden, ones = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.ones(2)
    >>> normed, summed = layer_norm(hidden, ones, 0 * ones, eps=0.25, residual=hidden)
    >>> normed
    tensor([[-0.9701,  0.9701],
            [ 0.0000,  0.0000]])
    >>> summed
    tensor([[2., 6.],
            [4., 4.]])
    """
    _check(hidden_states, weight, bias, residual, sum_bias)
    given = tuple(t for t in (hidden_states, weight, bias, residual, sum_bias) if t is not None)
    save = needs_grad(*given)
    if save and sum_bias is not None:
        raise ValueError(
            "layer_norm: sum_bias is for inference, got a call that needs a gradient; "
            "use torch.no_grad(), or leave the bias to the projection"
        )
    arguments = (hidden_states, weight, bias, residual, sum_bias, eps, save, backend)
    if watched(*given):
        normed, summed = schema.forward_op(*arguments)[:2]
    elif save:
        normed, summed = schema.EagerLayerNorm.apply(*arguments)[:2]
    else:
        normed, summed = schema.compute_forward(*arguments)[:2]
    return normed if residual is None and sum_bias is None else (normed, summed)


def explain(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    sum_bias: Tensor | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend serves this call of ``layer_norm``, and why the others do not."""
    _check(hidden_states, weight, bias, residual, sum_bias)
    return schema.BACKENDS.explain(backend, hidden_states)


def _check(
    hidden_states: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, sum_bias: Tensor | None
) -> None:
    check_shape("layer_norm", "hidden_states", hidden_states, ("T", "d"))
    check_dtype("layer_norm", "hidden_states", hidden_states, FLOATS)
    vectors = {"weight": weight, "bias": bias}
    if sum_bias is not None:
        vectors["sum_bias"] = sum_bias
    for name, vector in vectors.items():
        check_shape("layer_norm", name, vector, (hidden_states.shape[1],))
        check_dtype("layer_norm", name, vector, FLOATS)
    check_same_device("layer_norm", hidden_states=hidden_states, **vectors)
    if residual is not None:
        check_shape("layer_norm", "residual", residual, hidden_states.shape)
        check_dtype("layer_norm", "residual", residual, (hidden_states.dtype,))
        check_same_device("layer_norm", hidden_states=hidden_states, residual=residual)
