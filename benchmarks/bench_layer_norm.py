"""``layer_norm``: the norm of an encoder's layer on packed tokens, alone and after its residual sum.

Forward alone is inference; with backward, the parameters are frozen, as an encoder's under distillation are.
"""

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

OP = "layer_norm"
EPS = 1e-5
BACKENDS = ("reference", "triton")
PEERS = (*BACKENDS, "huggingface", "compiled", "liger")
TOKENS = (512, 4096, 16384) if ON_GPU else (2048,)
WIDTH = 1024
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
FORMS = ("norm", "sum+norm")
DIRECTIONS = ("fwd", "fwd+bwd")

Norm = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """States of a layer, what a sublayer adds to them, the norm's parameters, and gradients of the outputs."""

    states_Td: tuple[Tensor, ...]
    weight_d: Tensor
    bias_d: Tensor
    grads_Td: tuple[Tensor, ...]

    def double(self) -> Problem:
        states, grads = (tuple(t.double() for t in tensors) for tensors in (self.states_Td, self.grads_Td))
        return Problem(states, self.weight_d.double(), self.bias_d.double(), grads)


def make_problem(tokens: int, form: str) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    count = 1 if form == "norm" else 2
    states, grads = (tuple(random(tokens, WIDTH) for _ in range(count)) for _ in range(2))
    return Problem(states, 1 + random(WIDTH) / 4, random(WIDTH), grads)


def after_sum(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Norm:
    """A norm that knows no residual, after the sum."""

    def outputs(weight: Tensor, bias: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        if len(states) == 1:
            return (norm(states[0], weight, bias),)
        summed = states[0] + states[1]
        return norm(summed, weight, bias), summed

    return outputs


def huggingface(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(states, weight.shape, weight, bias, EPS)


def implementation(peer: str) -> Norm:
    if peer in BACKENDS:

        def ours(weight: Tensor, bias: Tensor, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
            outputs = mtllm_fast.layer_norm(hidden, weight, bias, eps=EPS, residual=residual, backend=peer)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return ours
    if peer == "liger":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return after_sum(lambda states, weight, bias: LigerLayerNormFunction.apply(states, weight, bias, EPS))
    return torch.compile(after_sum(huggingface)) if peer == "compiled" else after_sum(huggingface)


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        problem = make_problem(8, "norm")
        parameters = (problem.weight_d, problem.bias_d)
        return mtllm_fast.explain(OP, problem.states_Td[0], *parameters, eps=EPS).why_not[peer]
    if peer == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        return None if ON_GPU else "its kernels need a GPU"
    return None


def runner(norm: Norm, problem: Problem, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return norm(problem.weight_d, problem.bias_d, *problem.states_Td)

        return forward

    states = tuple(tensor.detach().requires_grad_() for tensor in problem.states_Td)

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = norm(problem.weight_d, problem.bias_d, *states)
        grads = torch.autograd.grad(outputs, states, problem.grads_Td)
        return *(output.detach() for output in outputs), *grads

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): states read and outputs written once; backward reads the sum and gradients and writes one dx.

    Per element 8 FLOPs for mean, variance and the normed value; backward 11.
    """
    count, states = len(problem.states_Td), problem.states_Td[0].nbytes
    parameters = problem.weight_d.nbytes + problem.bias_d.nbytes
    elements = problem.states_Td[0].numel()
    if direction == "fwd":
        return 2 * count * states + parameters, 8 * elements
    return (2 * count + count + 2) * states + 2 * parameters, 19 * elements


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layer_norm(benchmark: Any, direction: str, form: str, tokens: int, peer: str) -> None:
    problem = make_problem(tokens, form)
    truth = runner(after_sum(huggingface), problem.double(), direction)()
    plain = runner(after_sum(huggingface), problem, direction)()
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    moved_bytes, flops = least_work(problem, direction)
    case = f"{form} T={tokens} d={WIDTH} {'bf16' if ON_GPU else 'fp32'} {direction}"
    call = runner(implementation(peer), problem, direction)
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, truth, allowed, DTYPE))
