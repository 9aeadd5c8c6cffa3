"""``--mode train``: one step of self-distillation by every peer; gate, memory, interleaved rounds, record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from mtllm_fast.bench.counting import peak_bytes
from mtllm_fast.bench.facts import facts
from mtllm_fast.bench.gate import StepGate
from mtllm_fast.bench.measure import gemm_ceiling, interleave, spread, train_step_flops
from mtllm_fast.bench.options import BenchOptions
from mtllm_fast.bench.peers import Peer
from mtllm_fast.bench.runner import SCHEMA, Say, summarise
from mtllm_fast.bench.train_peers import LORA_DROPOUT, TrainStack, losses, make_train_stack, result, step
from mtllm_fast.bench.truth import true_step
from mtllm_fast.bench.workloads import Workload, make_workload

GATE_TEXTS = 4  # float64 with a gradient, at 8B too


def make_gate(train: TrainStack, few: Workload, batch: Workload) -> StepGate:
    """The gate of one batch, from the reference's steps without dropout. Leaves dropout off."""
    train.set_dropout(0.0)
    # Checkpointed: the reference must fit where one of the peers does.
    reference = step(train, losses(train)["reference-checkpointed"])
    return StepGate(
        true_step(train.stack, few.ids, train.llm_texts(few.ids), train.trained),
        result(train, reference, few.ids),
        result(train, reference, batch.ids),
        train.dtype,
    )


def check(peer: Peer, train: TrainStack, gate: StepGate, few: Workload) -> dict[str, Any]:
    """Gate one peer without dropout, then warm it up with dropout and take its memory."""
    start = time.perf_counter()
    train.set_dropout(0.0)
    try:
        error = gate.check(
            peer.name, result(train, peer.encode, few.ids), result(train, peer.encode, peer.workload.ids)
        )
        train.set_dropout(LORA_DROPOUT)
        peer.encode(peer.workload.ids)
        for parameter in train.trained.values():
            parameter.grad = None  # the step's own gradients are part of its memory
        memory = peak_bytes(lambda: peer.encode(peer.workload.ids), train.device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"status": "skipped", "reason": f"a batch of {peer.workload.tokens:,} token pairs does not fit"}
    return {"status": "ok", "error": error, "step_bytes": memory, "warmup_s": time.perf_counter() - start}


def run_train(options: BenchOptions, say: Say) -> dict[str, Any]:
    """The record of resolved options: rates in token pairs (one on each side), memory of a step beyond the weights."""
    say(f"building the {options.size} stack with LoRA ({options.dtype}, {options.device})")
    train = make_train_stack(options)
    vocab_size = train.stack.encoder.config.vocab_size
    batch = make_workload(options.workload, options.sentences or 1, vocab_size, options.seed)
    few = batch.sample(GATE_TEXTS)
    say("computing the float64 step on a sample")
    gate = make_gate(train, few, batch)
    every = losses(train)
    peers = [Peer(name, step(train, every[name]), batch) for name in options.peers or ()]
    rows: dict[str, dict[str, Any]] = {}
    for peer in peers:
        say(f"checking and warming up {peer.name}")
        rows[peer.name] = {"name": peer.name, **check(peer, train, gate, few)}
    runnable = [peer for peer in peers if rows[peer.name]["status"] == "ok"]
    ceiling = gemm_ceiling(train.device, train.dtype)
    say(f"timing {len(runnable)} peers in {options.rounds} interleaved rounds")
    timings = interleave(runnable, options.rounds or 1, train.device)
    flops = train_step_flops(train.stack, batch.lengths)
    for peer in runnable:
        rows[peer.name].update(summarise(peer, timings[peer.name], flops, ceiling))
        rows[peer.name]["peak_bytes"] = rows[peer.name].pop("step_bytes")
    add_step_ratios(list(rows.values()))
    return {
        "schema": SCHEMA,
        "benchmark": "train",
        **facts(train.device),
        "options": dataclasses.asdict(options),
        "workload": {
            "texts": len(batch.ids),
            "tokens": batch.tokens,
            "mean_length": batch.tokens / len(batch.ids),
            "max_length": int(batch.lengths.max()),
            "flops_per_token": flops / batch.tokens,
        },
        "gate": {
            "texts": len(few.ids), "reference_error": gate.reference_error, "allowed_error": gate.allowed_error
        },
        "gemm_ceiling_tflops": ceiling / 1e12,
        "memory_kind": "step",
        "trained_parameters": sum(parameter.numel() for parameter in train.trained.values()),
        "peers": list(rows.values()),
    }  # fmt: skip


def add_step_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Of each peer to the reference with the same checkpointing: speed in the same round, and memory."""
    ok = {row["name"]: row for row in rows if row["status"] == "ok"}
    for name, row in ok.items():
        base = ok.get("reference-checkpointed" if name.endswith("-checkpointed") else "reference")
        row["ratio_to_reference"] = base and spread(
            [theirs / own for own, theirs in zip(row["seconds"], base["seconds"], strict=True)]
        )
        row["memory_ratio_to_reference"] = base and row["peak_bytes"] / base["peak_bytes"]
