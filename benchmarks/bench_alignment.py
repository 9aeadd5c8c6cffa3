"""``align_spans`` beside two loops over words, in one process each, on documents of about 400 words.

Documents are sentences of the recorded case put together. The peers:

* ``loop``: the way of the authors' code, in our words. Both ends of a word are looked up on both sides, a span is a
  tensor of its tokens' indices in the padded batch, and all spans of a side are padded to a matrix with zeros.
* ``lean_loop``: the same look-ups, the spans left as Python lists. No training can use these; it is the least that a
  loop through the tokenizers' look-ups costs.

All must give the same spans. Peers take turns within every round, and ratios are medians of those of the same round.
Python's collector rests meanwhile: one pass over all that is imported takes longer than the lean loop. The second test
counts the tokenising of both sides, too (which the tokenizers spread over the cores).
"""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import harness
import pytest
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from mtllm_fast import SpanAlignment, align_spans

OP = "align_spans"
DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "alignment"
DOCUMENTS, SENTENCES, ROUNDS = 64, 35, 9


def ours(llm: Any, encoder: Any) -> SpanAlignment:
    return align_spans(llm, encoder, only_overlapping_tokens=False)


def ends_of_words(llm: Any, encoder: Any, row: int) -> Iterator[tuple[int, int, int, int]]:
    """First and last token of each word on both sides, where neither end is on no token or on token 0."""
    for word in dict.fromkeys(llm.word_ids(row)):
        if word is None:
            continue
        start, stop = llm.word_to_chars(row, word)
        ends = (
            llm.char_to_token(row, start),
            llm.char_to_token(row, stop - 1),
            encoder.char_to_token(row, start),
            encoder.char_to_token(row, stop - 1),
        )
        if all(ends):
            yield ends


def loop(llm: Any, encoder: Any, only_overlapping_tokens: bool = False) -> tuple[Tensor, Tensor]:
    llm_width, encoder_width = (max(map(len, batch["input_ids"])) for batch in (llm, encoder))
    bags: list[Tensor] = []
    encoder_bags: list[Tensor] = []
    for row in range(len(llm["input_ids"])):
        shift, encoder_shift = row * llm_width, row * encoder_width
        for a, b, c, d in ends_of_words(llm, encoder, row):
            if only_overlapping_tokens and (a != b or c != d):
                continue
            bags.append(torch.LongTensor(list(range(shift + a, shift + b + 1))))
            encoder_bags.append(torch.LongTensor(list(range(encoder_shift + c, encoder_shift + d + 1))))
    return pad_sequence(bags, batch_first=True), pad_sequence(encoder_bags, batch_first=True)


def lean_loop(llm: Any, encoder: Any) -> list[tuple[int, list[int], list[int]]]:
    return [
        (row, list(range(a, b + 1)), list(range(c, d + 1)))
        for row in range(len(llm["input_ids"]))
        for a, b, c, d in ends_of_words(llm, encoder, row)
    ]


PEERS: dict[str, Callable[[Any, Any], Any]] = {"ours": ours, "loop": loop, "lean_loop": lean_loop}


def check(llm: Any, encoder: Any) -> int:
    """All peers give the same spans; how many.

    Raises:
        AssertionError: they do not.
    """
    found, matrices, lists = ours(llm, encoder), loop(llm, encoder), lean_loop(llm, encoder)
    sides = (
        (llm, found.llm_indices, found.llm_offsets, matrices[0], [row[1] for row in lists]),
        (encoder, found.encoder_indices, found.encoder_offsets, matrices[1], [row[2] for row in lists]),
    )
    for batch, indices, offsets, matrix, spans in sides:
        lengths = [len(ids) for ids in batch["input_ids"]]
        in_row = torch.cat([torch.arange(n) for n in lengths])
        in_padded = torch.cat([row * max(lengths) + torch.arange(n) for row, n in enumerate(lengths)])
        assert torch.equal(in_padded[indices], matrix[matrix > 0])
        assert torch.equal(offsets.diff(), (matrix > 0).sum(dim=1))
        assert [part.tolist() for part in in_row[indices].split(offsets.diff().tolist())] == spans
    return len(found)


@pytest.mark.parametrize("work", ["aligning", "tokenising and aligning"])
def test_align_spans(benchmark: Any, work: str) -> None:
    sentences = json.loads((DATA / "spans.json").read_text())["sentences"]
    generator = random.Random(0)
    texts = [" ".join(generator.choices(sentences, k=SENTENCES)) for _ in range(DOCUMENTS)]
    tokenizers = [AutoTokenizer.from_pretrained(DATA / f"{side}_tokenizer") for side in ("llm", "encoder")]
    tokenised = [tokenizer(texts) for tokenizer in tokenizers]
    spans = check(*tokenised)
    words = sum(len({*encoding.word_ids} - {None}) for encoding in tokenised[0].encodings)
    tokens = [sum(map(len, batch["input_ids"])) for batch in tokenised]
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}

    def run(peer: str) -> None:
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            batches = tokenised if work == "aligning" else [tokenizer(texts) for tokenizer in tokenizers]
            PEERS[peer](*batches)
            seconds[peer].append(time.perf_counter() - start)
        finally:
            gc.enable()

    def run_the_others() -> None:  # before every round of ours
        for peer in PEERS:
            if peer != "ours":
                run(peer)

    benchmark.group = f"{OP}, {work}"
    benchmark.pedantic(lambda: run("ours"), setup=run_the_others, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable: the spans were checked, and that is all
        return
    per_document = {"words": words, "llm_tokens": tokens[0], "encoder_tokens": tokens[1], "spans": spans}
    per_document = {name: count / DOCUMENTS for name, count in per_document.items()}
    table = Table(
        title=f"{work}: {DOCUMENTS} documents, each of "
        + ", ".join(f"{count:,.0f} {name.replace('_', ' ')}" for name, count in per_document.items()),
        caption=f"one process, {os.cpu_count()} cores; medians of {ROUNDS} interleaved rounds",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("peer", "documents/s", "ours is faster by", "least … most"):
        table.add_column(heading, justify="left" if heading == "peer" else "right", no_wrap=True)
    for peer, times in seconds.items():
        times = times[-ROUNDS:]  # the first is the warm-up
        ratios = [theirs / mine for theirs, mine in zip(times, seconds["ours"][-ROUNDS:], strict=True)]
        speed = DOCUMENTS / median(times)
        table.add_row(peer, f"{speed:,.0f}", f"{median(ratios):.1f}x", f"{min(ratios):.1f} … {max(ratios):.1f}")
        benchmark.extra_info[peer] = {"documents_per_s": speed, "ours_is_faster_by": median(ratios), "seconds": times}
    benchmark.extra_info["per_document"] = per_document
    harness.TABLES.append(table)
