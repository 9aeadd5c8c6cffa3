"""``distillation_loss``, forward and backward: the pooled term, the span term, and both in one gradient.

Documents of one length, so that the eager peer pools a dense ``[B, L, D]`` view: its best case. Spans are as words have
them: three in four of one token on both sides, the others of two, none overlapping. Counted beside the times: the bytes
that live at once beyond the inputs and the gradient (``extra_mib``), and how many times eager's speed a peer has when
the two take turns (``x_eager``): what else runs on the machine then slows both.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, ON_GPU, Call, cold_cache, measure, timer
from torch import Tensor

import mtllm_fast
from mtllm_fast.bench.counting import peak_bytes
from mtllm_fast.bench.gate import ERROR_FLOOR, ERROR_MULTIPLE, relative_error

OP = "distillation_loss"
EPS = 1e-5
BACKENDS = ("reference", "cpu", "triton", "cuda")
PEERS = (*BACKENDS, "eager", "compiled")
TERMS = ("pooled", "spans", "spans of normed states", "both")
CASES = ((4096, 512), (16384, 512)) if ON_GPU else ((2048, 512), (16384, 512))
WIDTH = 4096
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
WEIGHTS = {"pooled": (1.0, 0.0), "both": (0.333, 0.667)}  # of the sequences and the spans; else (0, 1)

TURNS = 15 if ON_GPU else 5

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Random states of student and teacher (its own are normed), the norm's gain, and spans in CSR form."""

    hidden_TD: Tensor
    weight_D: Tensor
    teacher_TD: Tensor
    cu_seqlens: Tensor
    indices: Tensor
    offsets: Tensor

    def double(self) -> Problem:
        states = (self.hidden_TD.double(), self.weight_D.double(), self.teacher_TD.double())
        return Problem(*states, self.cu_seqlens, self.indices, self.offsets)

    @property
    def sentences(self) -> int:
        return len(self.cu_seqlens) - 1


def make_problem(tokens: int, length: int) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([1, 1, 1, 2], device=DEVICE).repeat(tokens // 5)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    indices = torch.arange(int(offsets[-1]), device=DEVICE)
    hidden, teacher = (random(tokens, WIDTH) + random(WIDTH) for _ in range(2))
    return Problem(hidden, 1 + random(WIDTH) / 4, teacher, cu_seqlens, indices, offsets)


def ours(problem: Problem, term: str, backend: str) -> Loss:
    sequence_weight, span_weight = WEIGHTS.get(term, (0.0, 1.0))
    weight = None if "normed" in term else problem.weight_D
    teacher: dict[str, Any] = {"teacher_states": problem.teacher_TD, "teacher_cu_seqlens": problem.cu_seqlens}
    if term == "pooled":
        teacher = {"teacher_pooled": problem.teacher_TD.unflatten(0, (problem.sentences, -1)).mean(1)}
    else:
        for side in ("", "teacher_"):
            teacher |= {f"{side}span_indices": problem.indices, f"{side}span_offsets": problem.offsets}

    def loss(hidden_TD: Tensor) -> Tensor:
        return mtllm_fast.distillation_loss(
            hidden_TD, weight, problem.cu_seqlens, eps=EPS, **teacher, sequence_weight=sequence_weight,
            span_weight=span_weight, backend=backend,
        ).loss  # fmt: skip

    return loss


def eager(problem: Problem, term: str) -> Loss:
    """Hugging Face's norm, a mean per document and a bag of embeddings per span, as the method's own code has them."""
    pooled_teacher = problem.teacher_TD.unflatten(0, (problem.sentences, -1)).mean(1)
    mask = torch.ones(problem.sentences, len(problem.hidden_TD) // problem.sentences, 1, device=DEVICE)
    sequence_weight, span_weight = WEIGHTS.get(term, (0.0, 1.0))

    def bags(states: Tensor) -> Tensor:
        return F.embedding_bag(problem.indices, states, problem.offsets[:-1], mode="mean")

    def loss(hidden_TD: Tensor) -> Tensor:
        states = hidden_TD if "normed" in term else huggingface_norm(hidden_TD, problem.weight_D)
        total = states.new_zeros(())
        if sequence_weight:
            grid = states.unflatten(0, (problem.sentences, -1))
            pooled = (grid * mask.to(grid.dtype)).sum(1) / mask.sum(1).to(grid.dtype)
            total = total + sequence_weight * F.mse_loss(pooled, pooled_teacher)
        if span_weight:
            total = total + span_weight * F.mse_loss(bags(states), bags(problem.teacher_TD))
        return total

    return loss


def huggingface_norm(hidden_TD: Tensor, weight_D: Tensor) -> Tensor:
    """LlamaRMSNorm: statistics in fp32, rounded to the input's dtype before the gain."""
    wide = hidden_TD if hidden_TD.dtype == torch.float64 else hidden_TD.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight_D * normed.to(hidden_TD.dtype)


def implementation(peer: str, problem: Problem, term: str) -> Loss:
    if peer in BACKENDS:
        return ours(problem, term, peer)
    loss = eager(problem, term)
    return torch.compile(loss) if peer == "compiled" else loss


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer not in BACKENDS:
        return None
    states, cu_seqlens = torch.ones(1, 8, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return mtllm_fast.explain(OP, states, None, cu_seqlens, backend=peer).why_not[peer]


def runner(loss: Loss, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    hidden = problem.hidden_TD.detach().requires_grad_()

    def forward_and_backward() -> tuple[Tensor, ...]:
        value = loss(hidden)
        return value.detach(), *torch.autograd.grad(value, hidden)

    return forward_and_backward


def speed_beside(other: Callable[[], object], call: Callable[[], object]) -> float:
    """The time of ``other`` over that of ``call``: the median over turns, after one that warms both up."""
    ratios = []
    for _ in range(TURNS + 1):
        seconds = []
        for function in (other, call):
            cold_cache()
            start = timer()
            function()
            seconds.append(timer() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


def least_work(problem: Problem, term: str) -> tuple[int, int]:
    """(bytes, FLOPs): the forward reads the student's states, the backward reads them and writes their gradient;
    with spans both read the teacher's too. About 16 FLOPs per element of a state."""
    states = problem.hidden_TD.nbytes
    return (3 if term == "pooled" else 5) * states, 16 * problem.hidden_TD.numel()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "length"), CASES)
@pytest.mark.parametrize("term", TERMS)
def test_distillation_loss(benchmark: Any, term: str, tokens: int, length: int, peer: str) -> None:
    problem = make_problem(tokens, length)
    exact = problem.double()
    truth = runner(eager(exact, term), exact)()
    plain = runner(eager(problem, term), problem)()
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    moved_bytes, flops = least_work(problem, term)
    case = f"{term} T={tokens} L={length} D={WIDTH} {'bf16' if ON_GPU else 'fp32'}"
    call = runner(implementation(peer, problem, term), problem)
    if peer != "eager":
        benchmark.extra_info["x_eager"] = speed_beside(runner(eager(problem, term), problem), call)
    benchmark.extra_info["extra_mib"] = (peak_bytes(call, DEVICE) - problem.hidden_TD.nbytes) / 2**20
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, truth, allowed, DTYPE))
