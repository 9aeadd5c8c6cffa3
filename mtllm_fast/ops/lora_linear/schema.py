"""What torch sees of ``lora_linear``: registered ops with fakes, a gradient and FLOP counts, and the launchers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import savable, watched
from mtllm_fast.core.registered import differentiable_once, register, touched_bytes
from mtllm_fast.core.tensors import adjacent_columns
from mtllm_fast.ops.lora_linear.columns import merged
from mtllm_fast.ops.lora_linear.group import SOURCES, Group

MAX_ADAPTERS, MAX_RANK = 3, 64  # of the kernels, which hold the low-rank states of a block of tokens in registers


def why_not_kernels(x: Tensor, a: Sequence[Tensor]) -> str | None:
    if torch.float64 in (x.dtype, a[0].dtype):
        return "its kernels compute in float32 and something is float64"
    if len(a) > MAX_ADAPTERS or max(t.shape[0] for t in a) > MAX_RANK:
        return f"its kernels take up to {MAX_ADAPTERS} adapters of rank {MAX_RANK}"
    return None


BACKENDS = Backends(
    "lora_linear",
    {"triton": lambda x, a: why_not_triton(x) or why_not_kernels(x, a), "reference": lambda x, a: None},
)


def _group(a: Any, b: Any, scales: Any, at: Any, dropout: float, seed: Tensor | None) -> Group:
    return Group([t.contiguous() for t in a], [t.contiguous() for t in b], scales, at, dropout, seed)


def launch_forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], at: Sequence[int], dropout: float, seed: Tensor | None, source: Sequence[Tensor],
    kind: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [T, Σ N], low [T, Σ r])"""
    with torch.autocast(x.device.type, enabled=False):
        module = BACKENDS.load(backend, x, a)
        return module.forward(adjacent_columns(x), weights, bias, _group(a, b, scales, at, dropout, seed))


def launch_backward(
    grad_y: Tensor, source: Sequence[Tensor], low: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor],
    b: Sequence[Tensor], scales: Sequence[float], at: Sequence[int], dropout: float, seed: Tensor | None, kind: str,
    needs_x: bool, needs_adapters: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx [T, K], the gradients of all a and b, flat); empty where not needed."""
    tensors = [adjacent_columns(t) for t in source]
    x = SOURCES[kind](*tensors) if kind in SOURCES else tensors[0]
    with torch.autocast(grad_y.device.type, enabled=False):
        module = BACKENDS.load(backend, grad_y, a)
        group = _group(a, b, scales, at, dropout, seed)
        grad_x, flat = module.backward(adjacent_columns(grad_y), x, low, weights, group, needs_x, needs_adapters)
    return grad_y.new_empty(0) if grad_x is None else grad_x, low.new_empty(0) if flat is None else flat


def _fake_forward(x: Tensor, weights: Any, bias: Any, a: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))
    return y, x.new_empty(x.shape[0], sum(t.shape[0] for t in a), dtype=a[0].dtype)


def _fake_backward(grad_y: Tensor, source: Any, low: Tensor, weights: Any, a: Any, b: Any, *rest: Any) -> Any:
    needs_x, needs_adapters, _ = rest[-3:]
    return (
        grad_y.new_empty((grad_y.shape[0], a[0].shape[1]) if needs_x else 0),
        low.new_empty(sum(t.numel() for t in (*a, *b)) if needs_adapters else 0),
    )


def _forward_launches(weights: Sequence[Tensor], b: Sequence[Tensor]) -> int:
    filled = sum(t.shape[0] for t in b) < sum(w.shape[0] for w in weights)  # columns without an adapter
    return 1 + len(weights) + filled


def _forward_bytes(arguments: Sequence[Any], result: Any) -> int:
    """One kernel reads x and writes y's low-rank part; a product per weight reads both and writes y."""
    x, weights, bias, a, b = arguments[:5]
    y, low = result
    return touched_bytes(x, bias, a, b, low, y) + touched_bytes([x] * len(weights), weights, y, y)


def _backward_bytes(arguments: Sequence[Any], result: Any) -> int:
    """One kernel reads dy and writes d and dx's low-rank part, a product per weight adds dy W to that, one kernel reads
    dy and what gives x for the adapters' gradients. (Its partial sums, a part of dy that falls with T, are left out.)
    """
    grad_y, source, low, weights, a, b = arguments[:6]
    grad_x, flat = result
    products = touched_bytes(grad_y, weights) + 2 * touched_bytes([grad_x] * len(weights))
    adapters = touched_bytes(grad_y, source, low, low, flat) if flat.numel() else 0
    return touched_bytes(grad_y, low, a, b, grad_x) + (products if grad_x.numel() else 0) + adapters


