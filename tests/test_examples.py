"""The scripts in ``examples/``: today's users' code plus one import, on a checkpoint that points to remote code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtllm_fast.tiny import tiny_path

EXAMPLES = Path(__file__).parent.parent / "examples"
REMOTE = "modeling_nllbllm2vec"
AUTO_MAP = {
    "AutoConfig": f"{REMOTE}.NLLBLLM2VecConfig",
    "AutoModel": f"{REMOTE}.NLLBLLM2Vec",
    "AutoModelForSequenceClassification": f"{REMOTE}.NLLBLLM2VecForSequenceClassification",
    "AutoModelForTokenClassification": f"{REMOTE}.NLLBLLM2VecForTokenClassification",
}


@pytest.fixture
def published(tmp_path):
    """A small checkpoint in the published layout whose ``auto_map`` points to code that must not run."""
    folder = shutil.copytree(tiny_path(), tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    (folder / f"{REMOTE}.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nraise SystemExit('remote code ran')\n"
    )
    return folder


def _run(script, *arguments, cwd):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (cwd / "executed").exists(), "a remote file was executed"
    assert not list((cwd / "hf").rglob(f"{REMOTE}*.py")), "a remote file was copied to be executed"
    return done.stdout


def test_retrieval(published, tmp_path):
    out = _run(EXAMPLES / "retrieval.py", published, cwd=tmp_path)
    assert out.count("->") == 3


def test_sequence_classification(published, tmp_path):
    out = _run(EXAMPLES / "finetune_sequence_classification.py", published, tmp_path / "nli", cwd=tmp_path)
    assert "eval_accuracy" in out
    assert "logits (24, 3)" in out
    assert (tmp_path / "nli" / "adapter_model.safetensors").exists()


def test_token_classification(published, tmp_path):
    out = _run(EXAMPLES / "finetune_token_classification.py", published, tmp_path / "ner", cwd=tmp_path)
    assert "logits (16," in out
    assert (tmp_path / "ner" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("order", ["import mtllm_fast; from transformers import AutoModel",
                                   "from transformers import AutoModel; import mtllm_fast"])  # fmt: skip
@pytest.mark.parametrize("trust", ["", ", trust_remote_code=False", ", trust_remote_code=True"])
def test_the_import_works_before_and_after_transformers(published, tmp_path, order, trust):
    script = tmp_path / "script.py"
    script.write_text(f"{order}\nprint(type(AutoModel.from_pretrained({str(published)!r}{trust})).__module__)\n")
    assert _run(script, cwd=tmp_path).strip() == "mtllm_fast.models.modeling"
