"""Tasks: which columns hold what, how they become one text, and how the authors of arXiv 2406.12739 trained on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

KINDS = ("sequence", "choice", "tokens")


@dataclass(frozen=True)
class Task:
    """What a classifier reads and says.

    Attributes:
        kind: ``"sequence"``: a label for one text or a pair; ``"choice"``: which of the choices answers a question on a
            context; ``"tokens"``: a label for each word.
        text: columns: one or two; context and question; the list of words.
        choices: columns of the choices.
        label: column of the label (a list of them for words).
        labels: names of the classes. Data hold the names, or numbers from ``first_label``. For choices: their numbers.
        max_length: most tokens of a text. A pair loses the end of the longer one, a choice task that of its context.
        epochs, learning_rate, batch_size, warmup: warm-up as a part of all steps.
        seeds: that the authors average over.
    """

    name: str
    kind: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    choices: tuple[str, ...] = ()
    first_label: int = 0
    max_length: int = 256
    epochs: float = 3
    learning_rate: float = 1e-4
    batch_size: int = 32
    warmup: float = 0.1
    seeds: tuple[int, ...] = (42, 43, 44)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        columns = {"sequence": (1, 2), "choice": (2,), "tokens": (1,)}[self.kind]
        if len(self.text) not in columns:
            counts = " or ".join(map(str, columns))
            raise ValueError(f"a task of kind {self.kind!r} has {counts} text columns, got {list(self.text)}")
        if self.kind == "choice" and len(self.choices) < 2:
            raise ValueError(f"a task of kind 'choice' needs the columns of at least two choices, got {self.choices}")
        if self.kind != "choice" and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"labels must name at least two classes, each once, got {list(self.labels)}")
        if self.max_length < 8:
            raise ValueError(f"max_length must be at least 8, got {self.max_length}")

    @property
    def columns(self) -> tuple[str, ...]:
        """All that a row must have to be read; the label is not needed to predict."""
        return (*self.text, *self.choices)

    @property
    def num_scores(self) -> int:
        """Width of the head: one score per class, or one for each choice."""
        return 1 if self.kind == "choice" else len(self.labels)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


_NLI = Task("nli", "sequence", ("premise", "hypothesis"), "label", ("entailment", "neutral", "contradiction"))
_NUMBERS = ("1", "2", "3", "4")

TASKS = {
    "xnli": replace(_NLI, name="xnli"),
    "americasnli": replace(_NLI, name="americasnli"),
    "kardesnlu": replace(_NLI, name="kardesnlu"),
    "belebele": Task(
        "belebele", "choice", ("flores_passage", "question"), "correct_answer_num", _NUMBERS,
        choices=("mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4"), first_label=1, max_length=4096, epochs=5,
    ),
    "nusax": Task(
        "nusax", "sequence", ("text",), "label", ("negative", "neutral", "positive"), epochs=20,
        seeds=(42, 43, 44, 45, 46),
    ),
}  # fmt: skip


def get_task(name: str) -> Task:
    """A preset by name.

    Raises:
        ValueError: lists the presets.

    >>> get_task("xnli").labels
    ('entailment', 'neutral', 'contradiction')
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, or custom columns; got {name!r}")
    return TASKS[name]
