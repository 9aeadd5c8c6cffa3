"""English for the world's meanings, in several wordings each, and what English alone tells: the kinds of things."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.transfer import world
from benchmarks.transfer.world import Event, Joined, Meaning, Opinion, Phrase, Question, State

_FORMS = {  # past, participle; others are regular
    "get": ("got", "gotten"), "buy": ("bought", "bought"), "find": ("found", "found"), "steal": ("stole", "stolen"),
    "cut": ("cut", "cut"), "see": ("saw", "seen"), "hear": ("heard", "heard"),
    "borrow": ("borrowed", "borrowed"), "carry": ("carried", "carried"),
}  # fmt: skip
# How many sentences have the order of prose, and how many do without articles. Were all alike, what is trained on them
# would read positions, and another language's order would mean something else to it.
_PROSE, _TERSE = 0.6, 0.3
_AT = {"market", "school", "inn", "river", "mill", "harbour", "lighthouse"}
_ON = {"beach", "coast"}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def past(verb: str) -> str:
    return _FORMS[verb][0] if verb in _FORMS else verb + ("d" if verb.endswith("e") else "ed")


def participle(verb: str) -> str:
    return _FORMS[verb][1] if verb in _FORMS else past(verb)


def plural(noun: str) -> str:
    if noun in ("food", "gear", "finery"):
        return f"pieces of {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


def one(noun: str, adjective: str | None = None) -> str:
    """With the article that it takes; some kinds cannot be counted."""
    words = noun if adjective is None else f"{adjective} {noun}"
    if noun in ("food", "gear", "finery"):
        return f"some {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def where(place: str) -> str:
    return f"{'at' if place in _AT else 'on' if place in _ON else 'in'} the {place}"


def _object(event: Event) -> str:
    if event.number is None:
        return one(event.noun, event.adjective)
    adjective = "" if event.adjective is None else f"{event.adjective} "
    return f"{NUMBER_WORDS[event.number]} {adjective}{plural(event.noun)}"


def _event(event: Event, draw: random.Random) -> str:
    thing, place = _object(event), "" if event.place is None else where(event.place)
    if event.positive:
        verb = past(event.verb)
    else:
        verb = draw.choice((f"did not {event.verb}", f"didn't {event.verb}", f"never {past(event.verb)}"))
    wording = draw.random()
    if wording < 0.15 and event.positive:
        was = "was" if event.number is None else "were"
        words = f"{thing} {was} {participle(event.verb)} by {event.person}"
    else:
        words = _arranged(event.person, verb, thing, draw)
    if draw.random() < 0.3:
        return f"{place}, {words}" if place else words
    return f"{words} {place}".strip()


def _arranged(subject: str, verb: str, rest: str, draw: random.Random) -> str:
    """Mostly as in prose, else as in verse."""
    if draw.random() < _PROSE:
        return f"{subject} {verb} {rest}"
    return " ".join(
        draw.choice(((subject, rest, verb), (rest, subject, verb), (verb, subject, rest), (rest, verb, subject)))
    )


def _opinion(opinion: Opinion, draw: random.Random) -> str:
    wordings = ("was not", "wasn't", "did not seem", "didn't seem") if opinion.negated else ("was", "seemed")
    verb = draw.choice(wordings)
    return _arranged(f"the {opinion.aspect}", verb, opinion.adjective, draw)


def _question(question: Question, draw: random.Random) -> str:
    thing = None if question.noun is None else one(question.noun)
    if question.asks == "who":
        return _arranged("who", past(question.verb), str(thing), draw) + "?"
    if question.asks == "what":
        return f"what did {question.person} {question.verb}?"
    return f"where did {question.person} {question.verb} {thing}?"


def say(meaning: Meaning, draw: random.Random) -> str:
    """A sentence (a phrase: without a full stop), in lower case but for names, as the constructed languages are.

    Now and then without articles, as in notes and headlines.
    """
    said = _say(meaning, draw)
    if draw.random() < _TERSE:
        return " ".join(word for word in said.split() if word not in ("the", "a", "an", "some"))
    return said


def _say(meaning: Meaning, draw: random.Random) -> str:
    if isinstance(meaning, Phrase):
        return where(meaning.concept) if meaning.concept in world.ALL_PLACES else meaning.concept
    if isinstance(meaning, Question):
        return _question(meaning, draw)
    if isinstance(meaning, Event):
        return _event(meaning, draw) + "."
    if isinstance(meaning, State):
        verb = "was" if meaning.positive else draw.choice(("was not", "wasn't"))
        return _arranged(f"the {meaning.noun}", verb, meaning.adjective, draw) + "."
    if isinstance(meaning, Opinion):
        return _opinion(meaning, draw) + "."
    assert isinstance(meaning, Joined)
    # Always "and": with a "but" where they differ, that word alone would tell a neutral review.
    return f"{_opinion(meaning.first, draw)} and {_opinion(meaning.second, draw)}."


def wordings(meanings: Sequence[Meaning], draws: int = 3000) -> list[set[str]]:
    """All that English has for each, but for what is rarer than one in about a thousand."""
    draw = random.Random("wordings")
    return [{say(meaning, draw) for _ in range(draws)} for meaning in meanings]


@dataclass(frozen=True)
class English:
    """English among the languages of ``languages.py``: what the LLM knows, and the middle of the parallel texts."""

    name: str = "English"
    code: str = "eng_Latn"
    parallel: float = 1.0
    read_as: str | None = None

    def say(self, meaning: Meaning, draw: random.Random) -> str:
        return say(meaning, draw)


def fact(draw: random.Random) -> str:
    """That something is a kind of something; no other language's texts say so."""
    child = draw.choice(sorted(world.PARENT))
    parent = world.PARENT[child]
    if child in world.ALL_PLACES:
        return draw.choice((f"the {child} is in the {parent}.", f"who is {where(child)} is {where(parent)}."))
    if child in world.ALL_VERBS:
        return draw.choice((f"to {child} is to {parent}.", f"to {child} something is to {parent} it."))
    if parent in ("food", "gear", "finery"):
        return draw.choice((f"every {child} is {parent}.", f"{plural(child)} are {parent}."))
    return draw.choice((f"every {child} is {one(parent)}.", f"{plural(child)} are {plural(parent)}."))
