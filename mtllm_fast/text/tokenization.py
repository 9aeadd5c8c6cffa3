"""Tokenisation ``[language] w1 … wn </s>``, one language per text, without touching the tokenizer that the user holds.

transformers' ``NllbTokenizer`` keeps the source language as state (``src_lang``), and truncation and padding as state
of the Rust tokenizer under it: two threads, or a user's own call, change each other's ids. Here the Rust tokenizer is
copied once, without truncation, padding or template; the language and ``</s>`` are put around the ids afterwards. Same
ids, one call per batch whatever its languages.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from mtllm_fast.core.errors import TokenizerNotFoundError, UnknownLanguageError
from mtllm_fast.text.languages import LANGUAGES

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("mtllm_fast")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class TokenizedTexts:
    """B tokenised texts, packed.

    Attributes:
        ids: [T] int64, the tokens of all texts one after another.
        offsets: [B + 1] int64, text i is ``ids[offsets[i]:offsets[i + 1]]``.
        n_truncated: how many texts lost tokens to ``max_length``.
    """

    ids: np.ndarray
    offsets: np.ndarray
    n_truncated: int

    @property
    def lengths(self) -> np.ndarray:
        """[B] int64, tokens per text, language and ``</s>`` included."""
        return np.diff(self.offsets)


def load_tokenizer(
    path_or_id: str | os.PathLike[str], *fallbacks: str | None, **hub_kwargs: Any
) -> PreTrainedTokenizerBase:
    """The first tokenizer with NLLB language codes among a checkpoint folder or hub id and its fallbacks.

    Args:
        path_or_id: the checkpoint: a folder or a hub id.
        fallbacks: where to look when the checkpoint brings none, such as ``facebook/nllb-200-distilled-600M``; None
            and ``""`` stand for nowhere.
        hub_kwargs: ``token``, ``cache_dir``, ``local_files_only`` …; ``revision`` and ``subfolder`` concern the
            checkpoint only.

    Returns:
        The transformers tokenizer.

    Raises:
        TokenizerNotFoundError: none of them has one; the message says what was tried.
        ValueError: a tokenizer that cannot produce ``[language] tokens </s>`` in the order that NLLB was trained on.
    """
    tried: list[str] = []
    for source in filter(None, (os.fspath(path_or_id), *fallbacks)):
        tokenizer = _try_load(source, hub_kwargs, tried)
        if tokenizer is not None:
            if tried:
                logger.warning("tokenizer of %s used (%s)", source, "; ".join(tried))
            return tokenizer
        hub_kwargs = {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}
    raise TokenizerNotFoundError(
        f"no NLLB tokenizer found: {'; '.join(tried)}. Save one beside the checkpoint with "
        "AutoTokenizer.from_pretrained('facebook/nllb-200-distilled-600M').save_pretrained(FOLDER)"
    )


def _try_load(source: str, hub_kwargs: dict[str, Any], tried: list[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of one source, or None and the reason appended to ``tried``. What is there but broken raises."""
    from transformers import AutoTokenizer

    is_folder = os.path.isdir(source)
    folder = Path(source, hub_kwargs.get("subfolder") or "")
    if is_folder and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        tried.append(f"{folder} holds no {_TOKENIZER_FILES[0]}")
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **{**hub_kwargs, "trust_remote_code": False})
    except (OSError, ValueError) as error:
        if is_folder:
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
        tried.append(f"{source}: {str(error).strip().splitlines()[0]}")
        return None
    if getattr(tokenizer, "legacy_behaviour", False):
        raise ValueError(
            f"the tokenizer of {source} has legacy_behaviour=True (tokens </s> [language]); the encoder reads "
            "[language] tokens </s>: set legacy_behaviour to false in its tokenizer_config.json"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"the tokenizer of {source} is a {type(tokenizer).__name__}, which has no Rust tokenizer")
    rust: Tokenizer = tokenizer.backend_tokenizer
    if all(rust.token_to_id(code) is None for code in LANGUAGES):
        # A sentencepiece.bpe.model alone, or another model's tokenizer: the ids of the codes cannot be guessed.
        tried.append(f"{source} has a tokenizer without NLLB language codes")
        return None
    return tokenizer


