"""``stack_projection``: up-projection, RMSNorm, QKV and RoPE of the first layer at NLLB-600M and Llama-3-8B widths.

On a GPU every peer is timed, from one token to 65,536, forward alone and with backward. Everywhere, and before anything
is timed, each variant's FLOPs, launches and bytes are counted while its own code runs on tensors without data: FLOPs by
torch's counter, a launch per op that is neither a view nor an allocation, bytes by what such an op reads and writes.
``-k counted`` runs only that.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, Call, measure
from torch import Tensor

import mtllm_fast
from mtllm_fast.bench.counting import Work, counted_work
from mtllm_fast.bench.gate import ERROR_FLOOR, ERROR_MULTIPLE, relative_error
from mtllm_fast.ops.stack_projection import Composite, StackWeights
from mtllm_fast.ops.stack_projection.composite import absorb

OP = "stack_projection"
EPS = 1e-5
HEADS, KV_HEADS, HEAD_DIM, STATE_WIDTH, WIDTH = 32, 8, 128, 1024, 4096
COLUMNS = (HEADS + 2 * KV_HEADS) * HEAD_DIM
BACKENDS = ("reference", "triton", "cuda")
PEERS = (*BACKENDS, "unabsorbed", "huggingface", "compiled", "liger")
TOKENS = (1, 32, 64, 512, 4096, 16384, 65536) if ON_GPU else (2048,)
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)
DIRECTIONS = ("fwd", "fwd+bwd") if ON_GPU else ("fwd",)

Project = Callable[[Tensor, StackWeights], tuple[Tensor, ...]]


def random_inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, StackWeights, Tensor, Tensor]:
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(dtype)

    rows, kv_rows = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    weights = StackWeights(
        up=random(WIDTH, STATE_WIDTH, scale=STATE_WIDTH**-0.5), norm=1 + random(WIDTH, scale=0.25),
        q=random(rows, WIDTH, scale=WIDTH**-0.5), k=random(kv_rows, WIDTH, scale=WIDTH**-0.5),
        v=random(kv_rows, WIDTH, scale=WIDTH**-0.5), head_dim=HEAD_DIM, eps=EPS,
    )  # fmt: skip
    angles = torch.rand(tokens, HEAD_DIM // 2, device=DEVICE, generator=generator).repeat(1, 2) * 512
    states = random(tokens, STATE_WIDTH) + random(STATE_WIDTH)
    return states, weights, angles.cos().to(dtype), angles.sin().to(dtype)


def huggingface(e: Tensor, w: StackWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The modules' own arithmetic: a Linear, LlamaRMSNorm, three Linears, rotate-half RoPE."""
    x = torch.nn.functional.linear(e, w.up)
    wide = x if x.dtype == torch.float64 else x.float()
    normed = w.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    q, k, v = (torch.nn.functional.linear(normed, rows).unflatten(-1, (-1, HEAD_DIM)) for rows in (w.q, w.k, w.v))
    cos, sin = cos[:, None], sin[:, None]

    def rotate(t: Tensor) -> Tensor:
        first, second = t.chunk(2, dim=-1)
        return t * cos + torch.cat((-second, first), dim=-1) * sin

    return x, rotate(q), rotate(k), v


