"""``quantize_rows``: a batch's states to e4m3 with a scale per token, alone and with the norm or the gate before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, Call, measure
from torch import Tensor
from torch.nn import functional as F

import mtllm_fast
from mtllm_fast.ops.quantize_rows import quantize_rows
from mtllm_fast.ops.quantize_rows.e4m3 import E4M3, LARGEST, SMALLEST
from mtllm_fast.ops.rms_norm import rms_norm
from mtllm_fast.ops.swiglu import swiglu

OP = "quantize_rows"
BACKENDS = ("reference", "triton")
PEERS = (*BACKENDS, "two passes", "eager", "compiled")
EPS = 1e-5
# (tokens T, width K, what comes before): one sentence, a batch before q, k and v, gate and up, and an 8B model's down.
CASES = (
    *((32, 4096, ""), (16384, 4096, ""), (16384, 4096, "norm"), (16384, 4096, "sum and norm")),
    *((16384, 14336, ""), (16384, 14336, "gate")),
) if ON_GPU else ((2048, 512, ""), (2048, 512, "sum and norm"), (2048, 512, "gate"))  # fmt: skip
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def eager(x: Tensor, before: dict[str, Any]) -> tuple[Tensor, ...]:
    """The formula in the dtype of x."""
    summed = ()
    if "residual" in before:
        x = x + before["residual"]
        summed = (x,)
    if "norm_weight" in before:
        x = F.rms_norm(x, x.shape[1:], before["norm_weight"], EPS)
    if "gated" in before:
        gate, up = x.chunk(2, 1)
        x = F.silu(gate) * up
    scale = x.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    if x.dtype == torch.float64:  # the truth: not rounded
        return x / scale, scale, *summed
    return (x / scale).to(E4M3), scale.float(), *summed


def two_passes(x: Tensor, before: dict[str, Any]) -> tuple[Tensor, ...]:
    """The op before and ``quantize_rows``, each by its best backend."""
    if "gated" in before:
        return quantize_rows(swiglu(x))
    if "norm_weight" not in before:
        return quantize_rows(x)
    normed = rms_norm(x, before["norm_weight"], eps=EPS, residual=before.get("residual"))
    return (*quantize_rows(normed[0]), normed[1]) if "residual" in before else quantize_rows(normed)


def implementation(peer: str) -> Any:
    if peer in BACKENDS:
        return lambda x, before: quantize_rows(x, **before, backend=peer)
    return {"two passes": two_passes, "eager": eager, "compiled": torch.compile(eager)}[peer]


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer not in BACKENDS:
        return None
    return mtllm_fast.explain(OP, torch.ones(2, 64, device=DEVICE), backend=peer).why_not[peer]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "width", "what"), CASES)
def test_quantize_rows(benchmark: Any, tokens: int, width: int, what: str, peer: str) -> None:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=generator)

    x, before = random(tokens, 2 * width if what == "gate" else width), {}
    if "norm" in what:
        before |= {"norm_weight": random(width), "eps": EPS}
    if "sum" in what:
        before["residual"] = random(tokens, width)
    if what == "gate":
        before["gated"] = True
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in before.items()}
    truth, quantize = eager(x.double(), wide), implementation(peer)
    moved = x.nbytes + tokens * (width + 4) + (2 * x.nbytes if "sum" in what else 0)
    case = f"T={tokens} K={width} {what or 'alone'} {'bf16' if ON_GPU else 'fp32'}"
    # Rounding to three bits of mantissa costs 2 to 3 %; the scale is that of one value, rounded to the dtype of x.
    allowed = (0.04, 0.01, 0.01)[: len(truth)]
    measure(benchmark, Call(OP, peer, case, lambda: quantize(x, before), moved, 3 * x.numel(), truth, allowed, DTYPE))
