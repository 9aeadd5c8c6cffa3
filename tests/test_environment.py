"""``mtllm-fast env`` and the check of a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from click.testing import Result
from reference import DATA
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mtllm_fast import environment
from mtllm_fast.cli.app import app
from mtllm_fast.core import native
from mtllm_fast.ops import OPS
from mtllm_fast.tiny import tiny_path


def _env(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["env", *arguments])


def test_it_tells_what_works_and_why_not():
    found = environment.environment()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["backends of norm_pool"]["reference"].startswith("works")
    for op in ("norm_pool", "stack_projection", "varlen_attention"):
        assert sum("auto" in text for text in found[f"backends of {op}"].values()) == 1
    if not torch.cuda.is_available():
        assert found["backends of norm_pool"]["cuda"] == "no: the tensors are on cpu"
        assert found["hardware"]["gpu"].startswith("none")
    assert set(environment.EXAMPLES) == set(OPS)


def test_a_backend_that_claims_to_work_is_really_run(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("driver too old")

    monkeypatch.setattr("mtllm_fast.ops.norm_pool.reference.forward", broken)
    assert environment.environment()["backends of norm_pool"]["reference"] == "no: RuntimeError: driver too old"


def test_why_there_is_no_extension(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "the CUDA extension was not built: MTLLM_FAST_CUDA=0"))
    assert (
        environment.environment()["cuda extension"]["built"]
        == "no: the CUDA extension was not built: MTLLM_FAST_CUDA=0"
    )


def test_a_missing_torch_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "-m", "mtllm_fast.environment"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert "torch: cannot be imported: ImportError: libcudart.so.13" in done.stdout
    assert "transformers: 5." in done.stdout


def test_the_command_prints_a_table_and_json():
    table = _env()
    assert table.exit_code == 0, table.stderr
    assert "backends of norm_pool" in table.stdout
    assert json.loads(_env("--json").stdout)["versions"]["python"]


def test_a_sound_model_has_no_problems():
    done = _env("--check", "tiny")
    assert done.exit_code == 0, done.stdout + done.stderr
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
    assert done.exit_code == 1
    assert any(message in problem for problem in json.loads(done.stdout)["model"]["problems"])


def test_a_missing_tokenizer_is_named():
    done = _env("--check", str(DATA / "forward-gqa" / "checkpoint"))
    assert done.exit_code == 1
    assert "tokenizer" in done.stdout


def test_a_backend_is_preferred_in_a_whole_process():
    program = (
        "import torch; from mtllm_fast.ops import explain\n"
        "print(explain('bias_relu', torch.ones(2, 4), torch.ones(4)).chosen)\n"
        "from mtllm_fast import norm_pool\n"
        "from mtllm_fast.core.backends import Backends\n"
        "print(Backends('one', {'cpu': lambda: None, 'reference': lambda: None}).choose('auto'))\n"
        "print(Backends('two', {'cpu': lambda: None, 'reference': lambda: 'no'}).choose('auto'))\n"
        "print(Backends('three', {'cpu': lambda: None}).choose('auto'))"
    )

    def chosen(name: str) -> subprocess.CompletedProcess[str]:
        setting = {**os.environ, "MTLLM_FAST_BACKEND": name}
        return subprocess.run([sys.executable, "-c", program], env=setting, capture_output=True, text=True)

    assert chosen("reference").stdout.split() == ["reference", "reference", "cpu", "cpu"]
    assert chosen("auto").stdout.split()[1:] == ["cpu", "cpu", "cpu"]
    wrong = chosen("refrence")
    assert wrong.returncode != 0
    assert "must be one of auto, cuda, triton, cpu, reference, got 'refrence'" in wrong.stderr
