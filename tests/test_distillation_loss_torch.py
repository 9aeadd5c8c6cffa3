"""``distillation_loss`` as torch sees it: registered, differentiated, compiled, autocast; and its bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_distillation_loss import BACKENDS, KINDS, LENGTHS, OPTIONS, SPANS, Problem, csr, make_problem, normed, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from mtllm_fast import distillation_loss, explain
from mtllm_fast.bench.counting import peak_bytes
from mtllm_fast.ops.distillation_loss import schema
from mtllm_fast.testing.inputs import cu_seqlens_of


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    problem = make_problem(
        width=5, lengths=(3, 0, 4), teacher_lengths=(2, 1, 5), spans=([[0, 1], [1], [6, 4]], [[0], [7, 2], [1]])
    )
    problem = problem.double()
    leaves = (problem.hidden.requires_grad_(), problem.weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: distillation_loss(h, w, **problem.arguments(), **OPTIONS | {"kind": kind}).loss, leaves
    )


def test_second_gradient_is_refused():
    problem = make_problem()
    hidden = problem.hidden.requires_grad_()
    loss = distillation_loss(hidden, problem.weight, **problem.arguments()).loss
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def op_arguments(problem: Problem) -> tuple[Any, ...]:
    given_ = problem.arguments() | {"hidden_states": problem.hidden, "weight": problem.weight}
    tensors = tuple(given_.get(name) for name in schema.Tensors._fields)
    return (*tensors, 1e-5, 1e-6, *OPTIONS.values())


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_opcheck(vectors, grads, device):
    problem = make_problem(device=device, vectors=vectors)
    problem.hidden.requires_grad_(grads[0])
    problem.weight.requires_grad_(grads[1])
    torch.library.opcheck(schema.forward_op, (*op_arguments(problem), "auto"))
    pooled = torch.randn(len(LENGTHS), 64, device=device)
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in op_arguments(problem)]
    scalars = (torch.tensor(2.0, device=device), pooled, torch.tensor(0.1, device=device))
    torch.library.opcheck(schema.backward_op, (*scalars, *arguments, True, "auto"))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_compiles_once_for_all_batches(backend, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def loss(hidden: Tensor, weight: Tensor, arguments: dict[str, Any]) -> Tensor:
        return 2 * distillation_loss(hidden, weight, **arguments, backend=backend).loss

    frames = []  # no two sizes of the first batch are equal: torch would take them for one
    for lengths, spans in (
        ((3, 4, 2, 5), SPANS[:3]),
        ((5, 0, 9), SPANS[:4]),
        ((2, 3, 4), SPANS[:3]),
        ((1, 30), SPANS[:5]),
    ):
        problem = make_problem(lengths=lengths, teacher_lengths=lengths, spans=(spans, spans), device=device, width=16)
        results = []
        for function in (loss, loss._torchdynamo_orig_callable):
            hidden, weight = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
            value = function(hidden, weight, problem.arguments())
            results.append((value.detach(), *torch.autograd.grad(value, (hidden, weight))))
        assert all(map(torch.equal, *results))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4, "another batch must not recompile"


def test_autocast_changes_nothing(device):
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(dtype=dtype, device=device)
        expected = run(problem, "auto")
        with torch.autocast(device.type, torch.bfloat16):
            found = run(problem, "auto")
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_memory_is_a_fraction_of_eagers():
    """At T=4096, D=1024; the benchmark counts at the size of a real batch."""
    lengths = (512,) * 8
    spans = [[i] for i in range(0, 4096, 2)]
    problem = make_problem(width=1024, lengths=lengths, teacher_lengths=lengths, spans=(spans, spans))
    arguments, teacher = problem.arguments(), problem.normed_teacher()
    indices, offsets = csr(spans)
    hidden = problem.hidden.requires_grad_()

    def eager() -> Any:
        states = normed(hidden, problem.weight, 1e-5)
        pooled = [s.unflatten(0, (8, 512)).mean(1) for s in (states, teacher)]
        embedded = [F.embedding_bag(indices, s, offsets[:-1], mode="mean") for s in (states, teacher)]
        return torch.autograd.grad(F.mse_loss(*pooled) + F.mse_loss(*embedded), hidden)

    def ours() -> Any:
        return torch.autograd.grad(distillation_loss(hidden, problem.weight, **arguments).loss, hidden)

    ours(), eager()
    extra = [peak_bytes(call) - hidden.nbytes for call in (ours, eager)]
    assert extra[0] < 0.25 * extra[1]


def test_whoever_watches_sees_the_op():
    problem = make_problem(device="meta")
    assert distillation_loss(problem.hidden, problem.weight, **problem.arguments()).loss.is_meta
    chosen = explain("distillation_loss", make_problem().hidden.double(), None, cu_seqlens_of((1,)))
    assert chosen.chosen == "reference"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(8)}, ValueError, r"weight must be \[64\], got \[8\]"),
        ({"kind": "l2"}, ValueError, "kind must be one of 'mse', 'smooth_l1', 'cosine', got 'l2'"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
        ({"beta": 0.0}, ValueError, "beta must be above 0, got 0.0"),
        ({"teacher_states": None}, ValueError, "exactly one of teacher_states and teacher_pooled"),
        ({"teacher_pooled": torch.ones(6, 64)}, ValueError, "exactly one of teacher_states and teacher_pooled"),
        ({"teacher_spans": torch.ones(10, 64)}, ValueError, "teacher_spans goes with teacher_pooled"),
        ({"teacher_cu_seqlens": None}, ValueError, "teacher_states needs teacher_cu_seqlens"),
        ({"teacher_cu_seqlens": cu_seqlens_of((1, 2))}, ValueError, r"teacher_cu_seqlens must be \[7\], got \[3\]"),
        ({"span_offsets": None}, ValueError, "came without span_offsets"),
        ({"span_indices": csr(SPANS)[0].int()}, TypeError, "span_indices must be int64, got int32"),
        ({"teacher_span_offsets": csr(SPANS[1:])[1]}, ValueError, r"teacher_span_offsets must be \[11\], got \[10\]"),
        ({"span_indices": torch.tensor([500])}, ValueError, "span_indices holds 500; the sentences have 122"),
        ({"teacher_weight": torch.ones(64, dtype=torch.int32)}, TypeError, "teacher_weight must be float32"),
        ({"cu_seqlens": cu_seqlens_of(LENGTHS).to("meta")}, ValueError, "must be on"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(changes, error, message):
    problem = make_problem()
    arguments = {"hidden_states": problem.hidden, "weight": problem.weight, **problem.arguments(), **changes}
    with pytest.raises(error, match=f"distillation_loss: .*{message}"):
        distillation_loss(**arguments)
