"""Stage 2's rows and batches: what is read from a table, how it is tokenised, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tasks_data
from transformers import AutoTokenizer

from mtllm_fast import FinetuneArguments, finetune, task_training_arguments
from mtllm_fast.tasks import examples
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.examples import Example, read_examples
from mtllm_fast.tasks.predict import Prediction, score
from mtllm_fast.tasks.presets import TASKS, Task, get_task
from mtllm_fast.tasks.training import TaskArguments
from mtllm_fast.tiny import tiny_llm_tokenizer, tiny_path

SENTIMENT = {"kind": "sequence", "text_columns": ["text"], "labels": ["good", "bad"], "max_length": 32}


def how(arguments, folder, dev=True, **options):
    given = {"disable_tqdm": True, "use_cpu": True, "logging_steps": 5}
    return task_training_arguments(arguments.resolve(), folder, dev, **given | options)


def encoders():
    return AutoTokenizer.from_pretrained(tiny_path()), tiny_llm_tokenizer()


def test_a_pair_is_read_as_the_tokenizers_read_it():
    nllb, llm = encoders()
    example = Example("0", ("All human beings", "are born free"), (), 1, "swh_Latn")
    task = TASKS["xnli"]
    batch = TaskCollator(task, nllb, reads_languages=True)([example])
    nllb.src_lang = "swh_Latn"
    assert batch["input_ids"].tolist() == nllb("All human beings", "are born free")["input_ids"]
    batch = TaskCollator(task, llm, reads_languages=False)([example])
    halves = [llm(text)["input_ids"] for text in example.text]
    assert batch["input_ids"].tolist() == halves[0] + halves[1]  # a BOS before each
    assert batch["labels"].tolist() == [1]


def test_the_longer_half_is_cut():
    nllb, _ = encoders()
    task = Task("t", "sequence", ("a", "b"), "label", ("x", "y"), max_length=12)
    ids = TaskCollator(task, nllb, reads_languages=True)([Example("0", ("All " * 30, "free"), (), 0, "eng_Latn")])
    assert len(ids["input_ids"]) == 12
    assert ids["input_ids"][-1] == nllb.eos_token_id
    free = nllb("free", add_special_tokens=False)["input_ids"]
    assert ids["input_ids"].tolist()[-1 - len(free) : -1] == free


@pytest.mark.parametrize("reads_languages", [True, False])
def test_choices_are_found_in_their_text_and_never_cut(reads_languages):
    tokenizer = encoders()[0 if reads_languages else 1]
    names = ("1", "2", "3")
    task = Task("t", "choice", ("c", "q"), "label", names, choices=names, max_length=64)
    example = Example("0", ("beings " * 60, "which?"), ("free", "naïve ☃", "free equal"), 2, "eng_Latn")
    batch = TaskCollator(task, tokenizer, reads_languages=reads_languages)([example])
    assert len(batch["input_ids"]) == 64
    for unit, choice in zip(range(3), example.choices, strict=True):
        start, end = batch["unit_offsets"][unit : unit + 2].tolist()
        said = tokenizer.decode(batch["input_ids"][batch["unit_indices"][start:end]])
        if choice.isascii():  # the tiny tokenizers have not every other character
            assert "".join(said.split()) == "".join(choice.split())
    short = Task("t", "choice", ("c", "q"), "label", names, choices=names, max_length=8)
    with pytest.raises(ValueError, match="question and choices have"):
        TaskCollator(short, tokenizer, reads_languages=reads_languages)([example])


def test_words_have_the_state_of_their_first_token():
    _, llm = encoders()
    task = Task("t", "tokens", ("w",), "label", ("O", "X"), max_length=8)
    example = Example("0", ("dignity", "and", "brotherhood"), (), (1, 0, 1), "eng_Latn")
    collate = TaskCollator(task, llm, reads_languages=False)
    batch = collate([example])
    kept = collate.kept_units(example)
    assert kept[0]
    assert not kept[-1]
    assert batch["labels"].tolist() == [tag for tag, there in zip(example.label, kept, strict=True) if there]
    assert batch["unit_indices"][0] == 1


def arguments_for(path, **options):
    return FinetuneArguments(**{**SENTIMENT, "llm": "tiny", "train": str(path), **options})


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"body": "x", "label": "good"}], {}, "no column 'text'; the columns are 'body', 'label'"),
        ([], {}, "holds no row"),
        ([{"text": 3, "label": "good"}], {}, "row 1: column 'text' must hold text, got int '3'"),
        ([{"text": " ", "label": "good"}], {}, "column 'text' is empty"),
        ([{"text": "a", "label": "fine"}], {}, "must hold one of good, bad, or 0 … 1, got str 'fine'"),
        ([{"text": "a", "label": 2}], {}, "got int '2'"),
        ([{"text": "a", "label": True}], {}, "got bool"),
        ([{"text": "a", "label": "good", "lang": "swahil"}], {"language_column": "lang"}, "row 1: column 'lang'"),
        ([{"text": "a", "label": "good"}], {"language": "klingon"}, "klingon"),
        ([{"text": "a", "label": "good"}], {"kind": "song"}, "kind must be one of"),
        ([{"text": "a", "label": "good"}], {"kind": "choice"}, "has 2 text columns"),
        ([{"text": "a", "label": "good"}], {"labels": ["good", "good"]}, "each once"),
        ([{"text": "a", "label": "good"}], {"task": "squad"}, "task must be one of xnli"),
        ([{"text": "a", "label": "good"}], {"kind": None}, "give a task"),
        ([{"text": "a", "label": "good"}], {"train": None}, "train is missing"),
    ],
)
def test_bad_rows_and_arguments_are_named_before_anything_is_written(records, options, message, tmp_path):
    arguments = arguments_for(tasks_data.write(tmp_path / "rows.jsonl", records), **options)

    def run():
        finetune(arguments, how(arguments, tmp_path / "out", dev=False, max_steps=1))

    with pytest.raises(ValueError, match=message):
        run()
    assert not (tmp_path / "out").exists()


def test_words_and_labels_must_be_as_many(tmp_path):
    path = tasks_data.write(tmp_path / "rows.jsonl", [{"words": ["a", "b"], "tags": ["O"]}])
    task = Task("t", "tokens", ("words",), "tags", ("O", "X"))
    with pytest.raises(ValueError, match="2 words in 'words', 1 labels in 'tags'"):
        read_examples(path, task)


def test_labels_are_names_or_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("premise,hypothesis,label\na,b,neutral\na,b,2\na,b,0\n")
    assert [example.label for example in read_examples(path, get_task("xnli"))] == [1, 2, 0]
    path = tasks_data.write(tmp_path / "rows.jsonl", tasks_data.choices(3))
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    labels = [example.label for example in read_examples(path, get_task("belebele"))]
    assert labels == [int(row["correct_answer_num"]) - 1 for row in rows]


def test_an_empty_choice_reads_none(tmp_path):
    rows = tasks_data.choices(1)
    rows[0]["mc_answer2"] = ""
    example = read_examples(tasks_data.write(tmp_path / "rows.jsonl", rows), get_task("belebele"))[0]
    assert example.choices[1] == "None"


def test_columns_beside_a_preset_replace_its_own():
    task = TaskArguments(
        task="belebele", text_columns=["passage", "question"], choice_columns=["a", "b", "c"]
    ).resolve()
    assert task.text == ("passage", "question")
    assert task.labels == ("1", "2", "3")
    assert task.epochs == TASKS["belebele"].epochs


@pytest.mark.parametrize("first", [0, 1, 3])
def test_numbers_and_their_names_are_the_same_class(first: int, tmp_path) -> None:
    """What a .csv writes as text and a .jsonl as a number, of choices named by their numbers."""
    arguments = TaskArguments(
        kind="choice", text_columns=["a", "b"], choice_columns=["c0", "c1", "c2"], first_label=first
    )
    task = arguments.resolve()
    assert task.labels == tuple(map(str, range(first, first + 3)))
    found = {}
    for name in ("rows.csv", "rows.jsonl"):
        file = tmp_path / name
        rows = [{"a": "x", "b": "y", "c0": "p", "c1": "q", "c2": "r", "label": first + i} for i in range(3)]
        if name.endswith("csv"):
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        else:
            lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) + "\n")
        found[name] = [example.label for example in read_examples(file, task, language="eng_Latn")]
    assert found["rows.csv"] == found["rows.jsonl"] == [0, 1, 2]
    stars = replace(task, labels=("1", "2", "3"), first_label=0)
    with pytest.raises(ValueError, match="must hold one of 1, 2, 3"):
        examples._label(0, stars, "row 1")
    assert examples._label(2, stars, "row 1") == examples._label("2", stars, "row 1") == 1


def test_a_word_that_was_cut_off_is_no_class() -> None:
    example = Example("0", ("a", "b", "c", "d"), (), (0, 1, 0, 1), "eng_Latn")
    found = score([Prediction(example, [None] * 4, [0, 1, 0, None])])
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
