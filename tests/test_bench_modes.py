"""The benchmark's other modes: a training step, latency, a sweep over batch sizes, and two results compared."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mtllm_fast.bench import BenchOptions, run
from mtllm_fast.bench.compare import comparison
from mtllm_fast.bench.report import append_json, attainable, draw, table
from mtllm_fast.cli.app import app
from mtllm_fast.core.errors import WrongResultError


def printed(rich_table) -> str:
    file = io.StringIO()
    Console(width=120, file=file).print(rich_table)
    return file.getvalue()


@pytest.fixture(scope="module")
def latency():
    return run(BenchOptions(mode="latency", rounds=2, peers=("reference", "ours"), dtype="fp32", device="cpu"))


def test_latency_is_of_one_sentence(latency):
    assert latency["workload"]["texts"] == 1
    for row in latency["peers"]:
        assert row["milliseconds"]["median"] == pytest.approx(1e3 * sum(row["seconds"]) / 2)
        assert row["ratio_to_bare_gemms"]["median"] > 1
    assert "/GEMMs" in printed(table(latency))


def test_a_sweep_has_a_point_for_each_batch_size(tmp_path):
    options = BenchOptions(batch_sizes=(4, 1), rounds=1, sentences=8, dtype="fp32", device="cpu", peers=("ours",))
    record = run(options)
    assert [point["batch_size"] for point in record["points"]] == [1, 4]
    assert "B=4" in printed(table(record))
    few, many = attainable(record, 1), attainable(record, 1e9)
    assert 0 < few < many == 1
    pytest.importorskip("matplotlib")
    draw(record, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_a_training_step_is_checked_and_measured(monkeypatch):
    from mtllm_fast.bench import train_peers

    options = BenchOptions(mode="train", rounds=1, sentences=4, dtype="fp32", device="cpu", peers=("reference", "ours"))
    record = run(options)
    text = printed(table(record))
    assert "of ref" in text
    assert all(row["peak_bytes"] > 0 and row["error"] < 1e-5 for row in record["peers"])
    honest = train_peers.our_loss

    def wrong(train, checkpointing):
        loss = honest(train, checkpointing)
        return lambda texts: loss(texts) * 1.01

    monkeypatch.setattr(train_peers, "our_loss", wrong)
    with pytest.raises(WrongResultError, match="ours"):
        run(options)


def test_results_are_compared_and_differences_named(latency, tmp_path):
    faster = copy.deepcopy(latency)
    faster["environment"]["hardware"]["cpu"] = "another"
    for row in faster["peers"]:
        row["tokens_per_s"]["median"] *= 2
    for name, record in (("a", latency), ("b", faster)):
        append_json(record, tmp_path / f"{name}.json")
    text = printed(comparison(tmp_path / "a.json", tmp_path / "b.json"))
    assert text.count("2.00x") == 2
    assert "DIFFERS hardware.cpu" in text
    assert "same machine" in printed(comparison(tmp_path / "a.json", tmp_path / "a.json"))
    append_json(copy.deepcopy(latency) | {"benchmark": "train"}, tmp_path / "c.json")
    (tmp_path / "d.json").write_text(json.dumps({"benchmark": "latency", "peers": []}))
    (tmp_path / "e.json").write_text("[1]")
    for bad, message in (
        ("c.json", "nothing to compare"),
        ("none.json", "is no file"),
        ("d.json", "has no environment, execution, options"),
        ("e.json", "has no benchmark"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison(tmp_path / "a.json", tmp_path / bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "serve"], "mode must be one of"),
        (["--sweep", "1,many"], "--sweep takes numbers"),
        (["--sweep", "1,2", "--mode", "latency"], "needs mode encode"),
        (["--mode", "latency", "--sentences", "3"], "latency is that of one sentence"),
    ],
)
def test_what_the_command_refuses(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: Liger runs")
def test_liger_without_a_gpu_is_skipped_with_its_reason():
    options = BenchOptions(rounds=1, sentences=4, dtype="fp32", device="cpu", peers=("ours", "liger"))
    rows = {row["name"]: row for row in run(options)["peers"]}
    assert rows["liger"]["status"] == "skipped"
    assert "GPU" in rows["liger"]["reason"] or "installed" in rows["liger"]["reason"]
