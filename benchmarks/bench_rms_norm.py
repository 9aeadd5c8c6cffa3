"""``rms_norm``: RMSNorm of packed tokens, alone, after a residual addition, and per head; with and without backward."""

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

OP = "rms_norm"
EPS = 1e-5
BACKENDS = ("reference", "cpu", "triton")
PEERS = (*BACKENDS, "huggingface", "F.rms_norm", "compiled", "liger")
# (shape, whether a residual is added): hidden states of an 8B LLM, and the heads of Qwen3
CASES = (
    (((512, 4096), True), ((4096, 4096), True), ((16384, 4096), True), ((16384, 4096), False), ((4096, 32, 128), False))
    if ON_GPU
    else (((2048, 512), True), ((2048, 512), False))
)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DIRECTIONS = ("fwd", "fwd+bwd")

Norm = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """States and residual, the gain, which is frozen as in LoRA training, and a gradient of each output."""

    hidden: Tensor
    weight: Tensor
    residual: Tensor | None
    grads: tuple[Tensor, ...]

    def double(self) -> Problem:
        residual = None if self.residual is None else self.residual.double()
        return Problem(self.hidden.double(), self.weight.double(), residual, tuple(g.double() for g in self.grads))


def make_problem(shape: tuple[int, ...], with_residual: bool) -> Problem:
    generator = torch.Generator(device=DEVICE).manual_seed(shape[0])
    random = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE, generator=generator)
    residual = random(shape) if with_residual else None
    return Problem(
        random(shape), 1 + random(shape[-1]) / 4, residual, tuple(random(shape) for _ in range(1 + with_residual))
    )


def huggingface(hidden: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    """The residual addition of a layer and LlamaRMSNorm: statistics in fp32, rounded before the gain."""
    summed = hidden if residual is None else residual + hidden
    wide = summed if summed.dtype == torch.float64 else summed.float()
    normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(summed.dtype)
    return (normed,) if residual is None else (normed, summed)


def torch_norm(hidden: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    summed = hidden if residual is None else residual + hidden
    normed = F.rms_norm(summed, weight.shape, weight, EPS)
    return (normed,) if residual is None else (normed, summed)


def liger(hidden: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if residual is None:
        return (LigerRMSNormFunction.apply(hidden, weight, EPS, 0.0, "llama", False),)
    return LigerFusedAddRMSNormFunction.apply(hidden, residual, weight, EPS, 0.0, "llama", False)


def implementation(peer: str) -> Norm:
    def ours(hidden: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        result = mtllm_fast.rms_norm(hidden, weight, eps=EPS, residual=residual, backend=peer)
        return result if isinstance(result, tuple) else (result,)

    if peer in BACKENDS:
        return ours
    others = {"huggingface": huggingface, "F.rms_norm": torch_norm, "liger": liger}
    return torch.compile(huggingface) if peer == "compiled" else others[peer]


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        tensors = torch.ones(2, 64, dtype=DTYPE, device=DEVICE), torch.ones(64, dtype=DTYPE, device=DEVICE)
        return mtllm_fast.explain(OP, *tensors, eps=EPS, backend=peer).why_not[peer]
    if peer == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        return None if ON_GPU else "its kernels need a GPU"
    return None


def runner(norm: Norm, problem: Problem, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return norm(problem.hidden, problem.weight, problem.residual)

        return forward

    hidden = problem.hidden.detach().requires_grad_()
    residual = None if problem.residual is None else problem.residual.detach().requires_grad_()
    leaves = [leaf for leaf in (hidden, residual) if leaf is not None]

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = norm(hidden, problem.weight, residual)
        return (*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, problem.grads))

    return forward_and_backward


def least_work(problem: Problem, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs): inputs read and outputs written once; backward reads x and each gradient and writes one."""
    states = problem.hidden.nbytes * len(problem.grads)
    elements = problem.hidden.numel()
    if direction == "fwd":
        return 2 * states + problem.weight.nbytes, 5 * elements
    return 3 * states + 2 * problem.hidden.nbytes + 2 * problem.weight.nbytes, 13 * elements


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("shape", "residual"), CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rms_norm(benchmark: Any, direction: str, shape: tuple[int, ...], residual: bool, peer: str) -> None:
    problem = make_problem(shape, residual)
    truth = runner(huggingface, problem.double(), direction)()
    plain = runner(huggingface, problem, direction)()
    allowed = tuple(
        max(ERROR_MULTIPLE[DTYPE] * relative_error(output, true), ERROR_FLOOR[DTYPE])
        for output, true in zip(plain, truth, strict=True)
    )
    moved_bytes, flops = least_work(problem, direction)
    size = "x".join(map(str, shape)) + (" + residual" if residual else "")
    case = f"{size} {'bf16' if ON_GPU else 'fp32'} {direction}"
    call = runner(implementation(peer), problem, direction)
    measure(benchmark, Call(OP, peer, case, call, moved_bytes, flops, truth, allowed, DTYPE))
