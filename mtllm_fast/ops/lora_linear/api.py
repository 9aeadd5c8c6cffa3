"""``lora_linear`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.lora_linear import schema
from mtllm_fast.ops.lora_linear.group import SOURCES, Adapter, Gated, RmsNormed
from mtllm_fast.ops.lora_linear.masks import draw_seed, threshold_of

_OP = "lora_linear"


def lora_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    adapters: Sequence[Adapter | None],
    *,
    sizes: Sequence[int] | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    source: RmsNormed | Gated | None = None,
    split: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Frozen projections of one x with low-rank branches: ``y_g = x W_gᵀ + bias_g + s_g D_g(x) A_gᵀ B_gᵀ``.

    LoRA (Hu et al., 2021, arXiv 2106.09685) as PEFT computes it, for q, k and v, or gate and up, in one go. ``D_g`` is
    dropout with a mask of its own for each adapter, computed from a seed wherever it is needed and never stored; with
    ``dropout=0`` it is the identity. Low-rank products accumulate in float32 and are added to y in the base product.
    Kept for the backward: the low-rank states ``[T, Σ r]`` and x, or what ``source`` computes it from. Deterministic.
    Autocast changes nothing. Differentiable once, in x and the adapters; the weights and the bias are constants.

    Not PEFT's modules: three products, a dropout and two element-wise passes for each projection, each pass over y.
    Not Unsloth's functions, which want dropout 0 and one adapter for each projection.

    Args:
        x: ``[T, K]``, fp32, bf16, fp16 or fp64; rows may be strided.
        weight: ``[Σ N_g, K]``, all projections' weights below one another (one product), or a sequence of ``[N_g, K]``;
            in the dtype of x.
        adapters: for each projection its ``Adapter(a, b, scale)`` with ``a [r, K]`` and ``b [N_g, r]``, or None; at
            least one. All in the dtype of x, or all in another one (fp32 beside bf16): then the low-rank branch is
            computed in that one, and its sum is rounded to x's.
        sizes: the ``N_g`` of one merged weight; by default those of the adapters, if no projection lacks one.
        bias: ``[Σ N_g]``.
        dropout: 0 <= p < 1, rounded to a multiple of 2⁻¹⁶.
        seed: int64 ``[1]`` on the CPU: the same seed, the same masks. By default drawn from torch's default generator,
            so that ``torch.manual_seed`` and checkpointing rule it. (A CUDA graph repeats the masks of its capture.)
        source: what x was computed from, ``RmsNormed(states, rstd, weight)`` or ``Gated(gate, up)``: kept instead of x,
            which is computed again in the backward. Only saves memory; gradients reach these through x.
        split: False: return the one matrix ``[T, Σ N_g]``, whose gradient then need not be put together.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; ``mtllm_fast.explain`` tells what auto takes.

    Returns:
        For each projection ``[T, N_g]`` in the dtype of x: columns of one matrix, so rows are strided, and under
        autograd they cannot be changed in place. Without ``split`` a tuple of that matrix alone.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong; a weight or bias wants a gradient.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> adapter = Adapter(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]), scale=2.0)
    >>> lora_linear(x, weight, [adapter])
    (tensor([[7., 2.]]),)
    """
    arguments, sizes = _arguments(x, weight, adapters, sizes, bias, dropout, seed, source, backend)
    sizes = sizes if split else [sum(sizes)]
    a, b = arguments[3:5]
    is_watched = watched(x, *a, *b, *arguments[1])
    if not is_watched and needs_grad(x, *a, *b):
        return schema.EagerLoraLinear.apply(arguments, sizes, x, *a, *b)
    y = (schema.forward_op if is_watched else schema.launch_forward)(*arguments)[0]
    return (y,) if len(sizes) == 1 else y.split(sizes, dim=1)  # a split of one would still copy its gradient


