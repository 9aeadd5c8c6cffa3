"""Translation by NLLB, for the translate-test baseline: any language in, English out, cached text by text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSeq2SeqLM

from mtllm_fast.core.errors import BatchTooLargeError, UnknownLanguageError
from mtllm_fast.tasks.examples import Example
from mtllm_fast.text.languages import resolve_language
from mtllm_fast.text.tokenization import load_tokenizer, tokenize

logger = logging.getLogger("mtllm_fast")


class Translator:
    """An NLLB or M2M-100 model with its tokenizer; greedy search, or a beam.

    What a text becomes depends on nothing but the text, its language and the options: it is translated once, and kept
    in ``cache``, a file of JSON lines that grows as the work goes on. A killed run loses a batch.

    Args:
        model: folder or hub id.
        target: language to translate into.
        num_beams: 1: greedy.
        max_new_tokens: most tokens of a translation.
        max_length: most tokens of a text.
        cache: file, of one process at a time; None: nothing is kept.
        device: default: a GPU if there is one.

    Raises:
        UnknownLanguageError: the tokenizer lacks ``target``.
        ValueError: ``num_beams`` or ``max_new_tokens`` below 1; a cache whose lines are none.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        target: str = "eng_Latn",
        num_beams: int = 1,
        max_new_tokens: int = 256,
        max_length: int = 512,
        cache: str | os.PathLike[str] | None = None,
        dtype: Any = "auto",
        device: Any = None,
    ) -> None:
        if num_beams < 1 or max_new_tokens < 1:
            raise ValueError(f"num_beams and max_new_tokens must be at least 1, got {num_beams} and {max_new_tokens}")
        self.target, self.num_beams, self.max_length = resolve_language(target), num_beams, max_length
        self.max_new_tokens = max_new_tokens
        self.model = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=dtype).eval()
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = load_tokenizer(model)
        self._bos = self.tokenizer.backend_tokenizer.token_to_id(self.target)
        if self._bos is None:
            raise UnknownLanguageError(f"{model}: its tokenizer has no token for {self.target!r}")
        self._options = f"{_fingerprint(self.model)} {self.target} {num_beams} {max_new_tokens} {max_length}"
        self._cache = None if cache is None else Path(cache)
        self._known: dict[str, str] = {} if self._cache is None else _read_cache(self._cache)

    def __call__(self, texts: Sequence[str], languages: Sequence[str], *, batch_tokens: int = 4096) -> list[str]:
        """The translations in the order of ``texts``; those in the target's language stay as they are.

        Args:
            batch_tokens: most tokens of a batch, padding included, times the beams.

        Raises:
            BatchTooLargeError: it does not fit into memory.
        """
        keys = [self._key(text, language) for text, language in zip(texts, languages, strict=True)]
        missing = {k: i for i, k in enumerate(keys) if k not in self._known and languages[i] != self.target}
        for batch in tqdm(self._batches(list(missing.values()), texts, languages, batch_tokens), desc="translating"):
            found = self._translate([texts[i] for i in batch], [languages[i] for i in batch])
            self._remember({keys[i]: text for i, text in zip(batch, found, strict=True)})
        return [text if language == self.target else self._known[k]
                for text, language, k in zip(texts, languages, keys, strict=True)]  # fmt: skip

    def _batches(
        self, indices: list[int], texts: Sequence[str], languages: Sequence[str], batch_tokens: int
    ) -> list[list[int]]:
        """By length, the longest first: what does not fit shows at once."""
        if not indices:
            return []
        chosen = [texts[i] for i in indices], [languages[i] for i in indices]
        lengths = tokenize(self.tokenizer, *chosen, self.max_length).lengths.tolist()
        batches: list[list[int]] = []
        widest = 0
        for length, index in sorted(zip(lengths, indices, strict=True), reverse=True):
            if not batches or (len(batches[-1]) + 1) * widest * self.num_beams > batch_tokens:
                batches.append([])
                widest = length
            batches[-1].append(index)
        return batches

    @torch.no_grad()
    def _translate(self, texts: Sequence[str], languages: Sequence[str]) -> list[str]:
        tokens = tokenize(self.tokenizer, texts, languages, self.max_length)
        rows = [torch.from_numpy(tokens.ids[a:b]) for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
        pad = self.model.config.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(self.model.device)
        mask = (torch.arange(ids.shape[1])[None] < torch.from_numpy(tokens.lengths)[:, None]).to(ids)
        try:
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, forced_bos_token_id=self._bos, num_beams=self.num_beams,
                do_sample=False, max_new_tokens=self.max_new_tokens,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise BatchTooLargeError(
                f"translating {len(texts)} texts of up to {ids.shape[1]} tokens with {self.num_beams} beams does not "
                f"fit into the memory of {self.model.device}: lower batch_tokens, num_beams or max_new_tokens"
            ) from error
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    def forget(self) -> None:
        """Translate everything anew; the file is left as it is."""
        self._known = {}

    def _key(self, text: str, language: str) -> str:
        return hashlib.sha256(f"{self._options}\0{language}\0{text}".encode()).hexdigest()

    def _remember(self, found: dict[str, str]) -> None:
        self._known |= found
        if self._cache is not None:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with self._cache.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"key": k, "text": t}, ensure_ascii=False) + "\n" for k, t in found.items())
                file.flush()
                os.fsync(file.fileno())


def in_english(examples: Sequence[Example], translate: Translator) -> list[Example]:
    """Examples with all their texts translated. An empty choice reads "None", as in rows that have such."""
    parts = [(i, text) for i, example in enumerate(examples) for text in (*example.text, *example.choices)]
    found = iter(translate([text for _, text in parts], [examples[i].language for i, _ in parts]))
    english = []
    for example in examples:
        text = tuple(next(found) for _ in example.text)
        english.append(replace(example, text=text, choices=tuple(next(found) or "None" for _ in example.choices)))
    return english


def _fingerprint(model: Any) -> str:
    """Of the weights themselves, a sample of each: a folder may hold others the next time."""
    result = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sample = weight.flatten()[:: max(1, weight.numel() // 64)].float().cpu().numpy().tobytes()
        result.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + sample)
    return result.hexdigest()


def _read_cache(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    lines = path.read_bytes().split(b"\n")
    if lines.pop():  # a line that a killed process did not finish
        logger.warning("%s: its last line is unfinished and is dropped", path)
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_bytes(b"".join(line + b"\n" for line in lines))
        aside.replace(path)
    known = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known[row["key"]] = row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a translation ({error}); delete the file") from None
    return known
