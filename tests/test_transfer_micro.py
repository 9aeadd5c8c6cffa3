"""The transfer study's smallest preset, from nothing to its report: what a stack learns in English shows elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.transfer.names import MT_LLM, ZERO_SHOT

LEAD = 0.08  # over chance, of 600 answers: four standard deviations
NEAR_CHANCE = 0.06


@pytest.mark.slow
def test_the_stack_reads_what_its_llm_never_saw(tmp_path):
    root = Path(__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "benchmarks.transfer",
        "--preset",
        "micro",
        "--output-dir",
        str(tmp_path / "micro"),
    ]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "micro" / "report.json").read_text())
    accuracy = {(row["system"], row["languages"]): row["mean"] for row in report["accuracy"]}
    chance = report["chance"]["inference"]
    assert accuracy[MT_LLM, "seen"] > chance + LEAD
    for languages in ("seen", "unseen"):
        assert abs(accuracy[ZERO_SHOT, languages] - chance) < NEAR_CHANCE
    surface = report["leaks"]["inference"]
    assert max(surface["bag of words"], surface["lengths"]) < chance + 0.1
    assert {"distillation_loss", "norm_pool", "rms_norm"} <= {name.split(":")[0] for name in report["backends"]}
    assert (tmp_path / "micro" / "data.png").exists()
