"""From a stream of documents to packed batches, made in a thread beside the training step, and where to resume."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from mtllm_fast.training.collator import DataCollatorForSelfDistillation
from mtllm_fast.training.streams import DocumentStream

_TOKENISED_AT_ONCE = 64


class StreamingBatches(IterableDataset[dict[str, Any]]):
    """Batches of ``DataCollatorForSelfDistillation``, of so many documents or of so many tokens.

    With ``tokens_per_batch`` a batch takes whole documents as long as neither side has more tokens than that. What
    comes of a document does not depend on its batch. Tokenising runs in a thread, ``prefetch`` batches ahead;
    ``state_dict`` is the position after the last batch that was *given out*, so a resumed iterator continues with the
    next one, bit for bit.

    Args:
        stream: the documents of this process.
        collate: tokenises, aligns and packs.
        documents_per_batch, tokens_per_batch: one of the two. An incomplete batch at the end of a finite stream is
            given out too.
        prefetch: batches made ahead; 0: none, and no thread.

    One iterator at a time: they share the stream.

    Raises:
        ValueError: neither or both sizes, a budget below the collator's ``max_length``, or one on documents that end
            for several processes, which would end apart.

    >>> from mtllm_fast.tiny import tiny_documents, tiny_llm_tokenizer, tiny_path
    >>> from transformers import AutoTokenizer
    >>> collate = DataCollatorForSelfDistillation(tiny_llm_tokenizer(), AutoTokenizer.from_pretrained(tiny_path()))
    >>> from mtllm_fast.training.streams import open_documents
    >>> import datasets
    >>> stream = open_documents(datasets.Dataset.from_dict({"text": tiny_documents()[:9]}), epochs=1)
    >>> [len(batch["cu_seqlens"]) - 1 for batch in StreamingBatches(stream, collate, documents_per_batch=4)]
    [4, 4, 1]
    """

    def __init__(
        self,
        stream: DocumentStream,
        collate: DataCollatorForSelfDistillation,
        *,
        documents_per_batch: int | None = None,
        tokens_per_batch: int | None = None,
        prefetch: int = 2,
    ) -> None:
        if (documents_per_batch is None) == (tokens_per_batch is None):
            raise ValueError("give exactly one of documents_per_batch and tokens_per_batch")
        if documents_per_batch is not None and documents_per_batch < 1:
            raise ValueError(f"documents_per_batch must be at least 1, got {documents_per_batch}")
        if tokens_per_batch is not None and tokens_per_batch < collate.max_length:
            raise ValueError(
                f"tokens_per_batch must hold one document of max_length={collate.max_length}, got {tokens_per_batch}"
            )
        if tokens_per_batch is not None and stream.ends_unevenly:
            raise ValueError(
                "tokens_per_batch gives every process another number of batches at the end of its documents, and they "
                "would wait for each other for ever: read them with epochs=None, or give documents_per_batch"
            )
        if prefetch < 0:
            raise ValueError(f"prefetch must be at least 0, got {prefetch}")
        self._stream, self._collate = stream, collate
        self._documents, self._tokens, self._prefetch = documents_per_batch, tokens_per_batch, prefetch
        self._state = stream.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The stream's position after the last batch that was given out."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; the next iterator starts there."""
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._stream.load_state_dict(self._state)  # an iterator that was left early had read ahead
        made: Any = self._batches()
        batches = made if self._prefetch == 0 else _ahead(made, self._prefetch)
        try:
            for batch, state in batches:
                self._state = state
                yield batch
        finally:
            batches.close()

    def _batches(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each with the stream's position after its last document."""
        waiting: list[tuple[Any, dict[str, Any]]] = []
        size = [0, 0]
        for pair, state in self._tokenised():
            more = [have + len(side.ids) for have, side in zip(size, pair, strict=True)]
            if waiting and (len(waiting) == self._documents or (self._tokens is not None and max(more) > self._tokens)):
                yield self._batch(waiting)
                waiting, more = [], [len(side.ids) for side in pair]
            waiting.append((pair, state))
            size = more
        if waiting:
            yield self._batch(waiting)

    def _batch(self, waiting: list[tuple[Any, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._collate.pack([pair for pair, _ in waiting]), waiting[-1][1]

    def _tokenised(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Documents as tokens of both sides, each with the position after it; many at once, which is faster."""
        texts: list[str] = []
        states: list[dict[str, Any]] = []
        for text in self._stream:
            texts.append(text)
            states.append(self._stream.state_dict())
            if len(texts) == _TOKENISED_AT_ONCE:
                yield from zip(self._collate.tokenize(texts), states, strict=True)
                texts, states = [], []
        if texts:
            yield from zip(self._collate.tokenize(texts), states, strict=True)


def _ahead(items: Iterator[Any], count: int) -> Any:
    """The items, made in a thread up to ``count`` ahead; an error reaches the consumer in its place."""
    made: queue.Queue[tuple[str, Any]] = queue.Queue(count)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                made.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=produce, name="mtllm_fast-batches", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
