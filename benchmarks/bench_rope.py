"""``rope_qkv``: rotation of q and k in the output of a merged projection, with and without backward."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, Call, measure
from torch import Tensor

import mtllm_fast
from mtllm_fast.bench.gate import ERROR_FLOOR, ERROR_MULTIPLE, relative_error

OP = "rope"
BACKENDS = ("reference", "cpu", "triton")
PEERS = (*BACKENDS, "huggingface", "compiled", "liger")
HEAD_DIM = 128 if ON_GPU else 64
# (tokens T, heads of q, heads of k and of v): an 8B Llama, a 7B Qwen2
CASES = ((512, 32, 8), (4096, 32, 8), (16384, 32, 8), (16384, 28, 4)) if ON_GPU else ((1024, 8, 2),)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DIRECTIONS = ("fwd", "fwd+bwd")

Rotation = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """A random merged projection [T, (H + 2 KV) hd], the tables, and gradients of q, k and v."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    grads: tuple[Tensor, ...]

    @property
    def heads(self) -> tuple[int, int]:
        return self.grads[0].shape[1], self.grads[1].shape[1]

    def double(self) -> Problem:
        grads = tuple(grad.double() for grad in self.grads)
        return Problem(self.qkv.double(), self.cos.double(), self.sin.double(), grads)


def make_problem(tokens: int, num_heads: int, num_kv_heads: int) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    frequencies = 10000 ** -(torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM)
    angles = (torch.arange(tokens, device=DEVICE)[:, None] % 512 * frequencies).repeat(1, 2)
    grads = tuple(random(tokens, heads, HEAD_DIM) for heads in (num_heads, num_kv_heads, num_kv_heads))
    qkv = random(tokens, (num_heads + 2 * num_kv_heads) * HEAD_DIM)
    return Problem(qkv, angles.cos().to(DTYPE), angles.sin().to(DTYPE), grads)


def split(qkv: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    H, KV = problem.heads
    return qkv.unflatten(1, (-1, HEAD_DIM)).split((H, KV, KV), dim=1)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def huggingface(qkv: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    """apply_rotary_pos_emb of Llama."""
    q, k, v = split(qkv, problem)
    cos, sin = problem.cos[:, None], problem.sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v


def liger(qkv: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    """Its kernel rotates in place ``[B, H, T, hd]``, so that q and k are copied first."""
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k, v = split(qkv, problem)
    q, k = (x.clone()[None].transpose(1, 2) for x in (q, k))
    q, k = LigerRopeFunction.apply(q, k, problem.cos[None], problem.sin[None])
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0], v


def implementation(peer: str, problem: Problem) -> Rotation:
    H, KV = problem.heads
    if peer in BACKENDS:
        return lambda qkv: mtllm_fast.rope_qkv(
            qkv, problem.cos, problem.sin, num_heads=H, num_kv_heads=KV, backend=peer
        )
    function = liger if peer == "liger" else huggingface
    rotation = functools.partial(function, problem=problem)
    return torch.compile(rotation) if peer == "compiled" else rotation


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        heads = torch.ones(2, 1, 64, dtype=DTYPE, device=DEVICE)
        return mtllm_fast.explain(OP, heads, heads, heads[:, 0], heads[:, 0], backend=peer).why_not[peer]
    if peer == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        return None if ON_GPU else "its kernels need a GPU"
    return None


def runner(rotation: Rotation, problem: Problem, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return rotation(problem.qkv)[:2]

        return forward

    qkv = problem.qkv.detach().requires_grad_()

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = rotation(qkv)
        return (*(output.detach() for output in outputs), *torch.autograd.grad(outputs, qkv, problem.grads))

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): q, k and half of the tables read, q and k written; backward moves v's gradient as well."""
    rotated = problem.grads[0].nbytes + problem.grads[1].nbytes
    forward = 2 * rotated + problem.cos.nbytes
    flops = 3 * (problem.grads[0].numel() + problem.grads[1].numel())
    return (forward, flops) if direction == "fwd" else (2 * forward + 2 * problem.grads[2].nbytes, 2 * flops)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("tokens", "num_heads", "num_kv_heads"), CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rope(benchmark: Any, direction: str, tokens: int, num_heads: int, num_kv_heads: int, peer: str) -> None:
    problem = make_problem(tokens, num_heads, num_kv_heads)
    wide = problem.double()
    truth = runner(functools.partial(huggingface, problem=wide), wide, direction)()
    plain = runner(functools.partial(huggingface, problem=problem), problem, direction)()
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    moved_bytes, flops = least_work(problem, direction)
    case = f"T={tokens} H={num_heads} KV={num_kv_heads} hd={HEAD_DIM} {'bf16' if ON_GPU else 'fp32'} {direction}"
    call = runner(implementation(peer, problem), problem, direction)
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, truth, allowed, DTYPE))
