"""``bias_relu``: every backend against float64, its corners, and its contract with autograd, compile and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.bias_relu import bias_relu, schema
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.relu(x if bias is None else x + bias.to(x.dtype))


def run(function, x: Tensor, bias: Tensor | None, **options: object) -> dict[str, Tensor]:
    """Output and gradients for a fixed random gradient."""
    leaves = {"x": x.detach().requires_grad_()}
    if bias is not None:
        leaves["bias"] = bias.detach().requires_grad_()
    y = function(leaves["x"], leaves.get("bias"), **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, [*leaves.values()], grad)
    return {"y": y, **{f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def inputs(
    tokens: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    row_stride: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiples of 1/8, so that no rounding decides on which side of zero a sum lies."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.full((tokens, row_stride or width), float("nan"))
    rows[:, :width] = torch.randint(-64, 65, (tokens, width), generator=generator) / 8
    bias = torch.randint(-8, 9, (width,), generator=generator) / 8
    return rows.to(device, dtype)[:, :width], bias.to(device, bias_dtype or dtype)


def check(
    backend: str, device: torch.device, tokens: int, width: int, *, with_bias: bool = True, **shape: object
) -> None:
    """Output and gradients of one backend keep the error rule, with fresh memory and unused input full of NaN."""
    x, bias = inputs(tokens, width, device=device, **shape)
    given = bias if with_bias else None
    with poisoned_memory():
        found = run(bias_relu, x, given, backend=backend)
    same_dtype = run(plain, x, given)
    truth = run(plain, x.double(), None if given is None else bias.double())
    interpreted = backend == "triton" and device.type == "cpu"
    assert_as_accurate(found, same_dtype, truth, INTERPRETED_RULES if interpreted else RULES)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend: str, with_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, 37, 96, dtype=dtype, with_bias=with_bias)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("width", [1, 41, 1025, 4096])
def test_widths(backend: str, width: int, device: torch.device) -> None:
    check(backend, device, 5, width)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 1000, 4096, 4097, 8192])
def test_every_compiled_shape(backend: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, 3001, width, dtype=dtype)
    check(backend, device, 7, width, dtype=dtype, row_stride=width + 1, with_bias=False)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides(backend: str, device: torch.device) -> None:
    check(backend, device, 9, 64, row_stride=67)
    check(backend, device, 9, 64, row_stride=72, dtype=torch.bfloat16, with_bias=False)
    x, bias = inputs(8, 16, device=device)
    transposed = x.t().contiguous().t()
    assert torch.equal(bias_relu(transposed, bias, backend=backend), bias_relu(x, bias, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("with_bias", [False, True])
def test_no_tokens(backend: str, with_bias: bool, device: torch.device) -> None:
    x, bias = inputs(0, 16, device=device)
    result = run(bias_relu, x, bias if with_bias else None, backend=backend)
    assert result["y"].shape == result["grad of x"].shape == (0, 16)
    if with_bias:
        assert torch.equal(result["grad of bias"], torch.zeros(16, device=device))


def test_no_columns(device: torch.device) -> None:
    result = run(bias_relu, torch.ones(3, 0, device=device), torch.ones(0, device=device))
    assert result["y"].shape == (3, 0)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_many_rows_to_a_partial_sum(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps to a program, several programs; the last one has fewer rows."""
    if backend == "triton":
        from mtllm_fast.ops.bias_relu import triton_backend

        monkeypatch.setattr(triton_backend, "PARTIALS", 3)
        monkeypatch.setattr(triton_backend, "TILE", 512)
        monkeypatch.setattr(triton_backend, "COLUMNS", 32)
    check(backend, device, 301, 41, dtype=torch.float16)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16])
