"""A small world: what there is, what is a kind of what, and what can be said of it, apart from any language.

A meaning is a value; every language renders the same values, and labels follow from them alone (``relation``,
``sentiment``, ``Event.answers``). Nouns have kinds and kinds of kinds, verbs and places have more general ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TypeAlias

KINDS_OF_KINDS = {
    "food": ("fruit", "vegetable", "dish"),
    "creature": ("animal", "bird", "insect"),
    "gear": ("tool", "vehicle", "vessel"),
    "finery": ("garment", "jewel", "flower"),
}
# The last two of each are in no row that a task is learnt from.
KINDS = {
    "fruit": ("apple", "pear", "plum", "lemon", "cherry", "melon"),
    "vegetable": ("bean", "carrot", "onion", "turnip", "radish", "pumpkin"),
    "dish": ("pie", "stew", "cake", "pudding", "pancake", "dumpling"),
    "animal": ("horse", "dog", "goat", "cow", "rabbit", "donkey"),
    "bird": ("duck", "hen", "crow", "owl", "swan", "heron"),
    "insect": ("bee", "ant", "moth", "beetle", "wasp", "cricket"),
    "tool": ("hammer", "saw", "axe", "shovel", "needle", "rake"),
    "vehicle": ("cart", "boat", "truck", "train", "sled", "wagon"),
    "vessel": ("cup", "pot", "jar", "bowl", "barrel", "bottle"),
    "garment": ("shirt", "coat", "hat", "shoe", "glove", "cloak"),
    "jewel": ("ring", "pearl", "ruby", "crown", "brooch", "bracelet"),
    "flower": ("rose", "lily", "daisy", "tulip", "violet", "poppy"),
}
VERBS = {
    "get": ("buy", "find", "borrow", "steal"),
    "move": ("carry", "push", "pull", "lift"),
    "change": ("paint", "wash", "mend", "cut"),
    "notice": ("see", "hear", "smell", "watch"),
}
PLACES = {
    "house": ("kitchen", "cellar", "attic"),
    "town": ("market", "school", "inn"),
    "valley": ("meadow", "river", "mill"),
    "coast": ("harbour", "beach", "lighthouse"),
}
PEOPLE = (
    "Mara", "Tom", "Lena", "Boris", "Nina", "Karl", "Sara", "Otto", "Vera", "Pavel", "Rosa", "Ivan",
    "Dora", "Felix", "Tara", "Simon", "Gita", "Marko", "Alma", "Viktor", "Mona", "Peter", "Lola", "Emil",
)  # fmt: skip
GOOD = (
    "good", "lovely", "splendid", "pleasant", "charming", "superb", "delightful", "excellent", "wonderful", "fine",
    "brilliant", "marvellous", "perfect", "graceful", "glorious", "sublime",
)  # fmt: skip
BAD = (
    "bad", "awful", "dreadful", "nasty", "terrible", "grim", "horrid", "dismal", "poor", "lousy",
    "hideous", "vile", "dull", "miserable", "wretched", "foul",
)  # fmt: skip
ASPECTS = ("soup", "room", "song", "story", "garden", "view", "bed", "music", "service", "wine")
# What has one property of a group has none of the others; it may have none at all.
EXCLUSIVE = (("red", "blue", "green", "white", "black"), ("old", "new"), ("big", "small"), ("heavy", "light"))
PROPERTIES = tuple(word for group in EXCLUSIVE for word in group)
NUMBERS = (2, 3, 4, 5, 6)

PARENT = {
    child: parent
    for table in (KINDS_OF_KINDS, KINDS, VERBS, PLACES)
    for parent, children in table.items()
    for child in children
}
NOUNS = tuple(noun for nouns in KINDS.values() for noun in nouns)
ALL_PLACES = (*PLACES, *(place for places in PLACES.values() for place in places))
ALL_VERBS = (*VERBS, *(verb for verbs in VERBS.values() for verb in verbs))


@dataclass(frozen=True)
class Event:
    """Someone did something to something, somewhere; or, not ``positive``, did not."""

    person: str
    verb: str
    noun: str
    place: str | None = None
    number: int | None = None
    adjective: str | None = None
    positive: bool = True

    def answers(self, question: Question) -> bool:
        """Whether it tells what is asked: it falls under all that the question says."""
        parts = ((self.person, question.person), (self.noun, question.noun), (self.verb, question.verb))
        return self.positive and all(wide is None or is_a(narrow, wide) for narrow, wide in parts)


@dataclass(frozen=True)
class Opinion:
    """Something was good, or not, in one of many words."""

    aspect: str
    adjective: str
    negated: bool

    @property
    def favourable(self) -> bool:
        return (self.adjective in GOOD) != self.negated


@dataclass(frozen=True)
class State:
    """A thing has a property or, not ``positive``, has not."""

    noun: str
    adjective: str
    positive: bool = True


@dataclass(frozen=True)
class Question:
    """``asks`` who, what or where; that part is None (a question where has no place at all)."""

    asks: str
    person: str | None
    verb: str
    noun: str | None


@dataclass(frozen=True)
class Phrase:
    """A name, a noun or a place alone, as a choice."""

    concept: str


@dataclass(frozen=True)
class Joined:
    """The one and the other."""

    first: Opinion
    second: Opinion


Meaning: TypeAlias = Event | Opinion | State | Question | Phrase | Joined


def is_a(narrow: str | None, wide: str) -> bool:
    """Whether whatever is ``narrow`` is ``wide``: the same, or an ancestor."""
    while narrow is not None and narrow != wide:
        narrow = PARENT.get(narrow)
    return narrow == wide


def within(narrow: Event, wide: Event) -> bool:
    """Whether every happening of the one kind is one of the other, whatever is said of them."""
    parts = ((narrow.person, wide.person), (narrow.verb, wide.verb), (narrow.noun, wide.noun))
    parts_hold = all(is_a(one, other) for one, other in parts)
    return parts_hold and (wide.place is None or (narrow.place is not None and is_a(narrow.place, wide.place)))


def relation(premise: Event | State, hypothesis: Event | State) -> str:
    """``entailment``, ``contradiction`` or ``neutral``, by the logic of the two.

    Of what happened follows what is more general; of what did not, what is more special did not either. Who has a
    property has no other of its group.
    """
    if isinstance(premise, State) and isinstance(hypothesis, State):
        return _of_states(premise, hypothesis)
    if not (isinstance(premise, Event) and isinstance(hypothesis, Event)):
        return "neutral"
    if premise.positive:
        if within(premise, hypothesis):
            return "entailment" if hypothesis.positive else "contradiction"
        return "neutral"
    if within(hypothesis, premise):
        return "contradiction" if hypothesis.positive else "entailment"
    return "neutral"


def _of_states(premise: State, hypothesis: State) -> str:
    alike = ("contradiction", "entailment")
    if premise.noun != hypothesis.noun:
        return "neutral"
    if premise.adjective == hypothesis.adjective:
        return alike[premise.positive == hypothesis.positive]
    if premise.positive and group_of(premise.adjective) == group_of(hypothesis.adjective):
        return alike[not hypothesis.positive]
    return "neutral"


def group_of(adjective: str) -> tuple[str, ...]:
    """The properties of which a thing has one at most."""
    return next(group for group in EXCLUSIVE if adjective in group)


def sentiment(text: Joined) -> str:
    """Of two opinions: ``positive``, ``negative``, or ``neutral`` where they differ."""
    if text.first.favourable != text.second.favourable:
        return "neutral"
    return "positive" if text.first.favourable else "negative"


class Sampler:
    """Random meanings. ``learning``: only of the words that a task may be learnt from; else of all."""

    def __init__(self, seed: str, learning: bool = False) -> None:
        self.random = random.Random(seed)  # of a string: the same on every machine
        self.nouns = tuple(n for nouns in KINDS.values() for n in (nouns[:-2] if learning else nouns))
        self.places = tuple(p for places in PLACES.values() for p in (places[:-1] if learning else places))
        self.good: tuple[str, ...] = GOOD[:-4] if learning else GOOD
        self.bad: tuple[str, ...] = BAD[:-4] if learning else BAD

    def noun(self) -> str:
        """Of any level, mostly of the lowest."""
        level = self.random.random()
        if level < 0.7:
            return self.random.choice(self.nouns)
        return self.random.choice(tuple(KINDS) if level < 0.9 else tuple(KINDS_OF_KINDS))

    def event(self) -> Event:
        draw = self.random
        place = draw.choice((*self.places, *PLACES)) if draw.random() < 0.5 else None
        number = draw.choice(NUMBERS) if draw.random() < 0.2 else None
        adjective = draw.choice(PROPERTIES) if draw.random() < 0.2 else None
        positive = number is not None or draw.random() < 0.5  # whether two apples were not bought is hard to say
        return Event(draw.choice(PEOPLE), draw.choice(ALL_VERBS), self.noun(), place, number, adjective, positive)

    def opinion(self, favourable: bool | None = None) -> Opinion:
        """Negated half of the time, whichever it is: no word of it tells."""
        draw = self.random
        if favourable is None:
            favourable = draw.random() < 0.5
        negated = draw.random() < 0.5
        return Opinion(draw.choice(ASPECTS), draw.choice(self.good if favourable != negated else self.bad), negated)

    def joined(self, first: bool | None = None, second: bool | None = None) -> Joined:
        one, other = self.opinion(first), self.opinion(second)
        while other.aspect == one.aspect:
            other = self.opinion(second)
        return Joined(one, other)

    def state(self) -> State:
        return State(self.noun(), self.random.choice(PROPERTIES), self.random.random() < 0.6)

    def question(self) -> Question:
        event, asks = self.event(), self.random.choice(("who", "what", "where"))
        return question_of(event, asks)

    def phrase(self) -> Phrase:
        return Phrase(self.random.choice((*PEOPLE, *self.nouns, *KINDS, *self.places, *PLACES)))

    def any(self, in_text: bool = False) -> Meaning:
        """As in texts at large; ``in_text``: no phrase, which stands alone."""
        pick = self.random.random() * (0.92 if in_text else 1)
        if pick < 0.45:
            return self.event()
        if pick < 0.55:
            return self.opinion()
        if pick < 0.7:
            return self.joined()
        if pick < 0.8:
            return self.state()
        return self.question() if pick < 0.92 else self.phrase()


def question_of(event: Event, asks: str, verb: str | None = None, noun: str | None = None) -> Question:
    """What an event answers; ``verb`` and ``noun`` in its more general words, if given."""
    verb, noun = verb or event.verb, noun or event.noun
    if asks == "who":
        return Question("who", None, verb, noun)
    return Question(asks, event.person, verb, None if asks == "what" else noun)


def narrower(event: Event, draw: random.Random, sampler: Sampler) -> Event:
    """A more special event: a word for each that has more special ones, or the same."""
    noun, verb, place = event.noun, event.verb, event.place
    if noun in KINDS_OF_KINDS:
        noun = draw.choice(KINDS_OF_KINDS[noun])
    elif noun in KINDS:
        noun = draw.choice([n for n in KINDS[noun] if n in sampler.nouns])
    if verb in VERBS and draw.random() < 0.5:
        verb = draw.choice(VERBS[verb])
    if place in PLACES and draw.random() < 0.5:
        place = draw.choice([p for p in PLACES[place] if p in sampler.places])
    elif place is None and draw.random() < 0.5:
        place = draw.choice(sampler.places)
    return replace(event, noun=noun, verb=verb, place=place)


def wider(event: Event, draw: random.Random) -> Event:
    """A more general event, likewise."""
    noun, verb, place = PARENT.get(event.noun, event.noun), event.verb, event.place
    if verb in PARENT and draw.random() < 0.5:
        verb = PARENT[verb]
    if place is not None and draw.random() < 0.5:
        place = None if place in PLACES or draw.random() < 0.5 else PARENT[place]
    return replace(event, noun=noun, verb=verb, place=place)
