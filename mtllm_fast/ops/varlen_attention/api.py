"""``varlen_attention``: one function, the best installed implementation behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core.backends import Backends, Explanation
from mtllm_fast.core.checks import check_cu_seqlens, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_registered_op
from mtllm_fast.ops.varlen_attention import cpu, libraries, schema
from mtllm_fast.ops.varlen_attention.reference import varlen_attention_reference

_OP = "varlen_attention"
_REGISTERED = ("cpu", "meta")  # the latter stands for any device where work is counted and nothing computed


def _why_not_sdpa(q: Tensor, k: Tensor, scale: float, dropout_p: float) -> str | None:
    if q.device.type in _REGISTERED:
        return "on the CPU it has no dropout" if dropout_p > 0 else None
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}"
    return "on a GPU it has no float64" if q.dtype == torch.float64 else None


def _why_not_reference(q: Tensor, k: Tensor, scale: float, dropout_p: float) -> str | None:
    return "it reads cu_seqlens on the host, which a compiled graph cannot" if torch.compiler.is_compiling() else None


BACKENDS = Backends(
    _OP,
    {
        "flash_attn": libraries.why_not_flash_attn,
        "torch_varlen": libraries.why_not_torch_varlen,
        "sdpa": _why_not_sdpa,
        "reference": _why_not_reference,
    },
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dead_tail: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``softmax(scale · q kᵀ) v`` within each sentence of a packed batch, without a causal mask.

    Args:
        q (Tensor): ``[T, H, hd]``, fp16, bf16 or fp32 (fp64 on the CPU).
        k, v (Tensor): ``[T, KV, hd]``, same dtype; ``H`` is a multiple of ``KV`` and query head ``h`` reads key/value
            head ``h // (H / KV)``.
        cu_seqlens (Tensor): int32 ``[B+1]``, on the same device.
        max_seqlen (int): an upper bound of the longest sentence.
        scale (float): default ``hd ** -0.5``.
        dropout_p (float): dropout of the attention weights.
        dead_tail (bool): rows from ``cu_seqlens[-1]`` on may exist; their output is zero. Without it their output
            and gradients are undefined.
        backend (str): ``"flash_attn"`` (the package), ``"torch_varlen"`` (PyTorch's own), ``"sdpa"`` (PyTorch's
            memory-efficient kernel; on the CPU its flash kernel), ``"reference"``, or ``"auto"``: the first of these
            that can serve.

    Returns:
        Tensor: ``[T, H, hd]``, dtype of q.

    Raises:
        ValueError: shapes or devices do not fit, or the named backend cannot serve this call (the reason is named).

    Example:

        >>> import torch
        >>> from mtllm_fast.ops.varlen_attention import varlen_attention
        >>> q, kv = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
        >>> varlen_attention(q, kv, kv, torch.tensor([0, 2, 5], dtype=torch.int32), max_seqlen=3).shape
        torch.Size([5, 4, 16])
    """
    _check(q, k, v, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = BACKENDS.choose(backend, q, k, scale, dropout_p)
    if chosen == "reference":
        return varlen_attention_reference(q, k, v, cu_seqlens, scale=scale, dropout_p=dropout_p)
    if q.device.type in _REGISTERED:
        if needs_registered_op(q, k, v):
            return schema.varlen_attention_cpu(q, k, v, cu_seqlens, scale)[0]
        return cpu.inference(q, k, v, cu_seqlens, scale)
    library = {
        "flash_attn": libraries.flash_attn,
        "torch_varlen": libraries.torch_varlen,
        "sdpa": libraries.efficient_attention,
    }[chosen]
    if not dead_tail:
        return library(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p)
    # The libraries leave those rows unwritten: of the output, and in the backward of the gradients of q, k and v.
    dead = (torch.arange(q.shape[0], device=q.device) >= cu_seqlens[-1])[:, None, None]
    q, k, v = (t.masked_fill(dead, 0) for t in (q, k, v))
    return library(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p).masked_fill(dead, 0)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dead_tail: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Which backend ``varlen_attention`` takes for such a call, and why not the others. The None ones do not matter."""
    return BACKENDS.explain(backend, q, k, q.shape[-1] ** -0.5 if scale is None else scale, dropout_p)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    check_shape(_OP, "q", q, ("T", "H", "hd"))
    check_shape(_OP, "k", k, (q.shape[0], "KV", q.shape[2]))
    check_shape(_OP, "v", v, tuple(k.shape))
    check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens)
    check_same_device(_OP, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{_OP}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{_OP}: the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key/value heads")
