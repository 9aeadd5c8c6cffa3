"""The README's numbers are those of the committed records."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
readme_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme_tables)


def test_the_readme_agrees_with_the_records(capsys):
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def record_of(root, kind):
    return next(file for file in sorted((root / "benchmarks" / "results").glob("*.json")) if kind in file.name)


def test_a_number_that_changed_is_noticed_and_mended(copy, capsys):
    readme = copy / "README.md"
    text = readme.read_text()
    record = json.loads(record_of(copy, "sentences").read_text())
    median = next(p for p in record["peers"] if p["name"] == "ours")["tokens_per_s"]["median"]
    shown = f"| {median:,.0f} |"
    assert shown in text
    readme.write_text(text.replace(shown, "| 1,000,000 |", 1))
    assert readme_tables.main(["--check"], copy) == 1
    assert "1,000,000" in capsys.readouterr().out
    assert readme_tables.main([], copy) == 0
    assert readme.read_text() == text


def test_a_new_record_must_be_shown(copy):
    file = record_of(copy, "sentences")
    shutil.copy(file, file.with_name("2030-01-01-" + file.name))
    assert readme_tables.main(["--check"], copy) == 1
    readme_tables.main([], copy)
    assert "2030-01-01" in (copy / "README.md").read_text()


def test_without_a_record_of_a_gpu_the_readme_says_so(copy):
    sentence = "Nothing has been measured on a GPU yet."
    assert sentence not in (copy / "README.md").read_text()
    for file in (copy / "benchmarks" / "results").glob("*h200*"):
        file.unlink()
    readme_tables.main([], copy)
    text = (copy / "README.md").read_text()
    assert "| NVIDIA H200 |" not in text
    assert sentence in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "new.json: not JSON"),
        ("[]", "neither a record of throughput.py nor one of pytest-benchmark"),
        ('{"schema": 1}', "no field 'benchmark'"),
        ('{"schema": 1, "benchmark": "x", "execution": {"device": "cpu"}}', "no table for benchmark 'x'"),
        ('{"benchmarks": []}', "no benchmark names a peer or ours"),
        ('{"benchmarks": [{"extra_info": {"peer": "eager", "op": "f", "case": "a", "median_us": 1}}]}', "needs one of"),
    ],
)
def test_a_file_that_is_no_record_is_named(copy, content, message):
    (copy / "benchmarks" / "results" / "new.json").write_text(content)
    with pytest.raises(readme_tables.RecordError, match=message):
        readme_tables.main(["--check"], copy)


def test_a_readme_without_the_markers_is_refused(copy):
    (copy / "README.md").write_text("# nothing")
    with pytest.raises(readme_tables.RecordError, match="must hold the lines"):
        readme_tables.main([], copy)