forward_op = register(
    "lora_linear",
    "(Tensor x, Tensor[] weights, Tensor? bias, Tensor[] a, Tensor[] b, float[] scales, int[] at, float dropout,"
    " Tensor? seed, Tensor[] source, str kind, str backend) -> (Tensor, Tensor)",
    launch_forward,
    _fake_forward,
    launches=lambda arguments, result: _forward_launches(arguments[1], arguments[4]),
    moved_bytes=_forward_bytes,
)
backward_op = register(
    "lora_linear_backward",
    "(Tensor grad_y, Tensor[] source, Tensor low, Tensor[] weights, Tensor[] a, Tensor[] b, float[] scales, int[] at,"
    " float dropout, Tensor? seed, str kind, bool needs_x, bool needs_adapters, str backend) -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
    launches=lambda arguments, result: 1 + len(arguments[3]) * arguments[11] + 2 * arguments[12],
    moved_bytes=_backward_bytes,
)


def _low_rank_flops(tokens: int, a: Any, b: Any) -> int:
    """Of one product with each a and one with each b."""
    return sum(2 * tokens * shape[0] * shape[1] for shape in (*a, *b))


@register_flop_formula(torch.ops.mtllm_fast.lora_linear)
def _flops(x: Any, weights: Any, bias: Any, a: Any, b: Any, *rest: Any, **keywords: Any) -> int:
    return sum(2 * x[0] * w[0] * w[1] for w in weights) + _low_rank_flops(x[0], a, b)


@register_flop_formula(torch.ops.mtllm_fast.lora_linear_backward)
def _backward_flops(grad_y: Any, source: Any, low: Any, weights: Any, a: Any, b: Any, *rest: Any, **keywords: Any):  # type: ignore[no-untyped-def]
    needs_x, needs_adapters, _ = rest[-3:]
    base = sum(2 * grad_y[0] * w[0] * w[1] for w in weights) if needs_x else 0
    return base + (needs_x + needs_adapters) * _low_rank_flops(grad_y[0], a, b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, _, a, b, ctx.scales, ctx.at, ctx.dropout, seed, source, ctx.kind, ctx.backend = inputs
    source = [*source] or [x]
    kept = [*source, output[1], *weights, *a, *b]
    ctx.counts = [len(source), 1, len(weights), len(a), len(b)]
    ctx.save_for_backward(*map(savable, kept), *([] if seed is None else [seed]))


def _gradients(ctx: Any, grad_y: Tensor, needs_x: bool, needs_adapters: bool) -> tuple[Any, list[Any], list[Any]]:
    """(dx, of each a, of each b)"""
    saved = [*ctx.saved_tensors]
    parts = []
    for count in ctx.counts:
        parts.append(saved[:count])
        del saved[:count]
    source, (low,), weights, a, b = parts
    seed = saved[0] if saved else None
    launch = backward_op if watched(grad_y, low, *source, *a) else launch_backward
    grad_x, flat = launch(
        grad_y, source, low, weights, a, b, ctx.scales, ctx.at, ctx.dropout, seed, ctx.kind, needs_x, needs_adapters,
        ctx.backend,
    )  # fmt: skip
    of_x = grad_x if needs_x else None
    if not needs_adapters:
        return of_x, [None] * len(a), [None] * len(b)
    return of_x, *Group(a, b, ctx.scales, ctx.at, ctx.dropout, seed).views(flat)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.given = [
        [None] * len(value) if isinstance(value, (list, tuple)) and _tensors(value) else None for value in inputs
    ]
    _save(ctx, inputs, output)


def _tensors(value: Sequence[Any]) -> bool:
    return all(isinstance(t, Tensor) for t in value)


def _backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Any, ...]:
    grads = [*ctx.given]
    if grad_y is not None:
        needs = ctx.needs_input_grad
        grads[0], grads[3], grads[4] = _gradients(ctx, grad_y, needs[0], any((*needs[3], *needs[4])))
    return tuple(grads)


torch.library.register_autograd("mtllm_fast::lora_linear", _backward, setup_context=_setup_context)
differentiable_once("mtllm_fast::lora_linear_backward")


class EagerLoraLinear(torch.autograd.Function):
    """The gradient for plain eager calls; returns each projection's columns of y, and takes their gradients together.

    The op's lists of tensors are given a second time, one by one, so that autograd sees them.
    """

    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], sizes: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        output = launch_forward(*arguments)
        _save(ctx, arguments, output)
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes
        return output[0].split(sizes, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs_x, *needs_adapters = ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(needs_adapters))
        grad_x, grads_a, grads_b = _gradients(ctx, merged(grads, ctx.sizes), needs_x, any(needs_adapters))
        return None, None, grad_x, *grads_a, *grads_b
