"""Batches for self-distillation (stage 1 of arXiv 2406.12739): texts in, both sides' packed tokens and spans out.

A fast tokenizer keeps truncation, padding and language as state of the Rust tokenizer under it, which any call of its
owner may change. The collator therefore holds copies whose state is set once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding

from mtllm_fast.core.errors import UnknownLanguageError
from mtllm_fast.packing import pack_token_ids
from mtllm_fast.text.alignment import align_spans
from mtllm_fast.text.languages import resolve_language
from mtllm_fast.text.tokenization import refuse_half_surrogates

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


class DataCollatorForSelfDistillation:
    """Tokenise each text for the LLM and for the encoder, align the two word by word, pack both.

    The teacher reads ``llm_tokenizer(text)``, as that tokenizer does it (Llama: BOS first), the student
    ``[src_lang] tokens </s>``. Documents are usually longer than ``max_length``; each side keeps its first
    ``max_length`` tokens, special ones included, and spans lie where both still have tokens. This is the recipe.

    A plain callable: the ``collate_fn`` of a ``DataLoader`` (it pickles, so workers may be spawned) or the
    ``data_collator`` of a ``Trainer``, for map-style and streaming data. A ``Trainer`` needs
    ``remove_unused_columns=False``, or it drops the text before it gets here; for streaming data on several processes
    also ``accelerator_config={"dispatch_batches": False}``, since a packed batch cannot be cut into equal parts.

    Args:
        llm_tokenizer, encoder_tokenizer: fast tokenizers, the latter NLLB's. They are copied, neither changed nor
            looked at afterwards.
        src_lang: language of the texts, a FLORES-200 code or an alias (``mtllm_fast.languages``).
        max_length: most tokens per text on either side, at least 3.
        spans: whether to align; without, batches serve the sequence loss only.
        only_overlapping_tokens, complete: which spans; see ``align_spans``.
        text_column: where a text lies in an example that is a mapping.

    Raises:
        TypeError: a tokenizer that is not fast.
        ValueError: ``max_length`` below 3, or an encoder tokenizer without an end token.
        UnknownLanguageError: names the nearest codes, or the tokenizer has no token for the language.

    >>> from transformers import AutoTokenizer
    >>> from mtllm_fast.tiny import tiny_path
    >>> tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    >>> collate = DataCollatorForSelfDistillation(tokenizer, tokenizer, only_overlapping_tokens=False)
    >>> batch = collate(["All human beings", {"text": "are born free"}])
    >>> batch["cu_seqlens"].tolist(), batch["max_seqlen"], len(batch["spans"])
    ([0, 8, 15], 8, 6)
    """

    def __init__(
        self,
        llm_tokenizer: PreTrainedTokenizerBase,
        encoder_tokenizer: PreTrainedTokenizerBase,
        *,
        src_lang: str = "eng_Latn",
        max_length: int = 512,
        spans: bool = True,
        only_overlapping_tokens: bool = True,
        complete: bool = False,
        text_column: str = "text",
    ) -> None:
        if not isinstance(max_length, int):
            raise TypeError(f"max_length must be an int, got {type(max_length).__name__}")
        if max_length < 3:
            raise ValueError(f"max_length must be at least 3 (language, one token, </s>), got {max_length}")
        self.max_length = max_length
        self.spans = spans
        self.only_overlapping_tokens = only_overlapping_tokens
        self.complete = complete
        self.text_column = text_column
        self._llm = _copy_of("llm_tokenizer", llm_tokenizer, max_length)
        self._encoder = _copy_of("encoder_tokenizer", encoder_tokenizer, max_length, resolve_language(src_lang))

    def __call__(self, examples: Sequence[str | Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of B texts.

        Args:
            examples: strings, or mappings with the text column, whose other columns are ignored.

        Returns:
            dict: ``input_ids`` int64 ``[T_llm]``, ``cu_seqlens`` int32 ``[B + 1]``, ``max_seqlen`` int; the same of
            the encoder's side as ``encoder_input_ids`` …; and ``spans``, a ``SpanAlignment``, unless it was declined.

        Raises:
            ValueError: no example, one without the column, or a text without any token.
            TypeError: a text is not a string.
        """
        if isinstance(examples, str | Mapping):
            raise TypeError(f"examples must be a list of texts or mappings, got one {type(examples).__name__}")
        texts = [self._text(index, example) for index, example in enumerate(examples)]
        if not texts:
            raise ValueError("examples must hold at least one text, got none")
        return self.pack(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> list[tuple[Encoding, Encoding]]:
        """The tokens of each text for the LLM and for the encoder, truncated; ``pack`` makes batches of them."""
        llm, encoder = (_encode(own, list(texts)) for own in (self._llm, self._encoder))
        return list(zip(llm, encoder, strict=True))

    def pack(self, tokenized: Sequence[tuple[Encoding, Encoding]]) -> dict[str, Any]:
        """One batch of texts that ``tokenize`` has seen, together or not."""
        llm, encoder = (list(side) for side in zip(*tokenized, strict=True))
        # accelerate takes a streamed batch's first tensor for its longest, and cuts the others to that length.
        longer_first = sorted((_packed("", llm), _packed("encoder_", encoder)), key=_tokens, reverse=True)
        batch = longer_first[0] | longer_first[1]
        if self.spans:
            batch["spans"] = align_spans(
                BatchEncoding(encoding=llm), BatchEncoding(encoding=encoder),
                only_overlapping_tokens=self.only_overlapping_tokens, complete=self.complete,
            )  # fmt: skip
        return batch

    def _text(self, index: int, example: Any) -> str:
        if isinstance(example, Mapping):
            if self.text_column not in example:
                raise ValueError(
                    f"example {index} must have the column {self.text_column!r} (text_column names it), it has "
                    f"{list(example)}; a Trainer keeps columns that no model takes with remove_unused_columns=False"
                )
            example = example[self.text_column]
        if not isinstance(example, str):
            raise TypeError(f"the text of example {index} must be a str, got {type(example).__name__}")
        return example


def _copy_of(name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, language: str | None = None) -> Any:
    """A copy whose Rust tokenizer truncates and, for the encoder, writes ``[language] tokens </s>``."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{name} must be a fast tokenizer, whose offsets align the two sides, got {type(tokenizer).__name__}"
        )
    own: Any = copy.deepcopy(tokenizer)
    own.truncation_side = "right"  # both sides must keep the same end of a document
    own("", truncation=True, max_length=max_length, padding=False)  # leaves this state behind, and its own language
    if language is not None:
        _set_language(name, own, language)
    return own


def _set_language(name: str, own: Any, language: str) -> None:
    language_id = own.backend_tokenizer.token_to_id(language)
    if language_id is None:
        raise UnknownLanguageError(f"{name}, a {type(own).__name__}, has no token for {language!r}")
    if own.eos_token is None:
        raise ValueError(f"{name} must have an end token (eos_token), this {type(own).__name__} has none")
    # Not by src_lang, which means nothing to the class that transformers 5.2 loads NLLB's files in.
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=[language, "$A", own.eos_token],
        special_tokens=[(language, language_id), (own.eos_token, own.eos_token_id)],
    )


def _encode(own: Any, texts: list[str]) -> list[Encoding]:
    rust: Tokenizer = own.backend_tokenizer
    if rust.encode_special_tokens != own.split_special_tokens:  # pickling forgets it
        rust.encode_special_tokens = own.split_special_tokens
    try:
        encodings: list[Encoding] = rust.encode_batch(texts)
    except TypeError:
        refuse_half_surrogates("examples", texts)
        raise
    empty = [index for index, encoding in enumerate(encodings) if len(encoding) == 0]
    if empty:
        raise ValueError(f"the text of example {empty[0]} has no token: {texts[empty[0]]!r}; filter such texts out")
    return encodings


def _packed(prefix: str, encodings: list[Encoding]) -> dict[str, Any]:
    ids = [encoding.ids for encoding in encodings]
    packed = {**pack_token_ids(ids), "max_seqlen": max(map(len, ids))}
    return {f"{prefix}{name}": value for name, value in packed.items()}


def _tokens(packed: dict[str, Any]) -> int:
    return len(next(iter(packed.values())))
