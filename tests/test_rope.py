"""``rope``: every backend against float64, its corners, and its contract with autograd, compile and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.rms_norm import reference as blocked
from mtllm_fast.ops.rope import rope, rope_qkv, schema
from mtllm_fast.ops.stack_projection.reference import apply_rope
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate

BACKENDS = ["reference", "cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def tables(tokens: int, hd: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """(cos, sin) as Hugging Face's rotary embedding makes them."""
    angles = torch.arange(tokens)[:, None] * 10000 ** -(torch.arange(0, hd, 2) / hd)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def plain(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """What Hugging Face's layers make of a merged projection."""
    H, KV = heads
    q, k, v = qkv.unflatten(1, (H + 2 * KV, -1)).split((H, KV, KV), dim=1)
    return apply_rope(q, cos, sin).to(q.dtype), apply_rope(k, cos, sin).to(k.dtype), v


def separate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], backend: str = "auto"):
    H, KV = heads
    q, k, v = qkv.unflatten(1, (H + 2 * KV, -1)).split((H, KV, KV), dim=1)
    return *rope(q, k, cos, sin, backend=backend), v


def merged(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], backend: str = "auto"):
    return rope_qkv(qkv, cos, sin, num_heads=heads[0], num_kv_heads=heads[1], backend=backend)


def run(function, qkv: Tensor, *arguments: object, **options: object) -> dict[str, Tensor]:
    """Outputs and gradient of ``function(qkv, ...)`` for fixed random gradients."""
    qkv = qkv.detach().requires_grad_()
    outputs = function(qkv, *arguments, **options)
    seeds = [random(*output.shape, seed=7 + i).to(output) for i, output in enumerate(outputs)]
    (grad,) = torch.autograd.grad(outputs, qkv, seeds)
    return {"q": outputs[0], "k": outputs[1], "v": outputs[2], "grad of qkv": grad}


