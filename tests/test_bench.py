"""The throughput benchmark: length laws, peers that agree, a gate that refuses, a record that can be read again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mtllm_fast.bench import BenchOptions, run
from mtllm_fast.bench.gate import Gate, relative_error
from mtllm_fast.bench.measure import MemoryMeter, encode_flops, gemm_ceiling, interleave, spread
from mtllm_fast.bench.peers import (
    PEERS,
    Peer,
    packed_encode,
    padded_encode,
    reference_forward,
    resolve_peers,
    token_budget_batches,
    translate_encode,
)
from mtllm_fast.bench.report import append_json, draw, table
from mtllm_fast.bench.runner import add_ratios, make_peers
from mtllm_fast.bench.sizes import Stack, make_stack, make_translator
from mtllm_fast.bench.truth import true_embeddings
from mtllm_fast.bench.workloads import LANGUAGE_CODES, MAX_LENGTH, Workload, make_workload, sample_lengths
from mtllm_fast.core.errors import WrongResultError

README = Path(__file__).parents[1] / "README.md"

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
QUICK = BenchOptions(size="tiny", rounds=2, sentences=40, device="cpu", peers=("reference", "reference-sorted", "ours"))


@pytest.fixture(scope="module")
def stack() -> Stack:
    return make_stack("tiny", CPU, torch.float32, seed=0)


@pytest.fixture(scope="module")
def texts(stack: Stack) -> Workload:
    return make_workload("mixed", 24, stack.encoder.config.vocab_size, seed=1)


class TestWorkloads:
    @pytest.mark.parametrize(("name", "mean"), [("sentences", 40), ("documents", 358), ("mixed", 199)])
    def test_mean_length_is_the_laws(self, name: str, mean: float) -> None:
        lengths = sample_lengths(name, 30_000, np.random.default_rng(0))
        assert lengths.mean() == pytest.approx(mean, rel=0.02)
        assert lengths.max() <= MAX_LENGTH

    def test_padding_waste_of_unsorted_batches_is_the_known_one(self) -> None:
        lengths = sample_lengths("sentences", 32_000, np.random.default_rng(0)).reshape(-1, 32)
        waste = 1 - lengths.sum() / (32 * lengths.max(1).sum())
        assert 0.42 < waste < 0.50

    def test_texts_are_framed_seeded_and_free_of_special_ids(self) -> None:
        work = make_workload("sentences", 50, vocab_size=1000, seed=3)
        for text in work.ids:
            assert 1000 - 3 - LANGUAGE_CODES <= text[0] < 1000 - 3
            assert text[-1] == 2
            assert text[1:-1].min() >= 4
        again = make_workload("sentences", 50, vocab_size=1000, seed=3)
        assert all(np.array_equal(a, b) for a, b in zip(work.ids, again.ids, strict=True))
        assert not np.array_equal(work.lengths, make_workload("sentences", 50, 1000, seed=4).lengths)

    def test_sample_keeps_the_shortest_and_the_longest(self) -> None:
        work = make_workload("mixed", 100, vocab_size=1000, seed=0)
        lengths = work.sample(5).lengths
        assert len(lengths) == 5
        assert {work.lengths.min(), work.lengths.max()} <= set(lengths)

    def test_bad_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="workload must be one of sentences"):
            make_workload("tweets", 5, 1000, 0)
        with pytest.raises(ValueError, match="at least one text"):
            make_workload("sentences", 0, 1000, 0)
        with pytest.raises(ValueError, match="room for 202 language codes"):
            make_workload("sentences", 5, 200, 0)


class TestPeers:
    def test_same_semantics_peers_match_float64(self, stack: Stack, texts: Workload) -> None:
        truth = true_embeddings(stack, texts.ids)
        forward = reference_forward(stack)
        for encode in (
            padded_encode(forward, CPU, 5, sort=False),
            padded_encode(forward, CPU, 5, sort=True),
            packed_encode(stack.model, batch_tokens=700),
        ):
            assert relative_error(encode(texts.ids), truth) < 2e-6

    def test_truth_attends_to_later_tokens(self, stack: Stack, texts: Workload) -> None:
        text = texts.ids[0]
        changed = text.copy()
        changed[-2] = text[-2] + 1
        first_token = true_embeddings(stack, [text]), true_embeddings(stack, [changed])
        assert not torch.allclose(*first_token)

    def test_reference_shares_the_models_parameters_and_is_plain(self, stack: Stack) -> None:
        assert stack.encoder.layers[0].fc1.weight.data_ptr() == stack.model.nllb_encoder.layers[0].fc1.weight.data_ptr()
        assert type(stack.llm.layers[0]).__module__.startswith("transformers.")
        assert stack.llm.config._attn_implementation == "sdpa"

    def test_translation_reads_as_many_tokens_as_the_text_has(self, stack: Stack, texts: Workload) -> None:
        translator = make_translator(stack, seed=0)
        short = texts.sample(3)
        rows = {beams: translate_encode(stack, translator, 2, beams)(short.ids) for beams in (1, 4)}
        assert rows[1].shape == (3, stack.llm.config.hidden_size)
        assert bool(torch.isfinite(rows[1]).all())
        assert bool(torch.isfinite(rows[4]).all())
        assert translator.lm_head.weight is stack.encoder.embed_tokens.weight

    def test_token_budget_covers_every_text_once(self) -> None:
        lengths = [9, 7, 7, 5, 1]
        batches = token_budget_batches(lengths, np.arange(5), batch_tokens=8)
        assert [list(batch) for batch in batches] == [[0], [1], [2], [3, 4]]

    def test_names(self) -> None:
        assert resolve_peers(["ours", "translate-test", "reference"]) == (
            "reference", "translate-greedy", "translate-beam4", "ours",
        )  # fmt: skip
        with pytest.raises(ValueError, match="unknown peer 'theirs'"):
            resolve_peers(["theirs"])


class TestGate:
    def gate(self, dtype: torch.dtype = torch.float32) -> Gate:
        truth = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return Gate(truth, truth.to(dtype), truth.to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_accepts_the_reference_itself(self, dtype: torch.dtype) -> None:
        gate = self.gate(dtype)
        assert gate.check("same", gate.reference_sample, gate.reference_all) == gate.reference_error

    def test_refuses_a_small_error(self) -> None:
        gate = self.gate()
        with pytest.raises(WrongResultError, match=r"relative error 1\.00e-05"):
            gate.check("off", gate.reference_sample * (1 + 1e-5), gate.reference_all)

    def test_refuses_swapped_rows_that_the_sample_did_not_show(self) -> None:
        gate = self.gate(torch.bfloat16)
        swapped = gate.reference_all[[1, 0, 2, 3, 4, 5]]
        with pytest.raises(WrongResultError, match="one text differs"):
            gate.check("mixed up", gate.reference_sample, swapped)

    def test_refuses_nan(self) -> None:
        gate = self.gate()
        for poisoned in ("sample", "everything"):
            outputs = {"sample": gate.reference_sample.clone(), "everything": gate.reference_all.clone()}
            outputs[poisoned][3, 3] = float("nan")
            with pytest.raises(WrongResultError, match="nan"):
                gate.check("nan", **outputs)


class TestMeasures:
    def test_rounds_interleave_and_rotate(self) -> None:
        order: list[str] = []
        work = Workload("sentences", (np.array([5, 2]),))
        peers = [Peer(n, lambda ids, n=n: order.append(n), work) for n in "abc"]  # type: ignore[misc, return-value]
        timings = interleave(peers, 2, CPU)
        assert "".join(order) == "abcbca"
        assert all(len(timing.seconds) == 2 for timing in timings.values())

    def test_ratio_is_the_median_of_the_rounds_own(self) -> None:
        rows = [
            {"name": "reference", "status": "ok", "texts": 10, "seconds": [1.0, 10.0, 1.0]},
            {"name": "ours", "status": "ok", "texts": 5, "seconds": [0.25, 2.5, 0.1]},
        ]
        add_ratios(rows)
        assert rows[1]["ratio_to_reference"]["median"] == pytest.approx(2.0)  # type: ignore[index]
        assert rows[1]["ratio_to_reference_sorted"] is None

    def test_spread(self) -> None:
        assert spread([1, 2, 3, 4, 5]) == {"median": 3, "p10": pytest.approx(1.4), "p90": pytest.approx(4.6)}

    def test_flops_of_published_shapes(self) -> None:
        llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
                 "intermediate_size": 14336}  # fmt: skip
        nllb = {"d_model": 1024, "encoder_layers": 12, "encoder_ffn_dim": 4096}
        configs = [type("Module", (), {"config": type("Config", (), shape)()})() for shape in (nllb, llama)]
        stack = Stack(configs[0], torch.nn.Linear(1, 1), configs[1], None)
        per_token = encode_flops(stack, np.array([512])) / 512
        # 2 x (151 + 4.2 + 6979) M multiply-adds, and attention's 4 x 512 x (32 x 4096 + 12 x 1024).
        assert per_token == pytest.approx(2 * 7134.5e6 + 293.6e6, rel=1e-3)

    def test_memory_meter_sees_an_allocation_and_resets(self) -> None:
        meter = MemoryMeter(CPU)
        if meter.kind == "unknown":
            pytest.skip("this system offers no resettable high-water mark")
        meter.reset()
        before = meter.peak()
        torch.ones(64 * 2**20, dtype=torch.uint8)
        high = meter.peak()
        meter.reset()
        after = meter.peak()
        assert before is not None
        assert high is not None
        assert after is not None
        assert high - before > 50 * 2**20
        assert after < high

    def test_gemm_ceiling_is_a_rate(self) -> None:
        assert 1e8 < gemm_ceiling(CPU, torch.float32, repeats=1) < 1e16


class TestRun:
    def test_record_survives_json_and_the_table_shows_it(self, tmp_path: Path) -> None:
        record = run(QUICK)
        append_json(record, tmp_path / "new" / "out.json")
        append_json(record, tmp_path / "new" / "out.json")
        first, second = (tmp_path / "new" / "out.json").read_text().splitlines()
        assert json.loads(first) == json.loads(second) == json.loads(json.dumps(record))
        assert record["schema"] == 1
        assert {"torch", "transformers", "python"} <= set(record["environment"]["versions"])
        assert record["execution"]["threads"] == torch.get_num_threads()
        for row in record["peers"]:
            assert row["status"] == "ok"
            assert len(row["seconds"]) == 2
            assert row["error"] <= record["gate"]["allowed_error"]
            assert 0 < row["gemm_fraction"] < 1
            assert row["tokens_per_s"]["p10"] <= row["tokens_per_s"]["median"] <= row["tokens_per_s"]["p90"]
        assert record["peers"][0]["ratio_to_reference"]["median"] == 1
        assert table(record).row_count == 3

    def test_plot_is_a_png(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        draw(run(QUICK), tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_a_broken_model_ends_the_run_before_any_timing(self, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from mtllm_fast import MTLLM

        right = MTLLM.encode_packed
        monkeypatch.setattr(MTLLM, "encode_packed", lambda *args: 1.02 * right(*args))
        timed: list[object] = []
        monkeypatch.setattr("mtllm_fast.bench.runner.interleave", lambda *args: timed.append(args))
        with pytest.raises(WrongResultError, match="ours: relative error"):
            run(BenchOptions(size="tiny", rounds=1, sentences=8, device="cpu", dtype=dtype, peers=("ours",)))
        assert not timed

    def test_compile_without_a_compiler_is_skipped_with_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_compiler(forward: object, dynamic: bool) -> object:
            def fail(*args: object) -> None:
                raise RuntimeError("no C++ compiler\nand a long trace")

            return fail

        monkeypatch.setattr(torch, "compile", no_compiler)
        record = run(BenchOptions(size="tiny", rounds=1, sentences=8, device="cpu", peers=("reference", "compiled")))
        assert record["peers"][1]["status"] == "skipped"
        assert record["peers"][1]["reason"].endswith("no C++ compiler")
        assert table(record).row_count == 2

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"size": "70b"}, "size must be one of tiny"),
            ({"dtype": "fp8"}, "dtype must be one of fp32"),
            ({"device": "meta"}, "device must be cpu or cuda"),
            ({"rounds": 0}, "rounds must be at least 1"),
            ({"peers": ("ours", "x")}, "unknown peer 'x'"),
        ],
    )
    def test_options_are_checked(self, wrong: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BenchOptions(**wrong).resolved()  # type: ignore[arg-type]

    def test_every_peer_name_makes_a_peer(self, stack: Stack, texts: Workload) -> None:
        options = BenchOptions(device="cpu").resolved()
        made = tuple(peer.name for peer in make_peers(options, stack, texts))
        assert made == tuple(name for name in PEERS if name not in ("liger", "ours-fp8")), "which a CPU cannot run"


def throughput(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # this checkout, whatever is installed
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_script_prints_the_table_and_writes_the_files(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = throughput(
        "--rounds", "1", "--sentences", "32", "--peers", "reference,translate-test,ours", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert "translate-beam4" in done.stdout
    assert [row["name"] for row in json.loads(out.read_text())["peers"]][-1] == "ours"
    assert out.with_suffix(".png").exists()


def test_a_cosine_is_held_to_the_truth_and_to_the_reference() -> None:
    truth = torch.eye(4, dtype=torch.float64)
    gate = Gate(truth, truth.float(), truth.float())
    error, cosine = gate.check_cosine("ours-fp8", 2 * truth.float(), truth.float(), 0.99)
    assert (error, cosine) == (1.0, 1.0)
    turned = truth.float().roll(1, 0)
    for sample, everything in (
        (turned, truth.float()),
        (truth.float(), turned),
        (truth.float() * float("nan"), turned),
    ):
        with pytest.raises(WrongResultError, match="ours-fp8: cosine"):
            gate.check_cosine("ours-fp8", sample, everything, 0.99)


def test_script_refuses_unknown_options() -> None:
    done = throughput("--size", "huge")
    assert done.returncode == 2
    assert "size must be one of" in done.stderr


def test_the_readmes_table_is_what_the_committed_results_say() -> None:
    row = r"^\| [^|]* \| \[.*?\]\((benchmarks/results/\S+sentences\S+\.json)\) \|(.*)\|$"
    rows = re.findall(row, README.read_text(), re.MULTILINE)
    assert len(rows) >= 3
    for path, cells in rows:
        record = json.loads((README.parent / path).read_text())
        peers = {peer["name"]: peer for peer in record["peers"]}
        names = ("reference", "reference-sorted", "ours", "ours-fp8")
        expected = [f"{peers[name]['tokens_per_s']['median']:,.0f}" if name in peers else "–" for name in names]
        for base in ("reference", "reference_sorted"):
            expected.append(f"{peers['ours'][f'ratio_to_{base}']['median']:.2f}x")
        assert [cell.strip() for cell in cells.split("|")] == expected, path
