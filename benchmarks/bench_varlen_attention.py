"""``varlen_attention``: bidirectional attention within packed sentences, forward alone and with backward.

The peer ``padded`` is what a padded batch does: SDPA on ``[B, H, L, hd]`` with a key mask, here without its packing
and unpacking. Lengths vary, so that it pays for its padding.
"""

from __future__ import annotations

import functools
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

OP = "varlen_attention"
BACKENDS = ("reference", "sdpa", "torch_varlen", "flash_attn")
PEERS = (*BACKENDS, "padded")
HEADS, KV_HEADS, HEAD_DIM = (32, 8, 128) if ON_GPU else (8, 4, 64)
# (sentences, shortest, longest)
CASES = ((256, 20, 60), (32, 256, 512)) if ON_GPU else ((32, 20, 60),)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DIRECTIONS = ("fwd", "fwd+bwd")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Random q, k, v, the gradient of the output, and the sentences' lengths, longest first as ``encode`` sorts."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    lengths: tuple[int, ...]

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths], device=DEVICE).cumsum(0).to(torch.int32)

    def double(self) -> Problem:
        return Problem(self.q.double(), self.k.double(), self.v.double(), self.grad.double(), self.lengths)


def make_problem(sentences: int, shortest: int, longest: int) -> Problem:
    generator = torch.Generator().manual_seed(sentences)
    lengths = torch.randint(shortest, longest + 1, (sentences,), generator=generator).sort(descending=True).values
    total = int(lengths.sum())

    def draw(heads: int) -> Tensor:
        return torch.randn(total, heads, HEAD_DIM, generator=generator).to(DEVICE, DTYPE)

    return Problem(draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), draw(HEADS), tuple(lengths.tolist()))


def padded(problem: Problem) -> Attend:
    """SDPA on the padded grid with a key mask and, as in transformers, repeated keys: GQA with a mask is slow."""
    longest = max(problem.lengths)
    mask_BL = torch.arange(longest, device=DEVICE) < torch.tensor(problem.lengths, device=DEVICE)[:, None]
    rows = mask_BL.flatten().nonzero().squeeze(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grids = []
        for packed in (q, k, v):
            grid = packed.new_zeros(mask_BL.numel(), *packed.shape[1:]).index_copy(0, rows, packed)
            grids.append(grid.unflatten(0, mask_BL.shape).transpose(1, 2))
        grids[1:] = (grid.repeat_interleave(HEADS // KV_HEADS, 1) for grid in grids[1:])
        out = F.scaled_dot_product_attention(*grids, attn_mask=mask_BL[:, None, None])
        return out.transpose(1, 2).flatten(0, 1)[rows]

    return attend


def implementation(peer: str, problem: Problem) -> Attend:
    if peer == "padded":
        return padded(problem)
    options: dict[str, Any] = {"max_seqlen": max(problem.lengths), "backend": peer}
    return lambda q, k, v: mtllm_fast.varlen_attention(q, k, v, problem.cu_seqlens, **options)


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer == "padded":
        return None
    problem = make_problem(1, 8, 8)
    return mtllm_fast.explain(OP, problem.q, problem.k, backend=peer).why_not[peer]


def runner(attend: Attend, problem: Problem, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(problem.q, problem.k, problem.v),)

        return forward
    inputs = tuple(tensor.detach().requires_grad_() for tensor in (problem.q, problem.k, problem.v))

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = attend(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, problem.grad))

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): q, k, v read and out written, ``4 L^2 hd`` per head; the backward has 2.5 times the FLOPs."""
    moved = 2 * problem.q.nbytes + problem.k.nbytes + problem.v.nbytes
    flops = 4 * HEADS * HEAD_DIM * sum(length**2 for length in problem.lengths)
    if direction == "fwd":
        return moved, flops
    return 3 * moved, int(3.5 * flops)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("sentences", "shortest", "longest"), CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_varlen_attention(
    benchmark: Any, direction: str, sentences: int, shortest: int, longest: int, peer: str
) -> None:
    problem = make_problem(sentences, shortest, longest)
    exact = problem.double()
    truth = runner(implementation("reference", exact), exact, direction)()
    plain = runner(implementation("reference", problem), problem, direction)()
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    moved_bytes, flops = least_work(problem, direction)
    case = f"B={sentences} L={shortest}-{longest} H={HEADS}/{KV_HEADS} hd={HEAD_DIM} {direction}"
    call = runner(implementation(peer, problem), problem, direction)
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, truth, allowed, DTYPE))
