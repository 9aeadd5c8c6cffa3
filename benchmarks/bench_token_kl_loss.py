"""``token_kl_loss``: distillation of a student's next-token distribution under a frozen head, of Llama 3's on a GPU.

``eager`` is whole logits, their log-softmax in float32 and autograd. The floor counts the three products that any
implementation needs, two of logits and with backward one of the gradient: ours computes the logits a second time for
the gradient, and for jsd a third, and that is the price of not keeping them.
"""

from __future__ import annotations

import functools
import importlib.util
import math
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

OP = "token_kl_loss"
PEERS = ("reference", "eager", "liger")
ROWS, VOCABULARY, WIDTH = (2048, 128256, 4096) if ON_GPU else (256, 8192, 512)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TEMPERATURE, BETA = 2.0, 0.5
DIVERGENCES = ("kl", "jsd")
DIRECTIONS = ("fwd", "fwd+bwd")

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A student's states near those of its teacher, and the head of both; logits of a standard deviation of 2."""

    hidden_ND: Tensor
    teacher_ND: Tensor
    weight_VD: Tensor

    def double(self) -> Problem:
        return Problem(self.hidden_ND.double(), self.teacher_ND.double(), self.weight_VD.double())


def make_problem() -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    teacher = random(ROWS, WIDTH)
    return Problem(teacher + random(ROWS, WIDTH) / 2, teacher, random(VOCABULARY, WIDTH) * 2 / WIDTH**0.5)


def eager(problem: Problem, divergence: str) -> Loss:
    def log_softmax(states: Tensor) -> Tensor:
        logits = states @ problem.weight_VD.t()
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.log_softmax(wide / TEMPERATURE, dim=-1)

    def loss(hidden: Tensor) -> Tensor:
        kl = functools.partial(F.kl_div, reduction="batchmean", log_target=True)
        log_q, log_p = log_softmax(hidden), log_softmax(problem.teacher_ND)
        if divergence == "kl":
            return kl(log_q, log_p)
        log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
        return BETA * kl(log_m, log_p) + (1 - BETA) * kl(log_m, log_q)

    return loss


def implementation(peer: str, problem: Problem, divergence: str) -> Loss:
    if peer == "eager":
        return eager(problem, divergence)
    teacher, weight = problem.teacher_ND, problem.weight_VD
    if peer == "liger":
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

        beta = 0.0 if divergence == "kl" else BETA  # at 0 Liger's is KL(teacher‖student)
        return lambda hidden: LigerFusedLinearJSDFunction.apply(
            hidden, weight, teacher, weight, None, beta, -100, TEMPERATURE
        )
    options: dict[str, Any] = {"temperature": TEMPERATURE, "divergence": divergence, "beta": BETA, "backend": peer}
    return lambda hidden: mtllm_fast.token_kl_loss(hidden, teacher, weight, **options)


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        return None if ON_GPU else "its kernels need a GPU"
    return None


def runner(loss: Loss, problem: Problem, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss(problem.hidden_ND),)

        return forward
    hidden = problem.hidden_ND.detach().requires_grad_()

    def forward_and_backward() -> tuple[Tensor, ...]:
        value = loss(hidden)
        return (value.detach(), *torch.autograd.grad(value, hidden))

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): states and head read once; backward reads them again, and writes the gradient of the student's.

    Two products of ``[N, D]`` with the head, and with backward one of ``[N, V]`` with it.
    """
    read = problem.hidden_ND.nbytes + problem.teacher_ND.nbytes + problem.weight_VD.nbytes
    product = 2 * ROWS * VOCABULARY * WIDTH
    if direction == "fwd":
        return read, 2 * product
    return 2 * read + problem.hidden_ND.nbytes, 3 * product


@functools.cache
def expected(divergence: str, direction: str) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    """What the call returns in float64, and how much a peer may err."""
    problem = make_problem()
    double = problem.double()
    truth = runner(eager(double, divergence), double, direction)()
    plain = runner(eager(problem, divergence), problem, direction)()
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    return truth, allowed


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_token_kl_loss(benchmark: Any, direction: str, divergence: str, peer: str) -> None:
    problem = make_problem()
    truth, allowed = expected(divergence, direction)
    moved_bytes, flops = least_work(problem, direction)
    shape = f"N={ROWS} V={VOCABULARY} D={WIDTH}"
    case = f"{divergence} {shape} {'bf16' if ON_GPU else 'fp32'} {direction}"
    call = runner(implementation(peer, problem, divergence), problem, direction)
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, truth, allowed, DTYPE))
