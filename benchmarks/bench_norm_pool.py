"""``norm_pool``: last RMSNorm and mean pooling over packed tokens, forward alone and with backward.

All sentences of a case have the same length, so that the peers which know no packing can work on a dense
``[B, L, D]`` view without padding or mask: their best case, and one that ours does not know about.
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

OP = "norm_pool"
EPS = 1e-5
BACKENDS = ("reference", "cpu", "triton", "cuda")
PEERS = (*BACKENDS, "huggingface", "F.rms_norm", "compiled", "liger")
# (tokens T, tokens per sentence): one short batch, one of sentences, one of documents.
CASES = ((512, 64), (4096, 64), (16384, 512)) if ON_GPU else ((2048, 64),)
WIDTH = 4096 if ON_GPU else 512
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DIRECTIONS = ("fwd", "fwd+bwd")

Pool = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Random packed states, the norm's gain, and a gradient of the pooled output."""

    hidden_TD: Tensor
    weight_D: Tensor
    cu_seqlens: Tensor
    grad_BD: Tensor

    @property
    def sentences(self) -> int:
        return self.grad_BD.shape[0]

    def double(self) -> Problem:
        return Problem(self.hidden_TD.double(), self.weight_D.double(), self.cu_seqlens, self.grad_BD.double())


def make_problem(tokens: int, length: int) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=DEVICE)
    # The mean of normed rows is far from zero in a model; centred random rows would make every error look large.
    hidden = random(tokens, WIDTH) + random(WIDTH)
    return Problem(hidden, 1 + random(WIDTH) / 4, cu_seqlens, random(tokens // length, WIDTH))


def huggingface_norm(hidden_TD: Tensor, weight_D: Tensor) -> Tensor:
    """LlamaRMSNorm: statistics in fp32, rounded to the input's dtype before the gain."""
    wide = hidden_TD if hidden_TD.dtype == torch.float64 else hidden_TD.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight_D * normed.to(hidden_TD.dtype)


def pooled_by(norm: Pool, sentences: int) -> Pool:
    """Norm, then the mean over each sentence of a dense view."""

    def pool(hidden_TD: Tensor, weight_D: Tensor) -> Tensor:
        return norm(hidden_TD, weight_D).unflatten(0, (sentences, -1)).mean(1)

    return pool


def implementation(peer: str, problem: Problem) -> Pool:
    if peer in BACKENDS:
        return lambda hidden, weight: mtllm_fast.norm_pool(hidden, weight, problem.cu_seqlens, eps=EPS, backend=peer)
    if peer == "liger":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return pooled_by(
            lambda hidden, weight: LigerRMSNormFunction.apply(hidden, weight, EPS, 0.0, "llama", False),
            problem.sentences,
        )
    if peer == "F.rms_norm":
        return pooled_by(lambda hidden, weight: F.rms_norm(hidden, (WIDTH,), weight, EPS), problem.sentences)
    pool = pooled_by(huggingface_norm, problem.sentences)
    return torch.compile(pool) if peer == "compiled" else pool


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        problem = make_problem(64, 64)
        explanation = mtllm_fast.explain(
            "norm_pool", problem.hidden_TD, problem.weight_D, problem.cu_seqlens, eps=EPS, backend=peer
        )
        return explanation.why_not[peer]
    if peer == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        return None if ON_GPU else "its kernels need a GPU"
    return None


def runner(pool: Pool, problem: Problem, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (pool(problem.hidden_TD, problem.weight_D),)

        return forward

    hidden, weight = (tensor.detach().requires_grad_() for tensor in (problem.hidden_TD, problem.weight_D))

    def forward_and_backward() -> tuple[Tensor, ...]:
        pooled = pool(hidden, weight)
        return (pooled.detach(), *torch.autograd.grad(pooled, (hidden, weight), problem.grad_BD))

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): states read once and the pooled rows written; backward reads them again and writes dX.

    Per element of the states 2 FLOPs for the mean square and 2 for the weighted sum; backward 2 for ``<g, x>`` and 4
    for ``dX``.
    """
    states = problem.hidden_TD.nbytes
    small = problem.grad_BD.nbytes + problem.weight_D.nbytes + problem.cu_seqlens.nbytes
    elements = problem.hidden_TD.numel()
    if direction == "fwd":
        return states + small, 4 * elements
    return 3 * states + 2 * small, 10 * elements


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "length"), CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_norm_pool(benchmark: Any, direction: str, tokens: int, length: int, peer: str) -> None:
    problem = make_problem(tokens, length)
    exact = pooled_by(huggingface_norm, problem.sentences)
    truth = runner(exact, problem.double(), direction)()
    plain = runner(exact, problem, direction)()
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    moved_bytes, flops = least_work(problem, direction)
    case = f"T={tokens} L={length} D={WIDTH} {'bf16' if ON_GPU else 'fp32'} {direction}"
    call = runner(implementation(peer, problem), problem, direction)
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, truth, allowed, DTYPE))
