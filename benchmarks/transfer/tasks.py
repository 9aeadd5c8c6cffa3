"""Three tasks after the paper's: inference on pairs, the sentiment of reviews, reading with four choices.

Rows are drawn label by label from one distribution, so that neither sentence of a pair, no single word and no length
tells the label; ``leaks.py`` measures it. Rows to learn from are in English and know only some of the world's words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.transfer.corpora import say_all
from benchmarks.transfer.languages import AnyLanguage
from benchmarks.transfer.world import (
    ALL_VERBS,
    EXCLUSIVE,
    KINDS,
    PARENT,
    PEOPLE,
    PLACES,
    VERBS,
    Event,
    Meaning,
    Phrase,
    Sampler,
    State,
    is_a,
    narrower,
    question_of,
    relation,
    sentiment,
    wider,
)

INFERENCE_LABELS = ("entailment", "neutral", "contradiction")
SENTIMENT_LABELS = ("negative", "neutral", "positive")
_EXCLUDED = 2 / 3


@dataclass(frozen=True)
class Item:
    """One row apart from any language: its texts by column, each a paragraph of meanings, and its label."""

    texts: dict[str, tuple[Meaning, ...]]
    label: str

    @property
    def key(self) -> str:
        """What it means, for telling rows apart."""
        return repr(sorted(self.texts.items()))


@dataclass(frozen=True)
class WorldTask:
    """``preset``: the one of ``mtllm_fast`` whose columns the rows have; ``draw``: an item of each label, or one."""

    name: str
    preset: str
    label_column: str
    draw: Callable[[Sampler], list[Item]]
    chance: float


def inference(sampler: Sampler) -> list[Item]:
    """Three pairs with one hypothesis, on happenings or on properties. Polarity alone says some of it (``leaks``)."""
    hypothesis, premises = (_events if sampler.random.random() < 0.5 else _states)(sampler)
    items = []
    for label, premise in premises.items():
        assert relation(premise, hypothesis) == label
        items.append(Item({"premise": (premise,), "hypothesis": (hypothesis,)}, label))
    return items


def _events(sampler: Sampler) -> tuple[Event, dict[str, Event]]:
    """A hypothesis of middling generality, so that premises can be more special and more general."""
    draw = sampler.random
    place = draw.choice((*sampler.places, *PLACES)) if draw.random() < 0.5 else None
    person, verb, kind = draw.choice(PEOPLE), draw.choice(ALL_VERBS), draw.choice(tuple(KINDS))
    hypothesis = Event(person, verb, kind, place, positive=draw.random() < 0.5)
    return hypothesis, {label: _premise(hypothesis, label, sampler) for label in INFERENCE_LABELS}


def _premise(hypothesis: Event, label: str, sampler: Sampler) -> Event:
    """More special than the hypothesis if affirmed, more general if denied; a neutral one has another part, or is the
    wrong way round."""
    draw = sampler.random
    follows = {"entailment": hypothesis.positive, "contradiction": not hypothesis.positive}
    about = replace(hypothesis, positive=follows.get(label, draw.random() < 0.5))
    special = about.positive
    if label == "neutral":
        if draw.random() < 0.3:
            special = not special
        else:
            about = _other(about, sampler)
    return narrower(about, draw, sampler) if special else wider(about, draw)


def _states(sampler: Sampler) -> tuple[State, dict[str, State]]:
    """What follows from a property is often denied, and what contradicts it affirmed: another one of its group."""
    draw = sampler.random
    noun, group, positive = draw.choice(sampler.nouns), draw.choice(EXCLUSIVE), draw.random() < 0.5
    hypothesis = State(noun, draw.choice(group), positive)
    exclusive = State(noun, draw.choice([word for word in group if word != hypothesis.adjective]))
    same, opposite = hypothesis, replace(hypothesis, positive=not positive)
    entails = exclusive if not positive and draw.random() < _EXCLUDED else same
    contradicts = exclusive if positive and draw.random() < _EXCLUDED else opposite
    affirmed = draw.random() < (1 + _EXCLUDED) / 2  # as often as those two are
    if draw.random() < 0.5:
        others = [draw.choice(other) for other in EXCLUSIVE if other is not group]
        neutral = State(noun, draw.choice(others), affirmed)
    else:
        word = draw.choice((hypothesis.adjective, exclusive.adjective))
        neutral = State(draw.choice([other for other in sampler.nouns if other != noun]), word, affirmed)
    return hypothesis, dict(zip(INFERENCE_LABELS, (entails, neutral, contradicts), strict=True))


def _other(event: Event, sampler: Sampler) -> Event:
    """An event with another person, thing, action or place, which says nothing of the first."""
    draw = sampler.random
    parts = ["person", "noun", "verb"] + (["place"] if event.place is not None else [])
    part = draw.choice(parts)
    if part == "person":
        return replace(event, person=draw.choice([p for p in PEOPLE if p != event.person]))
    if part == "noun":
        others = [k for k in KINDS if PARENT[k] != PARENT[event.noun]]
        return replace(event, noun=draw.choice(others))
    if part == "verb":
        root = PARENT.get(event.verb, event.verb)
        verbs = tuple(VERBS) if event.verb in VERBS else tuple(v for own in VERBS.values() for v in own)
        return replace(event, verb=draw.choice([v for v in verbs if not is_a(v, root)]))
    region = PARENT.get(str(event.place), str(event.place))
    places = tuple(PLACES) if event.place in PLACES else sampler.places
    # A denied event that is made more general may lose its place, and would deny the hypothesis too.
    other = replace(event, place=draw.choice([p for p in places if not is_a(p, region)]))
    return other if event.positive else replace(other, person=draw.choice([p for p in PEOPLE if p != event.person]))


def reviews(sampler: Sampler) -> list[Item]:
    """Two opinions each: both good, both bad, or one of each."""
    signs = {"negative": (False, False), "positive": (True, True)}
    first = sampler.random.random() < 0.5
    items = []
    for label in SENTIMENT_LABELS:
        text = sampler.joined(*signs.get(label, (first, not first)))
        assert sentiment(text) == label
        items.append(Item({"text": (text,)}, label))
    return items


def reading(sampler: Sampler) -> list[Item]:
    """Two happenings, a question on one of them, and four kinds of things (or places) as answers, two of them of what
    happened. No answer is in the text in its own words: who knows what is of which kind gets every second one
    right, who also knows which happening is asked about all of them."""
    draw = sampler.random
    asks = draw.choice(("what", "where"))
    part, kinds = ("noun", tuple(KINDS)) if asks == "what" else ("place", tuple(PLACES))
    people = draw.sample(PEOPLE, 2)
    events = [_told(sampler, person, asks == "where") for person in people]
    answers = [PARENT[getattr(event, part)] for event in events]
    if answers[0] == answers[1]:
        return reading(sampler)
    question = question_of(events[0], asks)
    others = draw.sample([kind for kind in kinds if kind not in answers], 2)
    choices = [*answers, *others]
    draw.shuffle(choices)
    draw.shuffle(events)
    texts: dict[str, tuple[Meaning, ...]] = {"flores_passage": tuple(events), "question": (question,)}
    texts |= {f"mc_answer{i}": (Phrase(choice),) for i, choice in enumerate(choices, 1)}
    return [Item(texts, str(choices.index(answers[0]) + 1))]


def _told(sampler: Sampler, person: str, somewhere: bool) -> Event:
    draw = sampler.random
    verb = draw.choice([verb for verbs in VERBS.values() for verb in verbs])
    return Event(person, verb, draw.choice(sampler.nouns), draw.choice(sampler.places) if somewhere else None)


TASKS = {
    task.name: task
    for task in (
        WorldTask("inference", "xnli", "label", inference, 1 / 3),
        WorldTask("sentiment", "nusax", "label", reviews, 1 / 3),
        WorldTask("reading", "belebele", "correct_answer_num", reading, 1 / 4),
    )
}


def items_of(task: WorldTask, split: str, count: int, seed: str, other_than: Sequence[Item] = ()) -> list[Item]:
    """``count`` items, none of which is among ``other_than``; those to learn from may repeat, others do not.

    What is drawn together, one of each label, stays together: were only the known one left out, labels would lean to
    those that repeat less. Were rows to learn from all different, those of which there are few would be used up.
    """
    learning = split == "train"
    sampler = Sampler(f"{seed} {task.name} {split}", learning)
    seen = {item.key for item in other_than}
    items: list[Item] = []
    while len(items) < count:
        drawn = task.draw(sampler)
        if not any(item.key in seen for item in drawn):
            items += drawn
            seen.update(item.key for item in drawn if not learning)
    return items[:count]


def rows_of(task: WorldTask, items: Sequence[Item], language: AnyLanguage, seed: str) -> list[dict[str, Any]]:
    """The items' rows in one language."""
    draw = random.Random(f"{seed} {task.name} wording in {language.name}")
    rows = []
    for number, item in enumerate(items):
        texts = {column: say_all(meanings, language, draw) for column, meanings in item.texts.items()}
        rows.append({"id": str(number), **texts, task.label_column: item.label})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
