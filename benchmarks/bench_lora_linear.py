"""``lora_linear``: q, k and v with LoRA, forward alone and with backward, beside PEFT's modules.

Every peer draws its own dropout masks, so the check of the results runs without dropout, and the time is taken with it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, Call, check, measure
from torch import Tensor, nn

import mtllm_fast
from mtllm_fast.bench.gate import ERROR_FLOOR, ERROR_MULTIPLE, relative_error
from mtllm_fast.ops.lora_linear import Adapter, lora_linear

OP = "lora_linear"
BACKENDS = ("reference", "triton")
PEERS = (*BACKENDS, "peft", "compiled peft")
RANK, SCALE = 16, 2.0
DROPOUTS = (0.0, 0.05)
# (tokens, inputs, projections' widths): Llama-3.1-8B's two large groups.
CASES = (
    ((4096, 4096, (4096, 1024, 1024)), (16384, 4096, (4096, 1024, 1024)), (16384, 4096, (14336, 14336)))
    if ON_GPU
    else ((1024, 512, (512, 128, 128)),)
)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DIRECTIONS = ("fwd", "fwd+bwd")

Projections = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    x_TK: Tensor
    weight_NK: Tensor
    adapters: tuple[Adapter, ...]
    grads: tuple[Tensor, ...]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x_TK, *(tensor for adapter in self.adapters for tensor in adapter[:2]))

    def double(self) -> Problem:
        def wide(t: Tensor) -> Tensor:
            return t.detach().double().requires_grad_(t.requires_grad)

        adapters = tuple(Adapter(wide(a), wide(b), scale) for a, b, scale in self.adapters)
        return Problem(wide(self.x_TK), wide(self.weight_NK), adapters, tuple(map(wide, self.grads)))


def make_problem(tokens: int, width: int, sizes: tuple[int, ...]) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    adapters = tuple(
        Adapter(random(RANK, width).div_(width**0.5).requires_grad_(), random(n, RANK).div_(4).requires_grad_(), SCALE)
        for n in sizes
    )
    weight = random(sum(sizes), width) / width**0.5
    grads = random(tokens, sum(sizes)).split(sizes, dim=1)  # side by side, as a fused kernel leaves them
    return Problem(random(tokens, width).requires_grad_(), weight, adapters, grads)


def peft_modules(problem: Problem, dropout: float) -> nn.ModuleList:
    """PEFT's LoRA Linears around the same parameters."""
    import peft
    from peft.tuners.lora.layer import Linear

    config = peft.LoraConfig(r=RANK, lora_alpha=int(RANK * SCALE), lora_dropout=dropout)
    modules = nn.ModuleList()
    sizes = [adapter.b.shape[0] for adapter in problem.adapters]
    for weight, adapter in zip(problem.weight_NK.split(sizes), problem.adapters, strict=True):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        module = Linear(base, "default", config, r=RANK, lora_alpha=config.lora_alpha)
        module.lora_A["default"].weight = nn.Parameter(adapter.a.detach())
        module.lora_B["default"].weight = nn.Parameter(adapter.b.detach())
        modules.append(module)
    return modules.train()


def implementation(peer: str, problem: Problem, dropout: float) -> tuple[Projections, tuple[Tensor, ...]]:
    """(the function, the adapters' parameters that it uses)"""
    if peer in BACKENDS:
        arguments = (problem.weight_NK, problem.adapters)
        return lambda x: lora_linear(x, *arguments, dropout=dropout, backend=peer), problem.leaves[1:]
    modules = peft_modules(problem, dropout)
    parameters = tuple(
        part["default"].weight for module in modules for part in (module.lora_A, module.lora_B)
    )  # as in ``leaves``

    def project(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x) for module in modules)

    return torch.compile(project) if peer == "compiled peft" else project, parameters


def exact(problem: Problem, x: Tensor) -> tuple[Tensor, ...]:
    """PEFT's formula in plain torch, without dropout."""
    weights = problem.weight_NK.split([adapter.b.shape[0] for adapter in problem.adapters])
    return tuple(x @ w.t() + x @ a.t() @ b.t() * s for w, (a, b, s) in zip(weights, problem.adapters, strict=True))


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        problem = make_problem(8, 16, (16, 16))
        arguments = (problem.x_TK, problem.weight_NK, problem.adapters)
        return mtllm_fast.explain(OP, *arguments, backend=peer).why_not[peer]
    return "peft is not installed" if importlib.util.find_spec("peft") is None else None


def run(peer: str, problem: Problem, dropout: float, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    project, parameters = implementation(peer, problem, dropout)
    return runner(project, problem, parameters, direction)


def runner(
    project: Projections, problem: Problem, parameters: tuple[Tensor, ...], direction: str
) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return project(problem.x_TK)

        return forward

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = project(problem.x_TK)
        return (
            *(y.detach() for y in outputs),
            *torch.autograd.grad(outputs, (problem.x_TK, *parameters), problem.grads),
        )

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): x, weights and outputs once; backward the same with dy, dx and the adapters' gradients."""
    parameters = problem.weight_NK.nbytes + sum(t.nbytes for t in problem.leaves[1:])
    states = problem.x_TK.nbytes + sum(g.nbytes for g in problem.grads)
    tokens = problem.x_TK.shape[0]
    base, low_rank = 2 * tokens * problem.weight_NK.numel(), 2 * tokens * sum(t.numel() for t in problem.leaves[1:])
    if direction == "fwd":
        return states + parameters, base + low_rank
    return 2 * (states + parameters) + problem.x_TK.nbytes, 2 * base + 3 * low_rank


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "width", "sizes"), CASES)
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora_linear(
    benchmark: Any, direction: str, dropout: float, tokens: int, width: int, sizes: tuple[int, ...], peer: str
) -> None:
    problem = make_problem(tokens, width, sizes)
    results = []
    for numbers in (problem.double(), problem):
        project = functools.partial(exact, numbers)
        results.append(runner(project, numbers, numbers.leaves[1:], direction)())
    truth, plain = results
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    moved_bytes, flops = least_work(problem, direction)
    name = "bf16" if ON_GPU else "fp32"
    case = f"T={tokens} {width}->{'+'.join(map(str, sizes))} r={RANK} p={dropout} {name} {direction}"
    call = Call(OP, peer, case, run(peer, problem, 0.0, direction), moved_bytes, flops, truth, allowed, DTYPE)
    if dropout:  # no two peers have the same masks: check without, and let anything pass with
        check(call)
        anything = tuple(math.inf for _ in allowed)
        call = replace(call, run=run(peer, problem, dropout, direction), allowed_error=anything)
    measure(benchmark, call)
