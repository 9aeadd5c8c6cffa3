"""The absorbed weights: C = W_qkv diag(γ) W_up and c = W_qkv diag(γ) b, in the order and precision that kernels read.

    x = e W_upᵀ + b        rstd = rsqrt(mean(x²) + eps)        qkv = rstd · (e Cᵀ + c) + b_qkv

**Order.** Rotary embedding turns column i of a head together with column i + hd/2. The rows of C are *interleaved*
within each head (0, hd/2, 1, hd/2 + 1, …), so that the two columns of a pair are neighbours: a kernel then holds both
in one thread, whatever its tiles and the head size are.

**Precision.** Rounding C to bf16 errs by ΔC = C - Ĉ. Per token this is less than what the reference loses by rounding
x, but ΔC e has a part ΔC m, with m the mean of e, that is the same for every token: attention averages the rest away
and not this. So m's part is put back, exactly and for free, into the float32 bias:

    e Ĉᵀ + (c + ΔC m) = e Cᵀ + c + (e - m) (Ĉ - C)ᵀ

A second half-precision matrix, the *residual* of ΔC, removes the rest at 1.6 times the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtllm_fast.core.tensors import wide_dtype

FEW_TOKENS = 64  # up to here the CUDA kernel reads each weight once per 32 tokens; beyond, products are bound by FLOPs


@dataclass(frozen=True)
class StackWeights:
    """The parameters of the stage, as the modules hold them; any dtype, one device.

    Attributes:
        up: ``[D, d]``, the up-projection; ``up_bias`` ``[D]`` or None.
        norm: ``[D]``, the gain γ of the first layer's RMSNorm, whose epsilon is ``eps``.
        q, k, v: ``[H * hd, D]``, ``[KV * hd, D]``, ``[KV * hd, D]``; ``q_bias``, ``k_bias``, ``v_bias`` or None.
        q_norm, k_norm: ``[hd]``, gains of an RMSNorm on each head of q and k (Qwen3), or None; same epsilon.
        head_dim: hd, even.
    """

    up: Tensor
    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    head_dim: int
    eps: float
    up_bias: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """All that are there."""
        # By name: torch.compile of PyTorch 2.11 cannot go through the attributes.
        found = (
            self.up, self.norm, self.q, self.k, self.v,
            self.up_bias, self.q_bias, self.k_bias, self.v_bias, self.q_norm, self.k_norm,
        )  # fmt: skip
        return tuple(tensor for tensor in found if tensor is not None)

    def double(self) -> StackWeights:
        return self.map(Tensor.double)

    def map(self, function: Callable[[Tensor], Tensor]) -> StackWeights:
        """The same with each tensor replaced."""
        values: dict[str, Any] = {name: function(v) if isinstance(v, Tensor) else v for name, v in vars(self).items()}
        return StackWeights(**values)


@dataclass(frozen=True)
class Composite:
    """Absorbed weights, rows interleaved. Made by ``absorb``; ``rounded`` for a kernel.

    Attributes:
        weight: ``[N, d]`` with N = (H + 2 KV) hd.
        bias: ``[N]``, at least float32, added before the scaling by rstd.
        residual: ``[N, d]``, what rounding took from the weight, or None.
        qkv_bias: ``[N]``, at least float32, added after the scaling, or None.
    """

    weight: Tensor
    bias: Tensor
    residual: Tensor | None = None
    qkv_bias: Tensor | None = None

    def rounded(self, dtype: torch.dtype, mean_state: Tensor, *, residual: bool = False) -> Composite:
        """The weight in ``dtype``, with the bias corrected for ``mean_state`` [d], the mean of the encoder's states."""
        weight = self.weight.to(dtype)
        lost = self.weight - weight.to(self.weight.dtype)
        low = lost.to(dtype) if residual else None
        if low is not None:
            lost = lost - low.to(lost.dtype)
        return replace(self, weight=weight, residual=low, bias=self.bias + lost @ mean_state.to(lost.dtype))


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """``[heads * hd, …]``: the two halves of each head, row by row in turn."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def deinterleave(columns: Tensor, head_dim: int) -> Tensor:
    """The inverse, on columns: ``[T, heads * hd]`` back to the order of the heads."""
    return columns.unflatten(1, (-1, head_dim // 2, 2)).transpose(2, 3).flatten(1)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, accumulated and returned at least in float32; half-precision operands on a GPU by its tensor cores."""
    if a.is_cuda and a.dtype.itemsize == 2 and not torch.compiler.is_compiling():
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = wide_dtype(a.dtype)
    return a.to(wide) @ b.to(wide)