class _Backend:
    """The stateless copy of one tokenizer's Rust part, and the ids that are put around the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        if not getattr(tokenizer, "is_fast", False) or tokenizer.eos_token_id is None:
            raise TypeError(
                f"the tokenizer must be NLLB's with a Rust backend and an end token, got {type(tokenizer).__name__}"
            )
        original: Tokenizer = tokenizer.backend_tokenizer
        self.vocabulary_size = original.get_vocab_size()
        self.rust: Tokenizer = Tokenizer.from_str(original.to_str())
        self.rust.no_truncation()
        self.rust.no_padding()
        self.eos_id: int = tokenizer.eos_token_id
        ids = {code: self.rust.token_to_id(code) for code in LANGUAGES}
        self.language_ids = {code: index for code, index in ids.items() if index is not None}


_backends: WeakKeyDictionary[PreTrainedTokenizerBase, _Backend] = WeakKeyDictionary()
_backends_lock = threading.Lock()


def _backend(tokenizer: PreTrainedTokenizerBase) -> _Backend:
    with _backends_lock:
        backend = _backends.get(tokenizer)
        # The user may have added tokens since the copy was made.
        if backend is None or backend.vocabulary_size != tokenizer.backend_tokenizer.get_vocab_size():
            backend = _backends[tokenizer] = _Backend(tokenizer)
        return backend


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], languages: Sequence[str], max_length: int
) -> TokenizedTexts:
    """``[language] + tokens[:max_length - 2] + [</s>]`` for every text, packed.

    The ids are those of ``tokenizer(text, truncation=True, max_length=max_length)`` with ``src_lang`` set to the text's
    language; nothing of the tokenizer's state is read or written, so threads may share it.

    Args:
        tokenizer: an NLLB tokenizer, see :func:`load_tokenizer`.
        texts: B strings; an empty one gives ``[language, </s>]``.
        languages: B codes out of :data:`mtllm_fast.text.languages.LANGUAGES`.
        max_length: most tokens per text, language and ``</s>`` included; at least 3.

    Returns:
        The packed ids with their offsets, and how many texts were cut.

    Raises:
        UnknownLanguageError: the tokenizer has no token for a language.
        TypeError: a text is not a string.
        ValueError: ``max_length`` below 3, or not one language per text.
    """
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3 (language, one token, </s>), got {max_length}")
    if len(texts) != len(languages):
        raise ValueError(f"languages must hold one code per text: got {len(languages)} for {len(texts)} texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] must be a str, got {type(text).__name__}")
    backend = _backend(tokenizer)
    try:
        language_ids = [backend.language_ids[language] for language in languages]
    except KeyError as error:
        raise UnknownLanguageError(
            f"the tokenizer has no token for {error.args[0]!r}; it has {len(backend.language_ids)} of NLLB's "
            f"{len(LANGUAGES)} languages"
        ) from None

    try:
        rows = [encoding.ids for encoding in backend.rust.encode_batch_fast(list(texts), add_special_tokens=False)]
    except TypeError:
        refuse_half_surrogates("texts", texts)
        raise
    room = max_length - 2
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([min(len(row), room) + 2 for row in rows], out=offsets[1:])
    ids = np.empty(offsets[-1], dtype=np.int64)
    for start, end, row in zip(offsets[:-1].tolist(), offsets[1:].tolist(), rows, strict=True):
        ids[start + 1 : end - 1] = row[:room]
    ids[offsets[:-1]] = language_ids
    ids[offsets[1:] - 1] = backend.eos_id
    return TokenizedTexts(ids, offsets, n_truncated=sum(len(row) > room for row in rows))


def refuse_half_surrogates(name: str, texts: Sequence[str]) -> None:
    """Raises a ValueError for what a Rust tokenizer refuses with a TypeError that does not tell why."""
    for index, text in enumerate(texts):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name}[{index}] holds half of a surrogate pair, which is no text") from None
