"""Which tokens of two tokenizations of one text say the same: the spans that token-level distillation compares.

A span is a word of the LLM's pre-tokenisation, as the tokens that cover it on each side (the authors' follow-up to
arXiv 2406.12739). The whole batch is aligned at once from the tokenizers' offsets, by binary search.
"""

from __future__ import annotations

import marshal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BatchEncoding


@dataclass(frozen=True)
class SpanAlignment:
    """S aligned spans of a batch, ordered by text and then by word, in CSR form.

    Span s is ``indices[offsets[s] : offsets[s + 1]]`` of each side's packed tokens (the real tokens of all texts, one
    after another).

    Attributes:
        llm_indices: int64 ``[K]``, of the LLM's packed tokens; ``llm_offsets``: int64 ``[S + 1]``.
        encoder_indices: int64 ``[M]``, of the encoder's packed tokens; ``encoder_offsets``: int64 ``[S + 1]``.
    """

    llm_indices: Tensor
    llm_offsets: Tensor
    encoder_indices: Tensor
    encoder_offsets: Tensor

    def __len__(self) -> int:
        return self.llm_offsets.shape[0] - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SpanAlignment:
        return SpanAlignment(**{name: t.to(device, non_blocking=non_blocking) for name, t in vars(self).items()})

    def pin_memory(self) -> SpanAlignment:
        """In page-locked memory, whose copy to a GPU nobody waits for; what ``DataLoader(pin_memory=True)`` calls."""
        return SpanAlignment(**{name: t.pin_memory() for name, t in vars(self).items()})


def align_spans(
    llm_batch: BatchEncoding,
    encoder_batch: BatchEncoding,
    *,
    only_overlapping_tokens: bool = True,
    complete: bool = False,
) -> SpanAlignment:
    """Align two tokenizations of the same texts word by word.

    For every word of the LLM's pre-tokenisation: its first and its last character are looked up on both sides, and all
    tokens from the first's to the last's, inclusive, are its span. The default gives the spans of the authors' code:
    a character is the first token's that covers it (so of a character split into several byte tokens the later ones
    are not in the span), a word is dropped when an end of it is covered by no token of a side (whitespace, characters
    that a tokenizer normalises away), or is covered by token 0 (the authors take index 0 for "not found": it loses the
    first word where no special token is put in front).

    Args:
        llm_batch, encoder_batch: what two fast tokenizers returned for the same texts, with or without special tokens,
            padding (on either side) and truncation.
        only_overlapping_tokens: keep only spans of exactly one token on both sides.
        complete: take instead every token that shares a character with the word, from token 0 on: nothing is lost to
            the cases above, and a word is dropped only when a side has no token for any of it. A token of whitespace
            that its tokenizer trims to no character shares none.

    Returns:
        SpanAlignment: int64 CSR indices on the CPU; a text without any span has none.

    Raises:
        TypeError: a batch does not come from a fast tokenizer.
        ValueError: the batches hold different numbers of texts.

    >>> from transformers import AutoTokenizer
    >>> from mtllm_fast.tiny import tiny_path
    >>> tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    >>> batch = tokenizer(["Habari ya dunia"])
    >>> len(align_spans(batch, batch, only_overlapping_tokens=False))
    3
    """
    llm, encoder = _Side.of("llm_batch", llm_batch), _Side.of("encoder_batch", encoder_batch)
    if len(llm.encodings) != len(encoder.encodings):
        raise ValueError(f"the batches must hold the same texts: got {len(llm.encodings)} and {len(encoder.encodings)}")
    text, start, stop = llm.words()
    first_llm, last_llm, found_llm = llm.tokens_of(text, start, stop, complete)
    first_encoder, last_encoder, found_encoder = encoder.tokens_of(text, start, stop, complete)
    kept = found_llm & found_encoder
    if only_overlapping_tokens:
        kept &= (first_llm == last_llm) & (first_encoder == last_encoder)
    llm_indices, llm_offsets = _ranges(first_llm[kept], last_llm[kept])
    encoder_indices, encoder_offsets = _ranges(first_encoder[kept], last_encoder[kept])
    return SpanAlignment(*map(torch.from_numpy, (llm_indices, llm_offsets, encoder_indices, encoder_offsets)))


