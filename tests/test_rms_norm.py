"""``rms_norm``: every backend against float64, its corners, and its contract with autograd, compile and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.rms_norm import reference, rms_norm, schema
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate

EPS = 1e-5
BACKENDS = ["reference", "cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Rows of different size, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    scale = 4 * torch.rand(*shape[:-1], 1, generator=generator) + 0.1
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


def plain(hidden: Tensor, weight: Tensor, residual: Tensor | None = None, **_: object) -> tuple[Tensor, ...]:
    """What Hugging Face's layers make of it, in the dtype of ``hidden``."""
    x = hidden if residual is None else hidden + residual
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)).to(x.dtype)
    return (normed,) if residual is None else (normed, x)


def ours(hidden: Tensor, weight: Tensor, residual: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, ...]:
    result = rms_norm(hidden, weight, eps=EPS, residual=residual, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def run(function, tensors: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Outputs and gradients of ``function(**tensors)`` for fixed random gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves, **options)
    seeds = [random(*output.shape, seed=7 + i).to(output) for i, output in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    found = dict(zip(("normed", "summed"), outputs, strict=False))
    return found | {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def problem(*shape: int, dtype=torch.float32, weight_dtype=None, device="cpu", residual=True) -> dict[str, Tensor]:
    weight = 1 + torch.randn(shape[-1], generator=torch.Generator().manual_seed(2)) / 4
    tensors = {"hidden": random(*shape, dtype=dtype, device=device), "weight": weight.to(device, weight_dtype or dtype)}
    if residual:
        tensors["residual"] = random(*shape, seed=1, dtype=dtype, device=device)
    return tensors


def check(backend: str, tensors: dict[str, Tensor]) -> None:
    with poisoned_memory():
        fast = run(ours, tensors, backend=backend)
    truth = run(plain, {name: tensor.double() for name, tensor in tensors.items()})
    interpreted = backend == "triton" and tensors["hidden"].is_cpu
    assert_as_accurate(fast, run(plain, tensors), truth, INTERPRETED_RULES if interpreted else RULES)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend: str, residual: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, problem(37, 200, dtype=dtype, device=device, residual=residual))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("shape", [(3, 2), (5, 896), (9, 1536), (2, 8192), (3, 5, 128), (2, 3, 4, 96)], ids=str)
def test_shapes(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    check(backend, problem(*shape, device=device, residual=len(shape) != 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 896, 1536, 2048, 4096, 5120, 8192])
def test_every_compiled_shape(width: int, dtype: torch.dtype, device: torch.device) -> None:
    for residual in (False, True):
        check("triton", problem(3001, width, dtype=dtype, device=device, residual=residual))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31st_element(device: torch.device) -> None:
    hidden = torch.ones(2**19 + 3, 4096, dtype=torch.bfloat16, device=device)
    hidden[-1] = 2
    normed = rms_norm(hidden, torch.ones(4096, device=device), eps=3.0, backend="triton")
    assert normed[-1].float().sub(2 / 7**0.5).abs().max() < 0.01
    assert normed[-2].float().sub(0.5).abs().max() < 0.01


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_heads_within_a_wider_buffer(backend: str, device: torch.device) -> None:
    """q of a merged qkv, and gradients that are views too."""
    buffer = torch.full((11, 320), float("nan"), device=device)
    buffer[:, 64:256] = random(11, 192, device=device)
    heads = buffer[:, 64:256].unflatten(1, (3, 64))
    weight = random(64, seed=3, device=device)
    grads = torch.full((11, 320), float("nan"), device=device)
    grads[:, :192] = random(11, 192, seed=4, device=device)
    seed = grads[:, :192].unflatten(1, (3, 64))
    results = []
    for x, grad in ((heads, seed), (heads.contiguous(), seed.contiguous())):
        leaf = x.detach().requires_grad_()
        normed = rms_norm(leaf, weight, eps=EPS, backend=backend)
        results.append((normed, *torch.autograd.grad(normed, leaf, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strided_columns(backend: str, device: torch.device) -> None:
    tensors = problem(6, 32, device=device)
    expected = run(ours, tensors, backend=backend)
    tensors["hidden"] = tensors["hidden"].t().contiguous().t()
    tensors["residual"] = torch.cat((tensors["residual"],) * 2, 1)[:, :32]
    found = run(ours, tensors, backend=backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    leaf = tensors["hidden"].detach().requires_grad_()
    rms_norm(leaf, tensors["weight"], eps=EPS, backend=backend).sum().backward()  # a gradient with strides of zero
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("shape", [(0, 16), (0, 3, 16), (4, 0, 16)], ids=str)
def test_empty(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    found = run(ours, problem(*shape, device=device), backend=backend)
    assert [list(tensor.shape) for tensor in found.values()] == [list(shape)] * 3 + [[16], list(shape)]
    assert torch.equal(found["grad of weight"], torch.zeros_like(found["grad of weight"]))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_weight_of_another_dtype(backend: str, device: torch.device) -> None:
    check(backend, problem(9, 64, dtype=torch.bfloat16, weight_dtype=torch.float32, device=device))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_many_rows_per_program_and_block(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 256)
    if backend == "triton":
        from mtllm_fast.ops.rms_norm import triton_backend

        monkeypatch.setattr(triton_backend, "PROGRAMS", 3)
    check(backend, problem(531, 64, device=device))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_one_output_may_be_unused(backend: str, device: torch.device) -> None:
    tensors = problem(5, 64, device=device)
    found = run(lambda **t: ours(**t, backend=backend)[:1], tensors)
    expected = run(lambda **t: plain(**t)[:1], tensors)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    leaf = tensors["hidden"].requires_grad_()
    _, summed = ours(**tensors, backend=backend)
    assert torch.equal(torch.autograd.grad(summed.sum(), leaf)[0], torch.ones_like(leaf))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_only_what_needs_a_gradient_gets_one(backend: str, device: torch.device) -> None:
    tensors = problem(5, 64, device=device)
    full = run(ours, tensors, backend=backend)
    for name in tensors:
        leaves = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        outputs = ours(**leaves, backend=backend)
        seeds = [random(*output.shape, seed=7 + i).to(output) for i, output in enumerate(outputs)]
        wanted = outputs if name != "weight" else outputs[:1]
        (grad,) = torch.autograd.grad(wanted, leaves[name], seeds[: len(wanted)])
        assert torch.allclose(grad, full[f"grad of {name}"], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_stays_in_its_row(backend: str, device: torch.device) -> None:
    tensors = problem(5, 64, device=device)
    expected = run(ours, tensors, backend=backend)
    tensors["residual"][2, 3] = float("nan")
    found = run(ours, tensors, backend=backend)
    for name in ("normed", "grad of hidden", "grad of residual"):
        assert found[name][2].isnan().all()
        assert torch.equal(found[name][[0, 1, 3, 4]], expected[name][[0, 1, 3, 4]])
    assert found["grad of weight"].isnan().all()


def test_gradcheck() -> None:
    tensors = [t.double().requires_grad_() for t in problem(4, 5).values()]
    assert torch.autograd.gradcheck(lambda h, w, r: rms_norm(h, w, eps=EPS, residual=r), tensors)
    heads, weight = random(2, 3, 5, dtype=torch.float64).requires_grad_(), tensors[1]
    assert torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, eps=EPS), (heads, weight))


def test_second_gradient_is_refused() -> None:
    hidden = random(3, 5).requires_grad_()
    normed = rms_norm(hidden, torch.ones(5), eps=EPS)
    (grad,) = torch.autograd.grad(normed.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("residual", "grads"), [(True, (True, False)), (False, (True, True))])
def test_opcheck(residual: bool, grads: tuple[bool, bool], device: torch.device) -> None:
    tensors = problem(7, 16, device=device)
    hidden, weight = tensors["hidden"].requires_grad_(grads[0]), tensors["weight"].requires_grad_(grads[1])
    extra = tensors["residual"] if residual else None
    torch.library.opcheck(schema.forward_op, (hidden, weight, extra, EPS, "auto"))
    seed, rstd = random(7, 16, seed=9, device=device), torch.rand(7, device=device)
    arguments = (seed, seed if residual else None, hidden.detach(), weight.detach(), rstd, grads[1], "auto")
    torch.library.opcheck(schema.backward_op, arguments)


def test_compiles_once_for_all_batches(device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(hidden: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        normed, summed = ours(hidden, weight, residual)
        return ours(normed.unflatten(-1, (4, 16)), weight[:16])[0], summed * 2

    graphs = []
    for tokens in (7, 2, 301):
        tensors = problem(tokens, 64, device=device)
        found, expected = run(layer, tensors), run(layer._torchdynamo_orig_callable, tensors)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3, "another batch must not recompile"


def test_whoever_watches_sees_the_op() -> None:
    tensors = problem(5, 16)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = ours(**{name: mode.from_tensor(tensor) for name, tensor in tensors.items()})
        assert [type(fake) for fake in fakes] == [torch._subclasses.FakeTensor] * 2
    assert ours(**{name: tensor.to("meta") for name, tensor in tensors.items()})[1].shape == (5, 16)


def test_autocast_changes_nothing(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = problem(30, 64, device=device, dtype=dtype)
        expected = run(ours, tensors)
        with torch.autocast(device.type, torch.bfloat16):
            found = run(ours, tensors)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inference_tensors_can_feed_a_trained_layer(device: torch.device) -> None:
    with torch.inference_mode():
        tensors = problem(5, 16, device=device)
    for trained in ("hidden", "weight"):
        leaf = tensors[trained].clone().requires_grad_()
        ours(**{**tensors, trained: leaf})[0].sum().backward()
        assert leaf.grad is not None
    with torch.inference_mode():
        assert ours(**tensors)[0].is_inference()


HIDDEN, WEIGHT = torch.ones(7, 16), torch.ones(16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(8)}, ValueError, r"rms_norm: weight must be \[16\], got \[8\]"),
        ({"weight": WEIGHT.int()}, TypeError, "weight must be float32 or .*, got int32"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like hidden_states, got meta"),
        ({"hidden_states": WEIGHT}, ValueError, r"hidden_states must be \[..., T, D\], got \[16\]"),
        ({"hidden_states": [[1.0]]}, TypeError, "hidden_states must be a tensor, got list"),
        ({"hidden_states": HIDDEN.int()}, TypeError, "hidden_states must be float32 or .*, got int32"),
        ({"residual": HIDDEN[:3]}, ValueError, r"residual must be \[7, 16\], got \[3, 16\]"),
        ({"residual": HIDDEN.half()}, TypeError, "residual must be float32, got float16"),
        ({"residual": HIDDEN.to("meta")}, ValueError, "residual must be on cpu like hidden_states, got meta"),
        (
            {"backend": "cutlass"},
            UnsupportedBackendError,
            "'cutlass'; there are auto, triton, cpu, reference",
        ),
    ],
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rms_norm(**{"hidden_states": HIDDEN, "weight": WEIGHT, "eps": EPS, **changes})


def test_kernels_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedBackendError, match=r"the states are float64\. What would work: reference"):
        rms_norm(HIDDEN.double(), WEIGHT.double(), eps=EPS, backend="triton")
    with pytest.raises(UnsupportedBackendError, match="widths from 1 to 8192 and the states have 8193"):
        rms_norm(torch.ones(1, 8193), torch.ones(8193), eps=EPS, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedBackendError, match="TRITON_INTERPRET=1 is not set"):
        rms_norm(HIDDEN, WEIGHT, eps=EPS, backend="triton")
    assert explain("rms_norm", HIDDEN.double(), WEIGHT, eps=EPS).chosen == "reference"
