"""One run of the benchmark, from options to a JSON-ready record: build, gate, warm up, time, summarise."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtllm_fast.bench.facts import facts
from mtllm_fast.bench.gate import Gate
from mtllm_fast.bench.linears import BARE_GEMMS, bare_gemms
from mtllm_fast.bench.measure import MemoryMeter, Timing, encode_flops, gemm_ceiling, interleave, spread
from mtllm_fast.bench.options import BenchOptions
from mtllm_fast.bench.peers import (
    PEERS,
    TRANSLATE_TEST,
    Encode,
    Peer,
    fp8_model,
    inference_model,
    packed_encode,
    padded_encode,
    reference_forward,
    translate_encode,
)
from mtllm_fast.bench.sizes import Stack, make_stack, make_translator
from mtllm_fast.bench.truth import true_embeddings
from mtllm_fast.bench.workloads import MEAN_SENTENCE, Workload, make_workload, one_text
from mtllm_fast.core.errors import WrongResultError
from mtllm_fast.models.precision import why_not_here

GATE_TEXTS = 16
# Rounding errors add up over the layers of random weights (0.983 at 8B); a wrong scale leaves nothing of a cosine.
FP8_COSINE = 0.95
SCHEMA = 1

Say = Callable[[str], None]
Rows = dict[str, dict[str, Any]]


def make_peers(options: BenchOptions, stack: Stack, workload: Workload) -> list[Peer]:
    """The chosen peers over one stack that can run here, in the order of ``PEERS``."""
    forward, size, device = reference_forward(stack), options.batch_size, stack.device
    names = [name for name in options.peers or PEERS if why_not(name, device, stack.dtype) is None]
    encoders: dict[str, Callable[[], Encode]] = {
        "reference": lambda: padded_encode(forward, device, size, sort=False),
        "reference-sorted": lambda: padded_encode(forward, device, size, sort=True),
        "liger": lambda: _liger_encode(stack, size),
        "compiled": lambda: padded_encode(torch.compile(forward, dynamic=True), device, size, sort=True),
        "ours": lambda: packed_encode(inference_model(stack), options.batch_tokens or 1),
        "ours-fp8": lambda: packed_encode(fp8_model(stack), options.batch_tokens or 1),
    }
    cosines = {"ours-fp8": FP8_COSINE}
    peers = [
        Peer(name, encoders[name](), workload, min_cosine=cosines.get(name))
        for name in names
        if name not in TRANSLATE_TEST
    ]
    translations = [name for name in names if name in TRANSLATE_TEST]
    if translations:
        translator = make_translator(stack, options.seed)
        sample = workload.sample(options.translate_sentences or 1)
        for name in translations:
            beams = 4 if name == "translate-beam4" else 1
            encode = translate_encode(stack, translator, size, beams)
            peers.append(Peer(name, encode, sample, same_semantics=False))
    return sorted(peers, key=lambda peer: PEERS.index(peer.name))


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a peer cannot run on this machine, or None if nothing is known against it."""
    if name == "ours-fp8":
        return why_not_here("fp8", device, dtype)
    if name != "liger":
        return None
    from mtllm_fast.bench.liger import why_no_liger

    return why_no_liger(device)


def _liger_encode(stack: Stack, batch_size: int) -> Encode:
    from mtllm_fast.bench.liger import liger_forward

    return padded_encode(liger_forward(stack), stack.device, batch_size, sort=True)


def skipped(options: BenchOptions) -> Rows:
    """The rows of the chosen peers that cannot run here, with the reason."""
    reasons = {name: why_not(name, options.torch_device, options.torch_dtype) for name in options.peers or ()}
    return {
        name: {"name": name, "status": "skipped", "reason": reason}
        for name, reason in reasons.items()
        if reason is not None
    }


