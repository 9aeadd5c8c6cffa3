"""``bias_relu`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.bias_relu import schema


def bias_relu(x: Tensor, bias: Tensor | None, *, backend: str = "auto") -> Tensor:
    """ReLU of a product and its bias in one pass: ``y = max(x + bias, 0)``, and NaN where ``x + bias`` is NaN.

    What follows the first projection of a ReLU feed-forward layer (Vaswani et al., 2017). The sum is made in float32
    and rounded once. Deterministic. Differentiable once; the gradient is taken from the output, so that ``x`` need not
    be kept. Under autocast it keeps the dtype of ``x``.

    Args:
        x: ``[T, F]``, fp32, bf16, fp16 or fp64; rows may be strided. A product without its bias.
        bias: ``[F]``, of any of these dtypes; or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        ``[T, F]`` in the dtype of ``x``.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> bias_relu(torch.tensor([[-1.0, 1.0], [3.0, float("nan")]]), torch.tensor([0.5, 0.5]))
    tensor([[0.0000, 1.5000],
            [3.5000,    nan]])
    """
    _check(x, bias)
    given = (x,) if bias is None else (x, bias)
    if watched(*given):
        return schema.forward_op(x, bias, backend)
    if needs_grad(*given):
        return schema.EagerBiasReLU.apply(x, bias, backend)
    return schema.launch_forward(x, bias, backend)


def explain(x: Tensor, bias: Tensor | None, *, backend: str = "auto") -> Explanation:
    """Which backend serves this call of ``bias_relu``, and why the others do not."""
    _check(x, bias)
    return schema.BACKENDS.explain(backend, x)


def _check(x: Tensor, bias: Tensor | None) -> None:
    check_shape("bias_relu", "x", x, ("T", "F"))
    check_dtype("bias_relu", "x", x, FLOATS)
    if bias is not None:
        check_shape("bias_relu", "bias", bias, (x.shape[1],))
        check_dtype("bias_relu", "bias", bias, FLOATS)
        check_same_device("bias_relu", x=x, bias=bias)