def check(
    function, backend: str, device: torch.device, T: int = 9, heads: tuple[int, int] = (3, 2), hd: int = 16,
    dtype: torch.dtype = torch.float32, table_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    qkv = random(T, (heads[0] + 2 * heads[1]) * hd, dtype=dtype, device=device)
    cos, sin = tables(T, hd, table_dtype or dtype, device)
    with poisoned_memory():
        fast = run(function, qkv, cos, sin, heads, backend=backend)
    truth = run(plain, qkv.double(), cos.double(), sin.double(), heads)
    interpreted = backend == "triton" and device.type == "cpu"
    assert_as_accurate(fast, run(plain, qkv, cos, sin, heads), truth, INTERPRETED_RULES if interpreted else RULES)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("function", [separate, merged])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(function, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    check(function, backend, device, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("heads", "hd"), [((1, 1), 2), ((14, 2), 64), ((28, 4), 128), ((2, 2), 80)], ids=str)
def test_shapes(backend: str, heads: tuple[int, int], hd: int, device: torch.device) -> None:
    check(merged, backend, device, T=37, heads=heads, hd=hd)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_tables_in_float32(backend: str, device: torch.device) -> None:
    check(merged, backend, device, dtype=torch.bfloat16, table_dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "hd"), [((32, 8), 128), ((32, 8), 64), ((14, 2), 64), ((28, 4), 128), ((64, 8), 128)]
)
def test_every_compiled_shape(heads: tuple[int, int], hd: int, dtype: torch.dtype, device: torch.device) -> None:
    for function in (separate, merged):
        check(function, "triton", device, T=1001, heads=heads, hd=hd, dtype=dtype)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31st_element(device: torch.device) -> None:
    qkv = torch.zeros(2**19 + 3, 4096 + 2 * 1024, dtype=torch.bfloat16, device=device)
    qkv[-1] = 1
    table = torch.ones(qkv.shape[0], 128, dtype=torch.bfloat16, device=device)
    q, k, _ = rope_qkv(qkv, table, 0 * table, num_heads=32, num_kv_heads=8, backend="triton")
    assert all(x[-1].eq(1).all() and x[-2].eq(0).all() for x in (q, k))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("function", [separate, merged])
def test_strides(function, backend: str, device: torch.device) -> None:
    """Rows of a wider buffer, columns apart, heads in another order, views as tables, gradients without strides."""
    qkv, heads = random(5, 7 * 8, device=device), (3, 2)
    cos, sin = tables(5, 8, device=device)
    expected = run(function, qkv, cos, sin, heads, backend=backend)
    wider = torch.full((5, 77), float("nan"), device=device)
    wider[:, 3:59] = qkv
    for other in (wider[:, 3:59], qkv.t().contiguous().t()):
        found = run(function, other, *(torch.cat((t, t), 1)[:, :8] for t in (cos, sin)), heads, backend=backend)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    leaf = qkv.detach().requires_grad_()
    sum(output.sum() for output in function(leaf, cos, sin, heads, backend=backend)).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    heads_first = qkv.unflatten(1, (7, 8)).transpose(0, 1).contiguous().transpose(0, 1)
    q, k = rope(heads_first[:, :3], heads_first[:, 3:5], cos, sin, backend=backend)
    assert torch.equal(q, expected["q"])
    assert torch.equal(k, expected["k"])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_merged_gradient_is_one_buffer(backend: str, device: torch.device) -> None:
    qkv = random(5, 7 * 8, device=device).requires_grad_()
    outputs = merged(qkv, *tables(5, 8, device=device), (3, 2), backend)
    assert [tuple(output.shape) for output in outputs] == [(5, 3, 8), (5, 2, 8), (5, 2, 8)]
    (grad,) = torch.autograd.grad(outputs, qkv, [torch.ones_like(output) for output in outputs])
    assert grad.is_contiguous()
    assert torch.equal(grad[:, 40:], torch.ones_like(grad[:, 40:]))
    (grad,) = torch.autograd.grad(merged(qkv, *tables(5, 8, device=device), (3, 2), backend)[2].sum(), qkv)
    assert torch.equal(grad[:, :40], torch.zeros_like(grad[:, :40]))  # q and k are not used
    with torch.no_grad():
        assert merged(qkv, *tables(5, 8, device=device), (3, 2), backend)[2].data_ptr() == qkv[:, 40:].data_ptr()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_gradient_rotates_back(backend: str, device: torch.device) -> None:
    q, k = random(4, 3, 8, device=device).requires_grad_(), random(4, 1, 8, device=device).requires_grad_()
    rotated = rope(q, k, *tables(4, 8, device=device), backend=backend)
    for leaf, grad in zip((q, k), torch.autograd.grad(rotated, (q, k), [r.detach() for r in rotated]), strict=True):
        assert torch.allclose(grad, leaf, atol=1e-6)
    (grad,) = torch.autograd.grad(rope(q, k.detach(), *tables(4, 8, device=device), backend=backend)[0].sum(), q)
    assert grad.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("function", [separate, merged])
def test_empty(function, backend: str, device: torch.device) -> None:
    found = run(function, random(0, 7 * 8, device=device), *tables(0, 8, device=device), (3, 2), backend=backend)
    assert [list(tensor.shape) for tensor in found.values()] == [[0, 3, 8], [0, 2, 8], [0, 2, 8], [0, 56]]


def test_many_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 256)
    check(merged, "reference", device, T=101, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_stays_in_its_pair(backend: str, device: torch.device) -> None:
    qkv = random(4, 7 * 8, device=device)
    qkv[1, 2] = float("nan")
    found = run(merged, qkv, *tables(4, 8, device=device), (3, 2), backend=backend)
    expected = torch.zeros(4, 3, 8, dtype=torch.bool, device=device)
    expected[1, 0, [2, 6]] = True
    assert torch.equal(found["q"].isnan(), expected)
    assert found["k"].isfinite().all()


def test_gradcheck() -> None:
    cos, sin = (table.double() for table in tables(3, 4))
    q, k = random(3, 2, 4, dtype=torch.float64).requires_grad_(), random(3, 1, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))
    qkv = random(3, 4 * 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: merged(x, cos, sin, (2, 1)), (qkv,))