class SplitProduct(torch.autograd.Function):
    """A float32 product as three of bfloat16: ``a b = a₁ b₁ + a₂ b₁ + a₁ b₂`` with x₁ = bf16(x), x₂ = bf16(x - x₁).

    What is dropped is of the order 2⁻¹⁷. The gradients are plain bfloat16 products, as those of the modules are.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
        ctx.save_for_backward(a_high, b_high)
        return wide_mm(a_high, b_high) + (wide_mm(a_low, b_high) + wide_mm(a_high, b_low))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a_high, b_high = ctx.saved_tensors
        grad = grad.to(torch.bfloat16)
        grad_a = wide_mm(grad, b_high.t()) if ctx.needs_input_grad[0] else None
        return grad_a, wide_mm(a_high.t(), grad) if ctx.needs_input_grad[1] else None


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.to(torch.bfloat16)
    return high, (x - high).to(torch.bfloat16)


def absorb(weights: StackWeights) -> Composite:
    """The composite of live weights, at least in float32. Differentiable in every weight."""
    w = weights
    wide = wide_dtype(*(t.dtype for t in w.tensors()))
    with torch.autocast(w.up.device.type, enabled=False):
        up, gain = w.up.to(wide), w.norm.to(wide)
        scaled = [interleave(part.to(wide), w.head_dim) * gain for part in (w.q, w.k, w.v)]
        # In float32 a GPU would take many times as long as all that absorbing saves.
        product = SplitProduct.apply if splits(w.q) else torch.matmul
        weight = torch.cat([product(part, up) for part in scaled])
        if w.up_bias is None:
            bias = weight.new_zeros(weight.shape[0])
        else:
            up_bias = w.up_bias.to(wide)
            bias = torch.cat([part @ up_bias for part in scaled])
    return Composite(weight, bias, qkv_bias=_joined_bias(w, wide))


def _joined_bias(w: StackWeights, dtype: torch.dtype) -> Tensor | None:
    biases = (w.q_bias, w.k_bias, w.v_bias)
    if all(bias is None for bias in biases):
        return None
    parts = [
        part.new_zeros(part.shape[0], dtype=dtype) if bias is None else bias.to(dtype)
        for part, bias in zip((w.q, w.k, w.v), biases, strict=True)
    ]
    return torch.cat([interleave(part, w.head_dim) for part in parts])


def break_even_tokens(d: int, D: int, cost: float = 1.0) -> float:
    """Tokens per step from which building the composite pays: its 2 N D d FLOPs against 2 N (D - d) saved per token.

    The same number holds for the backward. ``cost``: of the building, relative to a product at the tokens' speed
    (``building_cost``). Infinite where the projection does not widen.

    >>> round(break_even_tokens(1024, 4096))
    1365
    """
    return cost * D * d / (D - d) if d < D else float("inf")


def building_cost(weight: Tensor) -> float:
    """What building a composite and differentiating it cost, relative to one product per direction.

    On a CPU about 2, measured: casts, the scaling by γ and the copies around the product. On a GPU in bfloat16 three
    products forward and one backward, and the same around them: 3. In float16 the product is float32's, which an H200
    multiplies at a thirteenth of the speed: 26. (From FLOPs; not yet measured.)
    """
    if splits(weight):
        return 3.0
    return 26.0 if weight.is_cuda and weight.dtype == torch.float16 else 2.0


def splits(weight: Tensor) -> bool:
    """Whether a composite of such weights is built of several bfloat16 products. Float16 has three bits more, which
    bfloat16 gradients would lose."""
    return weight.is_cuda and weight.dtype == torch.bfloat16
