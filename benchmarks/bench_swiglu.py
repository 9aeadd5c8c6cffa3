"""``swiglu``: the gated activation of an LLM's MLP on the output of a merged projection, with and without backward."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, ON_GPU, Call, measure
from torch import Tensor

import mtllm_fast
from mtllm_fast.bench.gate import ERROR_FLOOR, ERROR_MULTIPLE, relative_error

OP = "swiglu"
BACKENDS = ("reference", "cpu", "triton")
PEERS = (*BACKENDS, "huggingface", "compiled", "liger")
# (tokens T, width F): an 8B Llama, a 7B Llama 2, a 0.5B Qwen2
CASES = ((512, 14336), (4096, 14336), (16384, 14336), (16384, 11008), (16384, 4864)) if ON_GPU else ((1024, 1024),)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DIRECTIONS = ("fwd", "fwd+bwd")

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A random merged projection [T, 2 F] and a gradient of the output [T, F]."""

    merged: Tensor
    grad: Tensor

    def double(self) -> Problem:
        return Problem(self.merged.double(), self.grad.double())


def make_problem(tokens: int, width: int) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    return Problem(random(tokens, 2 * width), random(tokens, width))


def huggingface(merged: Tensor) -> Tensor:
    """LlamaMLP's activation."""
    gate, up = merged.chunk(2, -1)
    return F.silu(gate) * up


def liger(merged: Tensor) -> Tensor:
    """Copies the halves, as its kernels want them contiguous, and adjoins their gradients."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = merged.chunk(2, -1)
    return LigerSiLUMulFunction.apply(gate, up)


def implementation(peer: str) -> Activation:
    if peer in BACKENDS:
        return lambda merged: mtllm_fast.swiglu(merged, backend=peer)
    if peer == "compiled":
        return torch.compile(huggingface)
    return liger if peer == "liger" else huggingface


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        return mtllm_fast.explain(OP, torch.ones(2, 64, dtype=DTYPE, device=DEVICE), backend=peer).why_not[peer]
    if peer == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        return None if ON_GPU else "its kernels need a GPU"
    return None


def runner(activation: Activation, problem: Problem, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (activation(problem.merged),)

        return forward

    merged = problem.merged.detach().requires_grad_()

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = activation(merged)
        return (out.detach(), *torch.autograd.grad(out, merged, problem.grad))

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): two halves read, one written; backward reads three and writes two."""
    half, elements = problem.grad.nbytes, problem.grad.numel()
    return (3 * half, 5 * elements) if direction == "fwd" else (8 * half, 16 * elements)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "width"), CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_swiglu(benchmark: Any, direction: str, tokens: int, width: int, peer: str) -> None:
    problem = make_problem(tokens, width)
    truth = runner(huggingface, problem.double(), direction)()
    plain = runner(huggingface, problem, direction)()
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    moved_bytes, flops = least_work(problem, direction)
    case = f"T={tokens} F={width} {'bf16' if ON_GPU else 'fp32'} {direction}"
    call = runner(implementation(peer), problem, direction)
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, truth, allowed, DTYPE))