def test_bias_of_another_dtype(backend: str, bias_dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, 20, 64, dtype=torch.bfloat16, bias_dtype=bias_dtype)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """NaN stays NaN, and so does its gradient; the gradient at zero is zero. As torch.relu has it."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[nan, inf, -inf, 0.0, -0.0, -1.0, 1.0, inf]], dtype=dtype, device=device)
    bias = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0, nan, -inf], dtype=dtype, device=device)
    found, expected = run(bias_relu, x, bias, backend=backend), run(plain, x, bias)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)
    assert found["y"].isnan().tolist() == [[True, False, False, False, False, False, True, True]]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_only_what_needs_a_gradient_gets_one(backend: str, device: torch.device) -> None:
    x, bias = inputs(9, 16, device=device)
    expected = run(bias_relu, x, bias, backend=backend)
    grad = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)).to(device)
    for name in ("x", "bias"):
        leaf = (x if name == "x" else bias).detach().requires_grad_()
        y = bias_relu(leaf, bias, backend=backend) if name == "x" else bias_relu(x, leaf, backend=backend)
        assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], expected[f"grad of {name}"])


def test_keeps_the_output_alone(device: torch.device) -> None:
    x, bias = inputs(9, 16, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = bias_relu(x.requires_grad_(), bias)
    assert [tensor.data_ptr() for tensor in kept] == [y.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_results_repeat(backend: str, device: torch.device) -> None:
    x, bias = inputs(300, 48, device=device)
    first, second = (run(bias_relu, x, bias, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradcheck() -> None:
    x, bias = inputs(4, 5, dtype=torch.float64)
    x = x + 1 / 16  # no sum is zero, where the gradient jumps
    assert torch.autograd.gradcheck(bias_relu, (x.requires_grad_(), bias.requires_grad_()))
    assert torch.autograd.gradcheck(lambda x: bias_relu(x, None), (x,))


def test_second_gradient_is_refused() -> None:
    x, bias = inputs(4, 5)
    (grad,) = torch.autograd.grad(bias_relu(x.requires_grad_(), bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck(grads: tuple[bool, bool], device: torch.device) -> None:
    x, bias = inputs(7, 16, device=device)
    torch.library.opcheck(schema.forward_op, (x.requires_grad_(grads[0]), bias.requires_grad_(grads[1]), "auto"))
    y = torch.randn(7, 16, device=device)
    torch.library.opcheck(schema.backward_op, (torch.randn_like(y), y, grads[1], "auto"))


def test_opcheck_without_bias(device: torch.device) -> None:
    torch.library.opcheck(schema.forward_op, (inputs(7, 16, device=device)[0].requires_grad_(), None, "auto"))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_compiles_once_for_all_batches(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def doubled(x: Tensor, bias: Tensor) -> Tensor:
        return 2 * bias_relu(x, bias, backend=backend)

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for tokens in (7, 14, 2, 301):
        x, bias = inputs(tokens, 16, device=device)
        found, expected = run(compiled, x, bias), run(doubled, x, bias)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4, "another batch must not recompile"


def test_whoever_watches_sees_the_op() -> None:
    x, bias = inputs(7, 16)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Spy():
        bias_relu(x, bias)
        run(bias_relu, x, bias)
    assert seen.count(schema.forward_op) == 2
    assert schema.backward_op in seen
    assert bias_relu(x.to("meta"), bias.to("meta")).shape == (7, 16)


def test_autocast_changes_nothing(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = inputs(30, 64, device=device, dtype=dtype)
        expected = run(bias_relu, x, bias)
        with torch.autocast(device.type, torch.bfloat16):
            found = run(bias_relu, x, bias)
        assert all(found[name].dtype == dtype and torch.equal(found[name], expected[name]) for name in found)


def test_inference_tensors_can_feed_a_trained_layer(device: torch.device) -> None:
    with torch.inference_mode():
        x, bias = inputs(7, 16, device=device)
        assert bias_relu(x, bias).is_inference()
    leaf = bias.clone().requires_grad_()
    bias_relu(x, leaf).sum().backward()
    assert leaf.grad is not None


X, BIAS = torch.ones(7, 16), torch.ones(16)


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (X, BIAS[:8], ValueError, r"bias_relu: bias must be \[16\], got \[8\]"),
        (X[None], BIAS, ValueError, r"x must be \[T, F\], got \[1, 7, 16\]"),
        ([1.0], BIAS, TypeError, "x must be a tensor, got list"),
        (X.int(), BIAS, TypeError, "x must be float32 or .*, got int32"),
        (X, BIAS.long(), TypeError, "bias must be float32 or .*, got int64"),
        (X, BIAS.to("meta"), ValueError, "bias must be on cpu like x, got meta"),
    ],
)
def test_bad_input(x: object, bias: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bias_relu(x, bias)


def test_kernels_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedBackendError, match="no backend 'cutlass'; there are auto, triton, reference"):
        bias_relu(X, BIAS, backend="cutlass")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedBackendError, match=r"x is float64\. What would work: reference"):
        bias_relu(X.double(), BIAS, backend="triton")
    with pytest.raises(UnsupportedBackendError, match="x has no columns"):
        bias_relu(X[:, :0], BIAS[:0], backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedBackendError, match="TRITON_INTERPRET=1 is not set"):
        bias_relu(X, BIAS, backend="triton")
    assert explain("bias_relu", X, BIAS).chosen == "reference"
