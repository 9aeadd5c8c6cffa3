"""``rope`` and ``rope_qkv`` as users call them: documentation, checks, and which of the two doors a call takes.

One op behind both: ``rope`` for q and k of separate projections, ``rope_qkv`` for the output of a merged one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.rope import schema


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k, rotate-half convention, as Hugging Face's Llama has it.

    With the halves ``a, b`` of a head, of width hd / 2: ``a' = a cos − b sin`` and ``b' = b cos + a sin``. The kernel
    computes both in float32 and rounds once, in one launch. Su et al., "RoFormer", 2021.

    Differentiable once in q and k: the gradient is rotated back, and nothing but the tables is kept. Deterministic.
    Autocast changes nothing.

    Args:
        q, k: ``[T, H, hd]`` and ``[T, KV, hd]`` of one dtype, fp32, bf16, fp16 or fp64; tokens and heads may be
            strided. hd is even.
        cos, sin: ``[T, hd]`` whose two halves are equal (the first is read), of the dtype of q or float32. They get no
            gradient.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        ``(q, k)`` rotated, contiguous.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> q = torch.tensor([[[1.0, 2.0]]])
    >>> quarter = torch.zeros(1, 2), torch.ones(1, 2)
    >>> rope(q, 2 * q, *quarter)
    (tensor([[[-2.,  1.]]]), tensor([[[-4.,  2.]]]))
    """
    _check(q, k, cos, sin)
    q, k, _ = _call(q, k, cos, sin, q.shape[1], backend)
    return q, k


def rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """``rope`` of the q and k in the output of a merged projection, whose gradient lands in one buffer.

    The gradient of ``qkv`` is one contiguous ``[T, N]`` tensor, written by one launch that also carries that of v, so
    that the gradient of the merged projection is one product. If autograd records the call, v is copied along, a sixth
    of the bytes in an 8B Llama (a registered op may not return a view); otherwise it is a view of ``qkv``.

    Args:
        qkv: ``[T, (num_heads + 2 num_kv_heads) hd]``: the heads of q, of k, of v; rows may be strided. Dtypes, tables,
            backends and errors are those of ``rope``.
        num_heads, num_kv_heads: of q, and of k and v each.

    Returns:
        ``(q [T, H, hd], k [T, KV, hd], v [T, KV, hd])``, q and k rotated.

    >>> q, k, v = rope_qkv(torch.arange(6.0)[None], torch.zeros(1, 2), torch.ones(1, 2), num_heads=1, num_kv_heads=1)
    >>> q, k, v
    (tensor([[[-1.,  0.]]]), tensor([[[-3.,  2.]]]), tensor([[[4., 5.]]]))
    """
    _check_qkv(qkv, num_heads, num_kv_heads)
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    _check(q, k, cos, sin)
    if needs_grad(qkv):
        return _call(heads, None, cos, sin, num_heads, backend)
    return *_call(q, k, cos, sin, num_heads, backend)[:2], v


def explain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Explanation:
    """Which backend serves this call of ``rope``, and why the others do not."""
    _check(q, k, cos, sin)
    return schema.BACKENDS.explain(backend, q)


def _call(
    heads: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, num_heads: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (heads, k, cos, sin, num_heads, backend)
    tensors = (heads, cos, sin) if k is None else (heads, k, cos, sin)
    if watched(*tensors):
        return schema.forward_op(*arguments)
    if needs_grad(*tensors):
        return schema.EagerRope.apply(*arguments)
    return schema.launch_forward(*arguments)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_shape("rope", "q", q, ("T", "H", "hd"))
    T, _, hd = q.shape
    check_dtype("rope", "q", q, FLOATS)
    if hd % 2:
        raise ValueError(f"rope: q must be [T, H, hd] with an even hd, got {list(q.shape)}")
    check_shape("rope", "k", k, (T, "KV", hd))
    check_dtype("rope", "k", k, (q.dtype,))
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape("rope", name, table, (T, hd))
        check_dtype("rope", name, table, (q.dtype, torch.float32))
    if cos.dtype != sin.dtype:
        raise TypeError(f"rope: cos and sin must have one dtype, got {cos.dtype} and {sin.dtype}")
    check_same_device("rope", q=q, k=k, cos=cos, sin=sin)


def _check_qkv(qkv: Tensor, num_heads: int, num_kv_heads: int) -> None:
    check_shape("rope_qkv", "qkv", qkv, ("T", "N"))
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(f"rope_qkv: num_heads and num_kv_heads must be positive, got {num_heads} and {num_kv_heads}")
    heads = num_heads + 2 * num_kv_heads
    if qkv.shape[1] % (2 * heads):
        raise ValueError(
            f"rope_qkv: qkv must be [T, N] with N a multiple of 2 * {heads}, for {num_heads} heads of q and "
            f"{num_kv_heads} each of k and v, got {list(qkv.shape)}"
        )
