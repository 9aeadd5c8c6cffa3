"""The world of ``benchmarks/transfer``: languages say the same, and labels follow from meanings alone."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace

import pytest

from benchmarks.transfer import corpora, english, world
from benchmarks.transfer.languages import BY_NAME, ENGLISH, LANGUAGES, SEEN, UNSEEN
from benchmarks.transfer.leaks import leaks
from benchmarks.transfer.pretrain import parallel_texts
from benchmarks.transfer.tasks import TASKS, items_of, rows_of, write_rows
from benchmarks.transfer.world import (
    BAD,
    GOOD,
    PARENT,
    Event,
    Joined,
    Opinion,
    Phrase,
    Question,
    Sampler,
    State,
    is_a,
    narrower,
    question_of,
    relation,
    sentiment,
    wider,
)
from mtllm_fast.text.languages import resolve_language

EVERY = (ENGLISH, *LANGUAGES)
BOUGHT = Event("Mara", "buy", "apple", "market")


@pytest.mark.parametrize(
    ("premise", "hypothesis", "label"),
    [
        (BOUGHT, BOUGHT, "entailment"),
        (BOUGHT, Event("Mara", "get", "fruit"), "entailment"),
        (BOUGHT, Event("Mara", "get", "food", "town"), "entailment"),
        (Event("Mara", "get", "fruit"), BOUGHT, "neutral"),
        (BOUGHT, Event("Mara", "buy", "apple", "school"), "neutral"),
        (BOUGHT, Event("Tom", "buy", "apple", "market"), "neutral"),
        (BOUGHT, Event("Mara", "get", "fruit", positive=False), "contradiction"),
        (BOUGHT, Event("Mara", "buy", "apple", "coast", positive=False), "neutral"),
        (Event("Mara", "get", "food", positive=False), BOUGHT, "contradiction"),
        (Event("Mara", "get", "food", positive=False), replace(BOUGHT, positive=False), "entailment"),
        (replace(BOUGHT, positive=False), Event("Mara", "get", "food", positive=False), "neutral"),
        (replace(BOUGHT, positive=False), Event("Mara", "buy", "pear", "market"), "neutral"),
        (State("horse", "red"), State("horse", "red"), "entailment"),
        (State("horse", "red"), State("horse", "blue", False), "entailment"),
        (State("horse", "red"), State("horse", "blue"), "contradiction"),
        (State("horse", "red"), State("horse", "red", False), "contradiction"),
        (State("horse", "red"), State("horse", "old"), "neutral"),
        (State("horse", "red"), State("dog", "red", False), "neutral"),
        (State("horse", "red", False), State("horse", "blue"), "neutral"),
        (State("horse", "red", False), State("horse", "red"), "contradiction"),
        (State("horse", "old", False), State("horse", "new"), "neutral"),
    ],
)
def test_what_follows_from_what(premise, hypothesis, label):
    assert relation(premise, hypothesis) == label


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        (Opinion("soup", GOOD[0], False), Opinion("room", GOOD[1], False), "positive"),
        (Opinion("soup", BAD[0], True), Opinion("room", GOOD[1], False), "positive"),
        (Opinion("soup", GOOD[0], True), Opinion("room", BAD[1], False), "negative"),
        (Opinion("soup", GOOD[0], True), Opinion("room", BAD[1], True), "neutral"),
    ],
)
def test_what_a_review_feels(first, second, label):
    assert sentiment(Joined(first, second)) == sentiment(Joined(second, first)) == label


def test_an_event_answers_questions_in_its_own_words_and_in_more_general_ones():
    asked = [question_of(BOUGHT, asks, verb, noun) for asks in ("who", "what", "where") for verb in ("buy", "get")
             for noun in ("apple", "fruit", "food")]  # fmt: skip
    assert all(BOUGHT.answers(question) for question in asked)
    assert not any(replace(BOUGHT, person="Tom", noun="pear").answers(question) for question in asked[6:12])
    assert not BOUGHT.answers(Question("who", None, "buy", "pear"))
    assert not replace(BOUGHT, positive=False).answers(asked[0])


def test_narrower_and_wider_events_are_that():
    sampler = Sampler("narrower")
    for _ in range(500):
        event = replace(sampler.event(), number=None, adjective=None)
        assert world.within(narrower(event, sampler.random, sampler), event)
        assert world.within(event, wider(event, sampler.random))


def test_every_word_has_one_parent_and_no_circle():
    tables = (world.KINDS_OF_KINDS, world.KINDS, world.VERBS, world.PLACES)
    children = [child for table in tables for own in table.values() for child in own]
    assert len(children) == len(set(children)) == len(PARENT)
    assert all(is_a(child, PARENT[child]) and not is_a(PARENT[child], child) for child in children)


@pytest.mark.parametrize("language", EVERY, ids=lambda language: language.name)
def test_a_sentence_has_one_meaning(language):
    sampler, draw = Sampler("one meaning"), random.Random(0)
    said = {}
    for _ in range(4000):
        meaning = sampler.any()
        sentence = language.say(meaning, draw)
        assert said.setdefault(sentence, meaning) == meaning, sentence
    assert len(said) > 2000


def concepts(meaning):
    """The words of the world that a meaning holds."""
    if isinstance(meaning, Event):
        parts = (meaning.person, meaning.verb, meaning.noun, meaning.place, meaning.adjective, meaning.number)
    elif isinstance(meaning, Joined):
        return concepts(meaning.first) + concepts(meaning.second)
    elif isinstance(meaning, Opinion):
        parts = (meaning.aspect, meaning.adjective)
    elif isinstance(meaning, State):
        parts = (meaning.noun, meaning.adjective)
    elif isinstance(meaning, Phrase):
        parts = (meaning.concept,)
    else:
        parts = (meaning.person, meaning.verb, meaning.noun)
    return [str(part) for part in parts if part is not None]


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_every_language_says_all_that_is_meant(language):
    sampler, draw = Sampler("all that is meant"), random.Random(0)
    for _ in range(1000):
        meaning = sampler.any()
        words = language.say(meaning, draw).rstrip(".?").split()
        for concept in concepts(meaning):
            assert any(word.startswith(language.words[concept]) for word in words), (concept, words)


def test_word_order_and_affixes_are_the_languages_own():
    draw = random.Random(0)
    event = Event("Mara", "buy", "apple")
    for language in LANGUAGES:
        words = language.say(event, draw).rstrip(".").split()
        roots = {"S": language.words["Mara"], "V": language.words["buy"], "O": language.words["apple"]}
        places = {part: next(i for i, w in enumerate(words) if w.startswith(root)) for part, root in roots.items()}
        assert "".join(sorted(places, key=places.get)) == language.order
        assert (len(words) == 3) == language.affixes


def test_relatives_share_words_and_strangers_do_not():
    def shared(one, other):
        words = [word for word in one.words if word not in world.PEOPLE]
        return sum(one.words[word] == other.words[word] for word in words) / len(words)

    plain = str.maketrans("бдвгкзсеиоутпф", "бдбгкзсеееоотп")
    dialect, parent = BY_NAME["dialect"], BY_NAME["rich-svo"]
    assert shared(dialect, parent) > 0.2
    like = sum(dialect.words[w].translate(plain)[:2] == parent.words[w].translate(plain)[:2] for w in parent.words)
    assert like / len(parent.words) > 0.5
    assert shared(BY_NAME["unseen"], BY_NAME["rich-sov"]) < 0.02
    assert sum(BY_NAME["unseen"].words[w] == w for w in BY_NAME["unseen"].words) < 3


def test_languages_are_read_under_codes_that_the_tokenizer_has_each_once():
    codes = [language.code for language in (ENGLISH, *SEEN)]
    assert len(set(codes)) == len(codes)
    assert len({language.read_as for language in UNSEEN}) == len(UNSEEN)
    assert all(language.read_as in codes for language in UNSEEN)
    assert all(resolve_language(code) == code for code in codes)


def test_parallel_texts_are_graded_and_those_of_unseen_languages_are_none():
    texts = parallel_texts(corpora.parallel(400, "graded"))
    counts = {language.name: len(texts[language.code]) for language in SEEN}
    assert counts == {
        "rich-svo": 400,
        "rich-sov": 400,
        "poor-vso": 60,
        "poor-sov": 60,
        "scarce-svo": 8,
        "scarce-vso": 8,
    }
    assert not {language.code for language in UNSEEN} & texts.keys()


def test_facts_are_told_in_english_alone():
    draw = random.Random(0)
    facts = {english.fact(draw) for _ in range(3000)}
    told = " ".join(" ".join(own) for own in parallel_texts(corpora.parallel(500, "facts")).values())
    assert not any(fact in told for fact in facts)
    documents = list(corpora.documents(3000, "facts"))
    assert sum(fact in document for fact in facts for document in documents[:300]) > 20


@pytest.fixture(scope="module", params=sorted(TASKS))
def split(request):
    task = TASKS[request.param]
    test = items_of(task, "test", 900, "w")
    dev = items_of(task, "dev", 150, "w", test)
    return task, items_of(task, "train", 1500, "w", [*dev, *test]), dev, test


def test_no_meaning_is_in_two_splits_and_classes_are_even(split):
    task, *parts = split
    train, dev, test = ([item.key for item in items] for items in parts)
    assert len({*dev, *test}) == len(dev) + len(test)
    assert not {*train} & {*dev, *test}
    if task.name == "inference":  # rows that may repeat keep their share
        on_states = [isinstance(item.texts["premise"][0], State) for item in parts[0]]
        assert 0.4 < sum(on_states) / len(on_states) < 0.6
    for items in parts:
        counts = [sum(item.label == label for item in items) / len(items) for label in {item.label for item in items}]
        assert max(abs(count - task.chance) for count in counts) < 0.1


def test_labels_follow_from_the_meanings(split):
    task, *parts = split
    for item in (item for items in parts for item in items):
        if task.name == "inference":
            assert relation(*item.texts["premise"], *item.texts["hypothesis"]) == item.label
        elif task.name == "sentiment":
            assert sentiment(*item.texts["text"]) == item.label
        else:
            (question,) = item.texts["question"]
            (answer,) = [event for event in item.texts["flores_passage"] if event.answers(question)]
            choices = [item.texts[f"mc_answer{i}"][0].concept for i in range(1, 5)]
            part = {"what": answer.noun, "where": answer.place}[question.asks]
            assert [is_a(part, choice) for choice in choices] == [i == int(item.label) for i in range(1, 5)]


def test_some_words_are_not_learnt_from(split):
    _, train, _, test = split
    learnt, tested = (
        {c for item in items for texts in item.texts.values() for m in texts for c in concepts(m)}
        for items in (train, test)
    )
    assert tested - learnt
    new = {n for nouns in world.KINDS.values() for n in nouns[-2:]} | {
        p for own in world.PLACES.values() for p in own[-1:]
    }
    assert not learnt & (new | set(GOOD[-4:]) | set(BAD[-4:]))


def test_nothing_is_read_off_the_surface(split, tmp_path):
    task, train, _, test = split
    write_rows(tmp_path / "train", rows_of(task, train, ENGLISH, "train"))
    write_rows(tmp_path / "test", rows_of(task, test, ENGLISH, "test"))
    found = leaks(task, tmp_path / "train", tmp_path / "test")
    assert len(found) == {"inference": 4, "sentiment": 3, "reading": 0}[task.name]
    # Who is denied what says more than nothing of a pair: a polarity's own share of the labels.
    assert 0.5 < found.pop("polarities and names", 0.55) < 0.72
    margin = 3 * (task.chance * (1 - task.chance) / len(test)) ** 0.5
    assert all(abs(accuracy - task.chance) < margin for accuracy in found.values()), found


def test_a_leak_is_found(split, tmp_path):
    task, train, _, test = split
    if task.name == "reading":  # whose choices are all in the text: there is no baseline
        assert leaks(task, tmp_path, tmp_path) == {}
        return
    for name, items in (("train", train), ("test", test)):
        rows = rows_of(task, items, ENGLISH, name)
        column = "hypothesis" if task.name == "inference" else "text"
        write_rows(tmp_path / name, [{**row, column: f"{row[column]} {row['label']}"} for row in rows])
    assert leaks(task, tmp_path / "train", tmp_path / "test")["bag of words"] > 0.99


def test_rows_are_those_of_the_presets_columns(split):
    task, _, _, test = split
    rows = rows_of(task, test, BY_NAME["poor-vso"], "test")
    assert {row[task.label_column] for row in rows} == {item.label for item in test}
    assert all(isinstance(value, str) and value for row in rows for value in row.values())


def test_wordings_are_those_that_english_has():
    meanings = [paragraph[0] for paragraph in corpora.parallel(60, "wordings") if len(paragraph) == 1]
    known, draw = english.wordings(meanings), random.Random("other")
    said = [english.say(meaning, draw) for meaning in meanings]
    right = [s in own for s, own in zip(said, known, strict=True)]
    assert sum(right) / len(right) > 0.95
    assert not any(s in own for s, own in zip(said, known[1:] + known[:1], strict=True))


def test_the_world_is_the_same_on_every_machine():
    texts = parallel_texts(corpora.parallel(50, "same"))
    every = json.dumps([texts, list(corpora.documents(50, "same"))], ensure_ascii=False)
    assert hashlib.sha256(every.encode()).hexdigest()[:16] == "983fcd07858355d5"
