"""What every op benchmark shares: clocks, cold cache, bytes and FLOPs, the correctness gate, the table.

An op benchmark is a pytest-benchmark module, ``benchmarks/bench_<op>.py``::

    pytest benchmarks --benchmark-only                      # every op
    pytest benchmarks --benchmark-only --benchmark-json=ops.json

It has one parametrised test that hands a ``Call`` to ``measure`` for each *peer* (the op's backends, its reference,
``torch.compile`` of the reference, other libraries) and a function ``why_not(peer)`` that says why a peer cannot run
here; such tests are deselected and the reason is printed. On a GPU a call is timed by CUDA events after a write that
evicts the L2 cache; on a CPU by the wall clock. GB/s counts the bytes that the op must move at least (each input read
once, each output written once). The floor of a call is the longer of these bytes at the bandwidth that a large copy
reaches on the same device and its FLOPs at the speed of a large matrix product in its dtype.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from mtllm_fast.bench.gate import relative_error
from mtllm_fast.bench.measure import gemm_ceiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
ROUNDS = 50 if ON_GPU else 15
WARMUP_ROUNDS = 5 if ON_GPU else 2
SECONDS = 120.0 if ON_GPU else 4.0  # per measurement, roughly; a GPU's first call compiles
ROWS: list[dict[str, Any]] = []
"""Everything measured in this session; ``conftest.py`` prints it as a table."""
TABLES: list[Table] = []
"""Tables of benchmarks whose work is not counted in bytes and FLOPs; printed as they are."""


@dataclass(frozen=True)
class Call:
    """One measured call and the work that it must do at least.

    ``output`` are the tensors that the call returns, ``truth`` the same in float64, and ``allowed_error`` the largest
    relative error at which a time is worth taking.
    """

    op: str
    peer: str
    case: str
    run: Callable[[], tuple[Tensor, ...]]
    moved_bytes: int
    flops: int
    truth: tuple[Tensor, ...]
    allowed_error: tuple[float, ...]
    dtype: torch.dtype


class EventTime:
    """A CUDA event that pytest-benchmark can subtract: ``end - start`` waits, and is in seconds of device time."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: EventTime) -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


timer: Callable[[], Any] = EventTime if ON_GPU else time.perf_counter


@functools.cache
def _eviction_buffer() -> Tensor:
    """Several times the L2 cache of any GPU so far."""
    return torch.empty(512 * 2**20, dtype=torch.uint8, device=DEVICE)


def cold_cache() -> None:
    """Evict the L2 cache (GPU). The write also keeps the queue busy while the host prepares the timed launch."""
    if ON_GPU:
        _eviction_buffer().zero_()


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written: the ceiling of every memory-bound op. Best of ten."""
    elements = 2**29 if ON_GPU else 2**26
    source = torch.randint(-128, 127, (elements,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start = timer()
        target.copy_(source)
        seconds.append(timer() - start)
    return 2 * elements / min(seconds)


@functools.cache
def product_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the ceiling of every compute-bound op."""
    return gemm_ceiling(DEVICE, dtype)


def floor_seconds(call: Call) -> float:
    """No implementation of the op can be faster than this on the device."""
    return max(call.moved_bytes / copy_bandwidth(), call.flops / product_speed(call.dtype))


def check(call: Call) -> float:
    """Run the call once; its largest relative error.

    Raises:
        AssertionError: an output is missing, misshapen or too far from the truth.
    """
    outputs = call.run()
    if [output.shape for output in outputs] != [truth.shape for truth in call.truth]:
        raise AssertionError(f"{call.op} ({call.peer}): shapes {[tuple(output.shape) for output in outputs]}")
    errors = [relative_error(output, truth) for output, truth in zip(outputs, call.truth, strict=True)]
    for index, (error, allowed) in enumerate(zip(errors, call.allowed_error, strict=True)):
        if not error <= allowed:
            raise AssertionError(
                f"{call.op} ({call.peer}), {call.case}: output {index} errs by {error:.2e}, allowed {allowed:.2e}; "
                "a wrong result is not timed"
            )
    return max(errors)


def measure(benchmark: Any, call: Call) -> None:
    """Check the call, time it with pytest-benchmark's fixture, and keep a row for the table and the JSON."""
    start = time.perf_counter()
    error = check(call)
    seconds = time.perf_counter() - start
    rounds = min(ROUNDS, max(3, int(SECONDS / seconds)))  # a slow call on a CPU is not run for minutes
    benchmark.group = f"{call.op} {call.case}"
    benchmark.pedantic(call.run, setup=cold_cache, rounds=rounds, warmup_rounds=min(WARMUP_ROUNDS, rounds // 3))
    if benchmark.stats is None:  # --benchmark-disable: the call was checked, and that is all
        return
    seconds = benchmark.stats.stats.median
    row = {
        "op": call.op,
        "peer": call.peer,
        "case": call.case,
        "median_us": seconds * 1e6,
        "gb_per_s": call.moved_bytes / seconds / 1e9,
        "copy_gb_per_s": copy_bandwidth() / 1e9,
        "of_copy_bandwidth": call.moved_bytes / seconds / copy_bandwidth(),
        "of_floor": floor_seconds(call) / seconds,
        "gflop_per_s": call.flops / seconds / 1e9,
        "moved_bytes": call.moved_bytes,
        "flops": call.flops,
        "error": error,
    }
    benchmark.extra_info.update(row)
    if ON_GPU:
        benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
    ROWS.append(row)


def results_table() -> Table:
    """One row per measured call, grouped by op and case, with the speed relative to the reference of the group."""
    table = Table(
        title=f"op benchmarks on {torch.cuda.get_device_name() if ON_GPU else 'CPU'}, "
        f"copy {copy_bandwidth() / 1e9:,.0f} GB/s",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("op, case, peer", no_wrap=True)
    for heading in ("median us", "GB/s", "TFLOP/s", "of floor", "x ref"):
        table.add_column(heading, justify="right", no_wrap=True)
    reference = {(row["op"], row["case"]): row["median_us"] for row in ROWS if row["peer"] == "reference"}
    previous = None
    for row in sorted(ROWS, key=lambda row: (row["op"], row["case"])):
        key = (row["op"], row["case"])
        speedup = f"{reference[key] / row['median_us']:.2f}x" if key in reference else "-"
        if key != previous:
            table.add_row(f"[bold]{row['op']} {row['case']}[/]")
        table.add_row(
            f"  {row['peer']}",
            f"{row['median_us']:,.1f}",
            f"{row['gb_per_s']:,.1f}",
            f"{row['gflop_per_s'] / 1e3:,.2f}",
            f"{row['of_floor']:.0%}",
            speedup,
        )
        previous = key
    return table
