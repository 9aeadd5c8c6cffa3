"""``align_spans``: the authors' spans, bit for bit, on two recorded productions, and the complete treatment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DATA
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from mtllm_fast import SpanAlignment, align_spans

GOLDEN = DATA / "layerwise-C9"
RUNS = json.loads((GOLDEN / "alignment.json").read_text())


@cache
def tokenizers(folder: str, llm: str, encoder: str):
    return tuple(AutoTokenizer.from_pretrained(DATA / folder / name) for name in (llm, encoder))


def batches(folder: str, llm: str, encoder: str, texts: list[str], **options):
    return [tokenizer(texts, **options) for tokenizer in tokenizers(folder, llm, encoder)]


def per_text(batch, indices: Tensor, offsets: Tensor) -> list[list[list[int]]]:
    """CSR spans of packed tokens as token indices within each text."""
    lengths = [sum(encoding.attention_mask) for encoding in batch.encodings]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    spans: list[list[list[int]]] = [[] for _ in lengths]
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        text = int(torch.searchsorted(starts, indices[begin], right=True)) - 1
        spans[text].append((indices[begin:end] - starts[text]).tolist())
    return spans


def both(llm, encoder, **options) -> tuple[list, list]:
    found = align_spans(llm, encoder, **options)
    assert all(t.dtype == torch.int64 for t in vars(found).values())
    return (
        per_text(llm, found.llm_indices, found.llm_offsets),
        per_text(encoder, found.encoder_indices, found.encoder_offsets),
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_the_recorded_spans(overlap):
    recorded = json.loads((DATA / "alignment" / "spans.json").read_text())
    llm, encoder = batches("alignment", "llm_tokenizer", "encoder_tokenizer", recorded["sentences"],
                           **recorded["tokenize_kwargs"])  # fmt: skip
    found_llm, found_encoder = both(llm, encoder, only_overlapping_tokens=overlap)
    for i, spans in enumerate(recorded["spans"]):
        pairs = list(zip(spans["llm"], spans["encoder"], strict=True))
        expected = [pair for pair in pairs if not overlap or (len(pair[0]), len(pair[1])) == (1, 1)]
        assert list(zip(found_llm[i], found_encoder[i], strict=True)) == expected, recorded["sentences"][i]
    counts = json.loads((DATA / "alignment" / "case.json").read_text())["counts"]
    assert sum(map(len, found_llm)) == counts["spans_overlap" if overlap else "spans_all"]


@pytest.mark.parametrize("kind", ["all", "overlap"])
def test_the_recorded_bags(kind):
    """The recorded matrices of token ids into the padded batch, 0 where a row is shorter."""
    recorded = json.loads((DATA / "alignment" / "spans.json").read_text())
    expected = load_file(DATA / "alignment" / "expected.safetensors")
    llm, encoder = batches("alignment", "llm_tokenizer", "encoder_tokenizer", recorded["sentences"],
                           **recorded["tokenize_kwargs"])  # fmt: skip
    found = both(llm, encoder, only_overlapping_tokens=kind == "overlap")
    for spans, name in zip(found, ("bag_ids", "nllb_bag_ids"), strict=True):
        matrix = expected[f"{kind}.{name}"]
        rows = [[48 * text + token for token in span] for text, of_text in enumerate(spans) for span in of_text]
        assert [[int(i) for i in row if i] for row in matrix] == rows


@pytest.mark.parametrize("padding", [{}, {"padding": True}, {"padding": True, "padding_side": "left"}], ids=str)
@pytest.mark.parametrize("run", RUNS["runs"])
def test_the_second_production(run, padding):
    recorded = RUNS["runs"][run]
    texts = [RUNS["texts"][i] for i, example in enumerate(recorded["examples"]) if example is not None]
    examples = [example for example in recorded["examples"] if example is not None]
    pair = tokenizers("layerwise-C9", recorded["llm_tokenizer"], recorded["nllb_tokenizer"])
    if padding:
        for tokenizer in pair:
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    llm, encoder = (tokenizer(texts, **recorded["tokenize_kwargs"], **padding) for tokenizer in pair)
    found = both(llm, encoder, only_overlapping_tokens=False)
    for i, example in enumerate(examples):
        assert found[0][i] == example["spans"], texts[i]
        assert found[1][i] == example["nllb_spans"], texts[i]


@pytest.mark.parametrize("run", RUNS["runs"])
def test_texts_where_the_authors_code_raises_have_what_is_there(run):
    recorded = RUNS["runs"][run]
    pair = tokenizers("layerwise-C9", recorded["llm_tokenizer"], recorded["nllb_tokenizer"])
    for i in map(int, recorded["upstream_raises"]):
        llm, encoder = (tokenizer([RUNS["texts"][i]], **recorded["tokenize_kwargs"]) for tokenizer in pair)
        found = align_spans(llm, encoder, only_overlapping_tokens=False)
        assert len(found.llm_offsets) == len(found.encoder_offsets) == len(found) + 1


def test_complete_loses_nothing_and_ends_characters_of_several_tokens():
    texts = RUNS["texts"]
    llm, encoder = batches("layerwise-C9", "a_llm", "a_nllb", texts)
    plain, complete = (both(llm, encoder, only_overlapping_tokens=False, complete=c) for c in (False, True))
    longer = 0
    for i in range(len(texts)):
        ours = {span[0]: span for span in complete[0][i]}
        for span in plain[0][i]:
            assert span[0] in ours, "a span of the authors' is missing"
            assert ours[span[0]][: len(span)] == span, "a span ends earlier"
            longer += len(ours[span[0]]) > len(span)
    assert longer > 0, "no character in these texts is split into bytes"
    assert sum(map(len, complete[0])) > sum(map(len, plain[0]))


def test_the_first_word_without_special_tokens():
    llm, encoder = batches("layerwise-C9", "a_llm", "a_nllb", ["one two three"], add_special_tokens=False)
    dropped, _ = both(llm, encoder, only_overlapping_tokens=False)
    kept, _ = both(llm, encoder, only_overlapping_tokens=False, complete=True)
    assert len(kept[0]) == len(dropped[0]) + 1
    assert kept[0][0][0] == 0


@pytest.mark.parametrize("texts", [[""], ["", "a b", ""]], ids=str)
@pytest.mark.parametrize("complete", [False, True])
def test_empty_texts(texts, complete):
    llm, encoder = batches("layerwise-C9", "a_llm", "a_nllb", texts)
    found = align_spans(llm, encoder, only_overlapping_tokens=False, complete=complete)
    assert found.llm_offsets[0] == found.encoder_offsets[0] == 0
    assert len(found) == (2 if "a b" in texts else 0)


def test_bad_input_is_named():
    llm, encoder = batches("layerwise-C9", "a_llm", "a_nllb", ["one", "two"])
    with pytest.raises(ValueError, match="the batches must hold the same texts: got 2 and 1"):
        align_spans(llm, tokenizers("layerwise-C9", "a_llm", "a_nllb")[1](["one"]))
    with pytest.raises(TypeError, match="encoder_batch must be the BatchEncoding of a fast tokenizer, got dict"):
        align_spans(llm, dict(encoder))


def test_it_moves_as_one():
    found = SpanAlignment(*(torch.arange(3) for _ in range(4)))
    assert found.to("meta").encoder_offsets.is_meta


@dataclass
class Tokens:
    """What ``align_spans`` reads of a ``tokenizers.Encoding``."""

    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    attention_mask: list[int]

    def __len__(self) -> int:
        return len(self.offsets)


@st.composite
def segmentations(draw, position: int, end: int) -> Tokens:
    """Characters of a text cut into tokens and words at random: with characters of several tokens, characters that are
    dropped, tokens without characters, special tokens and padding."""
    some = st.integers(0, 2)
    tokens: list[tuple[int, int, int | None]] = [(0, 0, None)] * draw(some)
    word = 0
    while position < end:
        kind = draw(st.sampled_from(["token", "token", "token", "bytes", "dropped", "empty", "special"]))
        stop = min(end, position + (draw(st.integers(1, 4)) if kind == "token" else 1))
        if kind in ("token", "bytes"):
            tokens += [(position, stop, word)] * (1 if kind == "token" else draw(st.integers(2, 4)))
        if kind == "empty":
            tokens.append((position, position, word))
        elif kind == "special":
            tokens.append((0, 0, None))
        else:
            position = stop
        word += draw(st.booleans())
    tokens += [(0, 0, None)] * draw(some)
    front, behind = draw(st.sampled_from([(0, 0), (0, 3), (3, 0)]))
    padded = [(0, 0, None)] * front + tokens + [(0, 0, None)] * behind
    return Tokens(
        [(start, stop) for start, stop, _ in padded],
        [word for _, _, word in padded],
        [0] * front + [1] * len(tokens) + [0] * behind,
    )


def slow_spans(llm: Tokens, encoder: Tokens, overlap: bool, complete: bool) -> list[tuple[list[int], list[int]]]:
    """Word by word, token by token, as ``align_spans`` documents it."""

    def span(tokens: Tokens, start: int, stop: int) -> list[int]:
        real = [pair for pair, is_real in zip(tokens.offsets, tokens.attention_mask, strict=True) if is_real]
        if complete:
            ends = [i for i, (a, b) in enumerate(real) if set(range(a, b)) & set(range(start, stop))]
        else:
            first, last = ([i for i, (a, b) in enumerate(real) if a <= c < b][:1] for c in (start, stop - 1))
            ends = first + last if any(first) and any(last) else []
        return list(range(ends[0], ends[-1] + 1)) if ends else []

    spans = []
    for word in sorted({*llm.word_ids} - {None}):
        of_word = [pair for pair, w in zip(llm.offsets, llm.word_ids, strict=True) if w == word]
        start, stop = of_word[0][0], of_word[-1][1]
        pair = span(llm, start, stop), span(encoder, start, stop)
        if start < stop and all(pair) and (not overlap or (len(pair[0]), len(pair[1])) == (1, 1)):
            spans.append(pair)
    return spans


@settings(max_examples=400, deadline=None, database=None)
@given(
    st.data(), st.lists(st.integers(0, 12), max_size=4), st.sampled_from([0, 250, 65_530]), st.booleans(), st.booleans()
)
def test_any_segmentation(data, texts, begin, overlap, complete):
    """From ``begin`` on, so that places need one, two and three bytes."""
    llm, encoder = ([data.draw(segmentations(begin, begin + n)) for n in texts] for _ in range(2))
    found = both(
        SimpleNamespace(encodings=llm), SimpleNamespace(encodings=encoder),
        only_overlapping_tokens=overlap, complete=complete,
    )  # fmt: skip
    for i, pair in enumerate(zip(llm, encoder, strict=True)):
        expected = slow_spans(*pair, overlap, complete)
        assert list(zip(found[0][i], found[1][i], strict=True)) == expected