def explain(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    adapters: Sequence[Adapter | None],
    *,
    sizes: Sequence[int] | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    source: RmsNormed | Gated | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend serves this call of ``lora_linear``, and why the others do not."""
    arguments, _ = _arguments(x, weight, adapters, sizes, bias, dropout, seed, source, backend)
    return schema.BACKENDS.explain(backend, x, arguments[3])


def _arguments(
    x: Tensor, weight: Any, adapters: Any, sizes: Any, bias: Any, dropout: float, seed: Any, source: Any, backend: str
) -> tuple[tuple[Any, ...], list[int]]:
    """(the op's arguments, the projections' widths), checked."""
    check_shape(_OP, "x", x, ("T", "K"))
    check_dtype(_OP, "x", x, FLOATS)
    weights = [weight] if isinstance(weight, Tensor) else [*weight]
    if isinstance(weight, Tensor):
        sizes = _sizes(adapters, sizes)
    else:
        sizes = [w.shape[0] for w in weights]
    if len(sizes) != len(adapters) or not any(adapters):
        raise ValueError(
            f"{_OP}: adapters must be one or None for each of the {len(sizes)} projections and not all None, "
            f"got {[type(adapter).__name__ for adapter in adapters]}"
        )
    _check_base(x, weights, bias, sum(sizes))
    at = 0
    present: list[tuple[int, Adapter]] = []
    for g, (adapter, size) in enumerate(zip(adapters, sizes, strict=True)):
        if adapter is not None:
            _check_adapter(x, g, Adapter(*adapter), size, present[0][1].a.dtype if present else adapter[0].dtype)
            present.append((at, Adapter(*adapter)))
        at += size
    if not 0 <= dropout < 1:
        raise ValueError(f"{_OP}: dropout must be at least 0 and less than 1, got {dropout}")
    seed = _seed(seed) if threshold_of(dropout) else None
    kind, kept = _source(x, source)
    a, b = [adapter.a for _, adapter in present], [adapter.b for _, adapter in present]
    scales, starts = [float(adapter.scale) for _, adapter in present], [start for start, _ in present]
    return (x, weights, bias, a, b, scales, starts, float(dropout), seed, kept, kind, backend), sizes


def _sizes(adapters: Any, sizes: Any) -> list[int]:
    if sizes is not None:
        return [*sizes]
    if any(adapter is None for adapter in adapters):
        raise ValueError(f"{_OP}: sizes must be the projections' widths where one has no adapter, got None")
    return [adapter[1].shape[0] for adapter in adapters]


def _check_base(x: Tensor, weights: list[Tensor], bias: Tensor | None, width: int) -> None:
    rows = width if len(weights) == 1 else "N"
    named = {f"weight[{i}]" if len(weights) > 1 else "weight": w for i, w in enumerate(weights)}
    for name, tensor in named.items():
        check_shape(_OP, name, tensor, (rows, x.shape[1]))
    if bias is not None:
        check_shape(_OP, "bias", bias, (width,))
        named["bias"] = bias
    for name, tensor in named.items():
        check_dtype(_OP, name, tensor, (x.dtype,))
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{_OP}: {name} must be frozen (it gets no gradient), got one with requires_grad=True")
    check_same_device(_OP, x=x, **named)


def _check_adapter(x: Tensor, g: int, adapter: Adapter, size: int, dtype: torch.dtype) -> None:
    name = f"adapters[{g}]"
    check_shape(_OP, f"{name}.a", adapter.a, ("r", x.shape[1]))
    check_shape(_OP, f"{name}.b", adapter.b, (size, adapter.a.shape[0]))
    if adapter.a.shape[0] == 0:
        raise ValueError(f"{_OP}: {name} must have a rank of at least 1, got 0; pass None for no adapter")
    check_dtype(_OP, f"{name}.a", adapter.a, FLOATS)
    for part in ("a", "b"):
        check_dtype(_OP, f"{name}.{part}", getattr(adapter, part), (dtype,))
    check_same_device(_OP, x=x, **{f"{name}.a": adapter.a, f"{name}.b": adapter.b})


def _seed(seed: Tensor | None) -> Tensor:
    if seed is None:
        return draw_seed()
    check_shape(_OP, "seed", seed, (1,))
    check_dtype(_OP, "seed", seed, (torch.int64,))
    if seed.device.type != "cpu":
        raise ValueError(f"{_OP}: seed must be on the CPU, where it is read without waiting, got {seed.device}")
    return seed


def _source(x: Tensor, source: RmsNormed | Gated | None) -> tuple[str, list[Tensor]]:
    if source is None:
        return "x", []
    kind = next((name for name, cls in SOURCES.items() if isinstance(source, cls)), None)
    if kind is None:
        raise TypeError(f"{_OP}: source must be RmsNormed, Gated or None, got {type(source).__name__}")
    shapes = {"rstd": (x.shape[0],), "weight": (x.shape[1],)}
    for name, tensor in source._asdict().items():
        check_shape(_OP, f"source.{name}", tensor, shapes.get(name, tuple(x.shape)))
        check_dtype(_OP, f"source.{name}", tensor, FLOATS if name in shapes else (x.dtype,))
    check_same_device(_OP, x=x, **{f"source.{name}": tensor for name, tensor in source._asdict().items()})
    return kind, [tensor.detach() for tensor in source]
