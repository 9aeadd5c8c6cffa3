"""The choice of a backend for one call of an op, and the words for it.

An op lists its backends, best first, each with a function that says why it cannot serve a call (None: it can).
``auto`` takes the first that can; a backend named by the user serves or raises. ``MTLLM_FAST_BACKEND`` puts a name in
the place of ``auto``'s choice in a whole process, for the ops that have that backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mtllm_fast.core.devices import triton_is_interpreted
from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.core.settings import BACKEND

WhyNot = Callable[..., "str | None"]


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why the others do not; ``print`` it."""

    op: str
    requested: str
    chosen: str | None
    why_not: Mapping[str, str | None]
    """For every backend, best first: why it cannot serve this call, or None if it can."""

    def __str__(self) -> str:
        lines = [f"{self.op}(backend={self.requested!r}) -> {self.chosen or 'no backend can serve this call'}"]
        for name, reason in self.why_not.items():
            verdict = "chosen" if name == self.chosen else f"no: {reason}" if reason else "could serve"
            lines.append(f"  {name}: {verdict}")
        return "\n".join(lines)


def _is_for_auto(name: str) -> bool:
    """Interpreted Triton serves whoever names it (tests); it is neither fast nor safe to run in two threads."""
    return name != "triton" or not triton_is_interpreted()


def _preferred() -> str:
    """What the environment has in place of ``auto``; it is read once, so that compiled models see a constant.

    Raises:
        UnsupportedBackendError: a name that no op has.
    """
    name = BACKEND.value()
    if name not in _NAMES:
        raise UnsupportedBackendError(f"{BACKEND.name} must be one of {', '.join(_NAMES)}, got {name!r}")
    return name


_NAMES = ("auto", "cuda", "triton", "cpu", "reference")
_PREFERRED = _preferred()


class Backends:
    """The backends of one op, best first.

    >>> backends = Backends("twice", {"cuda": lambda x: "no GPU", "reference": lambda x: None})
    >>> backends.choose("auto", 1)
    'reference'
    >>> print(backends.explain("cuda", 1))
    twice(backend='cuda') -> no backend can serve this call
      cuda: no: no GPU
      reference: could serve
    """

    def __init__(self, op: str, why_not: Mapping[str, WhyNot]) -> None:
        self.op = op
        self.why_not = dict(why_not)
        self._modules: dict[str, ModuleType] = {}

    def choose(self, requested: str, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that serves this call; ``args`` are handed to the ``why_not`` functions."""
        if requested == "auto":
            preferred = self.why_not.get(_PREFERRED)
            if preferred is not None and preferred(*args, **kwargs) is None:
                return _PREFERRED
            for name, why_not in self.why_not.items():
                if _is_for_auto(name) and why_not(*args, **kwargs) is None:
                    return name
            reasons = "; ".join(f"{name}: {why_not(*args, **kwargs)}" for name, why_not in self.why_not.items())
            raise UnsupportedBackendError(f"{self.op}: no backend can serve this call: {reasons}")
        if requested not in self.why_not:
            known = ", ".join(["auto", *self.why_not])
            raise UnsupportedBackendError(f"{self.op}: there is no backend {requested!r}; there are {known}")
        reason = self.why_not[requested](*args, **kwargs)
        if reason is None:
            return requested
        able = [name for name, why_not in self.why_not.items() if why_not(*args, **kwargs) is None]
        raise UnsupportedBackendError(
            f"{self.op}: backend {requested!r} cannot serve this call: {reason}. What would work: {', '.join(able)}"
        )

    def load(self, requested: str, *args: Any, **kwargs: Any) -> ModuleType:
        """The module of the backend that serves this call: ``reference.py`` or ``NAME_backend.py`` in the op's folder.

        Backends are imported when they are first chosen, so that importing an op needs neither Triton nor an extension.
        """
        chosen = self.choose(requested, *args, **kwargs)
        if chosen not in self._modules:
            file = chosen if chosen == "reference" else f"{chosen}_backend"
            self._modules[chosen] = importlib.import_module(f"mtllm_fast.ops.{self.op}.{file}")
        return self._modules[chosen]

    def explain(self, requested: str, *args: Any, **kwargs: Any) -> Explanation:
        """What ``choose`` does for the same arguments, told instead of done."""
        reasons = {name: why_not(*args, **kwargs) for name, why_not in self.why_not.items()}
        able = [name for name, reason in reasons.items() if reason is None]
        fit = [name for name in able if _is_for_auto(name)]
        candidates = ([_PREFERRED] if _PREFERRED in able else fit) if requested == "auto" else [requested]
        chosen = next((name for name in candidates if name in able), None)
        return Explanation(self.op, requested, chosen, reasons)
