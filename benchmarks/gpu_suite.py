"""Build, test, sanitise and benchmark on the GPU of this machine, in one command.

On an H200 the tests took 130 s (the build has not been timed there), a stage of throughput at 8B 30 to 70 s (the
training step more than 90): all do not fit into the ten minutes at which the suite stops, so choose ``--stages``.

    python benchmarks/gpu_suite.py --out results-gpu
    python benchmarks/gpu_suite.py --out results-gpu --stages build,tests
    python benchmarks/gpu_suite.py --dry-run

Each stage is a process of its own with a time budget and a result file. A stage that fails or runs out of time (its
whole process group is killed) does not stop the next ones. Nothing is fetched from a network. DIR ends up with
``<stage>.log`` and, of a benchmark, ``<stage>.json`` per stage, and ``summary.json``, which is rewritten after every
stage; what an earlier run left there of other stages stays. The throughput stages take the largest model that fits.

Exit code: 0, every chosen stage passed; 1, a stage failed or timed out; 3, none failed, but stages that need a GPU
could not run because there is none (status "no GPU").
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 590.0
MAX_FILE_BYTES = 15 * 2**20
SMALL_KERNELS = "benchmarks/sanitizer_target.py"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands that run one after the other until one fails, within one budget.

    ``result`` says whether the commands write ``<name>.json`` into DIR, beside the log.
    """

    name: str
    budget_seconds: float
    commands: tuple[tuple[str, ...], ...]
    result: bool = False
    needs_gpu: bool = True
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def log(self) -> str:
        return f"{self.name}.log"

    @property
    def files(self) -> tuple[str, ...]:
        return (self.log, f"{self.name}.json") if self.result else (self.log,)


def sanitizer(tool: str, *options: str) -> tuple[str, ...]:
    """One compute-sanitizer run over small shapes of every CUDA kernel of ours, and of no other library."""
    ours_alone = ("--kernel-regex", "kns=mtllm", "--error-exitcode", "9")
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return (program, "--tool", tool, *options, *ours_alone, sys.executable, SMALL_KERNELS)


def throughput(out: Path, stage: str, size: str, *options: str) -> tuple[str, ...]:
    """One run of the benchmark in any of its modes, into the result file of its stage."""
    return (
        sys.executable, "benchmarks/throughput.py", "--size", size, "--dtype", "bf16", "--device", "cuda", *options,
        "--out", str(out / f"{stage}.json"), "--no-plot",
    )  # fmt: skip


