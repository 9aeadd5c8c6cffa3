"""Constructed languages for the world's meanings: a lexicon, a script, a word order and a morphology each.

NLLB's tokenizer knows 202 codes and no others, so each language borrows one. The code says nothing of the language that
it belongs to outside this world.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TypeAlias

from benchmarks.transfer import world
from benchmarks.transfer.english import English
from benchmarks.transfer.world import Event, Joined, Meaning, Opinion, Phrase, Question, State

_LETTERS = "abdefghiklmnoprstuvzjcwy"
SCRIPTS = {
    "Latn": _LETTERS,
    "Cyrl": "абдефгхиклмнопрстувзйцшы",
    "Grek": "αβδεφγηικλμνοπρστυωζθχψξ",
    "Armn": "աբդեֆգհիկլմնօպրստւվզջցքյ",
}
_CONSONANTS, _VOWELS = "bdfghklmnprstvz", "aeiou"
_WORDS = (
    *world.PEOPLE, *world.NOUNS, *world.KINDS, *world.KINDS_OF_KINDS, *world.ALL_VERBS, *world.ALL_PLACES,
    *world.GOOD, *world.BAD, *world.ASPECTS, *world.PROPERTIES, *map(str, world.NUMBERS),
    "who", "what", "where", "and", "be", "not", "in",
)  # fmt: skip


@dataclass(frozen=True)
class Language:
    """How a language says things.

    Attributes:
        name: what it is here; ``code``: what the tokenizer calls it.
        order: of subject, verb and object.
        affixes: whether case, tense, number and negation are suffixes, one after another; else words.
        fused: suffixes of number and case melt into one that is neither.
        adjective_first, postpositions: within phrases.
        cognates: the share of words that come from the English ones, by this language's change of sounds.
        parallel: how many paragraphs of parallel text there are, as a share of the richest language's.
        parent: a language whose words this one shares, but for ``drift`` of them and small changes of sound.
        read_as: the code that its texts are read under; a language that the MT model never saw has none of its own.
    """

    name: str
    code: str
    script: str
    order: str
    affixes: bool
    adjective_first: bool
    postpositions: bool
    fused: bool = False
    cognates: float = 0.0
    parallel: float = 0.0
    parent: str | None = None
    drift: float = 0.0
    read_as: str | None = None
    words: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.words.update(_lexicon(self))

    def say(self, meaning: Meaning, draw: random.Random) -> str:
        """A meaning in this language, in one of the wordings that it has for it."""
        if isinstance(meaning, Event):
            words, end = self._event(meaning, draw), "."
        elif isinstance(meaning, Opinion):
            words, end = self._opinion(meaning), "."
        elif isinstance(meaning, Joined):
            words, end = [*self._opinion(meaning.first), self._word("and"), *self._opinion(meaning.second)], "."
        elif isinstance(meaning, State):
            words, end = self._predicate(meaning.noun, meaning.adjective, not meaning.positive), "."
        elif isinstance(meaning, Question):
            words, end = self._asked(meaning), "?"
        else:
            words, end = self._alone(meaning), ""
        return " ".join(words) + end

    def _word(self, concept: str) -> str:
        return self.words[concept]

    def _arrange(self, subject: list[str], verb: list[str], thing: list[str]) -> list[str]:
        parts = {"S": subject, "V": verb, "O": thing}
        return [word for letter in self.order for word in parts[letter]]

    def _event(self, event: Event, draw: random.Random) -> list[str]:
        noun = self._thing(self._word(event.noun), event.number is not None)
        adjective = [] if event.adjective is None else [self._word(event.adjective)]
        number = [] if event.number is None else [self._word(str(event.number))]
        thing = [*number, *adjective, *noun] if self.adjective_first else [*number, *noun, *adjective]
        words = self._arrange([self._word(event.person)], self._verb(event.verb, event.positive), thing)
        if event.place is None:
            return words
        place = self._place(self._word(event.place))
        return [*place, *words] if draw.random() < 0.3 else [*words, *place]

    def _thing(self, noun: str, several: bool) -> list[str]:
        if not self.affixes:
            return [self.words["+object"], noun, *([self.words["+plural"]] if several else [])]
        if self.fused:
            return [noun + self.words["+objects" if several else "+object"]]
        return [noun + (self.words["+plural"] if several else "") + self.words["+object"]]

    def _verb(self, verb: str, positive: bool) -> list[str]:
        root = self._word(verb)
        if not self.affixes:
            return [*([] if positive else [self._word("not")]), root, self.words["+past"]]
        return [root + ("" if positive else self.words["+not"]) + self.words["+past"]]

    def _place(self, place: str) -> list[str]:
        if self.affixes:
            return [place + self.words["+place"]]
        return [place, self._word("in")] if self.postpositions else [self._word("in"), place]

    def _predicate(self, noun: str, adjective: str, negated: bool) -> list[str]:
        if self.affixes:
            copula = [self._word("be") + (self.words["+not"] if negated else "") + self.words["+past"]]
        else:
            copula = [*([self._word("not")] if negated else []), self._word("be"), self.words["+past"]]
        return self._arrange([self._word(noun)], copula, [self._word(adjective)])

    def _opinion(self, opinion: Opinion) -> list[str]:
        return self._predicate(opinion.aspect, opinion.adjective, opinion.negated)

    def _asked(self, question: Question) -> list[str]:
        subject = self._word("who" if question.person is None else question.person)
        thing = [self._word("what")] if question.noun is None else self._thing(self._word(question.noun), False)
        words = self._arrange([subject], self._verb(question.verb, True), thing)
        return [*words, self._word("where")] if question.asks == "where" else words

    def _alone(self, phrase: Phrase) -> list[str]:
        word = self._word(phrase.concept)
        return self._place(word) if phrase.concept in world.ALL_PLACES else [word]


def _lexicon(language: Language) -> dict[str, str]:
    """Of each concept its root in the script, no two alike; and the affixes."""
    if language.parent is not None:
        latin = _inherited(language)
    else:
        draw, latin = random.Random(f"words of {language.name}"), {}
        sounds = _sound_change(draw)
        taken: set[str] = set()
        for concept in _WORDS:
            is_name = concept in world.PEOPLE
            related = is_name or (concept.isalpha() and draw.random() < language.cognates)
            root = _changed(concept, sounds) if related else _root(draw, draw.choice((2, 2, 3)))
            while root in taken:
                root = _root(draw, 3) if not is_name else root + draw.choice(_VOWELS)
            taken.add(root)
            latin[concept] = root
        for affix in ("+plural", "+object", "+objects", "+past", "+not", "+place"):
            syllable = _root(draw, 1)
            while syllable in taken:
                syllable = _root(draw, 1)
            taken.add(syllable)
            latin[affix] = syllable
    table = str.maketrans(_LETTERS, SCRIPTS[language.script])
    return {concept: root.translate(table) for concept, root in latin.items()}


def _inherited(language: Language) -> dict[str, str]:
    """The parent's words in Latin letters with regular changes, and some that are new."""
    parent = BY_NAME[str(language.parent)]
    back = str.maketrans(SCRIPTS[parent.script], _LETTERS)
    draw = random.Random(f"words of {language.name}")
    few = dict(draw.sample([("b", "v"), ("k", "g"), ("s", "z"), ("e", "i"), ("o", "u"), ("t", "d"), ("p", "f")], 2))
    sounds = str.maketrans(few)
    latin: dict[str, str] = {}
    for concept, root in parent.words.items():
        word = root.translate(back).translate(sounds)
        new = draw.random() < language.drift and concept not in world.PEOPLE and not concept.startswith("+")
        while new or word in latin.values():
            word, new = _root(draw, 3), False
        latin[concept] = word
    return latin


