"""Which tokens of two tokenizations of one text say the same: the spans that token-level distillation compares.

A span is a word of the LLM's pre-tokenisation, as the tokens that cover it on each side (the authors' follow-up to
arXiv 2406.12739). The whole batch is aligned at once from the tokenizers' offsets, by binary search.
"""

from __future__ import annotations

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
            the cases above, and a word is dropped only when a side has no token for any of it.

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
    if llm.texts != encoder.texts:
        raise ValueError(f"the batches must hold the same texts: got {llm.texts} and {encoder.texts}")
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
    """The tokens of one side that stand for characters (no special ones), in order, of all texts.

    Attributes:
        texts: how many texts.
        text, start, stop, word: ``[n]``, each token's text, characters ``start`` to ``stop``, and word in its text.
        packed: ``[n]``, the token's index among the packed tokens; ``is_first``: whether that is its text's token 0.
    """

    texts: int
    text: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    word: np.ndarray
    packed: np.ndarray
    is_first: np.ndarray

    @classmethod
    def of(cls, name: str, batch: Any) -> _Side:
        encodings: Sequence[Any] | None = getattr(batch, "encodings", None)
        if encodings is None:
            raise TypeError(f"{name} must be the BatchEncoding of a fast tokenizer, got {type(batch).__name__}")
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        # Most of the time goes into these lists of Python objects, so each is made and read once.
        pairs = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        offsets = np.fromiter(pairs, np.int64, 2 * int(lengths.sum())).reshape(-1, 2)
        words = _joined([encoding.word_ids for encoding in encodings])
        words = np.where(np.isnan(words), -1, words).astype(np.int64)
        real = _joined([encoding.attention_mask for encoding in encodings]) > 0
        text = np.repeat(np.arange(len(encodings)), lengths)
        packed = np.cumsum(real) - 1
        starts = np.concatenate(([0], np.cumsum(np.bincount(text[real], minlength=len(encodings)))))
        stands = real & (words >= 0)
        is_first = packed == starts[text]
        return cls(
            texts=len(encodings), text=text[stands], start=offsets[stands, 0], stop=offsets[stands, 1],
            word=words[stands], packed=packed[stands], is_first=is_first[stands],
        )  # fmt: skip

    def words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, first character, one after the last character) of each word, ``[W]``."""
        begins = np.ones(len(self.word), dtype=bool)
        begins[1:] = (self.word[1:] != self.word[:-1]) | (self.text[1:] != self.text[:-1])
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(begins)) - 1 if len(first) else first
        return self.text[first], self.start[first], self.stop[last]

    def tokens_of(
        self, text: np.ndarray, start: np.ndarray, stop: np.ndarray, complete: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Packed index of the first and the last token of each word, and whether both are there; ``[W]``."""
        # One axis for all texts: characters of text i lie from i * scale on.
        scale = 2 + int(max(self.stop.max(initial=0), stop.max(initial=0)))
        starts, stops = self.text * scale + self.start, self.text * scale + self.stop
        # Tokens of one character in several bytes share its offsets, so both ends rise, but not strictly.
        first = self._covering(starts, stops, text * scale + start)
        if not complete:
            last = self._covering(starts, stops, text * scale + stop - 1)
            found = (first >= 0) & (last >= 0) & (stop > start)
            found &= ~(self._at(self.is_first, first) | self._at(self.is_first, last))
        else:
            first = np.searchsorted(stops, text * scale + start, side="right")
            last = np.searchsorted(starts, text * scale + stop, side="left") - 1
            found = (first <= last) & (stop > start)
        return self._at(self.packed, first), self._at(self.packed, last), found

    @staticmethod
    def _covering(starts: np.ndarray, stops: np.ndarray, character: np.ndarray) -> np.ndarray:
        """The first token that covers each character, -1 if there is none."""
        token = np.searchsorted(stops, character, side="right")
        inside = token < len(stops)
        inside[inside] = starts[token[inside]] <= character[inside]
        return np.where(inside, token, -1)

    def _at(self, values: np.ndarray, token: np.ndarray) -> np.ndarray:
        """``values`` of tokens, where those that do not exist may give anything."""
        return values[token.clip(0, max(len(values) - 1, 0))] if len(values) else np.zeros(len(token), values.dtype)


def _joined(lists: Sequence[Sequence[int | None]]) -> np.ndarray:
    """One array of all lists; None becomes NaN, which NumPy does on its own for floats."""
    return np.array(list(chain.from_iterable(lists)), dtype=np.float64)


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """first … last of each span one after another, and where each span's begin; int64."""
    lengths = last - first + 1
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(first - offsets[:-1], lengths), offsets
