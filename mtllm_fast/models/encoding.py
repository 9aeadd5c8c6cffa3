"""``encode``: texts to embeddings in token-budget batches of similar length, tokenised beside the model, unpadded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mtllm_fast.core.buffers import reused
from mtllm_fast.models.inputs import PackedInputs, prepare_inputs
from mtllm_fast.models.towers import evaluating
from mtllm_fast.text.languages import resolve_language
from mtllm_fast.text.tokenization import TokenizedTexts, tokenize

if TYPE_CHECKING:
    from mtllm_fast.models.modeling import MTLLM

logger = logging.getLogger("mtllm_fast")

_TEXTS_PER_CHUNK = 1024  # tokenised at once, beside the model's work on the chunk before
OUTPUTS = ("pooled", "tokens")


_CPU_BATCH_TOKENS = 2048


def default_batch_tokens(device: torch.device, batch_size: int, max_length: int) -> int:
    """Tokens per batch when the caller names none."""
    return min(batch_size * max_length, _CPU_BATCH_TOKENS) if device.type == "cpu" else batch_size * max_length


@dataclass(frozen=True)
class EncodeOptions:
    """The checked options of one ``encode`` call."""

    max_length: int
    batch_tokens: int
    normalize: bool
    output: str
    dtype: torch.dtype | None
    to_numpy: bool
    cuda_graphs: bool | None = None


def encode(
    model: MTLLM,
    sentences: str | Sequence[str],
    src_lang: str | Sequence[str],
    options: EncodeOptions,
    show_progress_bar: bool | None,
) -> Any:
    """See ``MTLLM.encode``."""
    texts = [sentences] if isinstance(sentences, str) else _listed("sentences", sentences)
    languages = _resolve_languages(src_lang, len(texts))
    for i, text in enumerate(texts):  # before the longest-first order would rename the index
        if not isinstance(text, str):
            raise TypeError(f"sentences must be strings, got {type(text).__name__} at index {i}")
    collector = _Collector(model, len(texts), options)
    truncated = 0
    with torch.no_grad(), reused(), evaluating(model), _progress_bar(show_progress_bar, len(texts)) as bar:
        model.refresh_fused(thorough=True)
        if options.cuda_graphs and (reason := model.graphs.why_not(model)):
            raise ValueError(f"cuda_graphs=True cannot be served: {reason}; pass None for where it can")
        for chunk, rows in _tokenized_chunks(model.tokenizer, texts, languages, options.max_length):
            truncated += chunk.n_truncated
            for batch in _batches(chunk.lengths, options.batch_tokens):
                collector.add(rows[batch], chunk.lengths[batch], _run(model, chunk, batch, options))
                bar.update(len(batch))
    if truncated:
        logger.warning("%d of %d texts were longer than max_length=%d tokens and were truncated",
                       truncated, len(texts), options.max_length)  # fmt: skip
    return collector.result(single=isinstance(sentences, str))


def _resolve_languages(src_lang: str | Sequence[str], count: int) -> list[str]:
    if isinstance(src_lang, str):
        return [resolve_language(src_lang)] * count
    src_lang = _listed("src_lang", src_lang)
    if len(src_lang) != count:
        raise ValueError(f"src_lang must be one code or one per text: got {len(src_lang)} codes for {count} texts")
    known = {code: resolve_language(code) for code in set(src_lang)}
    return [known[code] for code in src_lang]


def _listed(name: str, values: Any) -> list[str]:
    """Anything that iterates over strings in an order of its own; a table would give the names of its columns."""
    if isinstance(values, Mapping | Set) or hasattr(values, "columns") or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a string or a sequence of strings, got {type(values).__name__}")
    return list(values)


def _tokenized_chunks(
    tokenizer: Any, texts: list[str], languages: list[str], max_length: int
) -> Iterator[tuple[TokenizedTexts, np.ndarray]]:
    """Chunks of similarly long texts, longest first, each with its rows in the input; one chunk ahead in a thread."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    chunks = [order[i : i + _TEXTS_PER_CHUNK] for i in range(0, len(order), _TEXTS_PER_CHUNK)]

    def work(rows: np.ndarray) -> TokenizedTexts:
        return tokenize(tokenizer, [texts[i] for i in rows], [languages[i] for i in rows], max_length)

    with ThreadPoolExecutor(1, thread_name_prefix="mtllm_fast-tokenize") as pool:
        ahead: Future[TokenizedTexts] | None = pool.submit(work, chunks[0]) if chunks else None
        for i, rows in enumerate(chunks):
            assert ahead is not None
            current = ahead.result()
            ahead = pool.submit(work, chunks[i + 1]) if i + 1 < len(chunks) else None
            yield current, rows


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of each batch: longest first, as many texts as the budget of tokens takes, at least one."""
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        used = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, used + batch_tokens, side="right")), start + 1)
        yield order[start:stop]
        start = stop


def _run(model: MTLLM, chunk: TokenizedTexts, batch: np.ndarray, options: EncodeOptions) -> Tensor:
    """Pooled embeddings ``[B, D]`` or token states ``[T, D]`` of one batch, on the model's device."""
    lengths = chunk.lengths[batch]
    ids = np.concatenate([chunk.ids[chunk.offsets[i] : chunk.offsets[i + 1]] for i in batch])
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    states = None
    if options.cuda_graphs is not False:
        states = model.graphs.run(model, ids, cu_seqlens, options.output, at_once=options.cuda_graphs is True)
    if states is None:
        inputs = _to_device(model, ids, cu_seqlens, int(lengths.max()))
        states = model.pooled(inputs) if options.output == "pooled" else model.hidden(inputs)
    if options.normalize:
        states = F.normalize(states.float(), dim=-1)  # rounded once, to the dtype of the output
    return states


