"""The CPU extension: its build, its levels of instruction sets, its threads, and what it cannot do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda_build import build, project  # noqa: F401 (a fixture)
from test_distillation_loss import KINDS, make_problem
from test_distillation_loss import check as check_loss
from test_distillation_loss import run as run_loss
from test_norm_pool import DTYPES, EPS
from test_norm_pool import check as check_pool
from test_norm_pool import run as run_pool
from test_rms_norm import check as check_norm
from test_rms_norm import ours as norm
from test_rms_norm import problem as norm_problem
from test_rms_norm import run as run_norm
from test_rope import check as check_rope
from test_rope import merged
from test_swiglu import check as check_swiglu
from test_swiglu import problem as swiglu_problem

from mtllm_fast import explain
from mtllm_fast.core import native_cpu
from mtllm_fast.core.errors import CpuKernelError, UnsupportedBackendError
from mtllm_fast.ops.norm_pool import norm_pool
from mtllm_fast.ops.varlen_attention import cpu as varlen_cpu
from mtllm_fast.ops.varlen_attention.reference import varlen_attention_reference
from mtllm_fast.testing.inputs import cu_seqlens_of, packed_states
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import assert_as_accurate

CPU = torch.device("cpu")
needs_extension = pytest.mark.skipif(native_cpu.why_not_built() is not None, reason=native_cpu.why_not_built() or "")


@pytest.fixture(params=native_cpu.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if native_cpu.why_not_built() or request.param not in native_cpu.levels():
        pytest.skip(f"no {request.param} here")
    monkeypatch.setattr(native_cpu, "level", lambda: native_cpu.LEVELS.index(request.param))
    return request.param


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_keeps_the_error_rule(level: str, dtype: torch.dtype) -> None:
    for width in (5, 41, 256):
        check_pool("cpu", CPU, dtype=dtype, width=width, lengths=(3, 0, 200, 1))
    for kind in KINDS:
        check_loss("cpu", make_problem(dtype=dtype, dead_tail=3), kind=kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_norms_rotates_and_gates_within_the_rule(level: str, dtype: torch.dtype) -> None:
    for width in (1, 9, 41, 256):
        check_norm("cpu", norm_problem(70, width, dtype=dtype))
    check_norm("cpu", norm_problem(3, 5, 48, dtype=dtype, residual=False))
    for hd in (2, 14, 80):
        check_rope(merged, "cpu", CPU, T=37, heads=(4, 2), hd=hd, dtype=dtype)
    for width in (3, 40, 1376):
        check_swiglu("cpu", swiglu_problem(5, width, merged=width == 40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 64), (3, 1, 48)])
def test_every_level_attends_within_the_rule(
    level: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    lengths = [1, 7, 0, 33, 128, 129, 2]
    tokens, scale = sum(lengths) + 3, head_dim**-0.5
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    cu_seqlens = cu_seqlens_of(tuple(lengths))
    with poisoned_memory():
        found = varlen_cpu.inference(q, k, v, cu_seqlens, scale)
    assert not found[sum(lengths) :].any()
    plain, truth = (
        varlen_attention_reference(*(t[: sum(lengths)].to(kind) for t in (q, k, v)), cu_seqlens, scale=scale)
        for kind in (dtype, torch.float64)
    )
    assert_as_accurate({"out": found[: sum(lengths)]}, {"out": plain}, {"out": truth})
    for bad in (float("nan"), float("inf")):
        for tensor in (q, k, v):
            broken = tensor.clone()
            broken[5, 0, 3] = bad  # of the second sentence
            parts = [broken if t is tensor else t for t in (q, k, v)]
            out = varlen_cpu.inference(*parts, cu_seqlens, scale)
            want = varlen_attention_reference(*(t[: sum(lengths)].float() for t in parts), cu_seqlens, scale=scale)
            assert torch.equal(out[: sum(lengths)].isfinite(), want.isfinite())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_level_converts_half_precision_as_torch_does(level: str, dtype: torch.dtype) -> None:
    """Every one of the 65536 bit patterns is read, and numbers between any two are rounded to nearest even."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    cu_seqlens = cu_seqlens_of((1,))
    for values in patterns.view(-1, 1024):
        read = norm_pool(values[None], torch.ones(1024), cu_seqlens, eps=1.0, backend="cpu")
        assert read.shape == (1, 1024)
    wide = patterns.float()
    between = torch.cat([wide, wide * (1 + 2**-9), wide * (1 + 2**-12), wide * 0.75, torch.tensor([65519.0, 65520.0])])
    module, kernel_level = native_cpu.extension(), native_cpu.level()
    written = torch.empty(1, len(between), dtype=dtype)
    states = module.states({torch.float16: 1, torch.bfloat16: 2}[dtype], written.data_ptr(), len(between), 0, 0.0)
    sentences = module.sentences(cu_seqlens.data_ptr(), 1, 1, len(between))
    scratch = torch.empty(module.scratch_rows * len(between))
    gradient = between.contiguous()
    arguments = (gradient.data_ptr(), None, written.data_ptr(), 0, 0, scratch.data_ptr(), 1)
    assert module.backward(kernel_level, states, sentences, 0, *arguments) == 0  # without a norm it copies and rounds
    assert torch.equal(written[0].nan_to_num(7.0), between.to(dtype).nan_to_num(7.0))
    assert torch.equal(written[0].isnan(), between.isnan())
    back = torch.empty(1, 2**16)
    source = module.states({torch.float16: 1, torch.bfloat16: 2}[dtype], patterns.data_ptr(), 2**16, 0, 0.0)
    one = module.sentences(cu_seqlens.data_ptr(), 1, 1, 2**16)
    assert module.pool(kernel_level, source, one, 0, back.data_ptr(), 0, 1) == 0  # the mean of one row is the row
    assert torch.equal(back[0].nan_to_num(7.0), wide.nan_to_num(7.0))


