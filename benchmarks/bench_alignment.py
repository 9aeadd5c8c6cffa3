"""``align_spans`` beside a loop over words, as the authors' code has it, on documents that are tokenised already.

Documents are sentences of the recorded case put together, a few hundred tokens each. The peers must agree on the spans.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mtllm_fast import align_spans

OP = "align_spans"
DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "alignment"
DOCUMENTS, SENTENCES = 64, 20


def tokenised() -> tuple[Any, Any]:
    sentences = json.loads((DATA / "spans.json").read_text())["sentences"]
    generator = random.Random(0)
    texts = [" ".join(generator.choices(sentences, k=SENTENCES)) for _ in range(DOCUMENTS)]
    return tuple(AutoTokenizer.from_pretrained(DATA / f"{side}_tokenizer")(texts) for side in ("llm", "encoder"))  # type: ignore[return-value]


def loop_over_words(llm: Any, encoder: Any) -> int:
    """Word by word, character by character, through the tokenizers' own look-ups; how many spans there are."""
    spans = []
    for i in range(len(llm["input_ids"])):
        for word in dict.fromkeys(w for w in llm.word_ids(i) if w is not None):
            start, stop = llm.word_to_chars(i, word)
            ends = [
                batch.char_to_token(i, c) if c >= 0 else None for batch in (llm, encoder) for c in (start, stop - 1)
            ]
            if all(ends):
                spans.append((list(range(ends[0], ends[1] + 1)), list(range(ends[2], ends[3] + 1))))
    return len(spans)


@pytest.mark.parametrize("peer", ["ours", "loop"])
def test_align_spans(benchmark: Any, peer: str) -> None:
    llm, encoder = tokenised()
    align = (lambda: len(align_spans(llm, encoder, only_overlapping_tokens=False))) if peer == "ours" else (
        lambda: loop_over_words(llm, encoder))  # fmt: skip
    assert align() == loop_over_words(llm, encoder)
    benchmark.group = f"{OP}, {DOCUMENTS} documents"
    benchmark.pedantic(align, rounds=7, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["documents_per_s"] = DOCUMENTS / benchmark.stats.stats.median
        benchmark.extra_info["tokens"] = sum(map(len, llm["input_ids"]))