@dataclass(frozen=True)
class _Side:
    """The tokens of one side, of all texts one after another.

    Attributes:
        encodings: one per text; ``begin``: ``[texts]``, the packed index of each one's token 0.
        text, start, stop: ``[n]``, each token's text and characters; special tokens and padding have none.
        covering: ``[m]``, which tokens have characters; both ends of these rise, but not strictly, as the tokens of one
            character in several bytes share its place.
        packed: ``[m + 1]``, index of the former among the packed tokens. The last stands for "no token".
    """

    encodings: Sequence[Any]
    begin: np.ndarray
    text: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    covering: np.ndarray
    packed: np.ndarray

    @classmethod
    def of(cls, name: str, batch: Any) -> _Side:
        encodings: Sequence[Any] | None = getattr(batch, "encodings", None)
        if encodings is None:
            raise TypeError(f"{name} must be the BatchEncoding of a fast tokenizer, got {type(batch).__name__}")
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        # Most of the time goes into the tokenizers' lists of Python objects, above all the pairs. Hence none is asked
        # for in vain, and each is read and dropped before the next, which reuses its memory.
        pairs = np.frombuffer(b"".join([_pairs(encoding.offsets) for encoding in encodings]), _PAIR)
        if len(pairs) != lengths.sum():
            raise RuntimeError(f"marshal of this Python writes {len(pairs)} pairs for {lengths.sum()} offsets")
        start, stop = pairs["start"].astype(np.int64), pairs["stop"].astype(np.int64)
        padding = np.array([_padding(encoding.attention_mask) for encoding in encodings], np.int64).reshape(-1, 2)
        begin = _begins(lengths - padding.sum(axis=1))
        text = np.repeat(np.arange(len(encodings)), lengths)
        covering = np.flatnonzero(stop > start)
        packed = covering + (begin - _begins(lengths) - padding[:, 0])[text[covering]]
        return cls(encodings, begin, text, start, stop, covering, np.append(packed, -1))

    def words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, first character, one after the last character) of each word, ``[W]``."""
        ids = chain.from_iterable(encoding.word_ids for encoding in self.encodings)
        word = np.fromiter(ids, np.float64, len(self.text))  # floats, because NumPy reads None as NaN
        in_word = np.flatnonzero(~np.isnan(word))
        word, text = word[in_word], self.text[in_word]
        begins = np.ones(len(word), dtype=bool)
        begins[1:] = (word[1:] != word[:-1]) | (text[1:] != text[:-1])
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(word)) - 1 if len(first) else first
        return text[first], self.start[in_word[first]], self.stop[in_word[last]]

    def tokens_of(
        self, text: np.ndarray, start: np.ndarray, stop: np.ndarray, complete: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Packed index of the first and the last token of each word, and whether both are there; ``[W]``."""
        # One axis for all texts: characters of text i lie from i * scale on.
        scale = 2 + int(max(self.stop.max(initial=0), stop.max(initial=0)))
        base = self.text[self.covering] * scale
        starts, stops = base + self.start[self.covering], base + self.stop[self.covering]
        start, stop = text * scale + start, text * scale + stop
        first = np.searchsorted(stops, start, side="right")
        if complete:
            last = np.searchsorted(starts, stop, side="left") - 1
            return self.packed[first], self.packed[last], (first <= last) & (start < stop)
        last = np.searchsorted(stops, stop - 1, side="right")
        starts = np.append(starts, np.iinfo(np.int64).max)  # "no token" covers nothing
        found = (starts[first] <= start) & (starts[last] < stop) & (start < stop)
        first, last = self.packed[first], self.packed[last]
        return first, last, found & (first != self.begin[text]) & (last != self.begin[text])


# How marshal writes a pair in version 2: the tuple's mark and length, and for each int a mark and four bytes.
_PAIR = np.dtype([("", "V6"), ("start", "<i4"), ("", "V1"), ("stop", "<i4")])


def _pairs(offsets: list[tuple[int, int]]) -> bytes:
    """The pairs as records of ``_PAIR``.

    NumPy has no quick way to read a list of tuples: this makes the whole alignment a sixth faster than ``np.fromiter``
    over the chained pairs. Python keeps writing version 2, which has no references, so that all pairs are equally long.
    """
    return marshal.dumps(offsets, 2)[5:]  # without the list's mark and length


def _padding(attention_mask: list[int]) -> tuple[int, int]:
    """How many tokens of padding are in front and behind."""
    real = attention_mask.count(1)
    front = attention_mask.index(1) if real else 0
    return front, len(attention_mask) - front - real


def _begins(lengths: np.ndarray) -> np.ndarray:
    """Where each of several pieces of these lengths begins when they are put one after another."""
    return np.cumsum(lengths) - lengths


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """first … last of each span one after another, and where each span's begin; int64."""
    lengths = last - first + 1
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(first - offsets[:-1], lengths), offsets
