"""``swiglu`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.swiglu import schema


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """The gated activation of an LLM's MLP: ``silu(gate) ⊙ up`` with ``silu(x) = x / (1 + exp(-x))``.

    The kernels compute in float32 and round once; the reference also rounds ``silu(gate)``, as Hugging Face does.
    Shazeer, "GLU Variants Improve Transformer", 2020. Differentiable once in both; the backward keeps the inputs alone
    and writes both gradients in one pass, for a merged input into one buffer of its shape, so that the gradient of the
    merged projection is one product. Deterministic. Autocast changes nothing.

    Args:
        gate: ``[..., F]``, or, without ``up``, the output of a merged projection ``[..., 2 F]``: gate, then up. fp32,
            bf16, fp16 or fp64; the rows of a 2-D tensor may be strided.
        up: like ``gate``, or None.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        ``[..., F]``, contiguous, in the dtype of ``gate``.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> swiglu(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 2.0]]))
    tensor([[0.0000, 1.4621]])
    >>> swiglu(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
    tensor([[0.0000, 1.4621]])
    """
    _check(gate, up)
    tensors = (gate,) if up is None else (gate, up)
    if watched(*tensors):
        return schema.forward_op(gate, up, backend)
    if needs_grad(*tensors):
        return schema.EagerSwiGLU.apply(gate, up, backend)
    return schema.launch_forward(gate, up, backend)


def explain(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Explanation:
    """Which backend serves this call of ``swiglu``, and why the others do not."""
    _check(gate, up)
    return schema.BACKENDS.explain(backend, gate)


def _check(gate: Tensor, up: Tensor | None) -> None:
    if not isinstance(gate, Tensor):
        raise TypeError(f"swiglu: gate must be a tensor, got {type(gate).__name__}")
    if gate.dim() < 1:
        raise ValueError("swiglu: gate must be [..., F], got []")
    check_dtype("swiglu", "gate", gate, FLOATS)
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"swiglu: gate must be [..., 2 F] if there is no up, got {list(gate.shape)}")
        return
    check_shape("swiglu", "up", up, gate.shape)
    check_dtype("swiglu", "up", up, (gate.dtype,))
    check_same_device("swiglu", gate=gate, up=up)
