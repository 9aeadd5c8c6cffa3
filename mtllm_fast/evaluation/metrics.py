"""Scores from written predictions: per language, with intervals, and their average over languages."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_predictions(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a ``predictions.jsonl``.

    Raises:
        ValueError: a line without language, label or prediction, or no line.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")  # ids may hold other separators
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("id", "language", "label", "prediction")})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a prediction ({error!r})") from None
    if not rows:
        raise ValueError(f"{path} holds no prediction")
    return rows


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927), which stays within 0 … 1 and is fit for small counts.

    >>> [round(bound, 3) for bound in wilson(8, 10)]
    [0.49, 0.943]
    """
    share = correct / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def by_language(rows: Iterable[dict[str, Any]], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each language: accuracy with its interval, macro-F1 over ``labels``, how many texts (words), and the average
    over languages under ``"average"``. A missing prediction is a wrong one."""
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows:
        truth, said = row["label"], row["prediction"]
        many = zip(truth, said, strict=True) if isinstance(truth, list) else [(truth, said)]
        pairs.setdefault(row["language"], []).extend(many)
    scores = {language: _score(found, labels) for language, found in sorted(pairs.items())}
    average = {name: sum(s[name] for s in scores.values()) / len(scores) for name in ("accuracy", "macro_f1")}
    return {**scores, "average": {**average, "count": sum(s["count"] for s in scores.values())}}


def _score(pairs: Sequence[tuple[Any, Any]], labels: Sequence[str]) -> dict[str, Any]:
    correct = sum(truth == said for truth, said in pairs)
    f1s = []
    for label in labels:
        hit = sum(truth == said == label for truth, said in pairs)
        all_of_it = sum(truth == label for truth, _ in pairs) + sum(said == label for _, said in pairs)
        if all_of_it:
            f1s.append(2 * hit / all_of_it)
    return {
        "accuracy": correct / len(pairs),
        "interval": list(wilson(correct, len(pairs))),
        "macro_f1": sum(f1s) / len(f1s),
        "count": len(pairs),
    }
