"""Predictions of a task's model: computed, scored, and written down so that anybody can score them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.examples import Example
from mtllm_fast.tasks.model import TaskModel


class Prediction(NamedTuple):
    """Of one example: logits of its classes, and the best one; for words a list of each (None: beyond max_length)."""

    example: Example
    logits: list[Any]
    predicted: Any


@torch.no_grad()
def predict(
    model: TaskModel, collate: TaskCollator, examples: Sequence[Example], *, batch_tokens: int = 8192
) -> list[Prediction]:
    """In the order of ``examples``; batches hold texts of like length, up to so many characters' worth of tokens."""
    was_training = model.training
    model.eval()
    found: dict[int, Prediction] = {}
    try:
        for indices in _by_length(examples, batch_tokens):
            chosen = [examples[i] for i in indices]
            batch = {name: value for name, value in collate(chosen).items() if name not in ("labels", "states")}
            logits = model(**batch).logits.float().cpu()
            if not logits.isfinite().all():
                raise ValueError(f"the model says NaN or infinity of example {chosen[0].id} or those batched with it")
            found |= dict(zip(indices, _predictions(model, collate, chosen, logits), strict=True))
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(examples))]


def _by_length(examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    sizes = [sum(map(len, (*e.text, *e.choices))) // 3 + 8 for e in examples]
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(examples)), key=lambda i: -sizes[i]):
        if not batches or tokens + sizes[i] > batch_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += sizes[i]
    return batches


def _predictions(
    model: TaskModel, collate: TaskCollator, examples: Sequence[Example], logits: Tensor
) -> list[Prediction]:
    if model.task.kind != "tokens":
        best = logits.argmax(1).tolist()
        return [Prediction(e, row, b) for e, row, b in zip(examples, logits.tolist(), best, strict=True)]
    rows = iter(zip(logits.tolist(), logits.argmax(1).tolist(), strict=True))
    found = []
    for example in examples:
        words = [next(rows) if kept else (None, None) for kept in collate.kept_units(example)]
        found.append(Prediction(example, [w[0] for w in words], [w[1] for w in words]))
    return found


def score(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Accuracy and macro-F1 over all labels (words, where each has one), by scikit-learn."""
    try:
        from sklearn.metrics import accuracy_score, f1_score
    except ImportError:
        raise ValueError("scores need scikit-learn: pip install 'mtllm-fast[train]'") from None
    truth, said = flat(predictions)
    classes = sorted({*truth, *said} - {-1})  # a word that was cut off is of no class of its own
    return {
        "accuracy": float(accuracy_score(truth, said)),
        "macro_f1": float(f1_score(truth, said, labels=classes, average="macro", zero_division=0)),
    }


def flat(predictions: Sequence[Prediction]) -> tuple[list[int], list[int]]:
    """True and predicted classes, one of each per text or word. A word that was cut off counts as wrong (class -1)."""
    truth: list[int] = []
    said: list[int] = []
    for prediction in predictions:
        label = prediction.example.label
        if label is None:
            raise ValueError(f"example {prediction.example.id} has no label to score against")
        truth += label if isinstance(label, tuple) else (label,)
        own = prediction.predicted if isinstance(prediction.predicted, list) else [prediction.predicted]
        said += [-1 if one is None else one for one in own]
    return truth, said


def write_predictions(predictions: Sequence[Prediction], labels: Sequence[str], path: Path) -> None:
    """JSON lines: id, language, label, prediction (names of classes) and logits; whole or not at all."""

    def name(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [name(one) for one in value]
        return None if value is None else labels[value]

    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        for p in predictions:
            row = {"id": p.example.id, "language": p.example.language, "label": name(p.example.label)}
            row |= {"prediction": name(p.predicted), "logits": p.logits}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    aside.replace(path)
