"""The CUDA C++ kernels of ``norm_pool`` (csrc/norm_pool.cu). The partition is explained in ``chunks.py``.

Same floors as the Triton kernels (see there). On an H200 the forward of 32 sentences of 512 tokens takes 58 + 16 µs,
with its second launch half the bandwidth; the backward is not yet measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtllm_fast.core import native
from mtllm_fast.core.aot import CudaCase
from mtllm_fast.core.devices import guard
from mtllm_fast.ops.norm_pool.chunks import chunk_tokens, num_slots

POOLINGS = {"mean": 0, "cls": 1, "eos": 2}  # mtllm::Pooling

# By columns per load (Li1: unaligned rows; Li4, Li8: 16 bytes) and per thread. With 80 registers three blocks of 256
# threads fit a multiprocessor. The states are read once, by loads marked evict-first (EF).
WIDE = (r"LDG\.E\.EF\.128",)
LINT_CASES = (
    CudaCase(r"norm_pool_(forward|backward)_kernel.*Li[48]ELi16E", max_registers=80, must_contain=WIDE),
    CudaCase(r"norm_pool_(forward|backward)_kernel.*Li[48]ELi(8|32)E", max_registers=128, must_contain=WIDE),
    CudaCase(r"norm_pool_(forward|backward)_kernel.*Li1ELi32E", max_registers=128),
    CudaCase(r"norm_pool_combine_kernel", max_registers=40),
)


def forward(
    hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(pooled [B, D], Σ_t r_t x̂_t [B, D] fp32)"""
    B, D = cu_seqlens.shape[0] - 1, hidden_states.shape[1]
    pooled = hidden_states.new_empty(B, D)
    normed_mean = torch.empty(B, D, dtype=torch.float32, device=pooled.device) if save else None
    _forward(hidden_states, readable(weight, hidden_states), cu_seqlens, eps, pooling, pooled, normed_mean)
    return pooled, normed_mean


def mean_of_normed(hidden_states: Tensor, weight: Tensor | None, cu_seqlens: Tensor, eps: float) -> Tensor:
    """mean_t x̂_t [B, D] fp32, without the gain; mean_t h_t where ``weight`` is None: the states are normed already."""
    B, D = cu_seqlens.shape[0] - 1, hidden_states.shape[1]
    normed_mean = torch.empty(B, D, dtype=torch.float32, device=hidden_states.device)
    weight = None if weight is None else readable(weight, hidden_states)
    _forward(hidden_states, weight, cu_seqlens, eps, "mean", None, normed_mean)
    return normed_mean


def _forward(
    hidden_states: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    eps: float,
    pooling: str,
    pooled: Tensor | None,
    normed_mean: Tensor | None,
) -> None:
    (T, D), B = hidden_states.shape, cu_seqlens.shape[0] - 1
    chunk = chunk_tokens(T, B)
    slots = num_slots(T, B, chunk) if pooling == "mean" and chunk < T else 0
    partial = torch.empty(slots, D, dtype=torch.float32, device=hidden_states.device)
    with guard(hidden_states):
        status = native.extension().norm_pool_forward(
            native.DTYPES[hidden_states.dtype], hidden_states.data_ptr(), hidden_states.stride(0),
            native.address(weight), weight is not None and weight.dtype == torch.float32, cu_seqlens.data_ptr(),
            native.address(pooled), native.address(normed_mean), partial.data_ptr(),
            T, B, D, chunk, eps, POOLINGS[pooling], native.stream(hidden_states),
        )  # fmt: skip
    native.check("norm_pool forward", status)


def backward(
    grad_pooled: Tensor, hidden_states: Tensor, weight: Tensor, cu_seqlens: Tensor, eps: float, pooling: str
) -> Tensor:
    """dh [T, D]"""
    (T, D), B = hidden_states.shape, cu_seqlens.shape[0] - 1
    weight = readable(weight, hidden_states)
    grad_hidden = hidden_states.new_empty(T, D)
    with guard(hidden_states):
        status = native.extension().norm_pool_backward(
            native.DTYPES[hidden_states.dtype], grad_pooled.data_ptr(), hidden_states.data_ptr(),
            hidden_states.stride(0), weight.data_ptr(), weight.dtype == torch.float32, cu_seqlens.data_ptr(),
            grad_hidden.data_ptr(), T, B, D, chunk_tokens(T, B), eps, POOLINGS[pooling], native.stream(grad_hidden),
        )  # fmt: skip
    native.check("norm_pool backward", status)
    return grad_hidden


def readable(weight: Tensor, hidden_states: Tensor) -> Tensor:
    """The kernels read a weight of the states' dtype or of float32."""
    return weight if weight.dtype in (hidden_states.dtype, torch.float32) else weight.float()