def test_second_gradient_is_refused() -> None:
    qkv = random(3, 16).requires_grad_()
    q, _, _ = merged(qkv, *tables(3, 4), (2, 1))
    (grad,) = torch.autograd.grad(q.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("merge", [False, True])
def test_opcheck(merge: bool, device: torch.device) -> None:
    q, k = random(5, 7, 8, device=device).requires_grad_(), random(5, 2, 8, device=device).requires_grad_()
    cos, sin = tables(5, 8, device=device)
    torch.library.opcheck(schema.forward_op, (q, None if merge else k, cos, sin, 3 if merge else 7, "auto"))
    grads = (q.detach(), k.detach(), random(5, 2, 8, device=device) if merge else None)
    torch.library.opcheck(schema.backward_op, (*grads, cos, sin, "auto"))


@pytest.mark.parametrize("function", [separate, merged])
def test_compiles_once_for_all_batches(function, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * output for output in function(qkv, cos, sin, (3, 2)))

    graphs = []
    for tokens in (7, 2, 301):
        arguments = (random(tokens, 7 * 8, device=device), *tables(tokens, 8, device=device))
        found = run(layer, *arguments)
        expected = run(lambda *a: tuple(2 * output for output in function(*a, (3, 2))), *arguments)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3, "another batch must not recompile"


def test_whoever_watches_sees_the_op() -> None:
    tensors = (random(5, 56), *tables(5, 8))
    with torch._subclasses.FakeTensorMode() as mode:
        q, _, _ = merged(*(mode.from_tensor(tensor) for tensor in tensors), (3, 2))
        assert isinstance(q, torch._subclasses.FakeTensor)
    assert merged(*(tensor.to("meta") for tensor in tensors), (3, 2))[1].shape == (5, 2, 8)


def test_autocast_and_inference_tensors_change_nothing(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        qkv = random(5, 56, dtype=dtype, device=device)
        with torch.inference_mode():
            cos, sin = tables(5, 8, dtype, device)
        expected = run(merged, qkv, cos, sin, (3, 2))
        with torch.autocast(device.type, torch.bfloat16):
            found = run(merged, qkv, cos, sin, (3, 2))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


Q, K = torch.ones(5, 3, 8), torch.ones(5, 2, 8)
COS = torch.ones(5, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [[1.0]]}, TypeError, "rope: q must be a tensor, got list"),
        ({"q": COS}, ValueError, r"q must be \[T, H, hd\], got \[5, 8\]"),
        ({"q": torch.ones(5, 3, 7)}, ValueError, r"q must be \[T, H, hd\] with an even hd, got \[5, 3, 7\]"),
        ({"q": Q.int()}, TypeError, "q must be float32 or .*, got int32"),
        ({"k": K[:3]}, ValueError, r"k must be \[5, KV, 8\], got \[3, 2, 8\]"),
        ({"k": K.half()}, TypeError, "k must be float32, got float16"),
        ({"cos": COS[:, :4]}, ValueError, r"cos must be \[5, 8\], got \[5, 4\]"),
        ({"sin": COS.double()}, TypeError, "sin must be float32 or float32, got float64"),
        ({"q": Q.half(), "k": K.half(), "sin": COS.half()}, TypeError, "cos and sin must have one dtype"),
        ({"sin": COS.to("meta")}, ValueError, "sin must be on cpu like q, got meta"),
        (
            {"backend": "cutlass"},
            UnsupportedBackendError,
            "'cutlass'; there are auto, triton, cpu, reference",
        ),
    ],
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rope(**{"q": Q, "k": K, "cos": COS, "sin": COS, **changes})


def test_bad_qkv() -> None:
    with pytest.raises(ValueError, match=r"qkv must be \[T, N\] with N a multiple of 2 \* 7, .* got \[5, 50\]"):
        merged(torch.ones(5, 50), COS, COS, (3, 2))
    with pytest.raises(ValueError, match="must be positive, got 0 and 2"):
        merged(torch.ones(5, 56), COS, COS, (0, 2))
    with pytest.raises(ValueError, match=r"qkv must be \[T, N\], got \[5, 3, 8\]"):
        merged(Q, COS, COS, (3, 2))


def test_kernels_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedBackendError, match=r"q is float64\. What would work: reference"):
        rope(Q.double(), K.double(), COS, COS, backend="triton")
    with pytest.raises(UnsupportedBackendError, match="up to 16384 elements per token and q has 32768"):
        rope(torch.ones(1, 256, 128), torch.ones(1, 1, 128), torch.ones(1, 128), torch.ones(1, 128), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedBackendError, match="TRITON_INTERPRET=1 is not set"):
        rope(Q, K, COS, COS, backend="triton")
    assert explain("rope", Q.double(), K.double(), COS, COS).chosen == "reference"
