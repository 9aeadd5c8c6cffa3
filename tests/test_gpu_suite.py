"""The GPU suite's own machinery, with harmless commands in place of its stages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_suite.py"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite", module)
    spec.loader.exec_module(module)
    return module


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def run(suite: ModuleType, out: Path, *stages: object) -> tuple[int, dict[str, dict[str, object]]]:
    code = suite.run_suite(stages, out, gpu=False, say=lambda line: None)
    summary = json.loads((out / "summary.json").read_text())
    return code, {stage["stage"]: stage for stage in summary["stages"]}


def local(suite: ModuleType, name: str, code: str, seconds: float = 60, **more: object) -> object:
    return suite.Stage(name, seconds, (python(code),), needs_gpu=False, **more)


def test_failures_and_timeouts_do_not_stop_the_others(suite: ModuleType, tmp_path: Path) -> None:
    code, results = run(
        suite,
        tmp_path,
        local(suite, "fails", "print('the reason'); raise SystemExit(7)"),
        local(suite, "hangs", "import time; print('begun', flush=True); time.sleep(600)", seconds=2),
        local(suite, "works", "print('fine')"),
    )
    assert code == 1
    assert [result["status"] for result in results.values()] == ["failed", "timed out", "passed"]
    assert results["fails"]["exit_code"] == 7
    assert "the reason" in (tmp_path / "fails.log").read_text()
    assert "begun" in (tmp_path / "hangs.log").read_text()
    assert results["works"]["files"] == ["works.log"]


def test_a_timeout_kills_the_whole_process_group(suite: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "grandchild"
    grandchild = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    run(suite, tmp_path / "out", local(suite, "parent", code, seconds=1))
    time.sleep(4)
    assert not mark.exists()


def test_what_cannot_be_started_has_failed(suite: ModuleType, tmp_path: Path) -> None:
    stage = suite.Stage("absent", 10, (("/no/such/program",),), needs_gpu=False)
    code, results = run(suite, tmp_path, stage)
    assert code == 1
    assert results["absent"]["status"] == "failed"
    assert "/no/such/program" in (tmp_path / "absent.log").read_text()


def test_commands_of_a_stage_stop_at_the_first_failure_and_share_the_budget(suite: ModuleType, tmp_path: Path) -> None:
    stages = [
        suite.Stage("chain", 60, (python("raise SystemExit(3)"), python("print('never')")), needs_gpu=False),
        suite.Stage("shared", 2, (python("import time; time.sleep(1.2)"),) * 3, needs_gpu=False),
    ]
    _, results = run(suite, tmp_path, *stages)
    assert "never" not in (tmp_path / "chain.log").read_text()
    assert results["shared"]["status"] == "timed out"


def test_without_a_gpu_the_stages_say_so(suite: ModuleType, tmp_path: Path) -> None:
    gpu = suite.Stage("gpu", 60, (python("print('pretended')"),))
    code, results = run(suite, tmp_path, local(suite, "host", "pass"), gpu)
    assert code == 3
    assert results["gpu"] == {"stage": "gpu", "status": "no GPU", "files": []}
    assert results["host"]["status"] == "passed"
    assert not (tmp_path / "gpu.log").exists()


def test_results_of_an_earlier_run_do_not_pass_for_this_ones(suite: ModuleType, tmp_path: Path) -> None:
    for name in ("quiet", "other", "absent"):
        (tmp_path / f"{name}.json").write_text("{}")
    run(suite, tmp_path, local(suite, "other", "pass"))
    absent = suite.Stage("absent", 60, (python("pass"),), result=True)
    _, results = run(suite, tmp_path, local(suite, "quiet", "pass", result=True), absent)
    assert results["quiet"]["files"] == ["quiet.log"]
    assert not (tmp_path / "quiet.json").exists()
    assert results["other"]["status"] == "passed", "the summary keeps what other stages left"
    assert results["absent"]["files"] == []
    assert (tmp_path / "absent.json").exists(), "a stage that cannot run here deletes nothing"


def test_the_total_budget_cuts_off_what_is_left(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "TOTAL_SECONDS", 0.0)
    code, results = run(suite, tmp_path, local(suite, "late", "print('ran')"))
    assert (code, results["late"]["status"]) == (1, "timed out")


def test_a_huge_log_is_cut_in_the_middle(suite: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first" + b"." * (16 * 2**20) + b"last")
    suite.shorten(log)
    assert log.stat().st_size < 15.1 * 2**20
    assert log.read_bytes().startswith(b"first")
    assert log.read_bytes().endswith(b"last")


def test_the_real_plan_fits_its_promises(suite: ModuleType, tmp_path: Path) -> None:
    stages = suite.all_stages(tmp_path, "8b")
    files = [name for stage in stages for name in stage.files] + ["summary.json"]
    assert len(set(files)) == len(files)
    assert [suite.size_for(memory) for memory in (0, 12, 80)] == ["small", "1b", "8b"]
    assert all(name.replace(".", "").replace("-", "").isalnum() for name in files)
    assert suite.TOTAL_SECONDS < 600
    scripts = {part for stage in stages for command in stage.commands for part in command if part.endswith(".py")}
    assert scripts
    assert all((SCRIPT.parents[1] / script).exists() for script in scripts)


def test_dry_run_prints_the_plan_and_runs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), "--stages", "build,sanitizer"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "setup.py build_ext --inplace" in done.stdout
    assert "compute-sanitizer --tool racecheck" in done.stdout
    assert "throughput.py" not in done.stdout
    assert not out.exists()


def test_unknown_stages_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--stages", "lunch"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "unknown stage lunch" in done.stderr
