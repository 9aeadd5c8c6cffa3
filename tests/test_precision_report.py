"""What 8 bits cost, as ``mtllm-fast evaluate --precision-report`` tells it; and ``encode --precision``."""

from __future__ import annotations

import contextlib
import json
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mtllm_fast import MTLLM
from mtllm_fast.cli import precision_report
from mtllm_fast.cli.app import main
from mtllm_fast.testing.tolerance import relative_error
from mtllm_fast.tiny import article_1


def test_the_report_of_a_model_against_itself_and_of_known_embeddings() -> None:
    plain = torch.eye(4, 8) + 0.1 * torch.arange(4)[:, None]
    same = precision_report.compare(plain, 3 * plain, list("abcd"))
    assert same["cosine"] == {"min": pytest.approx(1), "mean": pytest.approx(1)}
    assert same["same_nearest_neighbour"] == 1
    turned = plain.clone()
    turned[2] = plain[0] + 0.01
    found = precision_report.compare(plain, turned, list("abcd"))
    cosine = F.cosine_similarity(plain[2], turned[2], dim=0).item()
    assert found["furthest"][0] == {"text": 2, "language": "c", "cosine": pytest.approx(cosine)}
    assert found["cosine"] == {"min": pytest.approx(cosine), "mean": pytest.approx((3 + cosine) / 4)}
    assert found["same_nearest_neighbour"] < 1
    assert precision_report.compare(plain[:2], plain[:2], list("ab"))["same_nearest_neighbour"] is None


def test_the_report_s_command(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mtllm-fast", "evaluate", *map(str, arguments)])
        try:
            main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    assert run("--precision-report", "--layers", "--out", tmp_path / "all.json", "--device", "cpu") == 0
    shown = capsys.readouterr()
    assert "fp8-emulated against float32" in shown.out
    assert "18 linear layers, 0 left as they are" in shown.out
    assert shown.err.endswith("whose embeddings mean nothing; give --model\n")
    report = json.loads((tmp_path / "all.json").read_text())
    assert (report["precision"], report["emulated"], report["texts"]) == ("fp8-emulated", True, len(article_1()))
    assert 0.998 < report["cosine"]["min"] <= report["cosine"]["mean"] < 1
    assert 0.8 < report["same_nearest_neighbour"] <= 1
    assert len(report["layer_errors"]) == 3
    assert all(0 < error < 0.1 for error in report["layer_errors"])

    texts = tmp_path / "texts.txt"
    texts.write_text("Habari ya dunia\nHabari za asubuhi\n")
    options = ["--precision-report", "--precision", "int8", "--texts", texts, "--device", "cpu"]
    assert run(*options, "--src-lang", "sw", "--out", tmp_path / "two.json") == 0
    report = json.loads((tmp_path / "two.json").read_text())
    assert (report["precision"], report["emulated"], report["texts"]) == ("int8", False, 2)
    assert report["same_nearest_neighbour"] is None
    for wrong in (options, [], ["--precision-report", "--src-lang", "sw"], ["--precision-report", "--model", "/no"]):
        capsys.readouterr()
        assert run(*wrong) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_encode_s_option(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("Habari ya dunia\nHabari za asubuhi\n")
    arguments = ["encode", tmp_path / "in.txt", "--src-lang", "sw", "--out", tmp_path / "out.npy", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["mtllm-fast", *map(str, arguments), "--precision", "int8"])
    with contextlib.suppress(SystemExit):
        main()
    model = MTLLM.from_pretrained("tiny")
    model.fuse("int8")
    expected = model.encode(["Habari ya dunia", "Habari za asubuhi"], "swh_Latn", convert_to_numpy=True)
    assert relative_error(torch.from_numpy(np.load(tmp_path / "out.npy")), torch.from_numpy(expected)) < 1e-3
