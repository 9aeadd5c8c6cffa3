"""``layer_norm``: every backend against float64, its corners, and its contract with autograd, compile and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.layer_norm import layer_norm, schema
from mtllm_fast.testing.inputs import packed_states
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate

EPS = 1e-5
BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None) -> tuple[Tensor, ...]:
    """What the modules of a layer make of it, in the dtype of ``hidden``."""
    summed = hidden if residual is None else hidden + residual
    normed = F.layer_norm(summed, weight.shape, weight.to(hidden.dtype), bias.to(hidden.dtype), eps)
    return (normed,) if residual is None else (normed, summed)


def fast(*arguments: Tensor, **options: object) -> tuple[Tensor, ...]:
    outputs = layer_norm(*arguments, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run(function, tensors: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Outputs and gradients of all ``tensors`` for fixed random gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    hidden, weight, bias, residual = (leaves.get(name) for name in ("hidden_states", "weight", "bias", "residual"))
    outputs = function(hidden, weight, bias, residual=residual, **options)
    generator = torch.Generator().manual_seed(1)
    grads_out = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    grads = torch.autograd.grad(outputs, [*leaves.values()], grads_out)
    found = dict(zip(("normed", "summed"), outputs, strict=False))
    return {**found, **{f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def inputs(
    tokens: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    with_residual: bool = True,
    row_stride: int | None = None,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    options = {"dtype": dtype, "device": device, "row_stride": row_stride}
    tensors = {
        "hidden_states": packed_states((tokens,), width, **options),
        "weight": (1 + torch.randn(width, generator=generator) / 4).to(device, parameter_dtype or dtype),
        "bias": torch.randn(width, generator=generator).to(device, parameter_dtype or dtype),
    }
    if with_residual:
        tensors["residual"] = packed_states((tokens,), width, seed=3, **options)
    return tensors


def check(backend: str, device: torch.device, tokens: int, width: int, *, eps: float = EPS, **shape: object) -> None:
    """Outputs and gradients of one backend keep the error rule, with fresh memory and unused input full of NaN."""
    tensors = inputs(tokens, width, device=device, **shape)
    with poisoned_memory():
        found = run(fast, tensors, eps=eps, backend=backend)
    same_dtype = run(plain, tensors, eps=eps)
    truth = run(plain, {name: tensor.double() for name, tensor in tensors.items()}, eps=eps)
    interpreted = backend == "triton" and device.type == "cpu"
    assert_as_accurate(found, same_dtype, truth, INTERPRETED_RULES if interpreted else RULES)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend: str, with_residual: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, 70, 128, dtype=dtype, with_residual=with_residual)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("width", [2, 41, 96, 768, 2048, 8192])
def test_widths(backend: str, width: int, device: torch.device) -> None:
    # At width 2 every normed value is near one and the gradient is a tiny difference, unless eps is large.
    check(backend, device, 5, width, eps=0.5 if width == 2 else EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 768, 1024, 1025, 2048, 4096, 8192])
def test_every_compiled_shape(backend: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, 3001, width, dtype=dtype)
    check(backend, device, 7, width, dtype=dtype, row_stride=width + 1, with_residual=False)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strided_rows(backend: str, device: torch.device) -> None:
    check(backend, device, 9, 64, row_stride=67)
    check(backend, device, 9, 64, row_stride=72, dtype=torch.bfloat16)
    check(backend, device, 9, 64, row_stride=64 * 3, with_residual=False)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strided_columns(backend: str, device: torch.device) -> None:
    tensors = inputs(8, 16, device=device)
    expected = fast(**tensors, eps=EPS, backend=backend)
    transposed = {name: tensors[name].t().contiguous().t() for name in ("hidden_states", "residual")}
    assert transposed["residual"].stride(1) != 1
    found = fast(**{**tensors, **transposed}, eps=EPS, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("with_residual", [False, True])
def test_no_tokens(backend: str, with_residual: bool, device: torch.device) -> None:
    with poisoned_memory():
        result = run(fast, inputs(0, 16, device=device, with_residual=with_residual), eps=EPS, backend=backend)
    assert all(torch.equal(result[f"grad of {name}"], torch.zeros(16, device=device)) for name in ("weight", "bias"))
    assert all(
        tensor.shape == (0, 16) for name, tensor in result.items() if name not in ("grad of weight", "grad of bias")
    )


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variance_is_taken_about_the_mean(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """E[x²] − E[x]² of these rows has no correct digit in float32."""
    hidden = 1000 + torch.randint(-4, 5, (6, 96), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ones, zeros = torch.ones(96, device=device, dtype=dtype), torch.zeros(96, device=device, dtype=dtype)
    found = layer_norm(hidden, ones, zeros, eps=EPS, backend=backend)
    truth = F.layer_norm(hidden.double(), (96,), eps=EPS)
    bound = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (found.double() - truth).abs().max() < bound


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_rows_that_are_all_partial_sums(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows to a program and several programs; the last one has fewer rows."""
    if backend == "triton":
        from mtllm_fast.ops.layer_norm import triton_backend

        monkeypatch.setattr(triton_backend, "PARTIALS", 3)
        monkeypatch.setattr(triton_backend, "TILE", 1024)
    check(backend, device, 301, 41)
    check(backend, device, 37, 512, dtype=torch.float16, with_residual=False)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float16])
