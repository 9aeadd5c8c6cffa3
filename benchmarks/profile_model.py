"""Where the time of ours goes on this GPU, kernel by kernel: what explains a target that was missed.

    python benchmarks/profile_model.py --size 8b --out profile.json

Profiles one call each of encoding full texts (bf16, and fp8 where the GPU has it), of one sentence, and of a training
step, after a warm-up. A record holds, per run, the wall time without the profiler, the summed time of all kernels, and
the kernels by total time with their number of launches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mtllm_fast.bench.facts import facts
from mtllm_fast.bench.measure import timed
from mtllm_fast.bench.options import BenchOptions
from mtllm_fast.bench.peers import fp8_model, inference_model, packed_encode
from mtllm_fast.bench.sizes import SIZES, make_stack
from mtllm_fast.bench.train_peers import losses, make_train_stack, step
from mtllm_fast.bench.workloads import MEAN_SENTENCE, make_workload, one_text
from mtllm_fast.models.precision import why_not_here

TOP = 40
NAME = 110  # characters of a kernel's name that tell it from others


def kernels(run: Callable[[], object], device: torch.device, repeats: int = 5) -> dict[str, Any]:
    """Profile one call of ``run`` after the calls that time it."""
    for _ in range(3):  # compiles, and captures a graph where there is one
        run()
    seconds = sorted(timed(run, device) for _ in range(repeats))[repeats // 2]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        timed(run, device)
    rows = [
        {"kernel": event.key[:NAME], "launches": event.count, "us": event.self_device_time_total}
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]
    rows.sort(key=lambda row: -row["us"])
    return {
        "seconds": seconds,
        "kernel_seconds": sum(row["us"] for row in rows) / 1e6,
        "launches": sum(row["launches"] for row in rows),
        "kernels": rows[:TOP],
    }


def encoding(size: str, device: torch.device) -> dict[str, Any]:
    stack = make_stack(size, device, torch.bfloat16, seed=0)
    vocabulary = stack.encoder.config.vocab_size
    full, one = make_workload("full", 32, vocabulary, 0), one_text(MEAN_SENTENCE, vocabulary, 0)
    found = {}
    models = {"ours": inference_model}
    if why_not_here("fp8", device, torch.bfloat16) is None:
        models["ours-fp8"] = fp8_model
    for name, make in models.items():
        encode = packed_encode(make(stack), batch_tokens=full.tokens)
        for what, texts in (("32 texts of 512 tokens", full.ids), ("one sentence", one.ids)):
            found[f"{name}, {what}"] = kernels(lambda encode=encode, texts=texts: encode(texts), device)
    return found


def training(size: str, device: torch.device) -> dict[str, Any]:
    options = BenchOptions(mode="train", size=size, dtype="bf16", device=str(device)).resolved()
    train = make_train_stack(options)
    texts = make_workload("documents", 44, train.stack.encoder.config.vocab_size, 0).ids
    run = step(train, losses(train)["ours"])
    return {f"training step, {len(texts)} documents": kernels(lambda: run(texts), device, repeats=3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    runs = encoding(arguments.size, device)
    torch.cuda.empty_cache()
    runs |= training(arguments.size, device)
    record = {"profile": arguments.size, **facts(device), "runs": runs}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, found in runs.items():
        total = found["kernel_seconds"]
        print(f"\n{name}: {1e3 * found['seconds']:.2f} ms, kernels {1e3 * total:.2f} ms, {found['launches']} launches")
        for row in found["kernels"][:16]:
            print(f"{row['us'] / 1e6 / total:7.1%} {row['launches']:6d}  {row['kernel'][:90]}")


if __name__ == "__main__":
    main()
