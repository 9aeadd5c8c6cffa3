"""Clocks, memory and arithmetic: interleaved rounds, high-water marks, FLOPs and the GEMM ceiling."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mtllm_fast.bench.peers import Peer
from mtllm_fast.bench.sizes import Stack
from mtllm_fast.bench.workloads import IdArray
from mtllm_fast.core import onednn
from mtllm_fast.models.flops import forward_flops, step_flops


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


def encode_flops(stack: Stack, lengths: IdArray) -> float:
    """FLOPs of encoding texts of these lengths."""
    return sum(forward_flops(stack.encoder.config, stack.llm.config, *_tokens_and_pairs(lengths)))


def train_step_flops(stack: Stack, lengths: IdArray) -> float:
    """FLOPs of a step of self-distillation on texts of these lengths on both sides."""
    counts = _tokens_and_pairs(lengths)
    return step_flops(stack.encoder.config, stack.llm.config, *counts, *counts)


def _tokens_and_pairs(lengths: IdArray) -> tuple[float, float]:
    L = lengths.astype(np.float64)
    return float(L.sum()), float((L * L).sum())


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
    wide = torch.float32
    if device.type == "cpu" and dtype != wide:
        # Without the instructions PyTorch multiplies in a loop, and one such product takes a minute.
        kinds = (dtype, wide) if onednn.product_dtype(dtype) == dtype else (wide,)
        return max(_gemm_rate(device, kind, repeats) for kind in kinds)
    return _gemm_rate(device, dtype, repeats)


def _gemm_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    n = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(repeats))
