"""Examples to packed batches, for a stack or for an LLM alone: tokens, and which of them each vector is the mean of.

A *unit* is what a model makes one vector of: a text (all its tokens), a choice (its own tokens within the text that
holds all of them), or a word (its first token).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from mtllm_fast.core.errors import UnknownLanguageError
from mtllm_fast.packing import pack_token_ids
from mtllm_fast.tasks.examples import Example
from mtllm_fast.tasks.presets import Task


class _Tokens(NamedTuple):
    """Of one example: ids, and the positions of each unit's tokens; None for a word that was cut off."""

    ids: list[int]
    units: list[list[int] | None]


class TaskCollator:
    """Batches of examples for models of a task.

    The text of a pair is ``prefix A prefix B suffix``, that of a choice task ``context question\\n1 c1\\n2 c2 …``,
    words are joined by blanks. A stack's prefix is the row's language code (once), its suffix ``</s>``; an LLM's are
    those that its tokenizer puts around a text (Llama: a BOS before each half of a pair), as in the authors' code.

    Args:
        tokenizer: fast; it is copied.
        reads_languages: whether it is NLLB's, and rows begin with their language.

    Raises:
        TypeError: a tokenizer that is not fast.
        ValueError: in a call: choices that do not fit into ``max_length``, a text without tokens.
    """

    def __init__(self, task: Task, tokenizer: Any, *, reads_languages: bool) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(f"tokenizer must be a fast one, whose offsets find words, got {type(tokenizer).__name__}")
        self.task, self.reads_languages = task, reads_languages
        self._prefix: list[int]
        self._suffix: list[int]
        self._rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._rust.no_truncation()
        self._rust.no_padding()
        special = list(tokenizer("", add_special_tokens=True)["input_ids"])
        ends = not reads_languages and tokenizer.eos_token_id is not None and special[-1:] == [tokenizer.eos_token_id]
        if reads_languages:
            self._prefix, self._suffix = [], [tokenizer.eos_token_id]
        else:
            self._prefix, self._suffix = (special[:-1], special[-1:]) if ends else (special, [])

    def __call__(self, examples: Sequence[Example | tuple[Example, Any]]) -> dict[str, Any]:
        """A packed batch.

        Args:
            examples: of B texts with U units, each alone or with the teacher's states ``[units, D]``.

        Returns:
            dict: ``input_ids`` int64 ``[T]``, ``cu_seqlens`` int32 ``[B + 1]``, ``max_seqlen``; ``labels`` int64
            ``[B]`` (words: ``[U]``, without those that were cut off); except for sequences ``unit_indices`` ``[K]`` and
            ``unit_offsets`` ``[U + 1]``: which packed tokens a unit consists of; ``states`` ``[U, D]`` if given.
        """
        pairs = [example if isinstance(example, tuple) else (example, None) for example in examples]
        rows = [self._row(example) for example, _ in pairs]
        batch: dict[str, Any] = {**pack_token_ids([row.ids for row in rows])}
        batch["max_seqlen"] = max(len(row.ids) for row in rows)
        if self.task.kind != "sequence":
            batch |= _units(rows, batch["cu_seqlens"].tolist())
        labels: list[Any] = [example.label for example, _ in pairs]
        if self.task.kind == "tokens":
            kept = [[unit is not None for unit in row.units] for row in rows]
            flat = [
                tag for tags, there in zip(labels, kept, strict=True) for tag, t in zip(tags, there, strict=True) if t
            ]
            batch["labels"] = torch.tensor(flat)
        elif all(label is not None for label in labels):
            batch["labels"] = torch.tensor(labels)
        if pairs[0][1] is not None:
            states = [torch.as_tensor(states) for _, states in pairs]
            if self.task.kind == "tokens":
                states = [s[[u is not None for u in row.units]] for s, row in zip(states, rows, strict=True)]
            batch["states"] = torch.cat(states)
        return batch

    def kept_units(self, example: Example) -> list[bool]:
        """For each unit whether it is in the batch: a word beyond ``max_length`` is not."""
        if self.task.kind != "tokens":
            return [True] * example.units
        return [unit is not None for unit in self._row(example).units]

    def _row(self, example: Example) -> _Tokens:
        prefix = [self._language(example)] if self.reads_languages else self._prefix
        room = self.task.max_length - len(prefix) - len(self._suffix)
        if self.task.kind == "sequence":
            halves = [self._encode(text).ids for text in example.text]
            between = [] if self.reads_languages or len(halves) == 1 else self._prefix
            halves = _cut_longest(halves, room - len(between))
            ids = [
                *prefix,
                *halves[0],
                *(between if len(halves) == 2 else []),
                *(halves[1] if len(halves) == 2 else []),
            ]
            return _Tokens([*ids, *self._suffix], [[*range(len(ids) + len(self._suffix))]])
        if self.task.kind == "choice":
            ids, spans = self._choices(example, room)
        else:
            ids, spans = self._words(example, room)
        units = [None if span is None else [len(prefix) + i for i in span] for span in spans]
        return _Tokens([*prefix, *ids, *self._suffix], units)

    def _encode(self, text: str) -> Any:
        return self._rust.encode(text, add_special_tokens=False)

    def _choices(self, example: Example, room: int) -> tuple[list[int], list[list[int] | None]]:
        context, question = example.text
        text, places = f"{context} {question}", []
        for number, choice in enumerate(example.choices, 1):
            text += f"\n{number} "
            places.append((len(text), len(text) + len(choice)))
            text += choice
        encoding = self._encode(text)
        in_context = sum(end <= len(context) for _, end in encoding.offsets)
        surplus = max(0, len(encoding.ids) - room)
        if surplus > in_context:
            raise ValueError(
                f"example {example.id}: question and choices have {len(encoding.ids) - in_context} tokens, and "
                f"max_length is {self.task.max_length}"
            )
        kept = [*range(in_context - surplus), *range(in_context, len(encoding.ids))]
        offsets = [encoding.offsets[i] for i in kept]
        spans: list[list[int] | None] = []
        for start, end in places:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
            if not inside:
                raise ValueError(f"example {example.id}: a choice has no token: {text[start:end]!r}")
            spans.append(inside)
        return [encoding.ids[i] for i in kept], spans

    def _words(self, example: Example, room: int) -> tuple[list[int], list[list[int] | None]]:
        bounds = [0]
        for word in example.text:
            bounds.append(bounds[-1] + len(word) + 1)
        encoding = self._encode(" ".join(example.text))
        offsets = encoding.offsets[:room]
        firsts = [
            next((i for i, (a, b) in enumerate(offsets) if a < end - 1 and b > start and b > a), None)
            for start, end in pairwise(bounds)
        ]
        return encoding.ids[:room], [None if first is None else [first] for first in firsts]

    def _language(self, example: Example) -> int:
        number = self._rust.token_to_id(example.language)
        if number is None:
            raise UnknownLanguageError(f"the tokenizer has no token for {example.language!r} (example {example.id})")
        return number


def _cut_longest(halves: list[list[int]], room: int) -> list[list[int]]:
    """Cut the longer one until both fit, as tokenizers' ``longest_first`` does."""
    lengths = [len(half) for half in halves]
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1
    return [half[:length] for half, length in zip(halves, lengths, strict=True)]


def _units(rows: Sequence[_Tokens], starts: Sequence[int]) -> dict[str, torch.Tensor]:
    spans = [
        [start + i for i in unit]
        for row, start in zip(rows, starts, strict=False)
        for unit in row.units
        if unit is not None
    ]
    offsets = torch.tensor([0, *(len(span) for span in spans)]).cumsum(0)
    return {"unit_indices": torch.tensor([i for span in spans for i in span]), "unit_offsets": offsets}
