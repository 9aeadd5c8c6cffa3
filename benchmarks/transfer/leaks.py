"""What can be read off the surface: baselines that see words or lengths and nothing of what they mean together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.transfer.tasks import WorldTask
from benchmarks.transfer.world import PEOPLE

_COLUMNS = {"inference": ("premise", "hypothesis"), "sentiment": ("text",)}


def leaks(task: WorldTask, train: Path, test: Path) -> dict[str, float]:
    """Accuracy on English tests of logistic regressions on bags of words (all texts, the last alone) and on lengths; of
    a pair also what follows from who is named and what is denied, whatever is said of whom, which is more than chance.

    Empty for reading, whose choices are all in the text.
    """
    columns = _COLUMNS.get(task.name)
    if columns is None:
        return {}
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = [_read(train), _read(test)]
    labels = [[row[task.label_column] for row in split] for split in rows]
    views = {
        "bag of words": lambda row: _bag(row, columns),
        "bag of words, last text alone": lambda row: _bag(row, columns[-1:]),
        "lengths": lambda row: {f"{c} {n}": float(v) for c in columns for n, v in _lengths(row[c]).items()},
    }
    if len(columns) == 2:  # what a pair's sentences deny, and whether they name the same person, but not what of
        views["polarities and names"] = lambda row: {_polarities_and_names(row, columns): 1.0}
    found = {}
    for name, view in views.items():
        model = make_pipeline(DictVectorizer(), LogisticRegression(C=0.3, max_iter=2000))
        model.fit([view(row) for row in rows[0]], labels[0])
        found[name] = float(model.score([view(row) for row in rows[1]], labels[1]))
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _bag(row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, float]:
    return {f"{column}: {word.strip('.,?')}": 1.0 for column in columns for word in row[column].split()}


def _polarities_and_names(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    texts = [row[column].strip(".").split() for column in columns]
    denied = [bool({"not", "never", "wasn't", "didn't"} & set(words)) for words in texts]
    names = [sorted(set(words) & set(PEOPLE)) for words in texts]
    return f"{denied} {names[0] == names[1]}"


def _lengths(text: str) -> dict[str, int]:
    return {"words": len(text.split()), "letters": len(text)}
