"""``distillation_loss`` as users call it: documentation, checks, and which of the two doors a call takes."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_choice, check_cu_seqlens, check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS
from mtllm_fast.ops.distillation_loss import schema
from mtllm_fast.ops.distillation_loss.inputs import KINDS, REDUCTIONS
from mtllm_fast.ops.distillation_loss.schema import Tensors

_OP = "distillation_loss"


class DistillationLoss(NamedTuple):
    """Scalars in float32 (float64 for float64 states); only ``loss`` has a gradient.

    ``fvu``: mean((x − x')²) over the variance of the teacher's pooled vectors, mean((x' − mean_b x')²): the fraction of
    variance unexplained (infinite for one sentence, which has no variance). ``fvu_student`` divides by the student's
    variance instead. ``cosine`` and ``norm_difference``
    (|x| − |x'|) are means over sentences, their ``span_`` relatives over spans.
    """

    loss: Tensor
    sequence_loss: Tensor
    span_loss: Tensor
    fvu: Tensor
    fvu_student: Tensor
    cosine: Tensor
    norm_difference: Tensor
    span_cosine: Tensor
    span_norm_difference: Tensor


def distillation_loss(
    hidden_states: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    *,
    eps: float = 1e-5,
    teacher_states: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_cu_seqlens: Tensor | None = None,
    teacher_eps: float | None = None,
    teacher_pooled: Tensor | None = None,
    teacher_spans: Tensor | None = None,
    span_indices: Tensor | None = None,
    span_offsets: Tensor | None = None,
    teacher_span_indices: Tensor | None = None,
    teacher_span_offsets: Tensor | None = None,
    sequence_weight: float = 1.0,
    span_weight: float = 1.0,
    kind: str = "mse",
    beta: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> DistillationLoss:
    """How far a student's states are from a teacher's, sentence by sentence and span by span.

    With ``y_t = weight ⊙ h_t · rsqrt(mean(h_t²) + eps)``, ``x_b`` the mean of y over the tokens of sentence b, ``x_s``
    over those of span s, and ``x'`` the teacher's::

        loss = sequence_weight · mean_b l(x_b, x'_b) + span_weight · mean_s l(x_s, x'_s)

    l is the mean over D of ``(x − x')²`` (``kind="mse"``, the published loss) or of torch's smooth L1, or
    ``1 − cos(x, x')``. The sequence term is stage 1 of MT-LLM (arXiv 2406.12739), the span term its authors' follow-up.
    The last RMSNorm, both poolings, the losses and the figures are one op: the forward writes nothing of size
    ``[T, D]``, the backward makes everything again and writes the gradient of ``hidden_states`` once. Sums are in
    float32 and in a fixed order. Differentiable once in ``hidden_states`` and ``weight``; the teacher gets no gradient.
    A sentence or span without any token on one side is left out.

    Args:
        hidden_states: ``[T, D]`` the student's states *before* its last RMSNorm, packed, fp32, bf16, fp16 or fp64.
        weight: ``[D]`` that norm's gain; None for states that are normed already.
        cu_seqlens: ``[B + 1]`` int32, where each sentence starts; tokens after the last entry belong to none.
        eps: of the norm.
        teacher_states: ``[T', D]`` the teacher's packed states, with ``teacher_cu_seqlens`` ``[B + 1]``;
            ``teacher_weight`` and ``teacher_eps`` (default ``eps``) as for the student, None for normed states.
        teacher_pooled: ``[B, D]`` instead of states: the teacher's pooled vectors, and ``teacher_spans`` ``[S, D]``.
        span_indices: int64 ``[K]``, span s has the student's packed tokens
            ``span_indices[span_offsets[s] : span_offsets[s + 1]]``, tokens of sentences; ``span_offsets`` ``[S + 1]``.
            Spans may overlap and lie in any order. ``teacher_span_indices`` and ``teacher_span_offsets`` are the
            teacher's; not needed with ``teacher_spans``. ``mtllm_fast.align_spans`` makes them.
        sequence_weight, span_weight: of the two terms; the figures are the terms without them.
        kind: ``"mse"``, ``"smooth_l1"`` (with ``beta``) or ``"cosine"``.
        reduction: ``"mean"`` over sentences and over spans, or ``"sum"``.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``mtllm_fast.explain`` tells what
            auto takes.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or combination is wrong.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> student, teacher = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    >>> cu_seqlens = torch.tensor([0, 1, 2], dtype=torch.int32)
    >>> out = distillation_loss(student, None, cu_seqlens, teacher_states=teacher, teacher_cu_seqlens=cu_seqlens)
    >>> out.loss, out.norm_difference
    (tensor(3.2500), tensor(1.7929))
    """
    tensors = Tensors(
        hidden_states, weight, cu_seqlens, teacher_states, teacher_weight, teacher_cu_seqlens, teacher_pooled,
        teacher_spans, span_indices, span_offsets, teacher_span_indices, teacher_span_offsets,
    )  # fmt: skip
    _check(tensors, kind, beta, reduction)
    # The teacher is a constant: what autograd knows of it stays out of the op.
    constants = [tensor if tensor is None else tensor.detach() for tensor in tensors[3:]]
    arguments = (
        hidden_states, weight, cu_seqlens, *constants, eps, eps if teacher_eps is None else teacher_eps,
        sequence_weight, span_weight, kind, beta, reduction, backend,
    )  # fmt: skip
    given = [tensor for tensor in (hidden_states, weight, cu_seqlens, *constants) if tensor is not None]
    if watched(*given):
        loss, figures, *_ = schema.forward_op(*arguments)
    elif needs_grad(*given):
        loss, figures, *_ = schema.EagerDistillationLoss.apply(*arguments)
    else:
        loss, figures, *_ = schema.launch_forward(*arguments)
    return DistillationLoss(loss, *figures.unbind())


def explain(
    hidden_states: Tensor, weight: Tensor | None, cu_seqlens: Tensor, *, backend: str = "auto", **others: object
) -> Explanation:
    """Which backend serves this call of ``distillation_loss``, and why the others do not."""
    inspect.signature(distillation_loss).bind(hidden_states, weight, cu_seqlens, **others)  # as a call would be refused
    check_shape(_OP, "hidden_states", hidden_states, ("T", "D"))
    return schema.BACKENDS.explain(backend, hidden_states)


def _check(tensors: Tensors, kind: str, beta: float, reduction: str) -> None:
    check_choice(_OP, "kind", kind, KINDS)
    check_choice(_OP, "reduction", reduction, REDUCTIONS)
    if not beta > 0:
        raise ValueError(f"{_OP}: beta must be above 0, got {beta}; for the mean absolute error take a small one")
    check_shape(_OP, "hidden_states", tensors.hidden_states, ("T", "D"))
    check_cu_seqlens(_OP, "cu_seqlens", tensors.cu_seqlens)
    D, B = tensors.hidden_states.shape[1], tensors.cu_seqlens.shape[0] - 1
    _check_teacher(tensors, D, B)
    _check_spans(tensors, D)
    for name in ("hidden_states", "weight", "teacher_states", "teacher_weight", "teacher_pooled", "teacher_spans"):
        tensor = getattr(tensors, name)
        if tensor is not None:
            if name.endswith("weight"):
                check_shape(_OP, name, tensor, (D,))
            check_dtype(_OP, name, tensor, FLOATS)
    check_same_device(_OP, **{name: t for name, t in tensors._asdict().items() if t is not None})


def _check_teacher(tensors: Tensors, D: int, B: int) -> None:
    if (tensors.teacher_states is None) == (tensors.teacher_pooled is None):
        raise ValueError(f"{_OP}: pass exactly one of teacher_states and teacher_pooled")
    if tensors.teacher_pooled is not None:
        check_shape(_OP, "teacher_pooled", tensors.teacher_pooled, (B, D))
        for name in ("teacher_weight", "teacher_cu_seqlens", "teacher_span_indices", "teacher_span_offsets"):
            if getattr(tensors, name) is not None:
                raise ValueError(f"{_OP}: {name} goes with teacher_states; teacher_pooled is known already")
        return
    if tensors.teacher_spans is not None:
        raise ValueError(f"{_OP}: teacher_spans goes with teacher_pooled; spans of teacher_states are made here")
    check_shape(_OP, "teacher_states", tensors.teacher_states, ("T'", D))  # type: ignore[arg-type]
    if tensors.teacher_cu_seqlens is None:
        raise ValueError(f"{_OP}: teacher_states needs teacher_cu_seqlens")
    check_cu_seqlens(_OP, "teacher_cu_seqlens", tensors.teacher_cu_seqlens)
    check_shape(_OP, "teacher_cu_seqlens", tensors.teacher_cu_seqlens, (B + 1,))


def _check_spans(tensors: Tensors, D: int) -> None:
    needed = ["span_indices", "span_offsets"]
    needed += ["teacher_spans"] if tensors.teacher_states is None else ["teacher_span_indices", "teacher_span_offsets"]
    given = [name for name in needed if getattr(tensors, name) is not None]
    if not given:
        return
    if given != needed:
        missing = " and ".join(name for name in needed if name not in given)
        raise ValueError(f"{_OP}: {' and '.join(given)} came without {missing}")
    assert tensors.span_offsets is not None
    if tensors.span_offsets.dim() != 1 or tensors.span_offsets.shape[0] == 0:
        raise ValueError(f"{_OP}: span_offsets must be [S+1], got {list(tensors.span_offsets.shape)}")
    S = tensors.span_offsets.shape[0] - 1
    shapes: dict[str, tuple[int | str, ...]] = {
        "span_indices": ("K",), "span_offsets": (S + 1,), "teacher_spans": (S, D),
        "teacher_span_indices": ("M",), "teacher_span_offsets": (S + 1,),
    }  # fmt: skip
    for name in needed:
        check_shape(_OP, name, getattr(tensors, name), shapes[name])
        if name != "teacher_spans":
            check_dtype(_OP, name, getattr(tensors, name), (torch.int64,))
    _check_values("", tensors.cu_seqlens, tensors.span_indices, tensors.span_offsets)
    if tensors.teacher_cu_seqlens is not None:
        _check_values(
            "teacher_", tensors.teacher_cu_seqlens, tensors.teacher_span_indices, tensors.teacher_span_offsets
        )


def _check_values(side: str, cu_seqlens: Tensor, indices: Tensor | None, offsets: Tensor | None) -> None:
    """On the host only: on a device it would wait, and a graph cannot."""
    assert indices is not None
    assert offsets is not None
    if indices.device.type != "cpu" or watched(cu_seqlens, indices, offsets):
        return
    tokens = int(cu_seqlens[-1])
    outside = indices[(indices < 0) | (indices >= tokens)]
    if len(outside):
        raise ValueError(
            f"{_OP}: {side}span_indices holds {int(outside[0])}; the sentences have {tokens} packed tokens"
        )
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(indices) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{_OP}: {side}span_offsets must rise from 0 to the number of indices, {len(indices)}; "
            f"it runs from {int(offsets[0])} to {int(offsets[-1])}"
        )
