"""What a run of the benchmark may be asked for, and what is decided where nothing was said."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from mtllm_fast.bench.peers import PEERS, TRAIN_PEERS, resolve_peers
from mtllm_fast.bench.sizes import SIZES
from mtllm_fast.bench.workloads import WORKLOADS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEAN_LENGTH = {"sentences": 40, "documents": 358, "mixed": 200, "full": 512}
# Enough tokens for a round to last seconds: long against a clock tick, short enough for many rounds. "small" reads as
# many sentences as FLORES-200's devtest has (1012): with 256 the padding of the unsorted reference, and with it the
# ratio to it, moves by 18 % with the texts that were drawn (1.77 to 2.13 times the real tokens over 12 seeds).
ROUND_TOKENS = {"tiny": 16_384, "small": 1012 * 40, "1b": 2_048, "8b": 1_024}
ROUND_TOKENS_GPU = 65_536
MIN_TEXTS = 32
TRANSLATE_SHARE = 16
# A training step keeps every activation of its batch: what fits beside 8B of weights on one GPU, padded and eager.
STEP_TOKENS = {"tiny": 1_024, "small": 2_048, "1b": 512, "8b": 512}
STEP_TOKENS_GPU = {"tiny": 8_192, "small": 8_192, "1b": 8_192, "8b": 2_048}
MIN_STEP_TEXTS = 4
# One call of one sentence takes milliseconds, so its spread needs many.
ROUNDS = {"encode": 5, "sweep": 5, "latency": 50, "train": 5}
MODE_PEERS = {
    "encode": PEERS,
    "sweep": ("reference", "reference-sorted", "ours"),
    "latency": tuple(name for name in PEERS if name != "reference-sorted"),  # one text is sorted already
    "train": TRAIN_PEERS,
}
MODES = ("encode", "train", "latency")


@dataclass(frozen=True)
class BenchOptions:
    """What to run. ``None`` means: chosen from the size and the device, and recorded as chosen.

    Args:
        mode: ``"encode"`` many texts, ``"train"`` one step of self-distillation, or ``"latency"`` of one sentence.
        batch_sizes: encode with each of these (``kind`` is then ``"sweep"``); only with mode ``"encode"``.
        size: one of ``SIZES``.
        workload: one of ``WORKLOADS``.
        dtype: ``"fp32"`` or ``"bf16"``; default fp32 on a CPU, bf16 on a GPU.
        device: a torch device; default the GPU if there is one.
        rounds: interleaved rounds, each timing every peer once; default by what is run.
        sentences: texts per round; of a training step, in its batch. Latency has one.
        batch_size: texts per batch of the padded peers (the published ``encode`` has 32).
        batch_tokens: real tokens per batch of ours.
        peers: names from ``PEERS``, or ``translate-test`` for both of its rows; from ``TRAIN_PEERS`` in training.
        translate_sentences: texts per round of the translate-test rows.
        seed: seed of weights and texts.
    """

    mode: str = "encode"
    batch_sizes: tuple[int, ...] = ()
    size: str = "tiny"
    workload: str = "sentences"
    dtype: str | None = None
    device: str | None = None
    rounds: int | None = None
    sentences: int | None = None
    batch_size: int = 32
    batch_tokens: int | None = None
    peers: tuple[str, ...] | None = None
    translate_sentences: int | None = None
    seed: int = 0

    @property
    def kind(self) -> str:
        """The mode, or ``"sweep"``."""
        return "sweep" if self.batch_sizes else self.mode

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype or "fp32"]

    def resolved(self) -> BenchOptions:
        """The same options with every ``None`` decided.

        Raises:
            ValueError: an unknown name, a count below one, or a device that torch does not have.
        """
        for name, value, known in (
            ("mode", self.mode, MODES), ("size", self.size, SIZES), ("workload", self.workload, WORKLOADS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.batch_sizes and self.mode != "encode":
            raise ValueError(f"a sweep over batch sizes needs mode encode, got {self.mode!r}")
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} was asked for, but torch sees no GPU")
        gpu = device.type == "cuda"
        dtype = self.dtype or ("bf16" if gpu else "fp32")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        sentences = self._sentences(gpu)
        names = MODE_PEERS[self.kind] if self.peers is None else self.peers
        decided = dataclasses.replace(
            self,
            dtype=dtype,
            device=str(device),
            rounds=ROUNDS[self.kind] if self.rounds is None else self.rounds,
            sentences=sentences,
            batch_tokens=self.batch_tokens if self.batch_tokens is not None else (16_384 if gpu else 2_048),
            translate_sentences=(
                max(1, sentences // TRANSLATE_SHARE) if self.translate_sentences is None else self.translate_sentences
            ),
            peers=resolve_peers(names, TRAIN_PEERS if self.mode == "train" else PEERS),
        )
        for name in ("rounds", "sentences", "batch_size", "batch_tokens", "translate_sentences"):
            if getattr(decided, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(decided, name)}")
        if any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"batch sizes must be at least 1, got {', '.join(map(str, self.batch_sizes))}")
        return decided

    def _sentences(self, gpu: bool) -> int:
        if self.mode == "latency":
            if self.sentences not in (None, 1):
                raise ValueError(f"latency is that of one sentence, got sentences={self.sentences}")
            return 1
        if self.sentences is not None:
            return self.sentences
        mean = MEAN_LENGTH[self.workload]
        if self.mode == "train":
            return max(MIN_STEP_TEXTS, (STEP_TOKENS_GPU if gpu else STEP_TOKENS)[self.size] // mean)
        return max(MIN_TEXTS, (ROUND_TOKENS_GPU if gpu else ROUND_TOKENS[self.size]) // mean)