def _to_device(model: MTLLM, ids_T: np.ndarray, bounds: np.ndarray, longest: int) -> PackedInputs:
    ids, cu_seqlens = (upload(torch.from_numpy(array), model.device) for array in (ids_T, bounds))
    return prepare_inputs(model, ids, None, None, cu_seqlens, longest)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """To a GPU from pinned memory: a pageable copy would wait for all the work that is queued."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class _Collector:
    """Puts the batches' results back into the order of the input."""

    def __init__(self, model: MTLLM, count: int, options: EncodeOptions) -> None:
        self.options = options
        self.width = model.config.hidden_size
        self.dtype = options.dtype or model.dtype
        if options.to_numpy and self.dtype == torch.bfloat16:
            self.dtype = torch.float32  # NumPy has no bfloat16
        self.device = torch.device("cpu") if options.to_numpy else model.device
        self.pooled = torch.empty(0)
        self.tokens: list[Tensor] = [torch.empty(0)] * count
        if options.output == "pooled":
            self.pooled = torch.empty(count, self.width, dtype=self.dtype, device=self.device)

    def add(self, rows: np.ndarray, lengths: np.ndarray, states: Tensor) -> None:
        states = states.to(self.device, self.dtype)
        if self.options.output == "pooled":
            self.pooled[upload(torch.from_numpy(rows), self.device)] = states
            return
        for row, part in zip(rows, states.split(lengths.tolist()), strict=True):
            self.tokens[row] = part.clone()  # a view would keep the whole batch's

    def result(self, single: bool) -> Any:
        if self.options.output == "pooled":
            found = self.pooled.numpy() if self.options.to_numpy else self.pooled
            return found[0] if single else found
        tokens = [t.numpy() for t in self.tokens] if self.options.to_numpy else self.tokens
        return tokens[0] if single else tokens


def _progress_bar(show: bool | None, total: int) -> tqdm:
    show = sys.stderr.isatty() and total > _TEXTS_PER_CHUNK // 4 if show is None else show
    return tqdm(total=total, unit="text", desc="encode", disable=not show)
