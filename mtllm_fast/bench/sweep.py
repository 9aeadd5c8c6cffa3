"""``--sweep``: encoding at several batch sizes, and how near each comes to what the machine can do."""

from __future__ import annotations

import dataclasses
from typing import Any

from mtllm_fast.bench.linears import model_weights
from mtllm_fast.bench.measure import encode_flops, interleave, memory_bandwidth
from mtllm_fast.bench.options import BenchOptions
from mtllm_fast.bench.runner import Prepared, Say, add_ratios, checked, make_peers, skipped, summarise
from mtllm_fast.bench.workloads import Workload

# Texts per round at a batch size: enough batches to sort, few enough that single texts do not take all the time.
BATCHES = 8
MIN_TEXTS = 32


def run_sweep(options: BenchOptions, prepared: Prepared, say: Say) -> dict[str, Any]:
    """One point per batch size, each gated and timed as a run of its own; ours gets as many tokens per batch as the
    padded peers' batches hold on average."""
    points = [_point(options, prepared, size, say) for size in sorted(set(options.batch_sizes))]
    rows = {row["name"]: row for row in points[-1]["peers"]}
    peers = [
        {key: rows[name][key] for key in ("name", "status", "reason", "error") if key in rows[name]} for name in rows
    ]
    record = prepared.record(options, peers)
    weights = model_weights(prepared.stack)
    record["streamed_bytes"] = sum(weight.numel() * weight.element_size() for weight in weights)
    record["bandwidth_bytes_per_s"] = memory_bandwidth(prepared.stack.device)
    record["points"] = points
    return record


def _point(options: BenchOptions, prepared: Prepared, size: int, say: Say) -> dict[str, Any]:
    stack, every = prepared.stack, prepared.workload
    texts = every.ids[: max(MIN_TEXTS, BATCHES * size)]
    workload = Workload(every.name, texts)
    batch_tokens = round(size * workload.tokens / len(texts))
    here = dataclasses.replace(options, batch_size=size, batch_tokens=batch_tokens)
    gate = dataclasses.replace(prepared.gate, reference_all=prepared.gate.reference_all[: len(texts)])
    at_size = dataclasses.replace(prepared, workload=workload, gate=gate)
    timed_peers, rows = checked(make_peers(here, stack, workload), at_size, lambda message: say(f"{size}: {message}"))
    say(f"{size}: timing")
    timings = interleave(timed_peers, options.rounds or 1, stack.device)
    for peer in timed_peers:
        flops = encode_flops(stack, peer.workload.lengths) if peer.same_semantics else None
        rows[peer.name].update(summarise(peer, timings[peer.name], flops, prepared.ceiling))
    rows |= skipped(options)
    ordered = [rows[name] for name in options.peers or ()]
    add_ratios(ordered)
    return {"batch_size": size, "batch_tokens": batch_tokens, "texts": len(texts), "peers": ordered}
