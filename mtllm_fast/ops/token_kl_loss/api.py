"""``token_kl_loss`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

import math

from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_choice, check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.token_kl_loss import schema

DIVERGENCES = ("kl", "jsd")
REDUCTIONS = ("mean", "sum")


def token_kl_loss(
    hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "kl",
    beta: float = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Divergence of a student's next-token distribution from a teacher's, row by row, without ``[N, V]`` logits.

    With ``p = softmax(teacher_weight h'_n / τ)`` of the teacher and ``q = softmax(weight h_n / τ)`` of the student:

        "kl":   KL(p‖q) = Σ_v p_v (log p_v − log q_v)
        "jsd":  β KL(p‖m) + (1 − β) KL(q‖m),  m = β p + (1 − β) q

    The generalised Jensen-Shannon divergence is that of GKD (Agarwal et al., 2023, arXiv 2306.13649) and of Liger.
    Neither these nor this op multiply by τ². Gradients shrink like 1/τ²: where the loss is added to one on hard labels,
    Hinton et al. (2015, arXiv 1503.02531) multiply it by ``temperature**2``.

    Vocabulary and rows are taken in chunks. Beside the gradients, which are summed in float32, temporaries take up to
    80 MB at a width of 4096 whatever N and V are; 115 with a gradient of the head, 145 where a CPU must cast halves.
    Products are in the dtype of the states (float32 on a CPU without instructions for it), what follows is in float32.
    The backward pass computes the logits again: 5 products where whole logits need 3, and 7 for jsd. Deterministic.
    Autocast changes nothing. Differentiable once, in ``hidden_states`` and ``weight``; the teacher gets no gradient.

    Not Liger's, because its Triton losses need a GPU, and its chunked one wants labels, holds the logits of whole rows,
    rounds their log-softmax to the dtype of the states and computes the gradient of a head that is frozen.

    Args:
        hidden_states: ``[N, D]``, fp32, bf16, fp16 or fp64: the student's rows after the last norm, one for each
            aligned token. N may be 0: then the loss is 0.
        teacher_hidden_states: ``[N, D']``, the teacher's rows for the same tokens.
        weight: ``[V, D]``, the student's head, cast to the dtype of the states if it has another.
        teacher_weight: ``[V, D']``, the teacher's head; ``weight`` by default.
        temperature: τ > 0.
        divergence: ``"kl"`` or ``"jsd"``.
        beta: β between 0 and 1, both excluded, the teacher's share in m. ``"kl"`` does not use it.
        reduction: ``"mean"`` over the N rows, or their ``"sum"``.
        backend: ``"auto"`` or ``"reference"``, which runs everywhere: most of the time goes to matrix products.

    Returns:
        A scalar in float32, or float64 if ``hidden_states`` are.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong.
        UnsupportedBackendError: there is no such backend.

    >>> states, teacher_states = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> token_kl_loss(states, teacher_states, torch.eye(2))
    tensor(0.4621)
    >>> token_kl_loss(states, teacher_states, torch.eye(2), divergence="jsd")
    tensor(0.1109)
    """
    _check(hidden_states, teacher_hidden_states, weight, teacher_weight, temperature, divergence, beta, reduction)
    teacher = (teacher_hidden_states.detach(), weight, None if teacher_weight is None else teacher_weight.detach())
    arguments = (hidden_states, *teacher, temperature, divergence, beta, reduction, backend)
    if watched(hidden_states, *(tensor for tensor in teacher if tensor is not None)):
        return schema.forward_op(*arguments)[0]
    if needs_grad(hidden_states, weight):
        return schema.EagerTokenKLLoss.apply(*arguments)[0]
    return schema.launch_forward(*arguments)[0]


def explain(
    hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "kl",
    beta: float = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
) -> Explanation:
    """Which backend serves this call of ``token_kl_loss``, and why the others do not."""
    _check(hidden_states, teacher_hidden_states, weight, teacher_weight, temperature, divergence, beta, reduction)
    return schema.BACKENDS.explain(backend)


def _check(
    hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    reduction: str,
) -> None:
    op = "token_kl_loss"
    check_shape(op, "hidden_states", hidden_states, ("N", "D"))
    check_shape(op, "weight", weight, ("V", hidden_states.shape[1]))
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must be [V, D] with V > 0, got [0, {weight.shape[1]}]")
    tensors = {"hidden_states": hidden_states, "teacher_hidden_states": teacher_hidden_states, "weight": weight}
    teacher_width: int | str = hidden_states.shape[1] if teacher_weight is None else "D'"
    check_shape(op, "teacher_hidden_states", teacher_hidden_states, (hidden_states.shape[0], teacher_width))
    if teacher_weight is not None:
        tensors["teacher_weight"] = teacher_weight
        check_shape(op, "teacher_weight", teacher_weight, (weight.shape[0], teacher_hidden_states.shape[1]))
    for name, tensor in tensors.items():
        check_dtype(op, name, tensor, FLOATS)
    check_same_device(op, **tensors)
    check_choice(op, "divergence", divergence, DIVERGENCES)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")
    if not 0 < beta < 1:
        raise ValueError(f"{op}: beta must be between 0 and 1, both excluded, got {beta}")