def test_parameters_of_another_dtype(backend: str, parameter_dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, 20, 64, dtype=torch.bfloat16, parameter_dtype=parameter_dtype)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_sum_bias(backend: str, dtype: torch.dtype, with_residual: bool, device: torch.device) -> None:
    """It is added to the sum alone: what is normed does not change."""
    tensors = inputs(12, 64, dtype=dtype, device=device, with_residual=with_residual)
    sum_bias = torch.randn(64, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    with torch.no_grad(), poisoned_memory():
        normed, summed = layer_norm(**tensors, sum_bias=sum_bias, eps=EPS, backend=backend)
    without = fast(**tensors, eps=EPS, backend=backend)[0]
    assert torch.equal(normed, without)
    parts = [tensors[name] for name in ("hidden_states", "residual") if name in tensors]
    plain_sum, truth = sum(parts) + sum_bias, sum(part.double() for part in parts) + sum_bias.double()
    rules = INTERPRETED_RULES if backend == "triton" and device.type == "cpu" else RULES
    assert_as_accurate({"summed": summed}, {"summed": plain_sum}, {"summed": truth}, rules)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_that_of_the_returned_sum(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = inputs(12, 64, dtype=dtype, device=device)
    normed, summed = layer_norm(**tensors, eps=EPS, backend=backend)
    assert torch.equal(layer_norm(summed, tensors["weight"], tensors["bias"], eps=EPS, backend=backend), normed)


def test_sum_bias_refuses_gradients() -> None:
    tensors = inputs(3, 16)
    trained = {**tensors, "hidden_states": tensors["hidden_states"].requires_grad_()}
    with pytest.raises(ValueError, match=r"sum_bias is for inference.*torch\.no_grad"):
        layer_norm(**trained, sum_bias=torch.ones(16), eps=EPS)
    with pytest.raises(ValueError, match="sum_bias is for inference"):
        layer_norm(**inputs(3, 16), sum_bias=torch.ones(16, requires_grad=True), eps=EPS)
    with pytest.raises(RuntimeError, match="no gradient with sum_bias"):
        schema.forward_op(*trained.values(), torch.ones(16), EPS, True, "auto")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_stays_in_its_row(backend: str, device: torch.device) -> None:
    tensors = inputs(9, 41, device=device)
    tensors["residual"][4, 7] = float("nan")
    result = run(fast, tensors, eps=EPS, backend=backend)
    for name in ("normed", "grad of hidden_states", "grad of residual"):
        assert result[name][4].isnan().all()
        assert result[name][[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    assert result["summed"].isnan().sum() == 1
    assert result["grad of weight"].isnan().all()
    assert result["grad of bias"].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_only_what_needs_a_gradient_gets_one(backend: str, device: torch.device) -> None:
    tensors = inputs(11, 16, device=device)
    expected = run(fast, tensors, eps=EPS, backend=backend)
    for wanted in tensors:
        leaf = tensors[wanted].detach().requires_grad_()
        outputs = fast(**{**tensors, wanted: leaf}, eps=EPS, backend=backend)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        if wanted in ("weight", "bias"):  # the sum does not depend on them
            outputs, grads = outputs[:1], grads[:1]
        found = torch.autograd.grad(outputs, leaf, grads)[0]
        assert torch.equal(found, expected[f"grad of {wanted}"])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_either_output_alone_may_be_used(backend: str, device: torch.device) -> None:
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in inputs(5, 16, device=device).items()}
    normed, summed = layer_norm(**tensors, eps=EPS, backend=backend)
    grads = torch.autograd.grad(summed.sum(), [*tensors.values()], retain_graph=True, allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(summed))
    assert torch.equal(grads[3], torch.ones_like(summed))
    assert grads[1] is grads[2] is None
    (grad,) = torch.autograd.grad(normed.sum(), tensors["bias"])
    assert torch.equal(grad, torch.full_like(grad, 5))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_results_repeat(backend: str, device: torch.device) -> None:
    tensors = inputs(70, 64, device=device)
    first, second = (run(fast, tensors, eps=EPS, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = fast(*(tensors[name] for name in ("hidden_states", "weight", "bias")), eps=EPS, backend=backend)[0]
    one = layer_norm(tensors["hidden_states"][5:6], tensors["weight"], tensors["bias"], eps=EPS, backend=backend)
    assert torch.equal(one[0], alone[5]), "a row must not depend on its neighbours"


@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(with_residual: bool) -> None:
    tensors = inputs(4, 5, dtype=torch.float64, with_residual=with_residual)
    names = [*tensors]

    def norm(*leaves: Tensor) -> tuple[Tensor, ...]:
        return fast(**dict(zip(names, leaves, strict=True)), eps=EPS)

    assert torch.autograd.gradcheck(norm, [tensor.requires_grad_() for tensor in tensors.values()])


def test_second_gradient_is_refused() -> None:
    tensors = inputs(3, 5, with_residual=False)
    leaf = tensors["hidden_states"].requires_grad_()
    (grad,) = torch.autograd.grad(layer_norm(**tensors, eps=EPS).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("grads", "with_residual"), [((True, True), True), ((True, False), False), ((False, True), True)], ids=str
)
def test_opcheck(grads: tuple[bool, bool], with_residual: bool, device: torch.device) -> None:
    tensors = inputs(7, 16, device=device, with_residual=with_residual)
    tensors["hidden_states"].requires_grad_(grads[0])
    tensors["weight"].requires_grad_(grads[1])
    residual = tensors.get("residual")
    three = [tensors[name] for name in ("hidden_states", "weight", "bias")]
    torch.library.opcheck(schema.forward_op, (*three, residual, None, EPS, any(grads), "auto"))
    states, weight, _ = (tensor.detach() for tensor in three)
    statistics = torch.randn(2, 7, device=device)
    backward = (torch.randn_like(states), residual, states, *statistics.unbind(), weight, *grads, "auto")
    torch.library.opcheck(schema.backward_op, backward)


def test_opcheck_with_sum_bias(device: torch.device) -> None:
    tensors = inputs(7, 16, device=device)
    arguments = (*tensors.values(), torch.ones(16, device=device), EPS, False, "auto")
    torch.library.opcheck(schema.forward_op, arguments)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_compiles_once_for_all_batches(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def doubled(*arguments: Tensor, **options: object) -> tuple[Tensor, ...]:
        return tuple(2 * output for output in fast(*arguments, eps=EPS, backend=backend, **options))

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for tokens in (7, 14, 2, 301):
        tensors = inputs(tokens, 16, device=device)
        found, expected = run(compiled, tensors), run(doubled, tensors)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4, "another batch must not recompile"


def test_whoever_watches_sees_the_op() -> None:
    tensors = inputs(7, 16)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Spy():
        layer_norm(**tensors, eps=EPS)
        run(fast, tensors, eps=EPS)
    assert seen.count(schema.forward_op) == 2
    assert schema.backward_op in seen
    normed, summed = layer_norm(**{name: tensor.to("meta") for name, tensor in tensors.items()}, eps=EPS)
    assert normed.shape == summed.shape == (7, 16)


def test_autocast_changes_nothing(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(30, 64, device=device, dtype=dtype)
        expected = run(fast, tensors, eps=EPS)
        with torch.autocast(device.type, torch.bfloat16):
            found = run(fast, tensors, eps=EPS)
        assert all(found[name].dtype == expected[name].dtype for name in found)
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("trained", ["hidden_states", "weight", "bias", "residual"])
def test_inference_tensors_can_feed_a_trained_layer(trained: str, device: torch.device) -> None:
    with torch.inference_mode():
        tensors = inputs(7, 16, device=device, with_residual=trained == "residual")
    leaf = tensors[trained] = tensors[trained].clone().requires_grad_()
    fast(**tensors, eps=EPS)[0].sum().backward()
    assert leaf.grad is not None
    with torch.inference_mode():
        assert fast(**tensors, eps=EPS)[0].is_inference()


HIDDEN, ONES = torch.ones(7, 16), torch.ones(16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": ONES[:8]}, ValueError, r"layer_norm: weight must be \[16\], got \[8\]"),
        ({"bias": None}, TypeError, "bias must be a tensor, got NoneType"),
        ({"sum_bias": HIDDEN}, ValueError, r"sum_bias must be \[16\], got \[7, 16\]"),
        ({"hidden_states": HIDDEN[None]}, ValueError, r"hidden_states must be \[T, d\], got \[1, 7, 16\]"),
        ({"hidden_states": HIDDEN.int()}, TypeError, "hidden_states must be float32 or .*, got int32"),
        ({"residual": HIDDEN[:6]}, ValueError, r"residual must be \[7, 16\], got \[6, 16\]"),
        ({"residual": HIDDEN.half()}, TypeError, "residual must be float32, got float16"),
        ({"residual": HIDDEN.to("meta")}, ValueError, "residual must be on cpu like hidden_states, got meta"),
        ({"bias": ONES.to("meta")}, ValueError, "bias must be on cpu like hidden_states, got meta"),
        ({"backend": "cutlass"}, UnsupportedBackendError, "no backend 'cutlass'; there are auto, triton, reference"),
    ],
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"hidden_states": HIDDEN, "weight": ONES, "bias": ONES, "eps": EPS, **changes}
    with pytest.raises(error, match=message):
        layer_norm(**arguments)


def test_kernels_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedBackendError, match=r"the states are float64\. What would work: reference"):
        layer_norm(HIDDEN.double(), ONES, ONES, eps=EPS, backend="triton")
    with pytest.raises(UnsupportedBackendError, match="widths from 1 to 8192 and the states have 8193"):
        layer_norm(torch.ones(1, 8193), torch.ones(8193), torch.ones(8193), eps=EPS, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedBackendError, match="TRITON_INTERPRET=1 is not set"):
        layer_norm(HIDDEN, ONES, ONES, eps=EPS, backend="triton")
    assert explain("layer_norm", HIDDEN, ONES, ONES, eps=EPS).chosen == "reference"
