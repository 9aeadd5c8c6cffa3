"""Rows of a table as examples of a task, every one checked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtllm_fast.core.errors import UnknownLanguageError
from mtllm_fast.tables import open_records, shown
from mtllm_fast.tasks.presets import Task
from mtllm_fast.text.languages import resolve_language


@dataclass(frozen=True)
class Example:
    """One row. ``text``: the task's text columns (words for ``"tokens"``); ``label``: a class, one per word, None."""

    id: str
    text: tuple[str, ...]
    choices: tuple[str, ...]
    label: int | tuple[int, ...] | None
    language: str

    @property
    def units(self) -> int:
        """How many vectors a model makes of it."""
        return len(self.choices) or (len(self.text) if isinstance(self.label, tuple) else 1)


def read_examples(
    path: str | os.PathLike[str],
    task: Task,
    *,
    language: str = "eng_Latn",
    language_column: str | None = None,
    id_column: str | None = None,
    labelled: bool = True,
) -> list[Example]:
    """All rows of a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` (words and their labels: lists, in the last two).

    Args:
        language: of all rows, any spelling of a code, unless ``language_column`` holds each row's.
        id_column: default: the row's number from 0.
        labelled: whether rows must have a label.

    Raises:
        FileNotFoundError, UnknownLanguageError: named, with the row.
        ValueError: no rows; a missing column (those there are listed), a text that is none, a label that is no class of
            the task, as many labels as words that there are not.
    """
    columns = [*task.columns, *([task.label] if labelled else [])]
    columns += [column for column in (language_column, id_column) if column is not None]
    spoken = resolve_language(language)
    examples = []
    for number, (line, record) in enumerate(open_records(path, columns)):
        where = f"{path}, row {line}"
        code = spoken if language_column is None else _language(record[language_column], where, language_column)
        identity = number if id_column is None else record[id_column]
        examples.append(_example(record, task, where, str(identity), code, labelled))
    if not examples:
        raise ValueError(f"{path}: holds no row")
    return examples


def _example(record: dict[str, Any], task: Task, where: str, identity: str, language: str, labelled: bool) -> Example:
    label = record[task.label] if labelled else None
    if task.kind == "tokens":
        words = _words(record[task.text[0]], where, task.text[0])
        names = () if label is None else _words(label, where, task.label, any_type=True)
        if labelled and len(names) != len(words):
            raise ValueError(f"{where}: {len(words)} words in {task.text[0]!r}, {len(names)} labels in {task.label!r}")
        tags = tuple(_label(name, task, where) for name in names) if labelled else (-100,) * len(words)
        return Example(identity, words, (), tags, language)
    text = tuple(_text(record[column], where, column) for column in task.text)
    # An empty choice reads "None", as in the authors' code: some multiple-choice data have such.
    choices = tuple(_text(record[column] or "None", where, column) for column in task.choices)
    return Example(identity, text, choices, _label(label, task, where) if labelled else None, language)


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} must hold text, got {shown(value)}")
    if not value.strip():
        raise ValueError(f"{where}: column {column!r} is empty")
    return value


def _words(value: Any, where: str, column: str, any_type: bool = False) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{where}: column {column!r} must hold a list, not an empty one, got {shown(value)}")
    return tuple(value) if any_type else tuple(_text(word, where, column) for word in value)


def _label(value: Any, task: Task, where: str) -> int:
    """A class by its name, or by its number, which a .csv writes as text."""
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if name in task.labels:  # names that are numbers are names: a .csv and a .jsonl say the same
        return task.labels.index(name)
    number = None if all(label.lstrip("-").isdigit() for label in task.labels) else value
    if isinstance(number, str) and number.lstrip("-").isdigit():
        number = int(number)
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number - task.first_label < len(task.labels):
        return number - task.first_label
    last = task.first_label + len(task.labels) - 1
    raise ValueError(
        f"{where}: column {task.label!r} must hold one of {', '.join(task.labels)}, or {task.first_label} … {last}, "
        f"got {shown(value)}"
    )


def _language(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} must hold a language code, got {shown(value)}")
    try:
        return resolve_language(value)
    except UnknownLanguageError as error:
        raise UnknownLanguageError(f"{where}: column {column!r}: {error}") from None
