"""Documents and batches for training: order, shuffling, sharing among processes, resuming, errors."""

from __future__ import annotations

import json
import threading

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mtllm_fast import DataCollatorForSelfDistillation
from mtllm_fast.tiny import tiny_documents, tiny_llm_tokenizer, tiny_path
from mtllm_fast.training.batching import StreamingBatches
from mtllm_fast.training.streams import open_documents

TEXTS = [f"text {i}" for i in range(23)]


def write(folder, suffix, texts, name="a"):
    path = folder / f"{name}{suffix}"
    if suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    elif suffix == ".csv":
        path.write_text("n,text\n" + "".join(f"1,{text}\n" for text in texts))
    else:
        pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=5)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_is_read_in_order(tmp_path, suffix):
    path = write(tmp_path, suffix, TEXTS)
    assert list(open_documents(path, epochs=1)) == TEXTS
    assert list(open_documents(str(path), epochs=2, block=4)) == TEXTS * 2


def test_folders_patterns_and_lists(tmp_path):
    write(tmp_path, ".txt", TEXTS[:5], "b")
    write(tmp_path, ".parquet", TEXTS[5:9], "a")
    (tmp_path / "notes.md").write_text("no data")
    assert list(open_documents(tmp_path, epochs=1)) == TEXTS[5:9] + TEXTS[:5]
    assert list(open_documents(f"{tmp_path}/*.txt", epochs=1)) == TEXTS[:5]
    assert list(open_documents([tmp_path / "b.txt", tmp_path / "a.parquet"], epochs=1)) == TEXTS[:9]


def test_datasets_objects():
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    assert list(open_documents(dataset, epochs=1)) == TEXTS
    assert list(open_documents(dataset.to_iterable_dataset(), epochs=1, block=4)) == TEXTS


