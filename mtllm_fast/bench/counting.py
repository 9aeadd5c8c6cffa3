"""Counts the work of a piece of code without a GPU: FLOPs, kernel launches and bytes, from the ops that it calls.

Meant for tensors without data (``device="meta"``): nothing is computed, so full-size models can be counted anywhere. An
op of this library counts as what its kernels declare (``core/registered.py``), any other as one launch that touches its
arguments and results once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mtllm_fast.core.registered import DECLARED, Declared, touched_bytes

_ONE_KERNEL = Declared(1, None)
_FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh", "prim::")


class Work(NamedTuple):
    """What a call did."""

    flops: int
    launches: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.3f} GFLOP, {self.launches} launches, {self.bytes / 1e6:.2f} MB"


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        is_view = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)
        if not is_view and not name.startswith(_FREE):
            declared = DECLARED.get(name, _ONE_KERNEL)
            given = (*args, *(kwargs or {}).values())
            launches = declared.launches
            self.launches += launches if isinstance(launches, int) else launches(given, out)
            moved = declared.moved_bytes
            self.bytes += touched_bytes(given, out) if moved is None else moved(given, out)
        return out


@torch.no_grad()
def counted_work(function: Callable[[], Any]) -> Work:
    """The work of one forward call.

    >>> x = torch.empty(8, 16, device="meta")
    >>> counted_work(lambda: (x @ x.t()).relu())
    Work(flops=2048, launches=2, bytes=1792)
    """
    counter = _Counter()
    with FlopCounterMode(display=False) as flops, counter:
        function()
    return Work(flops.get_total_flops(), counter.launches, counter.bytes)


def peak_bytes(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes of a device that live at once during a call beyond those before it, results included: what torch's
    allocator gave out, inside of ops too (GPU: its high-water mark; CPU: every allocation, by the profiler).

    >>> peak_bytes(lambda: torch.ones(1024).exp() + 1) // 4096
    2
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    live = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