@needs_extension
def test_results_depend_on_no_number_of_threads(two_threads: None) -> None:
    hidden = packed_states((300, 0, 77, 1), 72, dead_tail=9)
    arguments = (hidden, torch.ones(72), cu_seqlens_of((300, 0, 77, 1)))
    problem = make_problem()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        pooled = run_pool(norm_pool, *arguments, eps=EPS, backend="cpu")
        normed = run_norm(norm, norm_problem(300, 72), backend="cpu")
        q, k, v = packed_states((300, 77), 4 * 32, dead_tail=9).unflatten(1, (4, 32)).split((2, 1, 1), 1)
        attended = varlen_cpu.inference(q, k, v, cu_seqlens_of((100, 200, 77)), 0.2)
        results.append([*pooled.values(), *run_loss(problem, "cpu").values(), *normed.values(), attended])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_and_stays_in_its_sentence(level: str, bad: float) -> None:
    for t in range(6):
        hidden = packed_states((6, 5), 40)
        hidden[t, 39] = bad
        found = run_pool(norm_pool, hidden, torch.ones(40), cu_seqlens_of((6, 5)), eps=EPS, backend="cpu")
        assert found["pooled"][0].isnan().any()
        assert found["grad of hidden_states"][t].isnan().any()
        assert found["pooled"][1].isfinite().all()
        assert found["grad of hidden_states"][6:].isfinite().all()


@needs_extension
def test_what_it_cannot_do_is_said() -> None:
    hidden, weight, cu_seqlens = torch.ones(3, 8), torch.ones(8), cu_seqlens_of((3,))
    assert explain("norm_pool", hidden, weight, cu_seqlens, eps=EPS).chosen == "cpu"
    with pytest.raises(UnsupportedBackendError, match=r"'cpu' .* the states are float64\. What would work: reference"):
        norm_pool(hidden.double(), weight, cu_seqlens, eps=EPS, backend="cpu")
    reasons = explain("norm_pool", *(tensor.to("meta") for tensor in (hidden, weight, cu_seqlens)), eps=EPS).why_not
    assert reasons["cpu"] == "the tensors are on meta"
    assert native_cpu.why_not_cpu(torch.ones(3, 0)) == "the states have no columns"


def test_a_build_without_it_serves_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cpu, "_load", lambda: (None, "the CPU extension was not built: MTLLM_FAST_CPU=0"))
    explanation = explain("norm_pool", torch.ones(3, 8), torch.ones(8), cu_seqlens_of((3,)), eps=EPS)
    assert explanation.chosen == "reference"
    assert explanation.why_not["cpu"] == "the CPU extension was not built: MTLLM_FAST_CPU=0"
    with pytest.raises(CpuKernelError, match="MTLLM_FAST_CPU=0"):
        native_cpu.extension()


@needs_extension
def test_a_level_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    native_cpu.level.cache_clear()
    monkeypatch.setenv("MTLLM_FAST_CPU_LEVEL", "baseline")
    assert native_cpu.level() == 0
    native_cpu.level.cache_clear()
    monkeypatch.setenv("MTLLM_FAST_CPU_LEVEL", "mmx")
    with pytest.raises(CpuKernelError, match=r"must be auto or one of baseline.*, got 'mmx'"):
        native_cpu.level()
    monkeypatch.undo()
    native_cpu.level.cache_clear()
    assert native_cpu.extension().pool(7, *_nothing(), 0, 0, 0, 1) == -1  # not an illegal instruction


def _nothing() -> tuple[object, object]:
    module = native_cpu.extension()
    return module.states(0, 0, 0, 0, 0.0), module.sentences(0, 0, 0, 0)


@needs_extension
def test_the_extension_is_on_its_own() -> None:
    """It imports without torch, exports one symbol, and shares torch's pool of threads."""
    path = native_cpu.extension().__file__
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cpu", {path!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    if shutil.which("nm"):
        symbols = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
        assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["PyInit__cpu"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MTLLM_FAST_CPU": "0"}, "MTLLM_FAST_CPU=0"),
        ({"CXX": "/nowhere/c++", "MTLLM_FAST_CPU": "auto"}, "no C++ compiler found (looked for /nowhere/c++)"),
    ],
)
def test_builds_without_a_compiler_and_says_so(
    project: Path,  # noqa: F811
    environment: dict[str, str],
    reason: str,
) -> None:
    done = build(project, MTLLM_FAST_CUDA="0", **environment)
    assert done.returncode == 0, done.stderr
    assert f"mtllm-fast: CPU extension left out: {reason}" in done.stderr
    (record,) = project.glob("build/**/_build_info.json")
    assert json.loads(record.read_text())["cpu_left_out_because"] == reason


def test_demanding_it_without_a_compiler_fails(project: Path) -> None:  # noqa: F811
    done = build(project, MTLLM_FAST_CUDA="0", MTLLM_FAST_CPU="1", CXX="/nowhere/c++")
    assert done.returncode != 0
    assert "MTLLM_FAST_CPU=1, but no C++ compiler found (looked for /nowhere/c++)" in done.stderr