def compiled_graphs() -> int:
    """Graphs that torch.compile has built so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def warm_up(peer: Peer, sample: Workload, gate: Gate, device: torch.device) -> dict[str, Any]:
    """First passes of one peer, untimed in the results, and its gate.

    Returns what is known of the peer so far; ``status`` is ``"skipped"`` with the ``reason`` when torch.compile has no
    working compiler here. Any other failure is raised.
    """
    graphs = compiled_graphs()
    start = time.perf_counter()
    try:
        everything = peer.encode(peer.workload.ids)
    except Exception as error:
        if peer.name != "compiled":
            raise
        return {"status": "skipped", "reason": f"torch.compile fails here: {str(error).strip().splitlines()[0]}"}
    row: dict[str, Any] = {"status": "ok"}
    if peer.min_cosine is not None:
        row["error"], row["cosine"] = gate.check_cosine(peer.name, peer.encode(sample.ids), everything, peer.min_cosine)
    elif peer.same_semantics:
        row["error"] = gate.check(peer.name, peer.encode(sample.ids), everything)
    elif not bool(torch.isfinite(everything).all()):
        raise WrongResultError(f"{peer.name}: an embedding is not finite; no speed is reported for a wrong result")
    row["warmup_s"] = time.perf_counter() - start
    if peer.name == "compiled":
        row["graphs"] = compiled_graphs() - graphs
    return row


def summarise(peer: Peer, timing: Timing, flops: float | None, ceiling: float) -> dict[str, Any]:
    """Rates of one peer over its rounds. ``flops`` counts the useful work only, so padding lowers the fraction."""
    seconds = timing.seconds
    texts, tokens = len(peer.workload.ids), peer.workload.tokens
    return {
        "texts": texts,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": spread([tokens / s for s in seconds]),
        "sentences_per_s": spread([texts / s for s in seconds]),
        "milliseconds": spread([1e3 * s for s in seconds]),
        "gemm_fraction": None if flops is None else float(flops / spread(seconds)["median"] / ceiling),
        "peak_bytes": timing.peak_bytes,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Median over the rounds of each peer's sentences/s against the two references' in the same round."""
    by_name = {row["name"]: row for row in rows if row["status"] == "ok"}
    for base in ("reference", "reference-sorted"):
        key = f"ratio_to_{base.replace('-', '_')}"
        for row in by_name.values():
            if base in by_name:
                own, other = row, by_name[base]
                ratios = [
                    (own["texts"] / own_s) / (other["texts"] / other_s)
                    for own_s, other_s in zip(own["seconds"], other["seconds"], strict=True)
                ]
                row[key] = spread(ratios)
            else:
                row[key] = None


