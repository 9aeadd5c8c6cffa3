"""The kernels of ``norm_pool`` for the CPU (csrc/cpu): float32 sums over pieces of 64 tokens, in a fixed order.

The forward reads the states once and writes one row per sentence (and per piece of a longer one); the backward reads
them once and writes their gradient once: at T=2048, D=4096 in float32, 34 MB and 67 MB. What is of size ``[B, D]`` is
left to torch. A result depends on no number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core import buffers, native, native_cpu

POOLINGS = {"mean": 0, "cls": 1, "eos": 2}  # mtllm::cpu::Pooling


def forward(
    hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(pooled [B, D], Σ_t r_t x̂_t [B, D] fp32)"""
    normed_mean = mean_of_normed(hidden_states, weight, cu_seqlens, eps, pooling)
    return (weight.float() * normed_mean).to(hidden_states.dtype), normed_mean if save else None


def mean_of_normed(
    hidden_states: Tensor, weight: Tensor | None, cu_seqlens: Tensor, eps: float, pooling: str = "mean"
) -> Tensor:
    """Σ_t r_t x̂_t [B, D] fp32, without the gain; Σ_t r_t h_t where ``weight`` is None (normed states)."""
    normed_mean = buffers.empty(cu_seqlens.shape[0] - 1, hidden_states.shape[1])
    partial = buffers.empty(num_pieces(hidden_states, cu_seqlens) if pooling == "mean" else 0, hidden_states.shape[1])
    gain = None if weight is None else weight.float()
    status = native_cpu.extension().pool(
        native_cpu.level(), states(hidden_states, gain, eps), sentences(hidden_states, cu_seqlens), POOLINGS[pooling],
        normed_mean.data_ptr(), partial.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native_cpu.check("norm_pool forward", status)
    return normed_mean


def backward(
    grad_pooled: Tensor, hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str
) -> Tensor:
    """dh [T, D]"""
    grad_hidden = buffers.empty(*hidden_states.shape, dtype=hidden_states.dtype)
    of_token, gain, scratch = grad_pooled.float(), weight.float(), scratch_of(hidden_states)
    if pooling == "mean":
        of_token = of_token / cu_seqlens.diff().clamp(min=1)[:, None]
    status = native_cpu.extension().backward(
        native_cpu.level(), states(hidden_states, gain, eps), sentences(hidden_states, cu_seqlens), POOLINGS[pooling],
        of_token.data_ptr(), None, grad_hidden.data_ptr(), 0, 0, scratch.data_ptr(), len(scratch),
    )  # fmt: skip
    native_cpu.check("norm_pool backward", status)
    return grad_hidden


def states(tensor: Tensor, gain: Tensor | None, eps: float) -> Any:
    """``mtllm::cpu::States``; the caller keeps the tensors alive. ``gain`` is contiguous float32."""
    dtype, row_stride = native.DTYPES[tensor.dtype], tensor.stride(0)
    return native_cpu.extension().states(dtype, tensor.data_ptr(), row_stride, native.address(gain), eps)


def sentences(tensor: Tensor, cu_seqlens: Tensor) -> Any:
    """``mtllm::cpu::Sentences``"""
    return native_cpu.extension().sentences(cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, *tensor.shape)


def num_pieces(tensor: Tensor, cu_seqlens: Tensor) -> int:
    """Of the kernels' partition; see ``chunks.py``."""
    return tensor.shape[0] // native_cpu.extension().piece_tokens + cu_seqlens.shape[0]


def scratch_of(tensor: Tensor) -> Tensor:
    """What each thread of a call works in: [threads, rows, D]."""
    return buffers.empty(torch.get_num_threads(), native_cpu.extension().scratch_rows, tensor.shape[1])
