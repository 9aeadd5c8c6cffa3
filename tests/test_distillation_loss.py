"""``distillation_loss``: every backend against float64, its corners, and its contract with autograd and compile."""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast import distillation_loss
from mtllm_fast.testing.inputs import cu_seqlens_of, packed_states
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate

BACKENDS = ["reference", "cpu", "triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["mse", "smooth_l1", "cosine"]
LENGTHS, TEACHER_LENGTHS = (3, 0, 41, 1, 75, 2), (4, 2, 38, 1, 70, 0)
# Overlapping, repeated and empty spans, in no order, and tokens of no span.
SPANS = [[5, 6], [0], [6, 7, 8], [], [3], [100, 4], [9, 9], [44], [7], [119, 118, 117]]
TEACHER_SPANS = [[1], [0, 1], [6], [7], [], [90, 90, 2], [44], [45, 46], [6], [3]]
Bags = list[list[int]]


def csr(bags: Bags, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)
    return torch.tensor(functools.reduce(operator.iadd, bags, []), dtype=torch.int64).to(device), offsets.to(device)


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor | None
    teacher: Tensor
    teacher_weight: Tensor | None
    lengths: tuple[int, ...] = LENGTHS
    teacher_lengths: tuple[int, ...] = TEACHER_LENGTHS
    spans: tuple[Bags, Bags] | None = (SPANS, TEACHER_SPANS)
    vectors: bool = False

    def double(self) -> Problem:
        wide = [
            None if t is None else t.double() for t in (self.hidden, self.weight, self.teacher, self.teacher_weight)
        ]
        return replace(self, **dict(zip(("hidden", "weight", "teacher", "teacher_weight"), wide, strict=True)))

    def arguments(self) -> dict[str, Any]:
        """Of the op, all but ``hidden_states``, ``weight`` and options."""
        device = self.hidden.device
        kwargs: dict[str, Any] = {"cu_seqlens": cu_seqlens_of(self.lengths, device)}
        if self.spans is not None:
            kwargs["span_indices"], kwargs["span_offsets"] = csr(self.spans[0], device)
        if self.vectors:
            kwargs["teacher_pooled"] = torch.stack(bags(self.normed_teacher(), self.sentences(1)))
            if self.spans is not None:
                kwargs["teacher_spans"] = torch.stack(bags(self.normed_teacher(), self.spans[1]))
            return kwargs
        if self.spans is not None:
            kwargs["teacher_span_indices"], kwargs["teacher_span_offsets"] = csr(self.spans[1], device)
        teacher = {"states": self.teacher, "weight": self.teacher_weight}
        teacher |= {"cu_seqlens": cu_seqlens_of(self.teacher_lengths, device), "eps": 1e-6}
        return kwargs | {f"teacher_{name}": value for name, value in teacher.items()}

    def normed_teacher(self) -> Tensor:
        return normed(self.teacher, self.teacher_weight, 1e-6)

    def sentences(self, side: int) -> Bags:
        ends = cu_seqlens_of((self.lengths, self.teacher_lengths)[side]).tolist()
        return [list(range(i, j)) for i, j in itertools.pairwise(ends)]


def make_problem(
    *, width: int = 64, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", norm: bool = True,
    dead_tail: int = 0, row_stride: int | None = None, **changes: Any,
) -> Problem:  # fmt: skip
    lengths = changes.get("lengths", LENGTHS)
    teacher_lengths = changes.get("teacher_lengths", TEACHER_LENGTHS)
    options = {"dtype": dtype, "device": device, "row_stride": row_stride}
    gains = [(1 + torch.randn(width, generator=torch.Generator().manual_seed(i)) / 4).to(device, dtype) for i in (2, 3)]
    return Problem(
        packed_states(lengths, width, dead_tail=dead_tail, **options), gains[0] if norm else None,
        packed_states(teacher_lengths, width, seed=1, **options), gains[1] if norm else None, **changes,
    )  # fmt: skip


def normed(states: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return states
    wide = states if states.dtype == torch.float64 else states.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(states.dtype)


def bags(states: Tensor, indices: Bags) -> list[Tensor]:
    return [states[i].mean(0) if i else states.new_zeros(states.shape[1]) for i in indices]


def plain(hidden: Tensor, weight: Tensor | None, problem: Problem, **options: Any) -> dict[str, Tensor]:
    """Modules, loops and torch's own losses, in the dtype of the states."""
    student, teacher = normed(hidden, weight, 1e-5), problem.normed_teacher()
    terms, figures = [], {}
    for bag_lists in ((problem.sentences(0), problem.sentences(1)), problem.spans or ([], [])):
        pairs = [(i, j) for i, j in zip(*bag_lists, strict=True) if i and (j or problem.vectors)]
        if not pairs:
            terms.append(0 * student.sum())
            continue
        x, t = (
            torch.stack(bags(states, lists))
            for states, lists in zip((student, teacher), zip(*pairs, strict=True), strict=True)
        )
        if options["kind"] == "cosine":
            losses = 1 - F.cosine_similarity(x, t)
        elif options["kind"] == "mse":
            losses = F.mse_loss(x, t, reduction="none").mean(1)
        else:
            losses = F.smooth_l1_loss(x, t, beta=options["beta"], reduction="none").mean(1)
        terms.append(losses.mean() if options["reduction"] == "mean" else losses.sum())
        prefix = "" if len(terms) == 1 else "span_"
        figures[f"{prefix}cosine"] = F.cosine_similarity(x, t).mean()
        figures[f"{prefix}norm_difference"] = (x.norm(dim=1) - t.norm(dim=1)).mean()
        if not prefix:
            error = F.mse_loss(x, t)
            figures |= {
                "fvu": error / t.var(0, correction=0).mean(),
                "fvu_student": error / x.var(0, correction=0).mean(),
            }
    loss = options["sequence_weight"] * terms[0] + options["span_weight"] * terms[1]
    return {"loss": loss, "sequence_loss": terms[0], "span_loss": terms[1], **figures}


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    leaves = {"grad of hidden_states": hidden} | ({} if weight is None else {"grad of weight": weight})
    return dict(zip(leaves, torch.autograd.grad(2.5 * loss, list(leaves.values())), strict=True))


OPTIONS = {"sequence_weight": 0.3, "span_weight": 0.7, "kind": "mse", "beta": 0.8, "reduction": "mean"}


def run(problem: Problem, backend: str | None, **options: Any) -> dict[str, Tensor]:
    """Loss, figures and gradients: of the op, or (backend None) of the plain version."""
    options = OPTIONS | options
    hidden = problem.hidden.detach().requires_grad_()
    weight = None if problem.weight is None else problem.weight.detach().requires_grad_()
    if backend is None:
        out = plain(hidden, weight, problem, **options)
    else:
        found = distillation_loss(hidden, weight, **problem.arguments(), **options, backend=backend)
        out = found._asdict()
    return {name: value.detach() for name, value in out.items()} | gradients(out["loss"], hidden, weight)


def check(backend: str, problem: Problem, **options: Any) -> None:
    with poisoned_memory():
        fast = run(problem, backend, **options)
    tokens = sum(problem.lengths)
    tail = fast["grad of hidden_states"][tokens:]
    assert torch.equal(tail, torch.zeros_like(tail)), "tokens that belong to no sentence have a gradient"
    fast["grad of hidden_states"] = fast["grad of hidden_states"][:tokens]
    problem = replace(problem, hidden=problem.hidden[:tokens])
    same_dtype, truth = run(problem, None, **options), run(problem.double(), None, **options)
    names = [name for name in fast if name in truth]
    rounded = [name for name in names if fast[name].dtype != problem.hidden.dtype]  # ours are wide: kept to that rule
    rules = INTERPRETED_RULES if backend == "triton" and not problem.hidden.is_cuda else RULES
    half = problem.hidden.dtype in (torch.bfloat16, torch.float16)
    if half:
        for name in rounded:
            fast[name] = fast[name].to(problem.hidden.dtype)
    assert_as_accurate(*({name: values[name] for name in names} for values in (fast, same_dtype, truth)), rules)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("vectors", [False, True])
def test_against_float64(backend, kind, reduction, vectors, device):
    check(backend, make_problem(device=device, vectors=vectors), kind=kind, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(backend, kind, dtype, device):
    check(backend, make_problem(dtype=dtype, device=device), kind=kind)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_normed_already(backend, kind, device):
    check(backend, make_problem(norm=False, device=device), kind=kind)
    check(backend, replace(make_problem(device=device), teacher_weight=None), kind=kind)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("width", [41, 2000, 4096])
def test_widths(backend, width, device):
    check(backend, make_problem(width=width, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 1024, 2047, 2048, 4096, 5120, 8192, 16384])
def test_every_compiled_shape(backend, width, dtype, device):
    for kind in KINDS:
        check(backend, make_problem(width=width, dtype=dtype, device=device, dead_tail=5), kind=kind)
        check(backend, make_problem(width=width, dtype=dtype, device=device, row_stride=width + 1), kind=kind)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strided_rows_and_a_dead_tail(backend, device):
    check(backend, make_problem(row_stride=71, dead_tail=9, device=device))
    check(backend, make_problem(row_stride=72, dead_tail=70, dtype=torch.bfloat16, device=device), kind="cosine")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("vectors", [False, True])
def test_without_spans(backend, vectors, device):
    check(backend, make_problem(spans=None, vectors=vectors, device=device))
    check(backend, make_problem(spans=([], []), device=device))
    check(backend, make_problem(spans=([[], [1]], [[2], []]), device=device))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
@pytest.mark.parametrize("dead_tail", [0, 9])
def test_empty_batches(backend, lengths, dead_tail, device):
    problem = make_problem(
        lengths=lengths, teacher_lengths=lengths, spans=([], []), dead_tail=dead_tail, width=16, device=device
    )
    found = run(problem, backend)
    assert found["grad of hidden_states"].shape == (dead_tail, 16)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_zero_vectors_have_no_direction(backend, device):
    problem = make_problem(
        device=device, norm=False, lengths=(2, 3), teacher_lengths=(1, 2), spans=([[0], [3]], [[0], [1]])
    )
    problem.hidden[:2] = 0
    problem.teacher[1:] = 0
    found = run(problem, backend, kind="cosine")
    assert found["loss"] == 1
    assert not found["grad of hidden_states"].any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_state_that_is_not_finite_is_seen(backend, device):
    for kind in KINDS:
        problem = make_problem(device=device)
        problem.hidden[7, 3] = float("nan")
        found = run(problem, backend, kind=kind)
        assert found["loss"].isnan()
        assert found["grad of hidden_states"][7].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_not_finite_is_seen_in_the_gradient(backend, kind, device):
    problem = make_problem(
        device=device, norm=False, lengths=(2, 3), teacher_lengths=(2, 2), spans=([[0], [3]], [[0], [2]])
    )
    problem.teacher[2, 3] = float("nan")
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        found = run(problem, backend, kind=kind, sequence_weight=weights[0], span_weight=weights[1])
        assert found["loss"].isnan()
        assert found["grad of hidden_states"][3].isnan().any()
        assert found["grad of hidden_states"][:2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_results_repeat(backend, device):
    problem = make_problem(device=device)
    first, second = run(problem, backend), run(problem, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@st.composite
def problems(draw) -> Problem:
    """Any lengths and any bags of tokens on both sides."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4))
    student, teacher = (tuple(side) for side in zip(*lengths, strict=True))

    def some(tokens: int) -> Any:
        return st.lists(st.integers(0, tokens - 1), max_size=4) if tokens else st.just([])

    pairs = draw(st.lists(st.tuples(some(sum(student)), some(sum(teacher))), max_size=6))
    spans = ([p[0] for p in pairs], [p[1] for p in pairs])
    return make_problem(lengths=student, teacher_lengths=teacher, spans=spans, width=8).double()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), st.sampled_from(KINDS), st.sampled_from(["mean", "sum"]))
def test_any_spans(problem, kind, reduction):
    if not sum(problem.lengths):
        return
    found, truth = (run(problem, b, kind=kind, reduction=reduction) for b in ("reference", None))
    for name in ("loss", "grad of hidden_states"):
        assert torch.allclose(found[name], truth[name], rtol=1e-9, atol=1e-12), name
