"""The README's performance tables, made from the records under ``benchmarks/results``.

    python benchmarks/readme_tables.py            # write them into README.md
    python benchmarks/readme_tables.py --check    # print what differs, exit with 1 if anything does

A record is what ``throughput.py --out`` writes (``"schema"``), or what pytest-benchmark writes for ``bench_*.py``
(``"benchmarks"``). Every record is shown; its file's name begins with the day.
"""

from __future__ import annotations

import argparse
import difflib
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.transfer
BEGIN = "<!-- performance: made by benchmarks/readme_tables.py from benchmarks/results -->"
END = "<!-- end of performance -->"
# What an op is compared with, and ours in the order of preference; a record has one of each.
BASELINES = ("eager", "huggingface", "loop")
OURS = ("cuda", "triton", "cpu", "reference", "ours")


class RecordError(ValueError):
    """A file under results that is no record of a known kind; names the file and the field."""


def field(record: Any, path: str, file: Path) -> Any:
    """``record["a"]["b"]`` for ``"a.b"``."""
    for name in path.split("."):
        if not isinstance(record, dict) or name not in record:
            raise RecordError(f"{file.name}: no field {path!r}")
        record = record[name]
    return record


def load(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{file.name}: not JSON ({error})") from None
    if not isinstance(record, dict) or not ({"schema", "benchmarks"} & record.keys()):
        raise RecordError(f"{file.name}: neither a record of throughput.py nor one of pytest-benchmark")
    return record


def machine(record: dict[str, Any], file: Path) -> str:
    """The GPU, or the CPU with its cores and instructions."""
    if field(record, "execution.device", file) != "cpu":
        return field(record, "execution.gpu", file)
    cpu = field(record, "environment.hardware.cpu", file)
    return f"{cpu}, {field(record, 'execution.cpu_capability', file)}"


def on_a_gpu(record: dict[str, Any], file: Path) -> bool:
    if "schema" in record:
        return field(record, "execution.device", file) != "cpu"
    return any("gpu" in field(entry, "extra_info", file) for entry in field(record, "benchmarks", file))


def link(text: str, file: Path) -> str:
    return f"[{text}](benchmarks/results/{file.name})"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rates(record: dict[str, Any], file: Path, names: dict[str, str]) -> list[str]:
    """Of each peer named: median tokens/s; ``ours`` also over the others in the same round."""
    peers = {field(peer, "name", file): peer for peer in field(record, "peers", file)}
    ours = peers.get("ours")
    cells = []
    for name in names:
        peer = peers.get(name)
        ok = peer is not None and field(peer, "status", file) == "ok"
        cells.append(f"{field(peer, 'tokens_per_s.median', file):,.0f}" if ok else "–")
    for name, ratio in names.items():
        if ratio:
            value = None if ours is None or name not in peers else field(ours, ratio, file)
            cells.append("–" if value is None else f"{field(value, 'median', file):.2f}x")
    return cells


ENCODE = {
    "reference": "ratio_to_reference",
    "reference-sorted": "ratio_to_reference_sorted",
    "ours": "",
    "ours-fp8": "",
}
TRAIN = {"reference": "ratio_to_reference", "ours": ""}


def throughput_tables(records: dict[Path, dict[str, Any]]) -> list[str]:
    encode = ["reference", "sorted", "ours", "ours in fp8", "of reference", "of sorted"]
    titles = {
        "throughput": ("Encoding, real tokens per second", ENCODE, encode),
        "latency": ("One sentence, real tokens per second", ENCODE, encode),
        "train": ("A step of self-distillation, token pairs per second", TRAIN, ["reference", "ours", "of reference"]),
    }
    lines: list[str] = []
    for kind, (title, names, heads) in titles.items():
        chosen = {file: record for file, record in records.items() if field(record, "benchmark", file) == kind}
        if not chosen:
            continue
        columns = ["machine", "size, dtype, texts", *heads]
        lines += [f"{title} (medians of interleaved rounds, ratios of the same round):", "", row(columns)]
        lines.append(row(["---"] * len(columns)))
        for file, record in chosen.items():
            options = field(record, "options", file)
            texts = f"{field(record, 'workload.texts', file)} {field(options, 'workload', file)}"
            what = f"{field(options, 'size', file)}, {field(options, 'dtype', file)}, {texts}"
            lines.append(row([machine(record, file), link(what, file), *rates(record, file, names)]))
        lines.append("")
    unknown = [file for file, r in records.items() if field(r, "benchmark", file) not in titles]
    if unknown:
        raise RecordError(f"{unknown[0].name}: no table for benchmark {records[unknown[0]]['benchmark']!r}")
    return lines


def op_machine(record: dict[str, Any], file: Path) -> str:
    """The GPU that the benchmark noted, or the CPU with the instructions that its file is named after."""
    gpu = next((entry["extra_info"]["gpu"] for entry in record["benchmarks"] if "gpu" in entry["extra_info"]), None)
    level = next((word for word in ("avx512", "avx2") if word in file.name), "")
    cpu, count = (field(record, f"machine_info.cpu.{name}", file) for name in ("brand_raw", "count"))
    return gpu or f"{cpu}, {count} CPUs, {level.upper()}"


def op_rows(record: dict[str, Any], file: Path) -> list[str]:
    """One row for each case: the baseline's median, ours, and the ratio."""
    cases: dict[str, dict[str, float]] = {}
    in_turns: dict[str, float] = {}  # measured in turns, which the two medians by themselves need not be
    for entry in field(record, "benchmarks", file):
        extra = field(entry, "extra_info", file)
        if "peer" in extra:
            case = f"{field(extra, 'op', file)}, {field(extra, 'case', file)}"
            cases.setdefault(case, {})[extra["peer"]] = field(extra, "median_us", file) / 1e3
            if "x_eager" in extra:
                in_turns[f"{case} {extra['peer']}"] = extra["x_eager"]
        elif "ours" in extra:
            case = str(field(entry, "group", file))
            found = {name: side for name, side in extra.items() if isinstance(side, dict) and "seconds" in side}
            cases[case] = {name: 1e3 * statistics.median(side["seconds"]) for name, side in found.items()}
            in_turns[f"{case} ours"] = field(extra, "loop.ours_is_faster_by", file)
    if not cases:
        raise RecordError(f"{file.name}: no benchmark names a peer or ours")
    lines = []
    for case, medians in cases.items():
        baseline = next((name for name in BASELINES if name in medians), None)
        ours = next((name for name in OURS if name in medians and name != baseline), None)
        if baseline is None or ours is None:
            raise RecordError(f"{file.name}: {case} needs one of {BASELINES} and one of {OURS}, has {sorted(medians)}")
        ratio = in_turns.get(f"{case} {ours}")
        faster = f"{medians[baseline] / medians[ours]:.1f}x, one after the other" if ratio is None else f"{ratio:.1f}x"
        times = [f"{medians[name]:,.1f} ({name})" for name in (baseline, ours)]
        lines.append(row([op_machine(record, file), link(case, file), *times, faster]))
    return lines


def op_table(records: dict[Path, dict[str, Any]]) -> list[str]:
    if not records:
        return []
    head = ["machine", "op, case", "milliseconds", "ours", "faster by, measured in turns"]
    rows = [line for file, record in records.items() for line in op_rows(record, file)]
    return [
        "Single ops, forward and backward where the op has one:",
        "",
        row(head),
        row(["---"] * len(head)),
        *rows,
        "",
    ]


def transfer_tables(records: dict[Path, dict[str, Any]]) -> list[str]:
    """Of each study its summary, its two plots (beside it, named after it) and where all of it is."""
    from benchmarks.transfer.report import summary

    lines = []
    for file, record in records.items():
        seeds = len(field(record, "accuracy", file)[0]["seeds"])
        backend = "" if field(record, "backend", file) == "auto" else f", backend {record['backend']}"
        seconds = field(record, "seconds", file)
        took = "cut off and gone on with" if seconds is None else f"{seconds / 60:.0f} minutes"
        what = f"`{field(record, 'preset', file)}`{backend}, {machine(record, file)}, {took}"
        lines += [
            f"Accuracy on the languages that the MT model was trained on, % ({link(what, file)}; mean and 95 % interval"
        ]
        lines[-1] += f" of {seeds} seeds):" if seeds > 1 else " need more than this one seed):"
        lines += ["", *summary(record), ""]
        for plot in ("data", "costs"):
            image = file.with_name(f"{file.stem}-{plot}.png")
            if image.exists():
                lines += [f"![{plot}](benchmarks/results/{image.name})", ""]
    return lines


def tables(results: Path) -> str:
    """The generated part of the README, markers included."""
    files = sorted(results.glob("*.json"))
    if not files:
        raise RecordError(f"{results} holds no record")
    records = {file: load(file) for file in files}
    transfer = {file: record for file, record in records.items() if record.get("benchmark") == "transfer"}
    runs = {file: record for file, record in records.items() if "schema" in record and file not in transfer}
    ops = {file: record for file, record in records.items() if "schema" not in record}
    lines = throughput_tables(runs) + op_table(ops) + transfer_tables(transfer)
    if not any(map(on_a_gpu, records.values(), records)):
        lines.append("Nothing has been measured on a GPU yet.")
    return "\n".join([BEGIN, "", *lines, "", END])


def with_tables(readme: str, results: Path) -> str:
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RecordError(f"README.md must hold the lines {BEGIN!r} and {END!r}, in this order")
    return before + tables(results) + after


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args(words)
    readme = root / "README.md"
    now = readme.read_text(encoding="utf-8")
    wanted = with_tables(now, root / "benchmarks" / "results")
    if arguments.check:
        names = ("README.md", "README.md, as the records have it")
        difference = list(difflib.unified_diff(now.splitlines(), wanted.splitlines(), *names, lineterm=""))
        sys.stdout.write("".join(f"{line}\n" for line in difference))
        return 1 if difference else 0
    aside = readme.with_name(".README.md.tmp")
    aside.write_text(wanted, encoding="utf-8")
    aside.replace(readme)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RecordError as error:
        sys.exit(f"error: {error}")
