"""One run of the throughput benchmark, from options to a JSON-ready record: build, gate, warm up, time, summarise."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mtllm_fast.bench.facts import facts
from mtllm_fast.bench.gate import Gate
from mtllm_fast.bench.measure import MemoryMeter, Timing, encode_flops, gemm_ceiling, interleave, spread
from mtllm_fast.bench.peers import (
    PEERS,
    TRANSLATE_TEST,
    Peer,
    packed_encode,
    padded_encode,
    reference_forward,
    resolve_peers,
    translate_encode,
)
from mtllm_fast.bench.sizes import SIZES, Stack, make_stack, make_translator
from mtllm_fast.bench.truth import true_embeddings
from mtllm_fast.bench.workloads import WORKLOADS, Workload, make_workload
from mtllm_fast.core.errors import WrongResultError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEAN_LENGTH = {"sentences": 40, "documents": 358, "mixed": 200}
# Enough tokens for a round to last seconds: long against a clock tick, short enough for many rounds. "small" reads as
# many sentences as FLORES-200's devtest has (1012): with 256 the padding of the unsorted reference, and with it the
# ratio to it, moves by 18 % with the texts that were drawn (1.77 to 2.13 times the real tokens over 12 seeds).
ROUND_TOKENS = {"tiny": 16_384, "small": 1012 * 40, "1b": 2_048, "8b": 1_024}
ROUND_TOKENS_GPU = 65_536
MIN_TEXTS = 32
GATE_TEXTS = 16
TRANSLATE_SHARE = 16
SCHEMA = 1

Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What to run. ``None`` means: chosen from the size and the device, and recorded as chosen.

    Args:
        size: one of ``SIZES``.
        workload: one of ``WORKLOADS``.
        dtype: ``"fp32"`` or ``"bf16"``; default fp32 on a CPU, bf16 on a GPU.
        device: a torch device; default the GPU if there is one.
        rounds: interleaved rounds, each timing every peer once.
        sentences: texts per round.
        batch_size: texts per batch of the padded peers (the published ``encode`` has 32).
        batch_tokens: real tokens per batch of ours.
        peers: names from ``PEERS``, or ``translate-test`` for both of its rows.
        translate_sentences: texts per round of the translate-test rows.
        seed: seed of weights and texts.
    """

    size: str = "tiny"
    workload: str = "sentences"
    dtype: str | None = None
    device: str | None = None
    rounds: int = 5
    sentences: int | None = None
    batch_size: int = 32
    batch_tokens: int | None = None
    peers: tuple[str, ...] = PEERS
    translate_sentences: int | None = None
    seed: int = 0

    def resolved(self) -> BenchOptions:
        """The same options with every ``None`` decided.

        Raises:
            ValueError: an unknown name, a count below one, or a device that torch does not have.
        """
        for name, value, known in (("size", self.size, SIZES), ("workload", self.workload, WORKLOADS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} was asked for, but torch sees no GPU")
        gpu = device.type == "cuda"
        dtype = self.dtype or ("bf16" if gpu else "fp32")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        tokens = ROUND_TOKENS_GPU if gpu else ROUND_TOKENS[self.size]
        sentences = self.sentences
        if sentences is None:
            sentences = max(MIN_TEXTS, tokens // MEAN_LENGTH[self.workload])
        translate_sentences = self.translate_sentences
        if translate_sentences is None:
            translate_sentences = max(1, sentences // TRANSLATE_SHARE)
        decided = dataclasses.replace(
            self,
            dtype=dtype,
            device=str(device),
            sentences=sentences,
            batch_tokens=self.batch_tokens if self.batch_tokens is not None else (16_384 if gpu else 2_048),
            translate_sentences=translate_sentences,
            peers=resolve_peers(self.peers),
        )
        for name in ("rounds", "sentences", "batch_size", "batch_tokens", "translate_sentences"):
            if getattr(decided, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(decided, name)}")
        return decided


def make_peers(options: BenchOptions, stack: Stack, workload: Workload) -> list[Peer]:
    """The chosen peers over one stack, in the order of ``PEERS``."""
    forward, size = reference_forward(stack), options.batch_size
    device = stack.device
    peers = []
    for name in options.peers:
        if name == "reference":
            peers.append(Peer(name, padded_encode(forward, device, size, sort=False), workload))
        elif name == "reference-sorted":
            peers.append(Peer(name, padded_encode(forward, device, size, sort=True), workload))
        elif name == "compiled":
            compiled = torch.compile(forward, dynamic=True)
            peers.append(Peer(name, padded_encode(compiled, device, size, sort=True), workload))
        elif name == "ours":
            peers.append(Peer(name, packed_encode(stack, options.batch_tokens or 1), workload))
    translations = [name for name in options.peers if name in TRANSLATE_TEST]
    if translations:
        translator = make_translator(stack, options.seed)
        sample = workload.sample(options.translate_sentences or 1)
        for name in translations:
            beams = 4 if name == "translate-beam4" else 1
            encode = translate_encode(stack, translator, size, beams)
            peers.append(Peer(name, encode, sample, same_semantics=False))
    return sorted(peers, key=lambda peer: PEERS.index(peer.name))


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
    if peer.same_semantics:
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
    device, dtype = torch.device(options.device or "cpu"), DTYPES[options.dtype or "fp32"]
    say(f"building the {options.size} stack ({options.dtype}, {device})")
    stack = make_stack(options.size, device, dtype, options.seed)
    vocab_size = stack.encoder.config.vocab_size
    workload = make_workload(options.workload, options.sentences or 1, vocab_size, options.seed)
    sample = workload.sample(GATE_TEXTS)

    say("computing float64 truth on a sample")
    reference = padded_encode(reference_forward(stack), device, options.batch_size, sort=False)
    gate = Gate(true_embeddings(stack, sample.ids), reference(sample.ids), reference(workload.ids))
    peers = make_peers(options, stack, workload)
    rows: dict[str, dict[str, Any]] = {}
    for peer in peers:
        say(f"warming up and checking {peer.name}")
        rows[peer.name] = {"name": peer.name, **warm_up(peer, sample, gate, device)}

    timed_peers = [peer for peer in peers if rows[peer.name]["status"] == "ok"]
    ceiling = gemm_ceiling(device, dtype)
    graphs = compiled_graphs()
    say(f"timing {len(timed_peers)} peers in {options.rounds} interleaved rounds")
    timings = interleave(timed_peers, options.rounds, device)
    for peer in timed_peers:
        flops = encode_flops(stack, peer.workload.lengths) if peer.same_semantics else None
        rows[peer.name].update(summarise(peer, timings[peer.name], flops, ceiling))
    if rows.get("compiled", {}).get("status") == "ok":
        rows["compiled"]["graphs_while_timed"] = compiled_graphs() - graphs
    ordered = list(rows.values())
    add_ratios(ordered)
    flops = encode_flops(stack, workload.lengths)
    return {
        "schema": SCHEMA,
        "benchmark": "throughput",
        **facts(device),
        "options": dataclasses.asdict(options),
        "workload": {
            "texts": len(workload.ids),
            "tokens": workload.tokens,
            "mean_length": workload.tokens / len(workload.ids),
            "max_length": int(workload.lengths.max()),
            "flops_per_token": flops / workload.tokens,
        },
        "gate": {
            "texts": len(sample.ids),
            "reference_error": gate.reference_error,
            "allowed_error": gate.allowed_error,
        },
        "gemm_ceiling_tflops": ceiling / 1e12,
        "memory_kind": MemoryMeter(device).kind,
        "weights_bytes": sum(p.numel() * p.element_size() for p in stack.model.parameters()),
        "peers": ordered,
    }