@dataclass
class Prepared:
    """What every way of measuring encoding starts from."""

    stack: Stack
    workload: Workload
    sample: Workload
    gate: Gate
    ceiling: float  # FLOP/s

    def record(self, options: BenchOptions, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The JSON-ready record of a run; ``rows`` has one of each peer."""
        flops = encode_flops(self.stack, self.workload.lengths)
        return {
            "schema": SCHEMA,
            "benchmark": "throughput" if options.kind == "encode" else options.kind,
            **facts(self.stack.device),
            "options": dataclasses.asdict(options),
            "workload": {
                "texts": len(self.workload.ids),
                "tokens": self.workload.tokens,
                "mean_length": self.workload.tokens / len(self.workload.ids),
                "max_length": int(self.workload.lengths.max()),
                "flops_per_token": flops / self.workload.tokens,
            },
            "gate": {
                "texts": len(self.sample.ids),
                "reference_error": self.gate.reference_error,
                "allowed_error": self.gate.allowed_error,
            },
            "gemm_ceiling_tflops": self.ceiling / 1e12,
            "memory_kind": MemoryMeter(self.stack.device).kind,
            "weights_bytes": sum(p.numel() * p.element_size() for p in self.stack.model.parameters()),
            "peers": list(rows),
        }


def prepare(options: BenchOptions, say: Say) -> Prepared:
    """The stack, the texts, the gate and the ceiling of resolved options."""
    device, dtype = options.torch_device, options.torch_dtype
    say(f"building the {options.size} stack ({options.dtype}, {device})")
    stack = make_stack(options.size, device, dtype, options.seed)
    vocab_size = stack.encoder.config.vocab_size
    if options.kind == "latency":
        workload = one_text(MEAN_SENTENCE, vocab_size, options.seed)
        sample = make_workload("sentences", GATE_TEXTS, vocab_size, options.seed)
    else:
        workload = make_workload(options.workload, options.sentences or 1, vocab_size, options.seed)
        sample = workload.sample(GATE_TEXTS)
    say("computing float64 truth on a sample")
    reference = padded_encode(reference_forward(stack), device, options.batch_size, sort=False)
    gate = Gate(true_embeddings(stack, sample.ids), reference(sample.ids), reference(workload.ids))
    return Prepared(stack, workload, sample, gate, gemm_ceiling(device, dtype))


def checked(peers: Sequence[Peer], prepared: Prepared, say: Say) -> tuple[list[Peer], Rows]:
    """Warm up and gate every peer: those that can be timed, and what is known of each so far."""
    rows: Rows = {}
    for peer in peers:
        say(f"warming up and checking {peer.name}")
        rows[peer.name] = {
            "name": peer.name, **warm_up(peer, prepared.sample, prepared.gate, prepared.stack.device)
        }  # fmt: skip
    return [peer for peer in peers if rows[peer.name]["status"] == "ok"], rows


def run(options: BenchOptions, say: Say = lambda message: None) -> dict[str, Any]:
    """Run the benchmark and return its record: options, hardware, workload, and one row per peer.

    Args:
        options: what to run.
        say: called with a line about what is going on.

    Raises:
        ValueError: options that make no sense.
        WrongResultError: a peer computed something else than the reference; nothing was timed.

    Example:

        >>> from mtllm_fast.bench import BenchOptions, run
        >>> record = run(BenchOptions(size="tiny", rounds=2, sentences=8, peers=("reference", "ours")))
        >>> [row["name"] for row in record["peers"]]
        ['reference', 'ours']
    """
    options = options.resolved()
    if options.kind == "train":
        from mtllm_fast.bench.train import run_train

        return run_train(options, say)
    prepared = prepare(options, say)
    if options.kind == "sweep":
        from mtllm_fast.bench.sweep import run_sweep

        return run_sweep(options, prepared, say)
    return _run_once(options, prepared, say)


def _run_once(options: BenchOptions, prepared: Prepared, say: Say) -> dict[str, Any]:
    """Encoding, or the latency of one text: every peer on one workload."""
    stack, workload, rounds = prepared.stack, prepared.workload, options.rounds or 1
    timed_peers, rows = checked(make_peers(options, stack, workload), prepared, say)
    say("finding the fastest matrix product")
    gemms, product = bare_gemms(stack, workload, options.batch_tokens or 1)
    graphs = compiled_graphs()
    say(f"timing {len(timed_peers)} peers in {rounds} interleaved rounds")
    timings = interleave([*timed_peers, gemms], rounds, stack.device)
    for peer in timed_peers:
        flops = encode_flops(stack, peer.workload.lengths) if peer.same_semantics else None
        rows[peer.name].update(summarise(peer, timings[peer.name], flops, prepared.ceiling))
        rows[peer.name]["ratio_to_bare_gemms"] = (
            over(timings[peer.name].seconds, timings[BARE_GEMMS].seconds) if peer.same_semantics else None
        )
    if rows.get("compiled", {}).get("status") == "ok":
        rows["compiled"]["graphs_while_timed"] = compiled_graphs() - graphs
    rows |= skipped(options)
    ordered = [rows[name] for name in options.peers or ()]
    add_ratios(ordered)
    record = prepared.record(options, ordered)
    record["bare_gemms"] = {"product": product, "seconds": timings[BARE_GEMMS].seconds}
    return record


def over(seconds: Sequence[float], floor: Sequence[float]) -> dict[str, float]:
    """Median over the rounds of a time in units of another's in the same round."""
    return spread([own / other for own, other in zip(seconds, floor, strict=True)])
