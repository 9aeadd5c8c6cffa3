"""``stack_projection`` as users call it: documentation, checks, the choice of a form, and which door a call takes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mtllm_fast.core.backends import Explanation
from mtllm_fast.core.checks import check_choice, check_dtype, check_same_device, check_shape
from mtllm_fast.core.dispatch import needs_grad, watched
from mtllm_fast.core.tensors import FLOATS, wide_dtype
from mtllm_fast.ops.stack_projection import schema
from mtllm_fast.ops.stack_projection.composite import (
    Composite,
    StackWeights,
    absorb,
    break_even_tokens,
    building_cost,
    interleave,
)
from mtllm_fast.ops.stack_projection.reference import apply_rope, rms_norm, specification

_OP = "stack_projection"
FORMS = ("auto", "absorbed", "unabsorbed")


class StackProjection(NamedTuple):
    """What the rest of the LLM's first layer needs."""

    x: Tensor
    """``[T, D]``, the up-projected states: the residual stream."""
    q: Tensor
    """``[T, H, hd]``, rotated; q, k and v may be views of one tensor."""
    k: Tensor
    """``[T, KV, hd]``, rotated."""
    v: Tensor
    """``[T, KV, hd]``."""


def stack_projection(
    encoder_states: Tensor,
    weights: StackWeights,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    composite: Composite | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> StackProjection:
    """Up-projection, RMSNorm, QKV and rotary embedding of the LLM's first layer in one pass over the encoder's states.

        x = e W_upᵀ + b        n = γ ⊙ x · rsqrt(mean(x²) + eps)        q, k = rope(W_q n + b_q), rope(W_k n + b_k)
        absorbed:  qkv = rsqrt(mean(x²) + eps) · (e Cᵀ + c) + b_qkv     with C = W_qkv diag(γ) W_up, c = W_qkv diag(γ) b

    Both forms are exact; the absorbed one needs 2.8 times fewer FLOPs and weights at d=1024, D=4096, N=6144. Its
    gradients reach every weight. Deterministic, accumulated in float32. Under autocast the states and ``weights.up``
    are cast as a Linear would; the composite is built in float32.

    Args:
        encoder_states: ``[T, d]``, fp32, bf16, fp16 or fp64: the encoder's last states of T packed tokens.
        weights: the live parameters (``StackWeights``); ``weights.up`` has the dtype of the states.
        cos, sin: rotary tables whose halves are equal, ``[T, hd]``, or ``[L, hd]`` with ``position_ids``. Scaled
            variants (llama3) are tables like any other.
        position_ids: int64 ``[T]``, rows of the tables; None: token t has row t.
        composite: weights absorbed before, for inference (``absorb(weights).rounded(...)``). None: from the live
            weights, on every call.
        form: ``"absorbed"``, ``"unabsorbed"``, or ``"auto"``: absorbed with a composite, and without one from
            ``2 D d / (D - d)`` tokens on (2731 at d=1024, D=4096; half as many again in half precision on a GPU), where
            building it pays.
        backend: of the absorbed form: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"reference"``. The unabsorbed form is
            plain torch.

    Returns:
        StackProjection: x ``[T, D]``, q ``[T, H, hd]``, k and v ``[T, KV, hd]``, in the dtype of the states.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong, or the composite does not fit.
        UnsupportedBackendError: the named backend cannot serve this call.

    >>> weights = StackWeights(
    ...     up=torch.randn(8, 6), norm=torch.ones(8), q=torch.randn(8, 8), k=torch.randn(4, 8), v=torch.randn(4, 8),
    ...     head_dim=4, eps=1e-5)
    >>> cos, sin = torch.ones(3, 4), torch.zeros(3, 4)
    >>> [list(out.shape) for out in stack_projection(torch.randn(3, 6), weights, cos, sin, form="absorbed")]
    [[3, 8], [3, 2, 4], [3, 1, 4], [3, 1, 4]]
    """
    e, weights = _autocast(encoder_states, weights)
    _check(e, weights, cos, sin, position_ids, composite, form)
    if not _absorbs(e, weights, composite, form):
        return StackProjection(*specification(e, weights, *_tables(cos, sin, position_ids, e.dtype)))
    if composite is None:
        composite = absorb(weights)
    norms = _head_norms(weights)
    num_rotated = weights.q.shape[0] + weights.k.shape[0]
    differentiable = (e, weights.up, weights.up_bias, composite.weight, composite.bias, composite.qkv_bias)
    wants_grad = needs_grad(*(t for t in (*differentiable, norms) if t is not None))
    after = norms is not None and wants_grad  # the norms of q and k, and with them the rotation, are left to torch
    arguments = (
        *differentiable[:4], composite.residual, *differentiable[4:], None if after else norms,
        None if after else cos, None if after else sin, None if after else position_ids,
        num_rotated, weights.head_dim, weights.eps, backend,
    )  # fmt: skip
    if watched(e, weights.up, composite.weight):
        x, qkv, _ = schema.forward_op(*arguments)
    elif wants_grad:
        x, qkv, _ = schema.EagerStackProjection.apply(*arguments)
    else:
        x, qkv, _ = schema.launch_forward(*arguments)
    sizes = [weights.q.shape[0], weights.k.shape[0], weights.v.shape[0]]
    q, k, v = (part.unflatten(1, (-1, weights.head_dim)) for part in qkv.split(sizes, dim=1))
    if after:
        cos, sin = _tables(cos, sin, position_ids, q.dtype)
        assert weights.q_norm is not None
        assert weights.k_norm is not None
        q = apply_rope(rms_norm(q, weights.q_norm, weights.eps), cos, sin)
        k = apply_rope(rms_norm(k, weights.k_norm, weights.eps), cos, sin)
    return StackProjection(x, q, k, v)


def explain(
    encoder_states: Tensor,
    weights: StackWeights,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    composite: Composite | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> Explanation:
    """Which form and backend serve this call of ``stack_projection``, and why the others do not."""
    e, weights = _autocast(encoder_states, weights)
    _check(e, weights, cos, sin, position_ids, composite, form)
    explanation = schema.backends_for(e).explain(
        backend, e, weights.up.shape[0], _head_norms(weights), weights.head_dim
    )
    if _absorbs(e, weights, composite, form):
        how = "composite" + (" + residual" if composite.residual is not None else "") if composite else "live weights"
        return replace(explanation, op=f"{_OP}, absorbed from a {how}" if composite else f"{_OP}, absorbed from {how}")
    reason = f"the unabsorbed form is plain torch; absorbing pays from {_break_even(weights):g} tokens on"
    why_not = {name: why or (None if name == "reference" else reason) for name, why in explanation.why_not.items()}
    return replace(explanation, op=f"{_OP}, unabsorbed", chosen="reference", why_not=why_not)


def _absorbs(e: Tensor, weights: StackWeights, composite: Composite | None, form: str) -> bool:
    if form != "auto":
        return form == "absorbed"
    return composite is not None or e.shape[0] >= _break_even(weights)


def _break_even(weights: StackWeights) -> float:
    return break_even_tokens(weights.up.shape[1], weights.up.shape[0], building_cost(weights.q))


def _autocast(e: Tensor, weights: StackWeights) -> tuple[Tensor, StackWeights]:
    if not isinstance(e, Tensor) or e.dtype == torch.float64 or e.device.type == "meta":  # which has no autocast
        return e, weights
    if not torch.is_autocast_enabled(e.device.type):
        return e, weights
    dtype = torch.get_autocast_dtype(e.device.type)
    return e.to(dtype), replace(weights, up=weights.up.to(dtype))


def _tables(cos: Tensor, sin: Tensor, position_ids: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A row per token, in the dtype of what they turn, as the models have them."""
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    return cos.to(dtype), sin.to(dtype)


def _head_norms(weights: StackWeights) -> Tensor | None:
    """Gains of the norms of all heads of q and k, in the order of the composite; [H * hd + KV * hd]."""
    if weights.q_norm is None or weights.k_norm is None:
        return None
    wide, hd = wide_dtype(weights.q_norm.dtype), weights.head_dim
    parts = ((weights.q_norm, weights.q), (weights.k_norm, weights.k))
    return torch.cat([interleave(norm.to(wide).repeat(rows.shape[0] // hd), hd) for norm, rows in parts])


def _check(
    e: Tensor,
    w: StackWeights,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    composite: Composite | None,
    form: str,
) -> None:
    check_choice(_OP, "form", form, FORMS)
    check_shape(_OP, "encoder_states", e, ("T", "d"))
    check_dtype(_OP, "encoder_states", e, FLOATS)
    check_shape(_OP, "weights.up", w.up, ("D", e.shape[1]))
    check_dtype(_OP, "weights.up", w.up, (e.dtype,))
    check_shape(_OP, "weights.norm", w.norm, (w.up.shape[0],))
    if w.head_dim < 2 or w.head_dim % 2:
        raise ValueError(f"{_OP}: weights.head_dim must be even and at least 2, got {w.head_dim}")
    for name in ("q", "k", "v"):
        rows = getattr(w, name)
        check_shape(_OP, f"weights.{name}", rows, ("heads * hd", w.up.shape[0]))
        if rows.shape[0] % w.head_dim:
            raise ValueError(f"{_OP}: weights.{name} has {rows.shape[0]} rows, no multiple of head_dim={w.head_dim}")
    if (w.q_norm is None) != (w.k_norm is None):
        raise ValueError(f"{_OP}: weights.q_norm and weights.k_norm must both be given or both be None")
    rows = "T or more" if position_ids is not None else e.shape[0]
    check_shape(_OP, "cos", cos, (rows, w.head_dim))
    check_shape(_OP, "sin", sin, (cos.shape[0], w.head_dim))
    if position_ids is not None:
        check_shape(_OP, "position_ids", position_ids, (e.shape[0],))
        check_dtype(_OP, "position_ids", position_ids, (torch.int64,))
    check_same_device(_OP, encoder_states=e, **{"weights.up": w.up}, cos=cos, sin=sin)
    if composite is not None:
        if form == "unabsorbed":
            raise ValueError(f"{_OP}: form='unabsorbed' takes no composite")
        rows = w.q.shape[0] + w.k.shape[0] + w.v.shape[0]
        check_shape(_OP, "composite.weight", composite.weight, (rows, e.shape[1]))
        check_shape(_OP, "composite.bias", composite.bias, (rows,))
        check_dtype(_OP, "composite.bias", composite.bias, (wide_dtype(composite.bias.dtype),))
        if composite.residual is not None:
            check_shape(_OP, "composite.residual", composite.residual, (rows, e.shape[1]))
            check_dtype(_OP, "composite.residual", composite.residual, (composite.weight.dtype,))
        if composite.qkv_bias is not None:
            check_shape(_OP, "composite.qkv_bias", composite.qkv_bias, (rows,))
            check_dtype(_OP, "composite.qkv_bias", composite.qkv_bias, (wide_dtype(composite.qkv_bias.dtype),))
        check_same_device(_OP, encoder_states=e, **{"composite.weight": composite.weight})
