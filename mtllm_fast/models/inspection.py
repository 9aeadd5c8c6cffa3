"""What captured kernels depend on beyond their inputs: looked at once, and compared before every replay.

Looking at every module of an 8B model takes milliseconds of Python, as long as the replay. An inspection therefore
keeps flat lists of what it saw, and ``holds`` compares them with loops that run in C.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import attrgetter, contains, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtllm_fast.models import fusing
from mtllm_fast.models.plain import is_hooked

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PATCHES = ("forward", "_hf_hook", "_compiled_call_impl")  # in a module's ``__dict__``


@dataclass
class Inspection:
    """A model as it was: its modules, their types and children, and where its tensors lie.

    Attributes:
        reason: why it cannot be captured, or None. The rest is whole only then.
    """

    reason: str | None
    device: torch.device
    derived: tuple[Any, Any]  # what fuse() made: a composite, weights in 8 bits
    roots: list[nn.Module] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    types: list[type] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)  # the ``__dict__`` of each
    families: list[dict[str, nn.Module | None]] = field(default_factory=list)  # ``_modules`` of each
    children: list[nn.Module | None] = field(default_factory=list)
    owners: list[dict[str, Tensor | None]] = field(default_factory=list)  # ``_parameters`` and ``_buffers`` of each
    tensors: list[Tensor | None] = field(default_factory=list)
    addresses: list[Any] = field(default_factory=list)

    def reads_alike(self, model: MTLLM) -> bool:
        """Whether the same tensors lie where they lay: a replay reads live memory. ``holds`` asks for the rest too."""
        return _same(_derived(model), self.derived) and _pointers(self.tensors) == self.addresses[0]

    def holds(self, model: MTLLM) -> bool:
        """Whether everything is as it was. The device is that of a parameter, and needs no look of its own."""
        if not _same(_derived(model), self.derived) or not _same(_roots(model), self.roots):
            return False
        if list(map(type, self.modules)) != self.types or any(map(_hooks_of, self.states)):
            return False
        if any(any(map(contains, self.states, repeat(name))) for name in _PATCHES):
            return False
        same_children = _same(chain.from_iterable(map(dict.values, self.families)), self.children)
        same_tensors = _same(chain.from_iterable(map(dict.values, self.owners)), self.tensors)
        return same_children and same_tensors and _addresses(self.tensors) == self.addresses

    def is_same(self, other: Inspection) -> bool:
        """Whether a capture under the other one is as good under this."""
        same = self.device == other.device and _same(self.derived, other.derived)
        return (
            same
            and _same(self.modules, other.modules)
            and _same(self.tensors, other.tensors)
            and self.addresses == other.addresses
        )


def inspect(model: MTLLM) -> Inspection:
    """Look at everything that a capture would depend on."""
    composite, quantised = _derived(model)
    seen = Inspection(None, model.device, (composite, quantised))
    # fuse() puts the projections that it replaces on the host, and nothing reads them. A twin never changes.
    unread = set() if composite is None else {id(module) for module in fusing.projections(model)}
    if quantised is not None:
        unread |= {id(origin.module) for origin in quantised.origins.values()}
    seen.roots = _roots(model)
    waiting = list(seen.roots)
    while waiting:
        module = waiting.pop()
        state = module.__dict__
        seen.reason = _why_not_plain(module) or (None if id(module) in unread else _why_not_here(module, seen.device))
        if seen.reason is not None:
            return seen
        seen.modules.append(module)
        seen.types.append(type(module))
        seen.states.append(state)
        seen.families.append(state["_modules"])
        if id(module) not in unread:
            seen.owners.extend((state["_parameters"], state["_buffers"]))
        waiting.extend(child for child in state["_modules"].values() if child is not None)
    if composite is not None:
        seen.owners.append(vars_of(composite))
    seen.children = list(chain.from_iterable(map(dict.values, seen.families)))
    seen.tensors = list(chain.from_iterable(map(dict.values, seen.owners)))
    seen.addresses = _addresses(seen.tensors)
    return seen


def vars_of(composite: Any) -> dict[str, Tensor | None]:
    """The tensors of a composite, by name."""
    return {name: getattr(composite, name) for name in ("weight", "bias", "residual", "qkv_bias")}


def _roots(model: MTLLM) -> list[nn.Module]:
    return [model.nllb_encoder, model.up_proj, model.llm2vec]


def _hooks_of(state: dict[str, Any]) -> bool:
    before, after, backward_before, backward = map(state.__getitem__, _HOOKS)
    return bool(before or after or backward_before or backward)


def _derived(model: MTLLM) -> tuple[Any, Any]:
    return (None, None) if model._fused is None else (model._fused.composite, model._fused.quantised)


def _same(now: Iterable[Any], before: Sequence[Any]) -> bool:
    """Whether the same objects come in the same order; tensors cannot be compared with ``==``."""
    found = list(now)
    return len(found) == len(before) and all(map(is_, found, before))


def _pointers(tensors: list[Tensor | None]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


def _addresses(tensors: list[Tensor | None]) -> list[Any]:
    """Where each lies and how: address, strides, shape, dtype."""
    present = [tensor for tensor in tensors if tensor is not None]
    columns = (Tensor.stride, attrgetter("shape"), attrgetter("dtype"))
    return [_pointers(tensors), *(list(map(column, present)) for column in columns)]


def _why_not_plain(module: nn.Module) -> str | None:
    kind = type(module)
    if not _is_plain(kind):
        return f"{kind.__module__}.{kind.__qualname__} may do anything when it is called"
    state = module.__dict__
    if is_hooked(module) or "forward" in state or state.get("_compiled_call_impl") is not None:
        return f"a {kind.__name__} is hooked, patched or compiled"
    return None


def _why_not_here(module: nn.Module, device: torch.device) -> str | None:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return f"{name} of a {type(module).__name__} is a {type(tensor).__name__}"
        if tensor.device != device:
            return f"the model is on {device} and {tensor.device}"
    return None


_PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "mtllm_fast.")


@functools.cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether calling such a module does what its parameters say and no more: no adapters, no quantised weights."""
    return kind.__module__.startswith(_PLAIN)
