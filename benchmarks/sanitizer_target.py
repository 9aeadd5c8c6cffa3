"""Every CUDA kernel of ours once on small, awkward shapes: what ``gpu_suite.py`` runs under compute-sanitizer.

Widths that no vector load divides, empty sentences, a tail of tokens without a sentence, strided rows, each dtype,
forward and backward. Results are compared with the reference, so that a run in which nothing was launched cannot pass.
"""

from __future__ import annotations

import itertools

import torch

from mtllm_fast import norm_pool

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


def main() -> None:
    torch.manual_seed(0)
    cases = list(itertools.product(WIDTHS, TOLERANCE, ("mean", "cls", "eos")))
    for width, dtype, pooling in cases:
        run_norm_pool(width, dtype, pooling)
    torch.cuda.synchronize()
    print(f"norm_pool: {len(cases)} cases, forward and backward")


if __name__ == "__main__":
    main()
