"""What a run leaves behind: a table, a JSON line, a bar chart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

Cell = Callable[[dict[str, Any]], str]


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
    kind = record["benchmark"]
    if kind == "sweep":
        return _sweep_table(record)
    columns = {"throughput": _ENCODE, "latency": _LATENCY, "train": _TRAIN}[kind]
    grid = _grid(record, columns)
    for row in record["peers"]:
        if row["status"] != "ok":
            grid.add_row(row["name"], "[yellow]skipped[/]")
        else:
            cells = [cell(row) for cell in columns.values()]
            grid.add_row(row["name"], *cells, style="bold" if row["name"].startswith("ours") else "")
    return grid


def _grid(record: dict[str, Any], columns: Iterable[str]) -> Table:
    grid = Table(
        title=title(record),
        caption=caption(record),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    grid.add_column("peer", no_wrap=True)
    for heading in columns:
        grid.add_column(heading, justify="right", no_wrap=True)
    return grid


def _spread(values: dict[str, float]) -> str:
    return f"{_number(values['p10'])}-{_number(values['p90'])}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f}"


_RATE: dict[str, Cell] = {
    "tokens/s": lambda row: _number(row["tokens_per_s"]["median"]),
    "p10-p90": lambda row: _spread(row["tokens_per_s"]),
}
_ENCODE: dict[str, Cell] = {
    **_RATE,
    "texts/s": lambda row: _number(row["sentences_per_s"]["median"]),
    "x ref": lambda row: _ratio(row["ratio_to_reference"]),
    "x sorted": lambda row: _ratio(row["ratio_to_reference_sorted"]),
    "GEMM": lambda row: _share(row["gemm_fraction"]),
    "/GEMMs": lambda row: _ratio(row["ratio_to_bare_gemms"]),
    "GiB": lambda row: _gib(row["peak_bytes"]),
}
_LATENCY: dict[str, Cell] = {
    "ms": lambda row: _number(row["milliseconds"]["median"]),
    "p10-p90": lambda row: _spread(row["milliseconds"]),
    "x ref": lambda row: _ratio(row["ratio_to_reference"]),
    "/GEMMs": lambda row: _ratio(row["ratio_to_bare_gemms"]),
}
_TRAIN: dict[str, Cell] = {
    **_RATE,
    "x ref": lambda row: _ratio(row["ratio_to_reference"]),
    "GEMM": lambda row: _share(row["gemm_fraction"]),
    "GiB": lambda row: _gib(row["peak_bytes"]),
    "of ref": lambda row: _share(row["memory_ratio_to_reference"]),
}


def _sweep_table(record: dict[str, Any]) -> Table:
    """Texts per second by batch size, one row per peer."""
    points = record["points"]
    grid = _grid(record, [f"B={point['batch_size']}" for point in points])
    for number, row in enumerate(record["peers"]):
        here = [point["peers"][number] for point in points]
        rates = ["-" if r["status"] != "ok" else _number(r["sentences_per_s"]["median"]) for r in here]
        grid.add_row(row["name"], *rates, style="bold" if row["name"].startswith("ours") else "")
    return grid


_READING = {
    "throughput": "tokens/s: real tokens, no padding; ratios: medians of the rounds' own ratios",
    "latency": "one sentence a call; ratios: medians of the calls' own ratios, more is faster",
    "train": "one step of self-distillation; tokens/s: real tokens of the student, each with the teacher's",
    "sweep": "texts/s (median) by batch size, each point gated and timed as a run of its own",
}


def caption(record: dict[str, Any]) -> str:
    """What the columns mean, as far as the headings do not say it, and what else is known of single peers."""
    gate, versions = record["gate"], record["environment"]["versions"]
    rows = {row["name"]: row for row in record["peers"]}
    memory = {
        "cuda-allocator": "peak of the CUDA allocator, the weights of all peers included",
        "rss-high-water": "peak resident set of the whole process",
        "step": "what a step allocates at its peak beyond what is there before it",
        "unknown": "not available on this system",
    }[record["memory_kind"]]
    errors = ", ".join(f"{row['name']} {row['error']:.1e}" for row in rows.values() if "error" in row)
    lines = [
        _READING[record["benchmark"]],
        f"GEMM: part of the {record['gemm_ceiling_tflops']:.3g} TFLOP/s that a large matrix product reached; "
        f"{record['workload']['flops_per_token'] / 1e6:,.1f} MFLOP/token",
        f"error against float64 on {gate['texts']} texts (allowed {gate['allowed_error']:.1e}): {errors}",
    ]
    if record["benchmark"] in ("throughput", "train"):
        lines.append(f"GiB: {memory}")
    if "bare_gemms" in record:
        lines.append("/GEMMs: time over that of the model's bare matrix products of the same tokens, packed")
    lines += [
        f"{row['name']}: cosine to the reference and to float64 at least {row['cosine']:.5f}"
        for row in rows.values()
        if "cosine" in row
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
    """A PNG: bars of real tokens/s per peer with p10-p90 as whiskers; of a sweep, texts/s and the roofline by batch.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    if record["benchmark"] == "sweep":
        figure = Figure(figsize=(10, 4), layout="constrained")
        _draw_sweep(record, *figure.subplots(1, 2))
    else:
        rows = [row for row in record["peers"] if row["status"] == "ok"]
        figure = Figure(figsize=(8, 0.55 * len(rows) + 1.4), layout="constrained")
        _draw_bars(record, rows, figure.subplots())
    figure.suptitle(title(record), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_bars(record: dict[str, Any], rows: list[dict[str, Any]], axes: Any) -> None:
    rates = [row["tokens_per_s"] for row in rows]
    medians = [rate["median"] for rate in rates]
    whiskers = [[r["median"] - r["p10"] for r in rates], [r["p90"] - r["median"] for r in rates]]
    colours = ["#d1495b" if row["name"].startswith("ours") else "#8d99ae" for row in rows]
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
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sweep(record: dict[str, Any], rates: Any, roofline: Any) -> None:
    """Texts/s by batch size, and the share of the GEMM ceiling by real tokens per batch under what memory allows."""
    points = record["points"]
    tokens = [point["batch_tokens"] for point in points]
    for number, row in enumerate(record["peers"]):
        here = [point["peers"][number] for point in points]
        if any(peer["status"] != "ok" for peer in here):
            continue
        rates.plot(
            [point["batch_size"] for point in points],
            [peer["sentences_per_s"]["median"] for peer in here],
            marker="o",
            label=row["name"],
        )
        roofline.plot(tokens, [peer["gemm_fraction"] for peer in here], marker="o", label=row["name"])
    roofline.plot(tokens, [attainable(record, count) for count in tokens], "k--", label="attainable")
    for axes, x, y in (
        (rates, "texts per batch", "texts per second"),
        (roofline, "real tokens per batch", "share of the GEMM ceiling"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
    roofline.set_yscale("log")
    rates.legend(fontsize=8)


def attainable(record: dict[str, Any], tokens: float) -> float:
    """The largest share of the GEMM ceiling that a batch of so many tokens can reach, if every weight is read from
    memory once per batch."""
    compute = tokens * record["workload"]["flops_per_token"] / (record["gemm_ceiling_tflops"] * 1e12)
    reading = record["streamed_bytes"] / record["bandwidth_bytes_per_s"]
    return compute / max(compute, reading)
