"""``quantize_rows``: a batch's states to e4m3 with a scale per token, the pass before every 8-bit float product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, Call, measure
from torch import Tensor

import mtllm_fast
from mtllm_fast.bench.gate import relative_error
from mtllm_fast.ops.quantize_rows import quantize_rows
from mtllm_fast.ops.quantize_rows.e4m3 import E4M3, LARGEST, SMALLEST

OP = "quantize_rows"
BACKENDS = ("reference", "triton")
PEERS = (*BACKENDS, "eager", "compiled")
# (tokens T, width K): one sentence, a batch before q, k and v, a batch before an 8B model's down-projection.
CASES = ((32, 4096), (16384, 4096), (16384, 14336)) if ON_GPU else ((2048, 512),)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def implementation(peer: str) -> Quantize:
    if peer in BACKENDS:
        return lambda x: quantize_rows(x, backend=peer)
    return torch.compile(eager) if peer == "compiled" else eager


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer not in BACKENDS:
        return None
    return mtllm_fast.explain(OP, torch.ones(2, 64, device=DEVICE), backend=peer).why_not[peer]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "width"), CASES)
def test_quantize_rows(benchmark: Any, tokens: int, width: int, peer: str) -> None:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    x = torch.randn(tokens, width, device=DEVICE, dtype=DTYPE, generator=generator)
    quantize = implementation(peer)

    def dequantized() -> tuple[Tensor, ...]:
        q, scale = eager(x)
        return (q.double() * scale,)

    allowed = 1.01 * relative_error(dequantized()[0], x)  # what rounding to three bits of mantissa costs
    q, scale = quantize(x)
    assert relative_error(q.double() * scale, x) <= allowed
    truth = (q.double(), scale.double())
    moved = x.nbytes + x.numel() + 4 * tokens
    case = f"T={tokens} K={width} {'bf16' if ON_GPU else 'fp32'}"
    measure(benchmark, Call(OP, peer, case, lambda: quantize(x), moved, 3 * x.numel(), truth, (0.0, 0.0), DTYPE))
