"""``token_kl_loss`` against whole logits in float64, its corners, its memory, and its contract with autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mtllm_fast.ops.token_kl_loss import reference, token_kl_loss
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIVERGENCES = ["kl", "jsd"]


def plain(
    hidden: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "kl",
    beta: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    """Whole logits in the dtype of the states, their softmax and all the rest at least in float32, by autograd."""
    wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    head = (weight if teacher_weight is None else teacher_weight).detach()
    log_q = F.log_softmax((hidden @ weight.t()).to(wide) / temperature, dim=-1)
    log_p = F.log_softmax((teacher.detach() @ head.t()).to(wide) / temperature, dim=-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="sum", log_target=True)

    if divergence == "kl":
        total = kl(log_p, log_q)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        total = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return total / max(hidden.shape[0], 1) if reduction == "mean" else total


def problem(
    rows: int = 37, vocabulary: int = 203, width: int = 48, *, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", scale: float = 2.0, teacher_width: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """A student near its teacher, logits of this standard deviation; with ``teacher_width`` a teacher of its own."""
    generator = torch.Generator().manual_seed(rows)
    random = [torch.randn(size, width, generator=generator) for size in (rows, rows, vocabulary)]
    tensors = {"hidden": random[0], "teacher": random[0] + random[1] / 2, "weight": random[2] * scale / width**0.5}
    if teacher_width is not None:
        tensors["teacher"] = torch.randn(rows, teacher_width, generator=generator)
        head = torch.randn(vocabulary, teacher_width, generator=generator)
        tensors["teacher_weight"] = head * scale / teacher_width**0.5
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def run(function, hidden: Tensor, teacher: Tensor, weight: Tensor, **options: object) -> dict[str, Tensor]:
    """Loss and gradients of three times ``function(hidden, teacher, weight, ...)``."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, teacher, weight, **options)
    grads = torch.autograd.grad(3 * loss, (hidden, weight))
    return {"loss": loss.detach(), "grad of hidden_states": grads[0], "grad of weight": grads[1]}


def check(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Loss and gradients keep the error rule, with fresh memory full of NaN."""
    with poisoned_memory():
        ours = run(token_kl_loss, **inputs, **options)
    truth = run(plain, **{name: tensor.double() for name, tensor in inputs.items()}, **options)
    assert ours["loss"].dtype == torch.promote_types(torch.float32, inputs["hidden"].dtype)
    assert_as_accurate(ours, run(plain, **inputs, **options), truth)
    return ours


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_against_float64(divergence: str, dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    inputs = problem(dtype=dtype, device=device)
    check(inputs, divergence=divergence, reduction=reduction)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_half_precision(
    divergence: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU that has instructions for them, whether this one does or not; the GPU has its own way."""
    monkeypatch.setattr(reference.onednn, "product_dtype", lambda dtype: dtype)
    monkeypatch.setattr(reference, "COLUMNS", 50)
    check(problem(dtype=dtype, device=device), divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_temperature_and_beta(divergence: str, temperature: float, beta: float, device: torch.device) -> None:
    check(problem(device=device), divergence=divergence, temperature=temperature, beta=beta)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_of_its_own(divergence: str, dtype: torch.dtype, device: torch.device) -> None:
    check(problem(dtype=dtype, device=device, teacher_width=33), divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 60), (40, 1), (5, 7), (37, 203), (16, 100), (64, 16)])
def test_chunks(
    divergence: str, rows: int, columns: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "ROWS", rows)
    monkeypatch.setattr(reference, "COLUMNS", columns)
    check(problem(device=device), divergence=divergence, temperature=2.0)
    check(problem(device=device, dtype=torch.bfloat16, teacher_width=33), divergence=divergence)


def test_many_chunks_as_they_are(device: torch.device) -> None:
    check(problem(2100, 2500, 16, device=device), divergence="kl")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(divergence: str, reduction: str, rows: int, device: torch.device) -> None:
    found = check(problem(rows, device=device), divergence=divergence, reduction=reduction)
    if rows == 0:
        assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in found.values())
        assert [list(tensor.shape) for tensor in found.values()] == [[], [0, 48], [203, 48]]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("columns", [16, 1024])
