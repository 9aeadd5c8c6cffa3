"""What it costs a CPU that temporaries get fresh memory from the system (``mtllm_fast/core/buffers.py`` uses it again).

    python benchmarks/fresh_memory.py --size small --out fresh_memory.jsonl

Encodes the same texts in turns with and without memory that is used again, and multiplies the bare products; one JSON
line has the seconds, page faults and seconds of the system of every turn. How much the C library gives back depends on
what a process has allocated before: compare several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mtllm_fast.bench import peers
from mtllm_fast.bench.facts import facts
from mtllm_fast.bench.linears import BARE_GEMMS, bare_gemms
from mtllm_fast.bench.sizes import SIZES, make_stack
from mtllm_fast.bench.workloads import make_workload
from mtllm_fast.core import buffers

BATCH_TOKENS = 2048


@contextlib.contextmanager
def fresh_memory() -> Iterator[None]:
    with (
        mock.patch.object(buffers, "reused", contextlib.nullcontext),
        mock.patch.object(peers, "reused", contextlib.nullcontext),
    ):
        yield


def observed(call: Callable[[], object]) -> dict[str, float]:
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "page_faults": after.ru_minflt - before.ru_minflt,
        "system_seconds": after.ru_stime - before.ru_stime,
    }


def measure(size: str, sentences: int, rounds: int) -> dict[str, Any]:
    device = torch.device("cpu")
    stack = make_stack(size, device, torch.float32, seed=0)
    workload = make_workload("sentences", sentences, stack.encoder.config.vocab_size, 0)
    encode = peers.packed_encode(peers.inference_model(stack), BATCH_TOKENS)
    products, _ = bare_gemms(stack, workload, BATCH_TOKENS)

    def fresh() -> None:
        with fresh_memory():
            encode(workload.ids)

    calls = {
        "used again": lambda: encode(workload.ids),
        "fresh": fresh,
        BARE_GEMMS: lambda: products.encode(workload.ids),
    }
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in [*calls][turn % 3 :] + [*calls][: turn % 3]:
            turns[name].append(observed(calls[name]))
    turns = {name: rows[1:] for name, rows in turns.items()}  # the first warms up

    def ratio(one: str, other: str) -> float:
        pairs = zip(turns[one], turns[other], strict=True)
        return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)

    return {
        "benchmark": "fresh_memory",
        "size": size,
        "tokens": workload.tokens,
        "fresh_over_used_again": ratio("fresh", "used again"),
        "used_again_over_bare_gemms": ratio("used again", BARE_GEMMS),
        "turns": turns,
        **facts(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    record = measure(chosen.size, chosen.sentences, chosen.rounds)
    with chosen.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    faults = {name: statistics.median(row["page_faults"] for row in rows) for name, rows in record["turns"].items()}
    print(f"fresh over used again: {record['fresh_over_used_again']:.3f}; page faults: {faults}")


if __name__ == "__main__":
    main()
