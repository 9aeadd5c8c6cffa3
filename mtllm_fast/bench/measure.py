"""Clocks, memory and arithmetic: interleaved rounds, high-water marks, FLOPs and the GEMM ceiling."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mtllm_fast.bench.peers import Peer
from mtllm_fast.bench.sizes import Stack
from mtllm_fast.bench.workloads import IdArray


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class MemoryMeter:
    """High-water mark of memory between ``reset`` and ``peak``.

    ``kind`` says what is counted: ``"cuda-allocator"`` (bytes that torch's allocator handed out on the device, weights
    included), ``"rss-high-water"`` (the process's resident set, interpreter and weights included; Linux resets it per
    peer), or ``"unknown"`` where the system offers neither.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.kind = "cuda-allocator"
        elif os.access("/proc/self/clear_refs", os.W_OK):
            self.kind = "rss-high-water"
        else:
            self.kind = "unknown"

    def reset(self) -> None:
        if self.kind == "cuda-allocator":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.kind == "rss-high-water":
            Path("/proc/self/clear_refs").write_text("5")  # 5: set the peak to the present resident set

    def peak(self) -> int | None:
        """Bytes, or None where they cannot be read."""
        if self.kind == "cuda-allocator":
            return torch.cuda.max_memory_allocated(self.device)
        if self.kind == "rss-high-water":
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        return None


@dataclass
class Timing:
    """What one peer did over the rounds."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


def interleave(peers: Sequence[Peer], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time every peer once per round, starting each round with the next peer so that none always runs first."""
    timings = {peer.name: Timing() for peer in peers}
    memory = MemoryMeter(device)
    for first in range(rounds):
        for offset in range(len(peers)):
            peer = peers[(first + offset) % len(peers)]
            timing = timings[peer.name]
            memory.reset()
            timing.seconds.append(timed(functools.partial(peer.encode, peer.workload.ids), device))
            peak = memory.peak()
            if peak is not None:
                timing.peak_bytes = max(peak, timing.peak_bytes or 0)
    return timings


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


class Flops(NamedTuple):
    """Of one forward pass, 2 per multiply-add. Norms and activations are not counted."""

    encoder: float
    up_proj: float
    llm_linear: float
    llm_attention: float


def forward_flops(stack: Stack, lengths: IdArray) -> Flops:
    """FLOPs of texts of these lengths, from the configs.

    Per token: ``2 (4 d^2 + 2 d ffn)`` per encoder layer, ``2 d D``, and ``2 (D (H + 2 KV) hd + H hd D + 3 D ffn)`` per
    LLM layer; plus attention's two products, ``4 L width`` per token and layer.
    """
    enc, llm = stack.encoder.config, stack.llm.config
    d, D = enc.d_model, llm.hidden_size
    head_dim = getattr(llm, "head_dim", None) or D // llm.num_attention_heads
    q_width, kv_width = llm.num_attention_heads * head_dim, llm.num_key_value_heads * head_dim
    encoder_layer = 2 * (4 * d * d + 2 * d * enc.encoder_ffn_dim)
    llm_layer = 2 * (D * (q_width + 2 * kv_width) + q_width * D + 3 * D * llm.intermediate_size)
    L = lengths.astype(np.float64)
    tokens, pairs = float(L.sum()), float((L * L).sum())
    return Flops(
        encoder=enc.encoder_layers * (encoder_layer * tokens + 4 * d * pairs),
        up_proj=2 * d * D * tokens,
        llm_linear=llm.num_hidden_layers * llm_layer * tokens,
        llm_attention=llm.num_hidden_layers * 4 * q_width * pairs,
    )


def encode_flops(stack: Stack, lengths: IdArray) -> float:
    """FLOPs of encoding texts of these lengths."""
    return sum(forward_flops(stack, lengths))


def step_flops(stack: Stack, lengths: IdArray) -> float:
    """FLOPs of a step of self-distillation on texts of these lengths on both sides: the teacher's and the student's
    forward, and the student's backward, in which frozen weights have no gradient of their own (LoRA's products, which
    are small, are not counted, and nothing is computed twice)."""
    forward = forward_flops(stack, lengths)
    return forward.encoder + 2 * forward.up_proj + 3 * forward.llm_linear + 4 * forward.llm_attention


def memory_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes/s of a copy that no cache holds, read and written."""
    count = 2 ** (29 if device.type == "cuda" else 26)
    source = torch.zeros(count, device=device)
    target = torch.ones_like(source)
    return 2 * 4 * count / min(timed(lambda: target.copy_(source), device) for _ in range(repeats))


def gemm_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Best FLOP/s of a large square matrix product on random data: 8192 on a GPU, 2048 on a CPU.

    On a CPU without half-precision instructions a product in float32 is the faster way to one in ``dtype``.
    """
    if device.type == "cpu" and dtype != torch.float32:
        native, wide = (_gemm_rate(device, kind, repeats) for kind in (dtype, torch.float32))
        return max(native, wide)
    return _gemm_rate(device, dtype, repeats)


def _gemm_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    n = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(repeats))