def liger(e: Tensor, w: StackWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The same with Liger's RMSNorm and RoPE, as its patched Llama runs them."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    x = torch.nn.functional.linear(e, w.up)
    normed = LigerRMSNormFunction.apply(x, w.norm, EPS, 0.0, "llama", False)
    q, k, v = (torch.nn.functional.linear(normed, rows).unflatten(-1, (-1, HEAD_DIM)) for rows in (w.q, w.k, w.v))
    q, k = LigerRopeFunction.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    return x, q[0].transpose(0, 1), k[0].transpose(0, 1), v


def implementation(peer: str, inputs: tuple[Tensor, StackWeights, Tensor, Tensor], direction: str) -> Project:
    """``(states, weights) -> outputs``. Ours have their composite from before, as after ``fuse()``; in training not."""
    states, weights, cos, sin = inputs
    if peer in BACKENDS:
        composite = None
        if direction == "fwd":
            composite = absorb(weights).rounded(states.dtype, states.float().mean(0))
        return lambda e, w: mtllm_fast.stack_projection(
            e, w, cos, sin, composite=composite, form="absorbed", backend=peer
        )
    if peer == "unabsorbed":
        return lambda e, w: mtllm_fast.stack_projection(e, w, cos, sin, form="unabsorbed")
    plain = liger if peer == "liger" else huggingface
    mode = "max-autotune-no-cudagraphs" if ON_GPU else "default"
    project = torch.compile(plain, mode=mode) if peer == "compiled" else plain
    return lambda e, w: project(e, w, cos, sin)


def why_not(peer: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in BACKENDS:
        inputs = random_inputs(2, torch.float32 if peer == "reference" else torch.bfloat16)
        return mtllm_fast.explain(OP, *inputs, form="absorbed", backend=peer).why_not[peer]
    if peer == "liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        return None if ON_GPU else "its kernels need a GPU"
    return None


def runner(project: Project, inputs: tuple[Tensor, StackWeights, Tensor, Tensor], direction: str):
    states, weights = inputs[:2]
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(project(states, weights))

        return forward
    # As in stage 1: the up-projection is trained, the states and the LLM's weights are frozen.
    live = replace(weights, up=weights.up.detach().requires_grad_())
    grads = [torch.ones_like(out) / 64 for out in huggingface(*inputs)]

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = project(states, live)
        return (*(t.detach() for t in out), *torch.autograd.grad(out, live.up, grads))

    return forward_and_backward


def least_work(tokens: int, itemsize: int, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs) of the absorbed form: states and weights read once, x and qkv written; the floor of LIMITS 1a."""
    products = STATE_WIDTH * (WIDTH + COLUMNS)
    moved = itemsize * (tokens * (STATE_WIDTH + WIDTH + COLUMNS) + products)
    if direction == "fwd":
        return moved, 2 * tokens * products
    composite = 2 * 2 * COLUMNS * WIDTH * STATE_WIDTH  # built, and its gradient brought back to the up-projection
    return 3 * moved, 4 * tokens * products + composite


# Tuning the compiled peer takes most of a minute per shape.
CASES = [(tokens, peer) for tokens in TOKENS for peer in PEERS if peer != "compiled" or tokens in (32, 2048, 16384)]


@pytest.mark.parametrize(("tokens", "peer"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_stack_projection(benchmark: Any, direction: str, dtype: torch.dtype, tokens: int, peer: str) -> None:
    inputs = random_inputs(tokens, dtype)
    double = (inputs[0].double(), inputs[1].double(), inputs[2].double(), inputs[3].double())
    truth = runner(lambda e, w: huggingface(e, w, *double[2:]), double, direction)()
    plain = runner(lambda e, w: huggingface(e, w, *inputs[2:]), inputs, direction)()
    allowed = tuple(
        max(ERROR_MULTIPLE[dtype] * relative_error(output, true), ERROR_FLOOR[dtype])
        for output, true in zip(plain, truth, strict=True)
    )
    call = runner(implementation(peer, inputs, direction), inputs, direction)
    case = f"T={tokens} {str(dtype).removeprefix('torch.')} {direction}"
    moved, flops = least_work(tokens, dtype.itemsize, direction)
    measure(benchmark, Call(OP, peer, case, call, moved, flops, truth, allowed, dtype))


VARIANTS: dict[str, Callable[..., Any]] = {
    "huggingface": huggingface,
    "unabsorbed": lambda *inputs: mtllm_fast.stack_projection(*inputs, form="unabsorbed"),
    "absorbed": lambda *inputs: mtllm_fast.stack_projection(*inputs, composite=meta_composite(), form="absorbed"),
}


@functools.cache
def meta_composite() -> Composite:
    return Composite(
        torch.empty(COLUMNS, STATE_WIDTH, dtype=torch.bfloat16, device="meta"),
        torch.empty(COLUMNS, dtype=torch.float32, device="meta"),
    )


def count(variant: str, tokens: int) -> Work:
    """FLOPs, launches and bytes of one forward call of a variant, counted on meta tensors in bfloat16."""
    states, weights, *_ = random_inputs(1, torch.bfloat16)
    weights = weights.map(lambda t: t.to("meta"))
    e = states.to("meta").expand(tokens, -1).contiguous()
    tables = (torch.empty(tokens, HEAD_DIM, dtype=torch.bfloat16, device="meta") for _ in range(2))
    return counted_work(lambda: VARIANTS[variant](e, weights, *tables))


@pytest.mark.parametrize("tokens", [32, 4096])
def test_counted_work(benchmark: Any, tokens: int) -> None:
    """Prints what each variant does, counted; the absorbed one must do a good deal less."""
    rows = {name: count(name, tokens) for name in VARIANTS}
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update({name: row._asdict() for name, row in rows.items()})
    for name, row in rows.items():
        print(f"\n{OP} T={tokens} bf16 {name}: {row}", end="")
    print()
    assert rows["huggingface"].flops >= 2.7 * rows["absorbed"].flops
    assert rows["absorbed"].launches <= 3
