"""The texts of the throughput benchmark: seeded random token ids whose lengths follow the corpora that users encode.

Length laws, in tokens with the language code and ``</s>``, cut at ``MAX_LENGTH``:

=============  =============================================  ======
corpus         law                                            mean
=============  =============================================  ======
FLORES-200     gamma, mean 40, standard deviation 15          40
Belebele       gamma, mean 200, standard deviation 70         200
FineWeb        lognormal, median 410, mean 690, cut at 512    ~358
=============  =============================================  ======

The two gammas and the lognormal are assumed shapes, not fits: they reproduce the means, and so the padding waste,
that these corpora show. ``sentences`` draws from FLORES, ``documents`` from FineWeb, ``mixed`` a third of the texts
from each of the three. Only lengths matter to the speed of a dense model, so the ids themselves are uniform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.int64]

MAX_LENGTH = 512
MIN_LENGTH = 3  # language code, one token, </s>
MEAN_SENTENCE = 40
EOS_ID = 2
FIRST_TEXT_ID = 4  # after <s>, <pad>, </s>, <unk>
# An NLLB vocabulary ends in its 202 language codes, <mask> and two unused rows.
LANGUAGE_CODES_END = 3
LANGUAGE_CODES = 202


@dataclass(frozen=True)
class Workload:
    """Texts as token ids, in the order in which a user would hand them over."""

    name: str
    ids: tuple[IdArray, ...]

    @property
    def lengths(self) -> IdArray:
        """Tokens of each text, int64 [B]."""
        return np.array([len(text) for text in self.ids], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of all texts together: what "real tokens" means everywhere in the benchmark."""
        return int(self.lengths.sum())

    def sample(self, count: int) -> Workload:
        """At most ``count`` texts, evenly spaced over the sorted lengths: shortest and longest included."""
        if count >= len(self.ids):
            return self
        by_length = np.argsort(self.lengths, kind="stable")
        chosen = by_length[np.linspace(0, len(self.ids) - 1, count).round().astype(int)]
        return Workload(self.name, tuple(self.ids[i] for i in np.sort(chosen)))


def _gamma(rng: np.random.Generator, count: int, mean: float, deviation: float) -> NDArray[np.float64]:
    return rng.gamma(shape=(mean / deviation) ** 2, scale=deviation**2 / mean, size=count)


def flores_lengths(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Sentence lengths like FLORES-200's."""
    return _gamma(rng, count, mean=MEAN_SENTENCE, deviation=15)


def belebele_lengths(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Passage lengths like Belebele's."""
    return _gamma(rng, count, mean=200, deviation=70)


def fineweb_lengths(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Web document lengths like FineWeb's, before the cut at 512."""
    median, mean = 410.0, 690.0
    return rng.lognormal(math.log(median), math.sqrt(2 * math.log(mean / median)), size=count)


def full_lengths(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Texts that are all cut at ``MAX_LENGTH``."""
    return np.full(count, float(MAX_LENGTH))


CORPORA = {
    "sentences": (flores_lengths,),
    "documents": (fineweb_lengths,),
    "mixed": (flores_lengths, belebele_lengths, fineweb_lengths),
    "full": (full_lengths,),
}
WORKLOADS = tuple(CORPORA)


def sample_lengths(name: str, count: int, rng: np.random.Generator) -> IdArray:
    """``count`` text lengths of a workload, in random order, int64 [B]."""
    corpora = CORPORA[name]
    parts = np.array_split(np.arange(count), len(corpora))
    lengths = np.concatenate([law(rng, len(part)) for law, part in zip(corpora, parts, strict=True)])
    rng.shuffle(lengths)
    return np.clip(lengths.round(), MIN_LENGTH, MAX_LENGTH).astype(np.int64)


def make_workload(name: str, count: int, vocab_size: int, seed: int) -> Workload:
    """Random texts ``[language code] tokens </s>`` of one workload; the same for the same arguments.

    Args:
        name: one of ``WORKLOADS``.
        count: number of texts B.
        vocab_size: rows of the encoder's embedding table.
        seed: seed of the lengths and of the ids.

    Raises:
        ValueError: unknown name, no text, or a vocabulary too small to hold the language codes.

    Example:

        >>> work = make_workload("sentences", count=100, vocab_size=1000, seed=0)
        >>> len(work.ids), bool(30 < work.lengths.mean() < 50), int(work.ids[0][-1])
        (100, True, 2)
    """
    if name not in CORPORA:
        raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}")
    if count < 1:
        raise ValueError(f"a workload needs at least one text, got {count}")
    rng = np.random.default_rng(seed)
    codes_start = _codes_start(vocab_size)
    texts = (_random_text(int(length), codes_start, rng) for length in sample_lengths(name, count, rng))
    return Workload(name, tuple(texts))


def one_text(length: int, vocab_size: int, seed: int) -> Workload:
    """A workload of one random text of ``length`` tokens, at least ``MIN_LENGTH``."""
    text = _random_text(length, _codes_start(vocab_size), np.random.default_rng(seed))
    return Workload("one text", (text,))


def _codes_start(vocab_size: int) -> int:
    start = vocab_size - LANGUAGE_CODES_END - LANGUAGE_CODES
    if start <= FIRST_TEXT_ID:
        raise ValueError(f"vocab_size must leave room for {LANGUAGE_CODES} language codes, got {vocab_size}")
    return start


def _random_text(length: int, codes_start: int, rng: np.random.Generator) -> IdArray:
    """``[language code] tokens </s>``."""
    ids = rng.integers(FIRST_TEXT_ID, codes_start, size=length, dtype=np.int64)
    ids[0] = rng.integers(codes_start, codes_start + LANGUAGE_CODES)
    ids[-1] = EOS_ID
    return ids


def flat(texts: Sequence[IdArray]) -> tuple[IdArray, NDArray[np.int32]]:
    """Texts back to back [T], and ``cu_seqlens`` int32 [B+1]."""
    cu_seqlens = np.zeros(len(texts) + 1, dtype=np.int32)
    np.cumsum([len(text) for text in texts], out=cu_seqlens[1:])
    return np.concatenate(texts), cu_seqlens
