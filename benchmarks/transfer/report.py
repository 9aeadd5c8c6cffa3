"""From records of a study to intervals over seeds, a table and two plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.transfer.languages import BY_NAME, LANGUAGES
from benchmarks.transfer.names import BEAM, ENCODER, GREEDY, GROUPS, MT_LLM, ZERO_SHOT

SURFACE = "surface alone, English"
PLOTTED = (MT_LLM, BEAM, GREEDY, ENCODER, ZERO_SHOT)


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task, system and language or group of them: the mean over seeds of accuracy, and its 95 % interval.

    The interval is Student's over seeds, ``mean ± t s / sqrt(n)``; None with one seed. What seeds share (data, MT
    model, LLM) is not in it.
    """
    found = []
    names = {(r["task"], r["system"]): None for r in records}
    parts = {language.name: (language.name,) for language in LANGUAGES} | GROUPS
    for task, system in names:
        own = [r for r in records if (r["task"], r["system"]) == (task, system)]
        present = {r["language"] for r in own}
        for part, languages in parts.items():
            if not present & set(languages):
                continue
            by_seed = [
                statistics.fmean(r["accuracy"] for r in own if r["seed"] == seed and r["language"] in languages)
                for seed in sorted({r["seed"] for r in own})
            ]
            mean, half = interval(by_seed)
            found.append(
                {"task": task, "system": system, "languages": part, "mean": mean, "half": half, "seeds": by_seed}
            )
    return found


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of Student's 95 % interval."""
    if len(values) < 2:
        return values[0], None
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def summary(record: dict[str, Any], languages: str = "seen") -> list[str]:
    """Lines of Markdown: a row per system, a column per task: accuracy on some languages, and the cost of an answer."""
    tasks = list(record["chance"])
    chances = " | ".join(f"{task} (chance {100 * record['chance'][task]:.0f})" for task in tasks)
    lines = [f"| system | {chances} | MFLOP/row |", "| --- |" + " ---: |" * (len(tasks) + 1)]
    surface = [_surface(record, task) for task in tasks]
    if any(surface):
        lines.append(f"| {SURFACE} | {' | '.join(cell or '–' for cell in surface)} | – |")
    rows = [row for row in record["accuracy"] if row["languages"] == languages]
    for system in dict.fromkeys(row["system"] for row in rows):
        cells = {row["task"]: _cell(row) for row in rows if row["system"] == system}
        costs = [own[system]["mflop_per_row"] for own in record["costs"].values() if system in own]
        cost = f"{statistics.fmean(costs):,.0f}" if costs else "–"
        lines.append(f"| {system} | {' | '.join(cells.get(task, '–') for task in tasks)} | {cost} |")
    return lines


def table(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown: per task a row per system, a column per group of languages."""
    lines = []
    for task, chance in record["chance"].items():
        lines += [f"**{task}** (chance {100 * chance:.0f})", ""]
        rows = [r for r in record["accuracy"] if r["task"] == task]
        groups = [group for group in GROUPS if any(r["languages"] == group for r in rows)]
        lines.append(f"| system | {' | '.join(groups)} | rows/s | MFLOP/row |")
        lines.append("| --- |" + " ---: |" * (len(groups) + 2))
        if surface := _surface(record, task):
            lines.append(f"| {SURFACE} |{f' {surface} |' * len(groups)} – | – |")
        for system in dict.fromkeys(r["system"] for r in rows):
            cells = {r["languages"]: r for r in rows if r["system"] == system}
            cost = record["costs"][task].get(system)
            costs = [f"{cost['rows_per_second']:,.0f}", f"{cost['mflop_per_row']:,.0f}"] if cost else ["–", "–"]
            lines.append(f"| {system} | {' | '.join([*(_cell(cells[group]) for group in groups), *costs])} |")
        lines.append("")
    return lines


def _surface(record: dict[str, Any], task: str) -> str | None:
    """What the best baseline of ``leaks.py`` gets right without knowing what the words mean together."""
    found = record.get("leaks", {}).get(task)
    return f"{100 * max(found.values()):.1f}" if found else None


def _cell(row: dict[str, Any]) -> str:
    return f"{100 * row['mean']:.1f}" + ("" if row["half"] is None else f" ± {100 * row['half']:.1f}")


def plot_data(record: dict[str, Any], path: Path) -> None:
    """Accuracy against the amount of parallel text, a panel per task."""
    figure, axes = _panels(record)
    amounts = {name: one.parallel * record["paragraphs"] for name, one in BY_NAME.items() if one.parallel}
    for axis, (task, chance) in zip(axes, record["chance"].items(), strict=True):
        for system in PLOTTED:
            rows = [r for r in record["accuracy"] if (r["task"], r["system"]) == (task, system)]
            points = sorted(
                (amounts[r["languages"]], r["mean"], r["half"] or 0) for r in rows if r["languages"] in amounts
            )
            x, y, errors = zip(*points, strict=True)
            axis.errorbar(x, [100 * v for v in y], yerr=[100 * e for e in errors], fmt="o-", capsize=3, label=system)
        axis.axhline(100 * chance, color="grey", linestyle="--", linewidth=1)
        axis.set(title=task, xscale="log", xlabel="parallel paragraphs of the language")
    _finish(figure, axes, path)


def plot_costs(record: dict[str, Any], path: Path) -> None:
    """Accuracy on the languages that the MT model knows against the cost of an answer."""
    figure, axes = _panels(record)
    for axis, (task, chance) in zip(axes, record["chance"].items(), strict=True):
        rows = {r["system"]: r for r in record["accuracy"] if r["task"] == task and r["languages"] == "seen"}
        for system, cost in record["costs"][task].items():
            row = rows[system]
            axis.errorbar(
                [cost["mflop_per_row"]], [100 * row["mean"]], yerr=[100 * (row["half"] or 0)], fmt="o", capsize=3,
                label=system,
            )  # fmt: skip
        axis.axhline(100 * chance, color="grey", linestyle="--", linewidth=1)
        axis.set(title=task, xscale="log", xlabel="MFLOP per row")
    _finish(figure, axes, path)


def _panels(record: dict[str, Any]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    count = len(record["chance"])
    figure = Figure(figsize=(1.5 + 4 * count, 4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes[0].set_ylabel("accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    aside = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(aside, dpi=110)
    aside.replace(path)
