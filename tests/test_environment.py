"""``mtllm-fast env`` and the check of a checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from reference import DATA
from safetensors.torch import load_file, save_file

from mtllm_fast import environment
from mtllm_fast.tiny import tiny_path


def _env(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mtllm_fast.cli", "env", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_facts_tell_what_works_and_why_not(monkeypatch):
    found = environment.facts()
    assert found["packages"]["torch"] == torch.__version__
    assert found["backends"]["reference"] == "works"
    if not torch.cuda.is_available():
        assert found["backends"]["cuda"] == "no CUDA GPU"
        assert found["gpu"].startswith("none")


def test_a_broken_torch_spoils_its_lines_only(monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(environment, "_torch", broken)
    found = environment.facts()
    assert "libcudart" in found["gpu"]
    assert "libcudart" in found["backends"]["reference"]
    assert found["packages"]["transformers"][0] == "5"


def test_the_command_prints_a_table_and_json():
    table = _env()
    assert table.returncode == 0, table.stderr
    assert "backend triton" in table.stdout
    assert json.loads(_env("--json").stdout)["python"]


def test_a_sound_model_has_no_problems():
    done = _env("--check", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problems" in done.stdout


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(tiny_path(), tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["up_proj.weight"][0].fill_(float("nan")), "up_proj.weight holds 64 NaN and 0 infinite values"),
        (lambda t: t.pop("llm2vec.norm.weight"), "missing keys: llm2vec.norm.weight"),
        (lambda t: t.update({"llm2vec.extra": torch.ones(1)}), "extra keys: llm2vec.extra"),
    ],
)
def test_problems_are_named(checkpoint, change, message):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    done = _env("--check", str(checkpoint), "--json")
    assert done.returncode == 1
    assert any(message in problem for problem in json.loads(done.stdout)["model"]["problems"])


def test_a_missing_tokenizer_is_named():
    done = _env("--check", str(DATA / "forward-gqa" / "checkpoint"))
    assert done.returncode == 1
    assert "tokenizer" in done.stdout
