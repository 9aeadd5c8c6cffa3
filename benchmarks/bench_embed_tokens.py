"""``embed_tokens``: the entry of an encoder, without its rare gradient."""

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

OP = "embed_tokens"
BACKENDS = ("reference", "triton")
PEERS = (*BACKENDS, "huggingface", "compiled")
# (tokens T, tokens per sentence)
CASES = ((512, 64), (4096, 64), (16384, 512)) if ON_GPU else ((2048, 64),)
VOCABULARY = 256_206 if ON_GPU else 32_000
WIDTH = 1024
POSITIONS = 1026
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SCALE = WIDTH**0.5
OFFSET = 2

Embed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Packed tokens, where they stand in their sentences, and the rows of both matrices."""

    ids_T: Tensor
    weight_Vd: Tensor
    positions_T: Tensor
    table_Pd: Tensor

    def exact(self) -> Tensor:
        """The result in float64, without a copy of the whole vocabulary in it."""
        rows = self.table_Pd[self.positions_T + OFFSET].double()
        return self.weight_Vd[self.ids_T].double() * SCALE + rows

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ids_T, self.weight_Vd, self.positions_T, self.table_Pd


@functools.cache
def make_problem(tokens: int, length: int) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    ids = torch.randint(0, VOCABULARY, (tokens,), device=DEVICE, generator=generator)
    positions = torch.arange(tokens, device=DEVICE) % length
    return Problem(ids, random(VOCABULARY, WIDTH) / SCALE, positions, random(POSITIONS, WIDTH))


def huggingface(ids: Tensor, weight: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """M2M100ScaledWordEmbedding and the rows of M2M100SinusoidalPositionalEmbedding."""
    embedded = F.embedding(ids, weight) * SCALE
    return embedded + table.index_select(0, positions + OFFSET).to(embedded)


def implementation(peer: str) -> Embed:
    if peer in BACKENDS:
        return functools.partial(mtllm_fast.embed_tokens, scale=SCALE, offset=OFFSET, backend=peer)
    return torch.compile(huggingface) if peer == "compiled" else huggingface


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        row, ids = torch.ones(3, 8, device=DEVICE), torch.arange(1, device=DEVICE)
        return mtllm_fast.explain(OP, ids, row, ids, row, scale=SCALE, offset=OFFSET).why_not[peer]
    return None


def least_work(problem: Problem, length: int) -> tuple[int, int]:
    """(bytes, FLOPs): a row of the vocabulary read and one written per token, each position's row read once."""
    rows = 2 * problem.ids_T.shape[0] + length
    ids = problem.ids_T.nbytes + problem.positions_T.nbytes
    return rows * WIDTH * problem.weight_Vd.element_size() + ids, 2 * problem.ids_T.shape[0] * WIDTH


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "length"), CASES)
def test_embed_tokens(benchmark: Any, tokens: int, length: int, peer: str) -> None:
    problem = make_problem(tokens, length)
    truth = problem.exact()
    plain = relative_error(huggingface(*problem.tensors()), truth)
    allowed = max(ERROR_MULTIPLE[DTYPE] * plain, ERROR_FLOOR[DTYPE])
    embed = implementation(peer)

    def call() -> tuple[Tensor]:
        with torch.no_grad():
            return (embed(*problem.tensors()),)

    moved_bytes, flops = least_work(problem, length)
    case = f"T={tokens} L={length} d={WIDTH} {'bf16' if ON_GPU else 'fp32'}"
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, (truth,), (allowed,), DTYPE))
