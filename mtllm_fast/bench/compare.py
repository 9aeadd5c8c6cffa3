"""``--compare``: two result files side by side, and whether they may be compared at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table


def comparison(before: Path, after: Path) -> Table:
    """The last record of each file: every peer's median rate in both, and the second over the first.

    What else differs (machine, versions, options) is said below the table: such a ratio is not the code's alone.

    Raises:
        ValueError: a file is missing or holds no record, or the two are of different benchmarks.
    """
    old, new = _last(before), _last(after)
    if old["benchmark"] != new["benchmark"]:
        raise ValueError(f"{before} is of {old['benchmark']} and {after} of {new['benchmark']}: nothing to compare")
    table = Table(
        title=f"{new['benchmark']}: {before.name} -> {after.name}",
        caption="\n".join(differences(old, new)) or "same machine, versions and options",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("peer", no_wrap=True)
    for heading in ("tokens/s before", "after", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    rates = [_rates(record) for record in (old, new)]
    for name in dict.fromkeys((*rates[0], *rates[1])):
        first, second = (side.get(name) for side in rates)
        cells = ["-" if rate is None else f"{rate:,.0f}" for rate in (first, second)]
        table.add_row(name, *cells, "-" if first is None or second is None else f"{second / first:.2f}x")
    return table


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each fact about the two runs that is not the same."""
    lines = []
    for section in ("hardware", "versions"):
        lines += _unequal(section, old["environment"].get(section, {}), new["environment"].get(section, {}))
    lines += _unequal("execution", old["execution"], new["execution"])
    return lines + _unequal("options", old["options"], new["options"])


def _unequal(section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = sorted({*old, *new})
    return [f"DIFFERS {section}.{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


_NEEDED = ("benchmark", "peers", "environment", "execution", "options")


def _last(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    try:
        record = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no record of this benchmark: {error}") from error
    missing = [name for name in _NEEDED if not isinstance(record, dict) or name not in record]
    if missing:
        raise ValueError(f"{path} holds no record of this benchmark: it has no {', '.join(missing)}")
    return record


def _rates(record: dict[str, Any]) -> dict[str, float]:
    """Median tokens/s by peer; in a sweep by peer and batch size."""
    points = record.get("points") or [{"peers": record["peers"]}]
    return {
        row["name"] + (f" B={point['batch_size']}" if "batch_size" in point else ""): row["tokens_per_s"]["median"]
        for point in points
        for row in point["peers"]
        if row["status"] == "ok"
    }
