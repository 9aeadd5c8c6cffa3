"""Random projections with LoRA, what PEFT makes of them, and what the op does."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast.ops.lora_linear import Adapter, lora_linear
from mtllm_fast.ops.lora_linear.masks import keep_masks, kept_scale

SEED = torch.tensor([2**60 + 12345])
SIZES, RANKS = (150, 70, 40), (16, 4, 20)


class Case:
    """Random x, weights and adapters of SIZES and RANKS; ``missing`` projections have no adapter."""

    def __init__(
        self, device, dtype=torch.float32, adapters=None, tokens=75, width=100, missing=(), bias=False, row_stride=None
    ):
        generator = torch.Generator().manual_seed(0)

        def random(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.x = random(tokens, row_stride or width)[:, :width].requires_grad_()
        self.weights = [random(n, width) / math.sqrt(width) for n in SIZES]
        self.bias = random(sum(SIZES)) if bias else None
        self.adapters = [
            None
            if g in missing
            else Adapter(
                (random(r, width, dtype=adapters or dtype) / math.sqrt(width)).requires_grad_(),
                random(n, r, dtype=adapters or dtype).requires_grad_(),
                scale=0.5 * (g + 1),
            )
            for g, (n, r) in enumerate(zip(SIZES, RANKS, strict=True))
        ]
        self.grads = [random(tokens, n) for n in SIZES]

    @property
    def merged(self) -> Tensor:
        return torch.cat(self.weights)

    def double(self) -> Case:
        other = object.__new__(Case)
        other.x = self.x.detach().double().requires_grad_()
        other.weights = [w.double() for w in self.weights]
        other.bias = None if self.bias is None else self.bias.double()
        other.adapters = [
            a and Adapter(*(t.detach().double().requires_grad_() for t in a[:2]), a.scale) for a in self.adapters
        ]
        other.grads = [g.double() for g in self.grads]
        return other

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        for g, adapter in enumerate(self.adapters):
            if adapter is not None:
                named |= {f"a{g}": adapter.a, f"b{g}": adapter.b}
        return named

    def run(self, outputs) -> dict[str, Tensor]:
        """The outputs, and the gradients of x and of every adapter."""
        grads = torch.autograd.grad(outputs, [*self.leaves().values()], self.grads)
        named = {f"y{g}": y.detach() for g, y in enumerate(outputs)}
        return named | dict(zip((f"grad of {name}" for name in self.leaves()), grads, strict=True))

    def peft(self, dropout=0.0, seed=SEED) -> dict[str, Tensor]:
        """What PEFT's modules compute, module by module, with the op's masks."""
        outputs, g = [], 0
        biases = [None] * 3 if self.bias is None else self.bias.split(SIZES)
        for weight, bias, adapter in zip(self.weights, biases, self.adapters, strict=True):
            y = F.linear(self.x, weight, bias)
            if adapter is not None:
                x = self.x.to(adapter.a.dtype)
                if dropout:
                    x = (
                        x
                        * keep_masks(seed, g + 1, slice(0, x.shape[0]), x.shape[1], dropout, x.device)[g]
                        * kept_scale(dropout)
                    )
                y = (y + F.linear(F.linear(x, adapter.a), adapter.b) * adapter.scale).to(y.dtype)
                g += 1
            outputs.append(y)
        return self.run(outputs)

    def fast(self, dropout=0.0, seed=SEED, weight=None, **options) -> dict[str, Tensor]:
        weight = self.merged if weight is None else weight
        sizes = SIZES if isinstance(weight, Tensor) else None
        options = {"bias": self.bias, "dropout": dropout, "seed": seed, "sizes": sizes, **options}
        return self.run(lora_linear(self.x, weight, self.adapters, **options))


def saved_tensors(function) -> list[Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept
