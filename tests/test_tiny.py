"""The embedded checkpoint: same bytes every time, published layout, safe for parallel first uses, usable embeddings."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtllm_fast import MTLLM, MTLLMConfig
from mtllm_fast.text.languages import LANGUAGES
from mtllm_fast.tiny import article_1, generate, tiny_path

GENERATE = """
import sys
from mtllm_fast.tiny import tiny_path
print(tiny_path())
"""


def test_generation_is_deterministic(tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    generate(again)
    assert _hashes(again) == _hashes(tiny_path())
    assert sum(file.stat().st_size for file in again.iterdir()) < 8e6


def test_parallel_first_uses_share_one_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "MTLLM_FAST_CACHE": str(tmp_path / "new" / "cache")}
    command = [sys.executable, "-c", GENERATE]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1
    path = Path(paths.pop())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing is left of the losers
    assert _hashes(path) == _hashes(tiny_path())


def test_a_loser_of_the_race_uses_the_winners_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MTLLM_FAST_CACHE", str(tmp_path))

    def generate_while_another_wins(folder: Path) -> None:
        generate(folder)
        winner = tmp_path / folder.name
        winner.mkdir()
        (winner / "config.json").write_text("the winner's")

    monkeypatch.setattr("mtllm_fast.tiny.generate", generate_while_another_wins)
    assert (tiny_path() / "config.json").read_text() == "the winner's"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("MTLLM_FAST_CACHE", str(blocked / "cache"))
    with pytest.raises(OSError, match=rf"{blocked}/cache cannot be written .* set MTLLM_FAST_CACHE"):
        tiny_path()


def test_keys_and_shapes_are_the_models() -> None:
    with torch.device("meta"):
        model = MTLLM(MTLLMConfig.from_pretrained(tiny_path()))
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    weights = load_file(tiny_path() / "model.safetensors")
    assert {key: tensor.shape for key, tensor in weights.items()} == wanted
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_tokenizer_has_all_languages_within_the_embedding() -> None:
    model = MTLLM.from_pretrained("tiny")
    tokens = model.tokenizer.get_vocab()
    assert set(LANGUAGES) <= set(tokens)
    assert max(tokens.values()) < model.nllb_encoder.embed_tokens.num_embeddings


def test_embeddings_are_not_degenerate() -> None:
    model = MTLLM.from_pretrained("tiny")
    articles = article_1()
    embeddings = model.encode(list(articles.values()), list(articles), normalize_embeddings=True)
    cosines = embeddings @ embeddings.T - 2 * torch.eye(len(embeddings))
    assert torch.isfinite(embeddings).all()
    assert cosines.max() < 0.95
    one, other = model.encode(["A cat sat on the mat.", "A dog sat on the mat."], "eng_Latn", normalize_embeddings=True)
    assert 0.5 < one @ other < 0.95

    tokens = model.tokenizer(articles["eng_Latn"], return_tensors="pt")
    states = model(**tokens, output_hidden_states=True)
    for state in (*states.encoder_hidden_states, *states.hidden_states):
        assert 0.5 < state.std() < 5


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
