"""``swiglu``: every backend against float64, its corners, and its contract with autograd, compile and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from mtllm_fast.core import native_cpu
from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.rms_norm import reference as blocked
from mtllm_fast.ops.swiglu import schema, swiglu
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate

BACKENDS = ["reference", "cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def problem(*shape: int, merged: bool = False, **options) -> dict[str, Tensor]:
    if merged:
        return {"gate": random(*shape[:-1], 2 * shape[-1], **options)}
    return {"gate": random(*shape, **options), "up": random(*shape, seed=1, **options)}


def plain(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def run(function, tensors: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Output and gradients of ``function(**tensors)`` for a fixed random gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), random(*out.shape, seed=7).to(out))
    return {"out": out, **{f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check(backend: str, tensors: dict[str, Tensor]) -> None:
    with poisoned_memory():
        fast = run(swiglu, tensors, backend=backend)
    truth = run(plain, {name: tensor.double() for name, tensor in tensors.items()})
    interpreted = backend == "triton" and tensors["gate"].is_cpu
    assert_as_accurate(fast, run(plain, tensors), truth, INTERPRETED_RULES if interpreted else RULES)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend: str, merged: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, problem(37, 200, merged=merged, dtype=dtype, device=device))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("shape", [(3, 1), (7,), (35, 128), (3, 896), (2, 11008), (2, 3, 48)], ids=str)
def test_shapes(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    for merged in (False, True):
        check(backend, problem(*shape, merged=merged, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 896, 1536, 4864, 11008, 14336])
def test_every_compiled_shape(width: int, dtype: torch.dtype, device: torch.device) -> None:
    for merged in (False, True):
        check("triton", problem(1001, width, merged=merged, dtype=dtype, device=device))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31st_element(device: torch.device) -> None:
    merged = torch.ones(2**16 + 3, 2 * 16384, dtype=torch.bfloat16, device=device)
    merged[-1] = 0
    out = swiglu(merged, backend="triton")
    assert out[-1].eq(0).all()
    assert out[-2].float().sub(0.7311).abs().max() < 0.01


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides(backend: str, device: torch.device) -> None:
    tensors = problem(6, 32, device=device)
    expected = run(swiglu, tensors, backend=backend)
    merged = torch.cat((tensors["gate"], tensors["up"]), 1)
    views = {"gate": merged[:, :32], "up": merged[:, 32:]}
    transposed = {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}
    for others in (views, transposed):
        found = run(swiglu, others, backend=backend)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    leaf = merged.detach().requires_grad_()
    swiglu(leaf, backend=backend).sum().backward()  # a gradient with strides of zero
    assert leaf.grad is not None
    assert leaf.grad.is_contiguous()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (2, 0, 16)], ids=str)
def test_empty(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    found = run(swiglu, problem(*shape, device=device), backend=backend)
    assert [list(tensor.shape) for tensor in found.values()] == [list(shape)] * 3


def test_many_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 256)
    check("reference", problem(101, 64, merged=True, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_extremes_and_nan(backend: str, device: torch.device) -> None:
    """Large gates neither overflow nor lose their gradient, and NaN goes where torch lets it go, and nowhere else."""
    gate = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, float("nan")]], device=device)
    up = torch.full_like(gate, 2.0)
    found, expected = run(swiglu, {"gate": gate, "up": up}, backend=backend), run(plain, {"gate": gate, "up": up})
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_only_what_needs_a_gradient_gets_one(backend: str, device: torch.device) -> None:
    tensors = problem(5, 64, device=device)
    full = run(swiglu, tensors, backend=backend)
    for name in tensors:
        leaves = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        out = swiglu(**leaves, backend=backend)
        (grad,) = torch.autograd.grad(out, leaves[name], random(*out.shape, seed=7).to(out))
        assert torch.equal(grad, full[f"grad of {name}"])


def test_gradcheck() -> None:
    for merged in (False, True):
        tensors = [t.double().requires_grad_() for t in problem(3, 4, merged=merged).values()]
        assert torch.autograd.gradcheck(swiglu, tensors)


def test_second_gradient_is_refused() -> None:
    gate = random(3, 4).requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(gate).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("merged", [False, True])
def test_opcheck(merged: bool, device: torch.device) -> None:
    tensors = problem(7, 16, merged=merged, device=device)
    gate, up = tensors["gate"].requires_grad_(), tensors.get("up")
    torch.library.opcheck(schema.forward_op, (gate, up, "auto"))
    torch.library.opcheck(schema.backward_op, (random(7, 16, device=device), gate.detach(), up, "auto"))


@pytest.mark.parametrize("merged", [False, True])
def test_compiles_once_for_all_batches(merged: bool, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(gate: Tensor, up: Tensor | None = None) -> Tensor:
        return 2 * swiglu(gate, up)

    graphs = []
    for tokens in (7, 2, 301):
        tensors = problem(tokens, 64, merged=merged, device=device)
        found, expected = run(layer, tensors), run(lambda **t: 2 * swiglu(**t), tensors)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3, "another batch must not recompile"


def test_whoever_watches_sees_the_op() -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        assert isinstance(swiglu(mode.from_tensor(random(5, 16))), torch._subclasses.FakeTensor)
    assert swiglu(random(5, 16).to("meta")).shape == (5, 8)


def test_autocast_changes_nothing(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = problem(30, 64, device=device, dtype=dtype)
        expected = run(swiglu, tensors)
        with torch.autocast(device.type, torch.bfloat16):
            found = run(swiglu, tensors)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inference_tensors_can_feed_a_trained_layer(device: torch.device) -> None:
    with torch.inference_mode():
        up = random(5, 16, device=device)
    leaf = random(5, 16, device=device).requires_grad_()
    swiglu(leaf, up).sum().backward()
    assert leaf.grad is not None


GATE = torch.ones(7, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate": [[1.0]]}, TypeError, "swiglu: gate must be a tensor, got list"),
        ({"gate": torch.tensor(1.0)}, ValueError, r"gate must be \[..., F\], got \[\]"),
        ({"gate": GATE.int()}, TypeError, "gate must be float32 or .*, got int32"),
        ({"gate": torch.ones(7, 3)}, ValueError, r"gate must be \[..., 2 F\] if there is no up, got \[7, 3\]"),
        ({"up": GATE[:3]}, ValueError, r"up must be \[7, 16\], got \[3, 16\]"),
        ({"up": GATE.half()}, TypeError, "up must be float32, got float16"),
        ({"up": GATE.to("meta")}, ValueError, "up must be on cpu like gate, got meta"),
        (
            {"backend": "cutlass"},
            UnsupportedBackendError,
            "no backend 'cutlass'; there are auto, triton, cpu, reference",
        ),
    ],
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swiglu(**{"gate": GATE, **changes})


def test_kernels_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedBackendError, match=r"gate is float64\. What would work: reference"):
        swiglu(GATE.double(), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedBackendError, match="TRITON_INTERPRET=1 is not set"):
        swiglu(GATE, backend="triton")
    assert explain("swiglu", GATE).chosen == ("reference" if native_cpu.why_not_built() else "cpu")
