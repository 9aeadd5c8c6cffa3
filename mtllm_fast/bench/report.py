"""What a run leaves behind: a table, a JSON line, a bar chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table


def _number(value: float) -> str:
    """Three significant digits in a few characters: 9.87, 123, 4.57k, 38.1k."""
    if value >= 999.5:
        return f"{_number(value / 1000)}k"
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def _ratio(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['median']:.2f}x"


def title(record: dict[str, Any]) -> str:
    """One line that says what was run, and on what."""
    options, work, execution = record["options"], record["workload"], record["execution"]
    device = execution.get("gpu") or f"{record['environment']['hardware']['cpu']}, {execution['threads']} threads"
    return (
        f"{options['size']} {options['dtype']} on {device}: {work['texts']} {options['workload']}, "
        f"{work['tokens']:,} tokens, {options['rounds']} rounds"
    )


def table(record: dict[str, Any]) -> Table:
    """Medians and spread per peer, narrow enough for 80 columns; what the headings leave out is below it."""
    grid = Table(
        title=title(record),
        caption=caption(record),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    grid.add_column("peer", no_wrap=True)
    for heading in ("tokens/s", "p10-p90", "texts/s", "x ref", "x sorted", "GEMM", "GiB"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in record["peers"]:
        if row["status"] != "ok":
            grid.add_row(row["name"], "[yellow]skipped[/]")
            continue
        rate, fraction, peak = row["tokens_per_s"], row["gemm_fraction"], row["peak_bytes"]
        grid.add_row(
            row["name"],
            _number(rate["median"]),
            f"{_number(rate['p10'])}-{_number(rate['p90'])}",
            _number(row["sentences_per_s"]["median"]),
            _ratio(row["ratio_to_reference"]),
            _ratio(row["ratio_to_reference_sorted"]),
            "-" if fraction is None else f"{fraction:.0%}",
            "-" if peak is None else f"{peak / 2**30:.2f}",
            style="bold" if row["name"] == "ours" else "",
        )
    return grid


def caption(record: dict[str, Any]) -> str:
    """What the columns mean, as far as the headings do not say it, and what else is known of single peers."""
    gate, versions = record["gate"], record["environment"]["versions"]
    rows = {row["name"]: row for row in record["peers"]}
    memory = {
        "cuda-allocator": "peak of the CUDA allocator, weights included",
        "rss-high-water": "peak resident set of the whole process",
        "unknown": "not available on this system",
    }[record["memory_kind"]]
    errors = ", ".join(f"{row['name']} {row['error']:.1e}" for row in rows.values() if "error" in row)
    lines = [
        "tokens/s: real tokens, no padding; ratios: medians of the rounds' own ratios",
        f"GEMM: part of the {record['gemm_ceiling_tflops']:.3g} TFLOP/s that a large matrix product reached; "
        f"{record['workload']['flops_per_token'] / 1e6:,.1f} MFLOP/token",
        f"GiB: {memory}",
        f"error against float64 on {gate['texts']} texts (allowed {gate['allowed_error']:.1e}): {errors}",
    ]
    lines += [f"{row['name']}: {row['reason']}" for row in rows.values() if row["status"] != "ok"]
    compiled = rows.get("compiled", {})
    if compiled.get("status") == "ok":
        lines.append(
            f"compiled: {compiled['warmup_s']:.0f} s of warm-up and compilation not counted, "
            f"{compiled['graphs']} graphs, {compiled['graphs_while_timed']} more while timed"
        )
    translated = [row for row in rows.values() if row["name"].startswith("translate") and row["status"] == "ok"]
    if translated:
        lines.append(
            f"translate-*: timed on {translated[0]['texts']} of the texts, shortest to longest; output lengths forced"
        )
    lines.append(", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "triton")))
    return "\n".join(lines)


def append_json(record: dict[str, Any], path: Path) -> None:
    """Append the record to ``path`` as one line of JSON; folders are made, earlier lines stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def draw(record: dict[str, Any], path: Path) -> None:
    """Bar chart of real tokens/s per peer, p10-p90 as whiskers, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in record["peers"] if row["status"] == "ok"]
    rates = [row["tokens_per_s"] for row in rows]
    medians = [rate["median"] for rate in rates]
    whiskers = [[r["median"] - r["p10"] for r in rates], [r["p90"] - r["median"] for r in rates]]
    figure = Figure(figsize=(8, 0.55 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    colours = ["#d1495b" if row["name"] == "ours" else "#8d99ae" for row in rows]
    bars = axes.barh([row["name"] for row in rows], medians, xerr=whiskers, color=colours, ecolor="#2b2d42")
    labels = [
        f"{row['tokens_per_s']['median']:,.0f}"
        + ("" if row["ratio_to_reference"] is None else f"  ({_ratio(row['ratio_to_reference'])})")
        for row in rows
    ]
    axes.bar_label(bars, labels=labels, padding=6)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("real tokens per second (median, p10-p90)")
    axes.set_title(title(record), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
