"""Texts for pretraining: parallel paragraphs in all languages, and English documents that also tell what is what."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.transfer import english
from benchmarks.transfer.languages import AnyLanguage
from benchmarks.transfer.world import (
    GOOD,
    PARENT,
    PEOPLE,
    Event,
    Joined,
    Meaning,
    Phrase,
    Sampler,
    State,
    group_of,
    narrower,
    question_of,
)


def parallel(count: int, seed: str) -> list[tuple[Meaning, ...]]:
    """Paragraphs of meanings: a tenth of two to four sentences, the rest of one."""
    sampler = Sampler(f"{seed} parallel")
    draw = sampler.random
    several = (draw.choice((2, 3, 4)) if draw.random() < 0.1 else 1 for _ in range(count))
    return [tuple(sampler.any(in_text=sentences > 1) for _ in range(sentences)) for sentences in several]


def say_all(paragraph: tuple[Meaning, ...], language: AnyLanguage, draw: random.Random) -> str:
    """A paragraph in a language."""
    return " ".join(language.say(meaning, draw) for meaning in paragraph)


def documents(count: int, seed: str) -> Iterator[str]:
    """English documents of a few sentences: happenings and what follows from them, happenings retold, opinions and what
    people felt, questions with their answers, facts, and whatever else is said."""
    sampler = Sampler(f"{seed} documents")
    kinds = (_facts, _anything, *2 * (_feelings, _retold, _consequences), *3 * (_answers,))
    for _ in range(count):
        yield " ".join(sampler.random.choice(kinds)(sampler))


def _facts(sampler: Sampler) -> list[str]:
    return [english.fact(sampler.random) for _ in range(sampler.random.choice((2, 3, 4)))]


def _consequences(sampler: Sampler) -> list[str]:
    """Something happened, so what is more general happened; or did not happen, so what is more special did not; or a
    thing had a property, so it had no other of the kind."""
    draw, texts = sampler.random, []
    if draw.random() < 0.3:
        state = replace(sampler.state(), positive=True)
        other = draw.choice([word for word in group_of(state.adjective) if word != state.adjective])
        denied = State(state.noun, other, positive=False)
        return [english.say(state, draw), f"so {english.say(denied, draw)}"]
    for _ in range(draw.choice((1, 2))):
        wide = sampler.event()
        wide = Event(wide.person, wide.verb, wide.noun, wide.place)
        narrow = narrower(wide, draw, sampler)
        for event in (narrow, wide) if draw.random() < 0.5 else (_denied(wide), _denied(narrow)):
            texts.append(english.say(event, draw))
        texts[-1] = f"so {texts[-1]}"
    return texts


def _denied(event: Event) -> Event:
    return Event(event.person, event.verb, event.noun, event.place, positive=False)


def _feelings(sampler: Sampler) -> list[str]:
    draw, opinion = sampler.random, sampler.opinion()
    felt = draw.choice(("happy", "glad", "pleased") if opinion.favourable else ("angry", "sad", "upset"))
    person = draw.choice(PEOPLE)
    texts = [f"{english.say(opinion, draw)[:-1]}, so {person} was {felt}."]
    first, second = sampler.opinion(), sampler.opinion()
    both = Joined(first, replace(second, aspect=first.aspect))  # of one aspect, as no review of the task is
    if both.first.favourable == both.second.favourable:
        felt = draw.choice(("happy", "glad", "pleased") if both.first.favourable else ("angry", "sad", "upset"))
    else:
        felt = draw.choice(("unsure", "undecided"))
    texts.append(f"{english.say(both, draw)[:-1]}, so {draw.choice(PEOPLE)} was {felt}.")
    alike = (opinion.adjective in GOOD) == opinion.favourable
    return texts if alike or draw.random() < 0.5 else texts[::-1]


def _answers(sampler: Sampler) -> list[str]:
    draw = sampler.random
    events = [sampler.event() for _ in range(draw.choice((2, 3)))]
    told = [Event(e.person, e.verb, e.noun, e.place or draw.choice(sampler.places)) for e in events]
    told = list({event.person: event for event in told}.values())
    event, asks = draw.choice(told), draw.choice(("who", "what", "where"))
    question = english.say(question_of(event, asks), draw)
    answer = {"who": event.person, "what": event.noun, "where": str(event.place)}[asks]
    if draw.random() < 0.5:
        answer = PARENT.get(answer, answer)  # "where did Mara buy an apple? in the town."
    return [*(english.say(one, draw) for one in told), question, f"{english.say(Phrase(answer), draw)}."]


def _retold(sampler: Sampler) -> list[str]:
    """Happenings, and the same again in other words and another order."""
    draw = sampler.random
    events = [sampler.event() for _ in range(draw.choice((1, 2, 3)))]
    again = draw.sample(events, len(events))
    return [*(english.say(event, draw) for event in events), "again:", *(english.say(event, draw) for event in again)]


def _anything(sampler: Sampler) -> list[str]:
    sentences = sampler.random.choice((1, 2, 3))
    return [english.say(sampler.any(in_text=sentences > 1), sampler.random) for _ in range(sentences)]
