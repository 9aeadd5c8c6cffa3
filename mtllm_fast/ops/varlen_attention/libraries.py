"""The GPU paths: variable-length attention of the installed libraries. None pads or forms ``[L, L]`` in memory."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core.devices import compute_capability

_HALVES = (torch.float16, torch.bfloat16)


def _why_not_flash_kernels(q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}"
    if q.dtype not in _HALVES:
        return f"it takes float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"it takes head sizes up to 256 that are multiples of 8, got {q.shape[-1]}"
    if torch.version.hip is None and compute_capability(q.device.index) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


# torch.compile of PyTorch 2.11 sees no mark on what functools.cache returns, so it is on a function around that.
@torch.compiler.assume_constant_result
def _flash_attn_installed() -> bool:
    return _is_installed("flash_attn")


@functools.cache
def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def why_not_flash_attn(q: Tensor, k: Tensor, scale: float, dropout_p: float) -> str | None:
    return _why_not_flash_kernels(q) or (None if _flash_attn_installed() else "flash-attn is not installed")


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p=dropout_p, softmax_scale=scale, causal=False
    )


@torch.compiler.assume_constant_result
def _torch_varlen_parameters() -> tuple[str, ...]:
    """Argument names of ``varlen_attn``; empty where this PyTorch has none. They grew from 2.10 on."""
    return _read_varlen_parameters()


@functools.cache
def _read_varlen_parameters() -> tuple[str, ...]:
    if not _is_installed("torch.nn.attention.varlen"):
        return ()
    from torch.nn.attention.varlen import varlen_attn

    return tuple(inspect.signature(varlen_attn).parameters)


def why_not_torch_varlen(q: Tensor, k: Tensor, scale: float, dropout_p: float) -> str | None:
    if reason := _why_not_flash_kernels(q):
        return reason
    parameters = _torch_varlen_parameters()
    if not parameters:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
    if dropout_p > 0:
        return "it has no dropout"
    if "scale" not in parameters and abs(scale - q.shape[-1] ** -0.5) > 1e-6:
        return f"in PyTorch {torch.__version__} its scale is fixed"
    return None


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    parameters = _torch_varlen_parameters()
    options: dict[str, Any] = {}
    if "scale" in parameters:
        options["scale"] = scale
    if "num_splits" in parameters:
        options["num_splits"] = 1  # a sentence's bits then do not depend on its neighbours
    if "enable_gqa" in parameters:  # where it has no such switch, its kernels share heads unasked
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)  # type: ignore[return-value]  # a tuple only on request


def _expand_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float
) -> Tensor:
    """The memory-efficient kernel behind SDPA, called with ``cu_seqlens``: float32 too, which flash kernels lack."""
    k, v = _expand_heads(q, k, v)
    out = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, 0,
        torch.is_grad_enabled(), scale=scale,
    )[0]  # fmt: skip
    return out[0]