def _root(draw: random.Random, syllables: int) -> str:
    parts = [draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(syllables)]
    return "".join(parts) + (draw.choice("nrsklm") if draw.random() < 0.4 else "")


def _sound_change(draw: random.Random) -> dict[int, str]:
    consonants, vowels = list("pbtdkgszfv"), list(_VOWELS)
    draw.shuffle(vowels)
    swaps = dict(zip("pbtdkgszfv", draw.sample(consonants, len(consonants)), strict=True))
    chosen = dict(draw.sample(sorted(swaps.items()), 4)) | dict(draw.sample(list(zip(_VOWELS, vowels, strict=True)), 2))
    return str.maketrans(chosen)


def _changed(word: str, sounds: dict[int, str]) -> str:
    plain = word.lower().replace("x", "ks").replace("q", "k").replace("th", "t").replace("sh", "s").replace("ch", "k")
    return "".join(letter for letter in plain.translate(sounds) if letter in _LETTERS)


ENGLISH = English()
AnyLanguage: TypeAlias = English | Language
BY_NAME: dict[str, Language] = {}


def _add(*languages: Language) -> None:
    BY_NAME.update({language.name: language for language in languages})


_add(
    Language("rich-svo", "kir_Cyrl", "Cyrl", "SVO", False, True, False, parallel=1.0),
    Language("rich-sov", "eus_Latn", "Latn", "SOV", True, False, True, parallel=1.0, cognates=0.1),
    Language("poor-vso", "ell_Grek", "Grek", "VSO", False, False, False, parallel=0.15),
    Language("poor-sov", "quy_Latn", "Latn", "SOV", True, True, True, fused=True, parallel=0.15, cognates=0.3),
    Language("scarce-svo", "hye_Armn", "Armn", "SVO", True, True, False, parallel=0.02),
    Language("scarce-vso", "gla_Latn", "Latn", "VSO", True, False, False, fused=True, parallel=0.02, cognates=0.1),
    Language("unseen", "fon_Latn", "Latn", "SOV", True, True, True, read_as="quy_Latn"),
)
# Two that the MT model never saw, and that have a relative which it did; and one more, a close dialect.
_add(
    Language("unseen-kin", "vro_Latn", "Latn", "SOV", True, False, True, parent="rich-sov", drift=0.4,
             read_as="eus_Latn"),
    Language("dialect", "tyv_Cyrl", "Cyrl", "SVO", False, True, False, parent="rich-svo", drift=0.05,
             read_as="kir_Cyrl"),
)  # fmt: skip

LANGUAGES = tuple(BY_NAME.values())
SEEN = tuple(language for language in LANGUAGES if language.parallel)
UNSEEN = tuple(language for language in LANGUAGES if not language.parallel)
