"""What torch sees of ``token_kl_loss``: registered ops with fakes, a gradient and FLOP counts, and the launchers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtllm_fast.core.backends import Backends
from mtllm_fast.core.dispatch import savable, watched
from mtllm_fast.core.registered import differentiable_once, register, register_gradient

BACKENDS = Backends("token_kl_loss", {"reference": lambda: None})


def launch_forward(
    hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss [], what the gradient needs of each row [3, N])"""
    inputs = (hidden_states, teacher_hidden_states, weight, teacher_weight, temperature, divergence, beta)
    with torch.autocast(hidden_states.device.type, enabled=False):
        losses, statistics = BACKENDS.load(backend).forward(*inputs)
    return losses.sum() / _denominator(losses.shape[0], reduction), statistics


def launch_backward(
    grad_loss: Tensor,
    statistics: Tensor,
    hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    reduction: str,
    needs_hidden: bool,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden_states, of weight), an empty tensor in place of one that is not needed"""
    inputs = (hidden_states, teacher_hidden_states, weight, teacher_weight, temperature, divergence, beta)
    scale = grad_loss / _denominator(hidden_states.shape[0], reduction)
    with torch.autocast(hidden_states.device.type, enabled=False):
        grads = BACKENDS.load(backend).backward(scale, statistics, *inputs, needs_hidden, needs_weight)
    grad_hidden, grad_weight = (hidden_states.new_empty(0) if grad is None else grad for grad in grads)
    return grad_hidden, grad_weight


def _denominator(rows: int, reduction: str) -> int:
    return max(rows, 1) if reduction == "mean" else 1


def _fake_forward(hidden_states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    return hidden_states.new_empty((), dtype=wide), hidden_states.new_empty(3, hidden_states.shape[0], dtype=wide)


def _fake_backward(
    grad_loss: Tensor, statistics: Tensor, hidden_states: Tensor, teacher_hidden_states: Tensor, weight: Tensor,
    teacher_weight: Tensor | None, temperature: float, divergence: str, beta: float, reduction: str,
    needs_hidden: bool, needs_weight: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_hidden = hidden_states.new_empty(hidden_states.shape if needs_hidden else 0)
    return grad_hidden, weight.new_empty(weight.shape) if needs_weight else hidden_states.new_empty(0)


forward_op = register(
    "token_kl_loss",
    "(Tensor hidden_states, Tensor teacher_hidden_states, Tensor weight, Tensor? teacher_weight, float temperature,"
    " str divergence, float beta, str reduction, str backend) -> (Tensor, Tensor)",
    launch_forward,
    _fake_forward,
)
backward_op = register(
    "token_kl_loss_backward",
    "(Tensor grad_loss, Tensor statistics, Tensor hidden_states, Tensor teacher_hidden_states, Tensor weight,"
    " Tensor? teacher_weight, float temperature, str divergence, float beta, str reduction, bool needs_hidden,"
    " bool needs_weight, str backend) -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)


@register_flop_formula(torch.ops.mtllm_fast.token_kl_loss)
def _flops(states: Any, teacher: Any, weight: Any, head: Any, temperature: Any, *rest: Any, **keywords: Any) -> int:
    passes = 1 if rest[0] == "kl" else 2
    return passes * 2 * states[0] * weight[0] * (states[1] + teacher[1])


@register_flop_formula(torch.ops.mtllm_fast.token_kl_loss_backward)
def _backward_flops(grad: Any, kept: Any, states: Any, teacher: Any, weight: Any, *rest: Any, **keywords: Any) -> int:
    needs_hidden, needs_weight = rest[-3:-1]
    return 2 * states[0] * weight[0] * (states[1] * (1 + needs_hidden + needs_weight) + teacher[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.temperature, ctx.divergence, ctx.beta, ctx.reduction, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *(None if tensor is None else savable(tensor) for tensor in tensors))


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    grad_loss: Tensor | None = grads[0]
    if grad_loss is None:
        return (None,) * 9
    saved: tuple[Any, ...] = ctx.saved_tensors
    needs_hidden, _, needs_weight = ctx.needs_input_grad[:3]
    options = (ctx.temperature, ctx.divergence, ctx.beta, ctx.reduction, needs_hidden, needs_weight, ctx.backend)
    launch: Any = backward_op if watched(grad_loss, *(t for t in saved if t is not None)) else launch_backward
    grad_hidden, grad_weight = launch(grad_loss, *saved, *options)
    return (grad_hidden if needs_hidden else None, None, grad_weight if needs_weight else None, *(None,) * 6)


EagerTokenKLLoss = register_gradient("token_kl_loss", launch_forward, _setup_context, _backward)
differentiable_once("mtllm_fast::token_kl_loss_backward")