@pytest.mark.parametrize("scale", [60.0, 1e4, 1e8])
def test_extreme_logits(
    divergence: str, columns: int, scale: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probabilities underflow on either side, by far; in float64 so that the logits themselves are exact enough."""
    monkeypatch.setattr(reference, "COLUMNS", columns)
    double = problem(dtype=torch.float64, device=device, scale=scale)
    found, expected = (run(function, **double, divergence=divergence) for function in (token_kl_loss, plain))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-12)
    single = run(token_kl_loss, **{name: tensor.float() for name, tensor in double.items()}, divergence=divergence)
    assert all(tensor.isfinite().all() for tensor in single.values())


def test_disjoint_distributions_are_log_2_apart(device: torch.device) -> None:
    states = torch.tensor([[1e5, 0.0]], device=device, requires_grad=True)
    head = torch.eye(2, device=device)
    loss = token_kl_loss(states, states.flip(1), head, divergence="jsd")
    torch.testing.assert_close(loss.item(), math.log(2))
    assert torch.equal(torch.autograd.grad(loss, states)[0], torch.zeros_like(states))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_its_teacher(divergence: str, device: torch.device) -> None:
    inputs = problem(device=device)
    found = run(token_kl_loss, inputs["hidden"], inputs["hidden"], inputs["weight"], divergence=divergence)
    assert abs(found["loss"]) < 1e-6
    assert found["grad of hidden_states"].abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_does_not_underflow(divergence: str, device: torch.device) -> None:
    """Thousands of rows make the mean's gradients so small that fp16 holds few of their bits; a loss scale helps."""
    inputs = problem(4000, 64, 16, dtype=torch.float16, device=device)
    check(inputs, divergence=divergence, reduction="sum")
    scaled = run(lambda *tensors, **options: 2.0**12 * token_kl_loss(*tensors, **options), **inputs)
    truth = run(plain, **{name: tensor.double() for name, tensor in inputs.items()})
    grad, true = scaled["grad of hidden_states"].double() / 2**12, truth["grad of hidden_states"]
    assert (grad - true).norm() / true.norm() < 2e-3


def test_strided_inputs(device: torch.device) -> None:
    inputs = problem(device=device)
    expected = run(token_kl_loss, **inputs)
    columns = {name: tensor.t().contiguous().t() for name, tensor in inputs.items()}
    rows = {name: F.pad(tensor, (0, 5), value=math.nan)[:, :48] for name, tensor in inputs.items()}
    for strided in (columns, rows):
        assert not strided["weight"].is_contiguous()
        for name, tensor in run(token_kl_loss, **strided).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_a_head_of_another_dtype(weight_dtype: torch.dtype, device: torch.device) -> None:
    inputs = problem(device=device)
    states = {"hidden": inputs["hidden"].bfloat16(), "teacher": inputs["teacher"].bfloat16()}
    weight = inputs["weight"].bfloat16().to(weight_dtype)
    found = run(token_kl_loss, **states, weight=weight)
    expected = run(token_kl_loss, **states, weight=weight.bfloat16())
    assert found["grad of weight"].dtype == weight_dtype
    torch.testing.assert_close(found["loss"], expected["loss"])
    wide = token_kl_loss(states["hidden"], inputs["teacher"], weight)  # a teacher of another dtype than its student
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, found["loss"], rtol=1e-2, atol=0)


def test_only_what_needs_a_gradient_gets_one(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(device=device, teacher_width=33)
    both = run(token_kl_loss, **inputs)
    shapes = []
    product = reference._product
    monkeypatch.setattr(reference, "_product", lambda *a: shapes.append(product(*a).shape) or product(*a))
    for trained, other, name in (("hidden", "weight", "hidden_states"), ("weight", "hidden", "weight")):
        live = {**inputs, trained: inputs[trained].detach().requires_grad_()}
        states = (live["hidden"], live["teacher"], live["weight"])
        loss = token_kl_loss(*states, teacher_weight=live["teacher_weight"])
        shapes.clear()
        grad = torch.autograd.grad(3 * loss, live[trained])[0]
        assert torch.equal(grad, both[f"grad of {name}"])
        assert len(shapes) == 3, "two products for the logits and one for the gradient"
        assert inputs[other].shape not in shapes
    shapes.clear()
    assert not token_kl_loss(inputs["hidden"], inputs["hidden"], inputs["weight"]).requires_grad
    assert len(shapes) == 2


@pytest.mark.parametrize("watched", [False, True])
def test_the_teacher_never_gets_a_gradient(watched: bool) -> None:
    tensors = problem(teacher_width=33)
    *states, teacher_weight = (tensor.requires_grad_() for tensor in tensors.values())
    with FlopCounterMode(display=False) if watched else torch.enable_grad():
        token_kl_loss(*states, teacher_weight=teacher_weight).backward()
        frozen = token_kl_loss(states[0].detach(), states[1], states[2].detach(), teacher_weight=teacher_weight)
    assert [tensor.grad is not None for tensor in (*states, teacher_weight)] == [True, False, True, False]
    assert not frozen.requires_grad


class _Allocations(TorchDispatchMode):
    """The largest tensor that an op makes, and the most bytes of such tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, leaf.numel())
        self.most = max(self.most, sum(nbytes for _, nbytes in self.alive.values()))
        return out


@contextmanager
def allocations() -> Iterator[_Allocations]:
    with _Allocations() as mode:
        yield mode


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_never_exist_whole(divergence: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary, width, chunk = 96, 1000, 8, (32, 50)
    monkeypatch.setattr(reference, "ROWS", chunk[0])
    monkeypatch.setattr(reference, "COLUMNS", chunk[1])
    inputs = problem(rows, vocabulary, width, device=device)
    arguments = (inputs["hidden"], inputs["teacher"], inputs["weight"], None, 2.0, divergence, 0.5)
    with allocations() as forward:
        _, statistics = reference.forward(*arguments)
    with allocations() as backward:
        reference.backward(torch.ones((), device=device), statistics, *arguments, True, True)
    with allocations() as eager:
        run(plain, **inputs)
    assert eager.largest == rows * vocabulary, "the test sees what eager torch allocates"
    per_chunk_of_each_row = 2 * rows * vocabulary // chunk[1]
    assert forward.largest <= max(math.prod(chunk), per_chunk_of_each_row)
    assert backward.largest == vocabulary * width  # the gradient of the head
    tiles = 5 * 4 * math.prod(chunk)
    small = 4 * (6 * per_chunk_of_each_row + 20 * rows + 4 * chunk[1] * width)
    assert forward.most <= tiles + small
    assert backward.most <= tiles + small + inputs["weight"].nbytes + 2 * inputs["hidden"].nbytes
    assert forward.most < eager.most / 5
