"""Every CUDA kernel of ours once on small, awkward shapes: what ``gpu_suite.py`` runs under compute-sanitizer.

Widths that no vector load divides, empty sentences, a tail of tokens without a sentence, strided rows, each dtype,
forward and backward. Results are compared with the reference, so that a run in which nothing was launched cannot pass.
"""

from __future__ import annotations

import itertools

import torch

from mtllm_fast import distillation_loss, norm_pool, stack_projection
from mtllm_fast.ops.stack_projection import StackWeights

WIDTHS = (1, 41, 256, 2000)
LENGTHS = (3, 0, 70, 1)
TAIL = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def run_norm_pool(width: int, dtype: torch.dtype, pooling: str) -> None:
    tokens = sum(LENGTHS) + TAIL
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    states = torch.randn(tokens, width + 8, dtype=dtype).cuda()[:, :width]
    weight = torch.randn(width, dtype=dtype).cuda()
    grad = torch.randn(len(LENGTHS), width, dtype=dtype).cuda()
    results = []
    for backend in ("cuda", "reference"):
        hidden, gain = states.detach().requires_grad_(), weight.detach().requires_grad_()
        pooled = norm_pool(hidden, gain, cu_seqlens, eps=1e-5, pooling=pooling, backend=backend)
        results.append((pooled.detach(), *torch.autograd.grad(pooled, (hidden, gain), grad)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)


def run_distillation_loss(width: int, dtype: torch.dtype, kind: str) -> None:
    """Overlapping, repeated and empty spans; without a norm at width 1, where every normed value is near one."""
    tokens = sum(LENGTHS)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    states, teacher = (torch.randn(tokens + TAIL, width + 8, dtype=dtype).cuda()[:, :width] for _ in range(2))
    gain = None if width == 1 else torch.randn(width, dtype=dtype).cuda()
    indices = torch.tensor([0, 1, 1, 70, 70, 5, 73], device="cuda")
    offsets = torch.tensor([0, 1, 3, 3, 6, 7], device="cuda")
    results = []
    for backend in ("cuda", "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in (states, gain) if tensor is not None]
        out = distillation_loss(
            leaves[0], None if gain is None else leaves[1], cu_seqlens,
            teacher_states=teacher, teacher_weight=gain, teacher_cu_seqlens=cu_seqlens,
            span_indices=indices, span_offsets=offsets, teacher_span_indices=indices, teacher_span_offsets=offsets,
            kind=kind, backend=backend,
        )  # fmt: skip
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves)))
    for ours, reference in zip(*results, strict=True):
        scale = reference.abs().max().item() + 1e-6
        torch.testing.assert_close(ours / scale, reference / scale, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


# (T, d, D, head_dim): one token, part of a tile, more than the kernel for few tokens takes.
STACKS = ((1, 24, 40, 8), (45, 1064, 72, 24), (70, 64, 136, 32))


def run_stack_projection(tokens: int, d: int, width: int, head_dim: int, dtype: torch.dtype) -> None:
    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / shape[-1] ** 0.5).to("cuda", dtype)

    rows = 2 * head_dim
    weights = StackWeights(
        up=random(width, d), norm=random(width), q=random(rows, width), k=random(rows, width), v=random(rows, width),
        head_dim=head_dim, eps=1e-5, up_bias=random(width), q_bias=random(rows), v_bias=random(rows),
    )  # fmt: skip
    angles = torch.rand(tokens, head_dim // 2, device="cuda").repeat(1, 2)
    e, tables = torch.randn(tokens, d).to("cuda", dtype), (angles.cos().to(dtype), angles.sin().to(dtype))
    results = []
    for backend in ("cuda", "reference"):
        states, up = e.detach().requires_grad_(), weights.up.detach().requires_grad_()
        live = StackWeights(**{**vars(weights), "up": up})
        out = stack_projection(states, live, *tables, form="absorbed", backend=backend)
        grads = torch.autograd.grad(sum(t.float().square().sum() for t in out), (states, up))
        results.append([*(t.detach() for t in out), *grads])
    for ours, reference in zip(*results, strict=True):
        scale = reference.abs().max().item() + 1
        torch.testing.assert_close(ours / scale, reference / scale, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def main() -> None:
    torch.manual_seed(0)
    cases = list(itertools.product(WIDTHS, TOLERANCE, ("mean", "cls", "eos")))
    for width, dtype, pooling in cases:
        run_norm_pool(width, dtype, pooling)
    losses = list(itertools.product((*WIDTHS, 5120), TOLERANCE, ("mse", "smooth_l1", "cosine")))
    for width, dtype, kind in losses:
        run_distillation_loss(width, dtype, kind)
    stacks = list(itertools.product(STACKS, (torch.bfloat16, torch.float16)))
    for sizes, dtype in stacks:
        run_stack_projection(*sizes, dtype)
    torch.cuda.synchronize()
    print(
        f"norm_pool: {len(cases)} cases, distillation_loss: {len(losses)}, stack_projection: {len(stacks)}, "
        "forward and backward"
    )


if __name__ == "__main__":
    main()
