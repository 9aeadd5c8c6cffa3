"""The transfer study as a whole, far too small to learn anything: every part runs, and comes out the same twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.transfer.costs import costs_of
from benchmarks.transfer.jobs import job
from benchmarks.transfer.languages import ENGLISH
from benchmarks.transfer.names import BEAM, ENCODER, GREEDY, MT_LLM, ZERO_SHOT
from benchmarks.transfer.presets import PRESETS
from benchmarks.transfer.report import interval, plot_costs, plot_data, summarise, summary, table
from benchmarks.transfer.study import Study

NANO = dataclasses.replace(
    PRESETS["micro"], paragraphs=200, documents=200, mt_width=32, mt_layers=1, llm_width=32, llm_layers=1, mt_steps=4,
    clm_steps=4, mntp_steps=2, simcse_steps=2, distill_steps=3, train_rows={"sentiment": 60}, test_rows=30,
    dev_rows=30, mt_vocabulary=600, llm_vocabulary=600,
)  # fmt: skip


def run(folder):
    study = Study(folder, NANO)
    study.claim()
    jobs = [one for phase in study.phases() for one in phase]
    results = [job(study, *one) for one in jobs]
    return study, [record for result in results for record in result or []]


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    return [run(tmp_path_factory.mktemp(name) / "study") for name in ("one", "other")]


def digests(root):
    """Of what is trained, predicted and translated; of states without the teacher's digest, in which its path is."""
    names = ("*.safetensors", "predictions*.jsonl", "translations*.jsonl")
    files = sorted(path for name in names for path in root.rglob(name))
    held = {path: load_file(path)["rows"].numpy().tobytes() if path.stem == "states" else path.read_bytes()
            for path in files}  # fmt: skip
    return {str(path.relative_to(root)): hashlib.sha256(content).hexdigest() for path, content in held.items()}


def curves(root):
    """Every loss that was logged, of every run."""
    logs = sorted(root.rglob("log.json"))
    return {str(p.relative_to(root)): [[line.get("loss"), line.get("eval_loss")] for line in json.loads(p.read_text())]
            for p in logs}  # fmt: skip


def test_the_same_seed_gives_the_same_bits(twice):
    (one, records), (other, again) = twice
    assert records == again
    assert digests(one.root) == digests(other.root)
    assert curves(one.root) == curves(other.root)
    assert {name.split("/")[0] for name in digests(one.root)} >= {"mt", "llm", "seed-1"}
    assert len(curves(one.root)) >= 6


def test_a_study_that_is_whole_is_not_made_again(twice):
    study, records = twice[0]
    before = {path: path.stat().st_mtime_ns for path in study.root.rglob("*") if path.is_file()}
    _, again = run(study.root)
    assert again == records
    after = {path: path.stat().st_mtime_ns for path in study.root.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} == {study.root / "study.json"}


def test_records_are_of_every_system_and_language(twice):
    _, records = twice[0]
    languages = {ENGLISH.name, *NANO.languages}
    systems = {ZERO_SHOT, GREEDY, BEAM, ENCODER, MT_LLM}
    assert {(r["system"], r["language"]) for r in records} == {(s, one) for s in systems for one in languages}
    assert {r["rows"] for r in records} == {NANO.test_rows}
    english = {r["system"]: r["accuracy"] for r in records if r["language"] == ENGLISH.name}
    assert english[GREEDY] == english[BEAM] == english[ZERO_SHOT]  # English is not translated


def test_intervals_are_students_over_seeds():
    mean, half = interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(4.302652730 * 0.1 / 3**0.5)
    assert interval([0.5]) == (0.5, None)


def test_a_summary_is_of_means_over_languages_and_seeds():
    records = [
        {"task": "sentiment", "system": MT_LLM, "seed": seed, "language": language, "accuracy": accuracy}
        for seed, language, accuracy in
        [(1, "rich-svo", 0.5), (1, "rich-sov", 0.7), (2, "rich-svo", 0.7), (2, "rich-sov", 0.9)]
    ]  # fmt: skip
    rows = {row["languages"]: row for row in summarise(records)}
    assert rows["rich"]["seeds"] == pytest.approx([0.6, 0.8])
    assert rows["rich-svo"]["mean"] == pytest.approx(0.6)
    assert "poor" not in rows
    record = {"accuracy": summarise(records), "chance": {"sentiment": 1 / 3}, "costs": {"sentiment": {}}}
    assert summary(record)[-1] == "| MT-LLM | 70.0 ± 127.1 | – |"
    assert table(record)[4].startswith("| MT-LLM | 70.0 ± 127.1 |")


def test_a_folder_belongs_to_one_study(twice):
    study, _ = twice[0]
    with pytest.raises(FileExistsError, match="holds another study"):
        Study(study.root, dataclasses.replace(NANO, mt_steps=5)).claim()


def test_backends_and_seconds_of_every_job_are_kept(twice):
    study, _ = twice[0]
    accounts = study.accounts()
    jobs = {"-".join(map(str, one)) for phase in study.phases() for one in phase}
    assert set(accounts["job_seconds"]) == jobs
    chosen = {name.split(": ")[0] for name in accounts["backends"]}
    assert chosen >= {"distillation_loss", "varlen_attention", "rms_norm", "lora_linear"}


def test_costs_and_plots_are_of_the_studys_own_systems(twice, tmp_path):
    study, records = twice[0]
    costs = costs_of(study)
    found = costs["sentiment"]
    assert set(found) == {ZERO_SHOT, GREEDY, BEAM, ENCODER, MT_LLM}
    assert found[ENCODER]["mflop_per_row"] < found[MT_LLM]["mflop_per_row"]
    assert found[ZERO_SHOT]["mflop_per_row"] < found[BEAM]["mflop_per_row"]
    assert all(cost["rows_per_second"] > 0 for cost in found.values())
    record = {
        "accuracy": summarise(records), "chance": {"sentiment": 1 / 3}, "costs": costs, "paragraphs": NANO.paragraphs
    }  # fmt: skip
    for plot in (plot_data, plot_costs):
        plot(record, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_mt_models_quality_is_a_share_of_every_language(twice):
    quality = twice[0][0].mt_quality(4)
    assert quality == {"rich-svo": 0.0, "rich-sov": 0.0}  # after four steps


def test_workers_end_with_a_study_that_is_killed():
    """Their one job would take an hour."""
    program = (
        "import multiprocessing, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from benchmarks.transfer.jobs import start_worker\n"
        "import os\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, initializer=start_worker, initargs=(1,))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 3600).result()\n"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as study:
        assert study.stdout is not None
        worker = int(study.stdout.readline())
        os.kill(worker, 0)
        study.kill()
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its study by 20 seconds")


def alive(process):
    """Whether it runs; one that has ended and that nobody has asked after does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
