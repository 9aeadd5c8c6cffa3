"""What torch sees of ``distillation_loss``: registered ops with fakes, a gradient, and the launchers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtllm_fast.core import native, native_cpu
from mtllm_fast.core.backends import Backends
from mtllm_fast.core.devices import why_not_triton
from mtllm_fast.core.dispatch import savable, watched
from mtllm_fast.core.registered import differentiable_once, register, register_gradient
from mtllm_fast.core.tensors import adjacent_columns, wide_dtype
from mtllm_fast.ops.distillation_loss.inputs import (
    FIGURES,
    Forward,
    Options,
    Side,
    Spans,
    Vectors,
    spans_of_tokens,
)
from mtllm_fast.ops.norm_pool.schema import why_not_kernels

_MAX_UNALIGNED = 8192  # of the CUDA kernel


def _why_not_cuda(hidden_states: Tensor) -> str | None:
    width = hidden_states.shape[1]
    if width > _MAX_UNALIGNED and width * hidden_states.element_size() % 16:
        return f"it takes rows that are no multiple of 16 bytes up to {_MAX_UNALIGNED} wide, and these have {width}"
    return native.why_not_cuda(hidden_states) or why_not_kernels(hidden_states)


BACKENDS = Backends(
    "distillation_loss",
    {
        "cuda": _why_not_cuda,
        "triton": lambda hidden_states: why_not_triton(hidden_states) or why_not_kernels(hidden_states),
        "cpu": native_cpu.why_not_cpu,
        "reference": lambda hidden_states: None,
    },
)


class Tensors(NamedTuple):
    """The tensors of a call, in the order in which the registered ops take them."""

    hidden_states: Tensor
    weight: Tensor | None
    cu_seqlens: Tensor
    teacher_states: Tensor | None
    teacher_weight: Tensor | None
    teacher_cu_seqlens: Tensor | None
    teacher_pooled: Tensor | None
    teacher_spans: Tensor | None
    span_indices: Tensor | None
    span_offsets: Tensor | None
    teacher_span_indices: Tensor | None
    teacher_span_offsets: Tensor | None

    def sides(self, eps: float, teacher_eps: float) -> tuple[Side, Side | Vectors, Spans | None]:
        """The same as backends take it: rows may be strided, everything else is contiguous."""
        dense = self._replace(
            **{name: t.contiguous() for name, t in self._asdict().items() if t is not None and name not in _STATES},
            **{name: adjacent_columns(t) for name, t in self._asdict().items() if t is not None and name in _STATES},
        )
        student = Side(dense.hidden_states, dense.weight, eps, dense.cu_seqlens)
        teacher: Side | Vectors
        if dense.teacher_states is not None:
            assert dense.teacher_cu_seqlens is not None
            teacher = Side(dense.teacher_states, dense.teacher_weight, teacher_eps, dense.teacher_cu_seqlens)
        else:
            assert dense.teacher_pooled is not None
            teacher = Vectors(dense.teacher_pooled, dense.teacher_spans)
        if dense.span_indices is None:
            return student, teacher, None
        assert dense.span_offsets is not None
        return student, teacher, Spans(*dense[-4:])  # type: ignore[arg-type]


_STATES = ("hidden_states", "teacher_states")


def launch_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], figures [8], gradient in the pooled vectors [B, D], what the loss of a span counts for [])"""
    tensors = Tensors(*arguments[:12])
    eps, teacher_eps, *options, backend = arguments[12:]
    module = BACKENDS.load(backend, tensors.hidden_states)
    return tuple(module.forward(*tensors.sides(eps, teacher_eps), Options(*options)))  # type: ignore[return-value]


def launch_backward(
    grad_loss: Tensor, grad_pooled: Tensor, span_scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """(gradient of the states [T, D], of the weight [D] or an empty tensor)"""
    tensors = Tensors(*arguments[:12])
    eps, teacher_eps, *options, needs_weight, backend = arguments[12:]
    student, teacher, spans = tensors.sides(eps, teacher_eps)
    inverse = None if spans is None else spans_of_tokens(spans, student.states.shape[0])
    saved = Forward(grad_loss, grad_loss, grad_pooled, span_scale)
    module = BACKENDS.load(backend, tensors.hidden_states)
    grad_hidden, grad_weight = module.backward(
        grad_loss.contiguous(), student, teacher, spans, inverse, saved, Options(*options), needs_weight
    )
    return grad_hidden, grad_hidden.new_empty(0) if grad_weight is None else grad_weight


_TENSORS = ", ".join(
    f"{'Tensor' if name in ('hidden_states', 'cu_seqlens') else 'Tensor?'} {name}" for name in Tensors._fields
)
_OPTIONS = "float eps, float teacher_eps, float sequence_weight, float span_weight, str kind, float beta, str reduction"


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = Tensors(*arguments[:12])
    dtype = wide_dtype(tensors.hidden_states.dtype)
    scalar = tensors.hidden_states.new_empty((), dtype=dtype)
    grad_pooled = scalar.new_empty(tensors.cu_seqlens.shape[0] - 1, tensors.hidden_states.shape[1])
    return scalar, scalar.new_empty(len(FIGURES)), grad_pooled, torch.empty_like(scalar)


def _fake_backward(
    grad_loss: Tensor, grad_pooled: Tensor, span_scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    hidden_states, needs_weight = arguments[0], arguments[-2]
    size = hidden_states.shape[1] if needs_weight else 0
    dtype = wide_dtype(hidden_states.dtype) if needs_weight else hidden_states.dtype
    return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty(size, dtype=dtype)


forward_op = register(
    "distillation_loss",
    f"({_TENSORS}, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    launch_forward,
    _fake_forward,
)
backward_op = register(
    "distillation_loss_backward",
    f"(Tensor grad_loss, Tensor grad_pooled, Tensor span_scale, {_TENSORS}, {_OPTIONS}, bool needs_weight, str backend)"
    " -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *options, ctx.backend = inputs[12:]
    ctx.options = options
    _, figures, grad_pooled, span_scale = output
    ctx.mark_non_differentiable(figures, grad_pooled, span_scale)
    ctx.set_materialize_grads(False)
    ctx.needs = ctx.needs_input_grad[:2]
    saved = (grad_pooled, span_scale, *inputs[:12]) if any(ctx.needs) else ()
    ctx.save_for_backward(*(tensor if tensor is None else savable(tensor) for tensor in saved))


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    grad_loss: Tensor | None = grads[0]
    count = 13 + len(ctx.options)
    if grad_loss is None or not any(ctx.needs):
        return (None,) * count
    grad_pooled, span_scale, *tensors = ctx.saved_tensors
    weight = tensors[1]
    given = [tensor for tensor in tensors if tensor is not None]
    launch = backward_op if watched(grad_loss, grad_pooled, *given) else launch_backward
    grad_hidden, grad_weight = launch(
        grad_loss, grad_pooled, span_scale, *tensors, *ctx.options, bool(ctx.needs[1]), ctx.backend
    )
    return (
        grad_hidden if ctx.needs[0] else None,
        grad_weight.to(weight.dtype) if ctx.needs[1] else None,
        *(None,) * (count - 2),
    )


EagerDistillationLoss = register_gradient("distillation_loss", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::distillation_loss_backward")