def pytest_command(*names: str) -> tuple[str, ...]:
    """pytest, in parallel where xdist is installed: most of a test's time goes into compiling its kernel.

    Verbose, so that the log of a stage that ran out of time names what had failed.
    """
    workers = str(min(14, os.cpu_count() or 1))
    parallel = ("-n", workers, "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    files = [f"tests/test_{name}.py" for name in names]
    return (sys.executable, "-m", "pytest", "-v", "--tb=short", "--durations=20", *parallel, *files)


def all_stages(out: Path, size: str) -> list[Stage]:
    """The suite, cheap and indispensable stages first: what the total budget cuts off is at the end."""
    python = sys.executable
    peers = "reference,reference-sorted,ours,ours-fp8"
    train = "reference,reference-checkpointed,ours"  # of 16k tokens at 8B the first needs more than 141 GB
    layers = ("rms_norm", "rope", "swiglu", "layer_norm", "bias_relu", "embed_tokens", "lora_linear", "quantize_rows")

    # The ops and the model in one stage: every worker imports everything once. What takes longest comes last.
    tested = ("gpu", "graphs", "graphs_gpu", "norm_pool", "varlen_attention", *layers, "precision", "twins")
    losses = ("distillation_loss", "token_kl_loss", "stack_projection")
    tested += (*losses, *(f"{name}_torch" for name in losses))
    profile = (python, "benchmarks/profile_model.py", "--size", size, "--out", str(out / "profile.json"))

    def mode(name: str, budget_seconds: float, options: str) -> Stage:
        return Stage(name, budget_seconds, (throughput(out, name, size, *options.split()),), result=True)

    def encode(name: str, budget_seconds: float, workload: str, peers: str, texts: int, rounds: int) -> Stage:
        counts = f"--sentences {texts} --rounds {rounds}"
        return mode(name, budget_seconds, f"--workload {workload} --peers {peers} {counts}")

    def ops(name: str, budget_seconds: float, *modules: str, chosen: str = "not compiled") -> Stage:
        """Op benchmarks (all, if none is named) that write one result, at the end: a stage cut off loses all of it."""
        files = [f"benchmarks/bench_{module}.py" for module in modules] or ["benchmarks"]
        command = (python, "-m", "pytest", "-q", *files, "--benchmark-only", "-k", chosen)
        return Stage(name, budget_seconds, ((*command, f"--benchmark-json={out / f'{name}.json'}"),), result=True)

    return [
        Stage(
            "build",
            90,
            ((python, "setup.py", "build_ext", "--inplace"), (python, "-m", "mtllm_fast.cli", "env")),
            needs_gpu=False,
            environment=(("MTLLM_FAST_CUDA", "1"),),
        ),
        Stage("tests", 180, (pytest_command(*tested),)),
        mode("train", 180, f"--mode train --workload documents --sentences 44 --rounds 3 --peers {train}"),
        encode("full", 90, "full", peers, texts=64, rounds=3),
        encode("sentences", 90, "sentences", peers, texts=1024, rounds=3),
        mode("latency", 60, "--mode latency --peers reference,ours,ours-fp8"),
        Stage("profile", 90, (profile,), result=True),
        mode("sweep", 60, "--sweep 1,8,64 --sentences 256 --rounds 3 --peers reference-sorted,ours,ours-fp8"),
        ops("ops-layers", 90, *layers),
        ops("ops-stack", 100, "stack_projection"),
        ops("ops-pool", 40, "norm_pool"),
        ops("ops-loss", 60, "distillation_loss"),
        ops("ops-token-kl", 40, "token_kl_loss"),
        ops("ops-attention", 40, "varlen_attention"),
        Stage(
            "sanitizer",
            90,
            (
                sanitizer("memcheck", "--leak-check", "no"),
                sanitizer("racecheck", "--racecheck-report", "all"),
                sanitizer("initcheck"),
            ),
            # Freed and uninitialised memory must be visible to the tools, not pooled by torch's allocator.
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        ),
        encode("documents", 90, "documents", peers, texts=192, rounds=5),
        encode("translate", 90, "sentences", "ours,translate-test", texts=1024, rounds=3),
        # Compiling may take longer than all the rest, so it comes last.
        ops("ops-compiled", 120, chosen="compiled"),
        encode("compiled", 150, "sentences", f"{peers},compiled", texts=1024, rounds=3),
    ]


def gpu_memory() -> float:
    """GiB of the first GPU, 0 without one; asked in another process, so that this one holds no CUDA context."""
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 2**30 if done.returncode == 0 else 0.0


def size_for(memory: float) -> str:
    """The largest benchmark model whose weights and a batch of 16k tokens fit, with the translator beside it."""
    return "8b" if memory > 30 else "1b" if memory > 8 else "small"


def run_command(
    command: Sequence[str], environment: dict[str, str], log: Path, seconds: float
) -> tuple[str, int | None]:
    """Run one command with its output appended to ``log``; its whole process group is killed after ``seconds``.

    Returns:
        ``("passed", 0)``, ``("failed", code)``, or ``("timed out", None)``.
    """
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            # A group, not a session, of its own: whoever ends this program's session ends the command too.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return "failed", None
        try:
            code = process.wait(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            file.write(f"\nkilled after {seconds:.0f} s\n".encode())
            return "timed out", None
        finally:
            kill_group(process)
    return ("passed" if code == 0 else "failed"), code


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a command: a child that outlived it would hold the GPU during the next stage."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(stage: Stage, out: Path, seconds: float) -> dict[str, object]:
    """Run the stage's commands within ``seconds``, all together."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **dict(stage.environment),
    }
    start = time.monotonic()
    status, code = "passed", None
    for command in stage.commands:
        status, code = run_command(command, environment, out / stage.log, seconds - (time.monotonic() - start))
        if status != "passed":
            break
    return {"stage": stage.name, "status": status, "exit_code": code, "seconds": round(time.monotonic() - start, 1)}


def shorten(path: Path) -> None:
    """Cut the middle out of a file that grew beyond what is worth carrying home."""
    if path.exists() and path.stat().st_size > MAX_FILE_BYTES:
        half = MAX_FILE_BYTES // 2
        content = path.read_bytes()
        path.write_bytes(content[:half] + b"\n[... cut ...]\n" + content[-half:])


def run_suite(stages: Sequence[Stage], out: Path, gpu: bool, say: Callable[[str], None] = print) -> int:
    """Run the stages in order and return the exit code (see the module's docstring)."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + TOTAL_SECONDS
    summary = out / "summary.json"
    chosen = {stage.name for stage in stages}
    earlier = json.loads(summary.read_text())["stages"] if summary.exists() else []
    earlier = [result for result in earlier if result["stage"] not in chosen]
    results: list[dict[str, object]] = []
    for stage in stages:
        left = deadline - time.monotonic()
        if stage.needs_gpu and not gpu:
            result: dict[str, object] = {"stage": stage.name, "status": "no GPU"}
        elif left < 5:
            result = {"stage": stage.name, "status": "timed out", "seconds": 0.0}
        else:
            say(f"{stage.name}: at most {min(stage.budget_seconds, left):.0f} s")
            for name in stage.files:
                (out / name).unlink(missing_ok=True)  # an old result must not pass for this run's
            result = run_stage(stage, out, min(stage.budget_seconds, left))
            shorten(out / stage.log)
        result["files"] = [name for name in stage.files if "seconds" in result and (out / name).exists()]
        results.append(result)
        summary.write_text(json.dumps({"stages": [*earlier, *results]}, indent=2) + "\n")
    say(f"\n{'stage':<12}{'status':<12}{'seconds':>8}  files")
    for result in results:
        files = ", ".join(result["files"])  # type: ignore[arg-type]
        say(f"{result['stage']:<12}{result['status']:<12}{result.get('seconds', '-'):>8}  {files}")
    statuses = {result["status"] for result in results}
    if statuses & {"failed", "timed out"}:
        return 1
    return 3 if "no GPU" in statuses else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="default: gpu-results")
    parser.add_argument("--stages", metavar="A,B", help="only these, in the suite's order")
    parser.add_argument("--size", choices=("small", "1b", "8b"), help="of the throughput stages; default: what fits")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    memory = 0.0 if options.dry_run else gpu_memory()
    stages = all_stages(out, options.size or size_for(memory))
    if options.stages is not None:
        chosen = options.stages.split(",")
        known = [stage.name for stage in stages]
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(f"unknown stage {', '.join(unknown)}; choose from {', '.join(known)}")
        stages = [stage for stage in stages if stage.name in chosen]
    if options.dry_run:
        for stage in stages:
            print(f"{stage.name} (at most {stage.budget_seconds:.0f} s{', needs a GPU' if stage.needs_gpu else ''})")
            for command in stage.commands:
                print(f"    {' '.join((*(f'{k}={v}' for k, v in stage.environment), *command))}")
        print(f"at most {min(TOTAL_SECONDS, sum(stage.budget_seconds for stage in stages)):.0f} s in all")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the running command is ended
    return run_suite(stages, out, gpu=memory > 0)


if __name__ == "__main__":
    sys.exit(main())
