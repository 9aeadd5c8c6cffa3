"""``bias_relu``: what follows the first projection of an encoder's feed-forward layer.

With backward, the bias is frozen, as an encoder's under distillation is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, Call, measure
from torch import Tensor

import mtllm_fast
from mtllm_fast.bench.gate import ERROR_FLOOR, ERROR_MULTIPLE, relative_error

OP = "bias_relu"
BACKENDS = ("reference", "triton")
PEERS = (*BACKENDS, "huggingface", "compiled")
# (tokens T, inner width F) of NLLB-200's distilled 600M and its 3.3B models
CASES = ((512, 4096), (16384, 4096), (16384, 8192)) if ON_GPU else ((1024, 4096),)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DIRECTIONS = ("fwd", "fwd+bwd")

Activation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A product, its bias, and a gradient of the output."""

    x_TF: Tensor
    bias_F: Tensor
    grad_TF: Tensor

    def double(self) -> Problem:
        return Problem(self.x_TF.double(), self.bias_F.double(), self.grad_TF.double())


def make_problem(tokens: int, width: int) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    return Problem(random(tokens, width), random(width), random(tokens, width))


def huggingface(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    """The bias as a GEMM without an epilogue adds it, and nn.ReLU."""
    return torch.relu(x_TF + bias_F)


def implementation(peer: str) -> Activation:
    if peer in BACKENDS:
        return lambda x, bias: mtllm_fast.bias_relu(x, bias, backend=peer)
    return torch.compile(huggingface) if peer == "compiled" else huggingface


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        problem = make_problem(8, 8)
        return mtllm_fast.explain(OP, problem.x_TF, problem.bias_F).why_not[peer]
    return None


def runner(activation: Activation, problem: Problem, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (activation(problem.x_TF, problem.bias_F),)

        return forward

    x = problem.x_TF.detach().requires_grad_()

    def forward_and_backward() -> tuple[Tensor, ...]:
        y = activation(x, problem.bias_F)
        return y.detach(), torch.autograd.grad(y, x, problem.grad_TF)[0]

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): x read and y written once; backward reads y and its gradient and writes dx."""
    passes = 2 if direction == "fwd" else 5
    return passes * problem.x_TF.nbytes + problem.bias_F.nbytes, (passes // 2 + 1) * problem.x_TF.numel()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "width"), CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bias_relu(benchmark: Any, direction: str, tokens: int, width: int, peer: str) -> None:
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
