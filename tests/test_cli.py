"""The command line: results equal to the library's, clean errors, and ``kill -9`` during ``encode``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from mtllm_fast import MTLLM
from mtllm_fast.cli.app import main
from mtllm_fast.text.languages import LANGUAGES
from mtllm_fast.tiny import article_1, tiny_path

TEXTS = ["Habari ya dunia", "", "Wie geht's?", "word " * 40]
CODES = ["swh_Latn", "swh_Latn", "deu_Latn", "eng_Latn"]


WARNING = "warning: the model is the embedded tiny one, whose embeddings mean nothing; give --model\n"


class Finished(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path: Path) -> Callable[..., Finished]:
    """Runs ``mtllm-fast`` with these arguments in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def program(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["mtllm-fast", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Finished(code, *capsys.readouterr())

    return program


@pytest.fixture(scope="module")
def model() -> MTLLM:
    return MTLLM.from_pretrained("tiny")


def _jsonl(path: Path) -> Path:
    records = [{"text": t, "lang": c, "key": f"k{i}"} for i, (t, c) in enumerate(zip(TEXTS, CODES, strict=True))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _text(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(text + "\n" for text in texts))
    return path


def _variant(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """The tiny checkpoint with changed weights."""
    shutil.copytree(tiny_path(), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_help_is_quick() -> None:
    script = """
import sys
from mtllm_fast.cli.app import app
try:
    app(["encode", "--help"])
finally:
    assert not {"torch", "transformers", "numpy"} & set(sys.modules), "heavy imports for --help"
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--lang-column" in shown.stdout


def test_languages(run) -> None:
    assert [line.split("\t")[0] for line in run("languages").out.splitlines()] == list(LANGUAGES)
    assert run("languages", "swahili").out == "swh_Latn\tSwahili\tLatn\n"
    assert run("languages", "fa-AF").out == "prs_Arab\tDari\tArab\n"
    unknown = run("languages", "klingon")
    assert (unknown.code, unknown.out) == (2, "")
    assert unknown.err.startswith("error: unknown language 'klingon': the nearest are")


def test_bench_hands_its_arguments_over(run) -> None:
    shown = run("bench", "--help")
    assert shown.code == 0
    assert "--workload" in shown.out
    assert run("bench", "--no-such-option").code == 2


def test_encode_text_to_npy(run, tmp_path: Path, model: MTLLM) -> None:
    done = run("encode", _text(tmp_path / "in.txt"), "--src-lang", "sw", "--out", "out.npy", "--shard-size", 3)
    assert done == (0, "", f"{WARNING}out.npy: 4 embeddings of width 128\n")
    found = np.load("out.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model.encode(TEXTS, "swh_Latn").numpy(), atol=1e-5)
    assert sorted(os.listdir()) == ["in.txt", "out.npy"]


def test_encode_columns_to_parquet(run, tmp_path: Path, model: MTLLM) -> None:
    source = _jsonl(tmp_path / "in.jsonl")
    options = ["--lang-column", "lang", "--id-column", "key", "--normalize", "--max-length", 9]
    assert run("encode", source, "--out", "out.parquet", *options).code == 0
    table = pq.read_table("out.parquet")
    assert table["key"].to_pylist() == ["k0", "k1", "k2", "k3"]
    wanted = model.encode(TEXTS, CODES, max_length=9, normalize_embeddings=True).numpy()
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), wanted, atol=1e-6)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "float32"), ("float16", "float16")])
def test_encode_in_another_dtype(run, tmp_path: Path, model: MTLLM, dtype: str, stored: str) -> None:
    source = _text(tmp_path / "in.txt")
    assert run("encode", source, "--src-lang", "sw", "--out", "out.npy", "--dtype", dtype).code == 0
    found = np.load("out.npy")
    assert found.dtype == stored
    wanted = model.encode(TEXTS, "swh_Latn").numpy()
    error = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert 0 < error.max() < 0.05


def test_truncated_texts_are_counted_once(run, tmp_path: Path, caplog) -> None:
    source = _text(tmp_path / "in.txt", ["word " * 40, "short"] * 6)
    run("encode", source, "--src-lang", "eng_Latn", "--out", "out.npy", "--max-length", 20, "--shard-size", 4)
    assert [record.getMessage() for record in caplog.records] == [
        "6 texts were longer than --max-length and were truncated"
    ]


def test_an_empty_table(run, tmp_path: Path) -> None:
    assert run("encode", _text(tmp_path / "in.txt", []), "--src-lang", "sw", "--out", "out.npy").code == 0
    assert np.load("out.npy").shape == (0, 128)


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def _cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("in.txt --src-lang swahili --out o.npy", "unknown language 'swahili': the nearest are swh_Latn"),
        ("in.txt --out o.npy", "either --src-lang CODE or --lang-column NAME"),
        ("in.jsonl --src-lang sw --lang-column lang --out o.npy", "either --src-lang CODE or --lang-column NAME"),
        ("absent.txt --src-lang sw --out o.npy", "absent.txt: no such file"),
        ("in.xlsx --src-lang sw --out o.npy", "must end in .txt, .jsonl, .csv, .tsv, .parquet"),
        ("in.txt --lang-column lang --out o.npy", "a .txt has one text per line and no columns"),
        ("in.jsonl --src-lang sw --text-column body --out o.npy", "no column 'body'; the columns are 'text', 'lang'"),
        ("in.jsonl --lang-column key --out o.npy", "line 1: column 'key': unknown language 'k0'"),
        ("broken.jsonl --src-lang sw --out o.npy", "broken.jsonl, line 2: not JSON"),
        ("in.txt --src-lang sw --out o.csv", "must end in .npy or .parquet"),
        ("in.txt --src-lang sw --out absent/o.npy", "its folder absent does not exist"),
        ("in.txt --src-lang sw --out old.npy", "old.npy exists; --overwrite replaces it"),
        ("in.parquet --src-lang sw --out in.parquet --overwrite", "in.parquet is the input: choose another OUT"),
        ("in.jsonl --src-lang sw --id-column key --out o.npy", "--id-column needs an OUT that ends in .parquet"),
        ("in.txt --src-lang sw --out o.npy --device gpu", "--device must be such as cuda, cuda:1 or cpu"),
        ("in.txt --src-lang sw --out o.npy --device cuda:99", "--device cuda:99: PyTorch finds"),
        ("in.txt --src-lang sw --out o.npy --model ./absent", "./absent: no such checkpoint folder"),
        ("in.txt --src-lang sw --out o.npy --model cut", "corrupt or truncated safetensors file"),
        ("in.txt --src-lang sw --out o.npy --model silent", "holds no tokenizer.json"),
        ("in.txt --src-lang sw --out o.npy --max-length 2", "--max-length"),
        ("in.txt --src-lang sw --out o.npy --dtype int4", "--dtype"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path: Path, arguments: str, message: str) -> None:
    _text(tmp_path / "in.txt")
    _jsonl(tmp_path / "in.jsonl")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in.parquet")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "old.npy").write_text("precious")
    for name, damage in (("cut", _cut_weights), ("silent", _no_tokenizer)):
        if name in arguments:
            shutil.copytree(tiny_path(), tmp_path / name)
            damage(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    failed = run("encode", *arguments.split())
    assert failed.code == 2
    assert message in failed.err
    assert "Traceback" not in failed.err
    assert failed.err.startswith("error: ") == (failed.err.count("\n") == 1)  # else typer's own box
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.npy").read_text() == "precious"


def test_resuming_takes_the_same_job_only(run, tmp_path: Path, monkeypatch) -> None:
    source = _text(tmp_path / "in.txt", TEXTS * 5)
    command = ["encode", source, "--src-lang", "sw", "--out", "out.npy", "--shard-size", 6]
    assert run(*command).code == 0
    wanted = np.load("out.npy")
    os.remove("out.npy")

    def interrupted(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mtllm_fast.shards.Shards.merge", interrupted)
    assert run(*command).err == f"{WARNING}error: no space left on device\n"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    other_model = _variant(tmp_path / "other", lambda w: w["llm2vec.norm.weight"].__setitem__(0, 2.0))
    for change in (["--max-length", 64], ["--normalize"], ["--src-lang", "eng"], ["--model", other_model]):
        refused = run(*command, *change)
        assert refused.code == 2
        assert "out.npy.partial holds the work of another job" in refused.err
    with source.open("a") as file:
        file.write("one more\n")
    assert "holds the work of another job: rows was 20, is 21; input was" in run(*command).err
    _text(source, TEXTS * 5)

    monkeypatch.setattr(MTLLM, "encode", None)  # every shard is there: nothing is encoded again
    assert run(*command, "--batch-tokens", 64).code == 0
    np.testing.assert_array_equal(np.load("out.npy"), wanted)


@pytest.mark.parametrize(
    ("lines", "kills"), [(2_000, [3]), pytest.param(20_000, [5, 20], marks=pytest.mark.slow)], ids=["2000", "20000"]
)
def test_kill_during_encode(tmp_path: Path, model: MTLLM, lines: int, kills: list[int]) -> None:
    sentences = [sentence for text in article_1().values() for sentence in text.split(".")]
    distinct = [f"{i} {sentences[i % len(sentences)][:50]}" for i in range(997)]
    order = np.random.default_rng(0).integers(len(distinct), size=lines)
    source = _text(tmp_path / "in.txt", [distinct[i] for i in order])
    out, work = tmp_path / "out.npy", tmp_path / "out.npy.partial"
    command = [sys.executable, "-m", "mtllm_fast.cli", "encode", str(source), "--src-lang", "eng", "--out", str(out)]
    command += ["--shard-size", str(lines // 50)]

    def shards() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in work.glob("*.npy")} if work.exists() else {}

    finished: dict[str, int] = {}
    for killed_at in kills:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(shards()) < killed_at and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        assert finished.items() <= shards().items()  # what was finished before is not written again
        finished = shards()
        assert killed_at <= len(finished) < 50

    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert sorted(os.listdir(tmp_path)) == ["in.txt", "out.npy"]
    wanted = model.encode(distinct, "eng_Latn").numpy()
    np.testing.assert_allclose(np.load(out), wanted[order], atol=1e-4)
    gaps = np.linalg.norm(wanted[:, None, :8] - wanted[None, :, :8], axis=-1) + np.eye(len(wanted))
    assert gaps.min() > 3e-3  # any row out of place would have shown


def team_of_two(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    program = [sys.executable, "-m", "mtllm_fast.cli", *map(str, arguments)]
    return subprocess.run([*launcher, *program], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_two_processes_share_an_encode_and_go_on_with_what_is_there(tmp_path: Path, model: MTLLM) -> None:
    texts = [f"{i} {text}" for i in range(6) for text in TEXTS]
    source = _text(tmp_path / "in.txt", texts)
    command = ["encode", source, "--src-lang", "sw", "--out", "out.parquet", "--shard-size", 5]
    work = tmp_path / "out.parquet.partial"
    done = team_of_two(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("24 embeddings of width 128") == 1
    assert not work.exists()
    wanted = model.encode(texts, "swh_Latn").numpy()
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == list(range(24))
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), wanted, atol=1e-5)

    assert "exists; --overwrite replaces it" in team_of_two(*command, cwd=tmp_path).stderr
    again = team_of_two(*command, "--overwrite", "--normalize", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    norms = np.linalg.norm(np.stack(pq.read_table(tmp_path / "out.parquet")["embedding"].to_numpy()), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
