"""An op as torch sees it: registered with a fake and a gradient for whoever watches, launched directly otherwise.

``torch.compile``, FakeTensorMode, FLOP counters and selective checkpointing see registered ops alone. A plain
eager call goes straight to the launcher (``dispatch.watched`` tells which), its gradient by an autograd function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

NAMESPACE = "mtllm_fast"


class Declared(NamedTuple):
    """What the kernels behind one registered op do, for a count without a GPU."""

    launches: int | Callable[[Sequence[Any], Any], int]
    """A number, or a function of (arguments, result)."""
    moved_bytes: Callable[[Sequence[Any], Any], int] | None
    """Of (arguments, result); None: every tensor among them is read or written once."""


DECLARED: dict[str, Declared] = {}
"""By qualified name, ``"mtllm_fast::norm_pool"``."""


def register(
    name: str,
    signature: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    launches: int | Callable[[Sequence[Any], Any], int] = 1,
    moved_bytes: Callable[[Sequence[Any], Any], int] | None = None,
) -> Any:
    """Define ``mtllm_fast::name``; returns the op.

    Args:
        signature: of torch.library, ``"(Tensor x, float eps) -> Tensor"``.
        launch: computes it on a CPU or a GPU.
        fake: makes results of the right shapes, dtypes and strides, without data.
        launches, moved_bytes: what the fastest backend's kernels take; see ``Declared``.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, ("CPU", "CUDA"), launch)
    torch.library.register_fake(qualified, fake)
    DECLARED[qualified] = Declared(launches, moved_bytes)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_gradient(
    name: str,
    launch: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    """Give the registered op its gradient; returns an autograd function with the same one for plain eager calls.

    ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)`` are what ``torch.library.register_autograd``
    takes.
    """
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = launch(*inputs)
            setup_context(ctx, inputs, output)  # called here: torch's own call of it inspects the signature every time
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            return backward(ctx, *grads)

    Eager.__name__ = Eager.__qualname__ = f"Eager_{name}"
    return Eager


def differentiable_once(backward_op: str) -> None:
    """Makes a gradient of ``backward_op`` raise; without this, torch warns and treats its result as a constant."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{backward_op} has no gradient: the op can be differentiated once only")

    torch.library.register_autograd(backward_op, refuse)


def touched_bytes(*values: Any) -> int:
    """Bytes of all tensors among nested values, each once."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))