def test_a_dataset_by_name(monkeypatch):
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        return datasets.Dataset.from_dict({"body": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(open_documents("owner/fineweb", text_column="body", split="sample", epochs=1)) == TEXTS
    assert asked == {"name": "owner/fineweb", "split": "sample", "streaming": True}


def test_empty_texts_are_counted(tmp_path):
    path = write(tmp_path, ".txt", ["a", "", "  ", "b", "", "c"])
    stream = open_documents(path, epochs=2, block=2)
    assert list(stream) == ["a", "b", "c"] * 2
    assert stream.skipped == 6


def test_shuffling_is_a_permutation_of_its_own_in_each_epoch(tmp_path):
    for name in "abc":
        write(tmp_path, ".txt", [f"{name}{text}" for text in TEXTS], name)
    plain = list(open_documents(tmp_path, epochs=1))
    stream = iter(open_documents(tmp_path, seed=1, block=10))
    first, second = ([next(stream) for _ in plain] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(plain)
    assert len({tuple(plain), tuple(first), tuple(second)}) == 3
    assert first == list(open_documents(tmp_path, seed=1, block=10, epochs=1))
    assert first != list(open_documents(tmp_path, seed=2, block=10, epochs=1))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), block=st.integers(1, 12), epochs=st.integers(1, 3),
    seed=st.none() | st.integers(0, 5), world=st.integers(1, 3), stop=st.integers(0, 40),
)  # fmt: skip
def test_all_processes_together_read_everything_once_and_resume_exactly(
    tmp_path_factory, sizes, block, epochs, seed, world, stop
):
    folder = tmp_path_factory.mktemp("data")
    for number, size in enumerate(sizes):
        write(folder, ".txt", [f"{number}.{i}" if i % 4 != 3 else "" for i in range(size)], f"f{number}")
    if len(list(open_documents(folder, epochs=1))) < world:
        return
    options = {"block": block, "epochs": epochs, "seed": seed}
    whole = list(open_documents(folder, **options))
    shares = []
    for rank in range(world):
        stream = open_documents(folder, rank=rank, world_size=world, **options)
        documents, states = [], [stream.state_dict()]
        for document in stream:
            documents.append(document)
            states.append(json.loads(json.dumps(stream.state_dict())))
        assert stream.dropped == len(whole) % world
        again = open_documents(folder, rank=rank, world_size=world, **options)
        at = min(stop, len(documents))
        again.load_state_dict(states[at])
        assert list(again) == documents[at:]
        assert again.skipped == stream.skipped
        shares.append(documents)
    assert len({len(share) for share in shares}) == 1
    dealt = [document for round_ in zip(*shares, strict=True) for document in round_]
    assert dealt == whole[: len(whole) // world * world]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", "", {}, r"a\.txt: holds no row"),
        ("a.txt", "\n\n", {}, "0 documents for 1 processes"),
        ("a.txt", "one\n", {"world_size": 2}, "1 documents for 2 processes"),
        ("a.jsonl", '{"body": "x"}\n', {}, r"line 1: no column 'text'; the columns are 'body'"),
        ("a.jsonl", '{"text": 3}\n', {}, r"row 1: column 'text' must hold text, got int '3'"),
        ("a.jsonl", '{"text": null}\n', {}, "got null"),
        ("a.jsonl", "{text}\n", {}, "line 1: not JSON"),
        ("a.csv", "a,b\n1,2\n", {}, "no column 'text'; the columns are 'a', 'b'"),
        ("a.docx", "x", {}, "must end in .txt"),
        ("a.parquet", "x", {}, "not a readable Parquet file"),
        ("a.txt", "one\n", {"rank": 1}, "rank must be one of 0"),
        ("a.txt", "one\n", {"block": 0}, "block must be at least 1"),
        ("a.txt", "one\n", {"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_bad_data_are_refused_at_once(tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_documents(tmp_path / name, **options)


def test_a_column_of_numbers_in_parquet(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="must hold text, got int '1'"):
        open_documents(tmp_path)


def test_no_file_matches(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_documents(f"{tmp_path}/*.parquet")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_documents(tmp_path / "gone.txt")


def test_a_position_in_other_documents_is_refused(tmp_path):
    path = write(tmp_path, ".txt", TEXTS)
    stream = open_documents(path, seed=1)
    next(iter(stream))
    state = stream.state_dict()
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        open_documents(path, seed=2).load_state_dict(state)
    path.write_text(path.read_text() + "more\n")
    with pytest.raises(ValueError, match="documents was"):
        open_documents(path, seed=1).load_state_dict(state)


def collator(**options):
    return DataCollatorForSelfDistillation(
        tiny_llm_tokenizer(), AutoTokenizer.from_pretrained(tiny_path()), max_length=24, **options
    )


def documents(count=40, **options):
    return open_documents(datasets.Dataset.from_dict({"text": tiny_documents()[:count]}), **options)


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif name == "spans":
            assert all(torch.equal(a, getattr(other[name], k)) for k, a in vars(value).items())
        else:
            assert value == other[name], name


def test_a_batch_is_what_the_collator_makes_of_its_texts():
    collate = collator()
    batches = StreamingBatches(documents(10, epochs=1), collate, documents_per_batch=4)
    found = list(batches)
    for number, batch in enumerate(found):
        same(batch, collate(tiny_documents()[:10][number * 4 : number * 4 + 4]))
    assert len(found) == 3


def test_a_budget_of_tokens_is_kept_and_used():
    batches = list(StreamingBatches(documents(epochs=1), collator(), tokens_per_batch=100))
    sizes = [(len(b["input_ids"]), len(b["encoder_input_ids"])) for b in batches]
    assert max(map(max, sizes)) <= 100
    assert all(max(size) > 100 - 24 for size in sizes[:-1])
    assert sum(len(b["cu_seqlens"]) - 1 for b in batches) == 40


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("size", [{"documents_per_batch": 3}, {"tokens_per_batch": 90}])
def test_resumed_batches_are_the_same_bit_for_bit(prefetch, size):
    collate = collator()

    def new():
        return StreamingBatches(documents(seed=3, block=16), collate, prefetch=prefetch, **size)

    whole = [batch for _, batch in zip(range(9), new(), strict=False)]
    for at in (1, 5):
        first = new()
        for _ in zip(range(at), first, strict=False):
            pass
        second = new()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        loader = torch.utils.data.DataLoader(second, batch_size=None)
        resumed = [batch for _, batch in zip(whole[at:], loader, strict=False)]
        gone_on = [batch for _, batch in zip(whole[at:], first, strict=False)]
        assert len(resumed) == len(gone_on) == len(whole) - at
        for want, batch in zip(whole[at:] * 2, resumed + gone_on, strict=True):
            same(batch, want)


def test_an_error_of_the_thread_reaches_the_loop(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 70 + '{"text": 1}\n')
    batches = iter(StreamingBatches(open_documents(tmp_path, block=8), collator(), documents_per_batch=8))
    with pytest.raises(ValueError, match="row 71"):
        list(batches)


def test_a_loop_that_is_left_leaves_no_thread():
    before = threading.active_count()
    batches = iter(StreamingBatches(documents(), collator(), documents_per_batch=2))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_sizes_that_cannot_be_are_refused():
    for options, message in (
        ({}, "exactly one"),
        ({"documents_per_batch": 1, "tokens_per_batch": 99}, "exactly one"),
        ({"documents_per_batch": 0}, "at least 1"),
        ({"tokens_per_batch": 23}, "max_length=24, got 23"),
        ({"documents_per_batch": 2, "prefetch": -1}, "prefetch must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamingBatches(documents(), collator(), **options)
    with pytest.raises(ValueError, match="wait for each other"):
        StreamingBatches(documents(epochs=1, world_size=2), collator(), tokens_per_batch=99)


def test_processes_get_as_many_batches():
    counts = []
    for rank in range(3):
        stream = documents(epochs=1, rank=rank, world_size=3)
        counts.append(len(list(StreamingBatches(stream, collator(), documents_per_batch=4))))
    assert counts == [4, 4, 4]  # 13 documents each of 40
