"""``quantize_rows``: bit for bit what its formula says, its corners, and its contract with autograd and compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops.quantize_rows import quantize_rows, schema
from mtllm_fast.ops.quantize_rows.e4m3 import E4M3, LARGEST, SMALLEST
from mtllm_fast.ops.rms_norm import rms_norm
from mtllm_fast.ops.swiglu import swiglu
from mtllm_fast.testing.inputs import packed_states
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import relative_error

BACKENDS = ["reference", "triton"]
NORM = {"norm_weight": torch.ones(16), "eps": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every finite value of e4m3, from the least to the largest.
GRID = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
GRID = GRID[GRID.isfinite()].unique()


@pytest.fixture(autouse=True)
def torch_converts_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds to 8-bit floats wrongly and is refused; here torch takes that step from it."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_exactly(value, source, target, rounding):
        if target != interpreter.tl.float8e4nv:
            return convert(value, source, target, rounding)
        return torch.from_numpy(value.astype("float32")).to(E4M3).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert_exactly)
    monkeypatch.setattr(schema, "why_not_interpreted", lambda x: None)


def states(rows: int, width: int, **options) -> Tensor:
    """Rows of very different size, with an outlier each."""
    x = packed_states((rows,), width, **options)
    x[torch.arange(rows), torch.arange(rows) % width] *= 30
    return x


def nearest(x: Tensor) -> Tensor:
    """The values of e4m3 that lie nearest, ties to the even one, by a search that knows no bit patterns."""
    above = torch.searchsorted(GRID, x.contiguous()).clamp(1, len(GRID) - 1)
    low, high = GRID[above - 1], GRID[above]
    up = (high - x < x - low) | ((high - x == x - low) & (above % 2 == len(GRID) // 2 % 2))
    return torch.where(up, high, low)


def check(x: Tensor, backend: str) -> None:
    with poisoned_memory():
        q, scale = quantize_rows(x, backend=backend)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (E4M3, x.shape, torch.float32, (len(x), 1))
    assert q.is_contiguous()
    assert scale.is_contiguous()
    wide = x.float().cpu()
    expected = wide.abs().amax(1, keepdim=True).clamp(min=SMALLEST) * (1 / LARGEST)
    assert torch.equal(scale.cpu(), expected)
    assert torch.equal(q.float().cpu(), nearest(wide * expected.reciprocal()))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 41, 2000, 4096])
def test_every_bit(backend: str, dtype: torch.dtype, width: int, device: torch.device) -> None:
    check(states(7, width, dtype=dtype, device=device), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 1024, 5120, 14336, 28672, 32768])
def test_every_compiled_shape(dtype: torch.dtype, width: int, device: torch.device) -> None:
    check(states(700, width, dtype=dtype, device=device), "triton")
    check(states(5, width, dtype=dtype, device=device, row_stride=width + 1), "triton")


def check_what_comes_before(backend: str, dtype: torch.dtype, width: int, device: torch.device, rows: int = 7) -> None:
    """The op that comes before, then ``quantize_rows``: bit for bit, but for the order of a norm's sum on a GPU."""
    x, residual = (states(rows, width, dtype=dtype, device=device, row_stride=width + i, seed=i) for i in (3, 0))
    weight = 1 + packed_states((1,), width, seed=2, dtype=dtype, device=device)[0]
    gate_up = states(rows, 2 * width, dtype=dtype, device=device, row_stride=2 * width + 5)
    exact = backend == "reference" or not x.is_cuda
    activated = swiglu(gate_up, backend=backend)
    if backend == "reference":  # which rounds silu(gate) too, as Hugging Face does
        activated = swiglu(gate_up.float(), backend=backend).to(dtype)
    normed, summed = rms_norm(x, weight, eps=1e-5, residual=residual, backend=backend)
    expected = (
        (*quantize_rows(normed, backend=backend), summed),
        quantize_rows(rms_norm(x, weight, eps=1e-5, backend=backend), backend=backend),
        quantize_rows(activated, backend=backend),
    )
    with poisoned_memory():
        found = (
            quantize_rows(x, norm_weight=weight, eps=1e-5, residual=residual, backend=backend),
            quantize_rows(x, norm_weight=weight, eps=1e-5, backend=backend),
            quantize_rows(gate_up, gated=True, backend=backend),
        )
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert (one.dtype, one.shape, one.is_contiguous()) == (other.dtype, other.shape, True)
            assert torch.equal(one.float(), other.float()) or not exact
        assert relative_error(ours[0].float() * ours[1], theirs[0].float() * theirs[1]) < 5e-3


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 41, 2000, 4096])
def test_a_norm_or_a_gate_before(backend: str, dtype: torch.dtype, width: int, device: torch.device) -> None:
    check_what_comes_before(backend, dtype, width, device)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2048, 4864, 8192])
def test_every_compiled_shape_with_something_before(width: int, device: torch.device) -> None:
    check_what_comes_before("triton", torch.bfloat16, width, device, rows=700)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [14336, 16384])
def test_every_compiled_gate(width: int, device: torch.device) -> None:
    gate_up = states(700, 2 * width, dtype=torch.bfloat16, device=device)
    ours = quantize_rows(gate_up, gated=True, backend="triton")
    theirs = quantize_rows(swiglu(gate_up, backend="triton"), backend="triton")
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides_zeros_and_no_rows(backend: str, device: torch.device) -> None:
    check(states(9, 128, device=device, row_stride=135), backend)
    check(states(9, 16, device=device).t().contiguous().t(), backend)
    check(torch.zeros(3, 16, device=device), backend)
    check(torch.zeros(0, 16, device=device), backend)
    check(torch.full((2, 16), 1e-38, device=device), backend)
    check(torch.full((2, 16), torch.finfo(torch.float32).max, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(backend: str, bad: float, device: torch.device) -> None:
    x = states(8, 64, device=device)
    clean, clean_scale = quantize_rows(x, backend=backend)
    x[3, 17] = bad
    q, scale = quantize_rows(x, backend=backend)
    assert scale[3].isnan().all()
    assert q[3].float().isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(q[others].float(), clean[others].float())
    assert torch.equal(scale[others], clean_scale[others])


def test_the_stated_bound_of_the_error() -> None:
    x = states(64, 512)
    q, scale = quantize_rows(x)
    error = (q.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * (1 + 1e-6)).all()
    assert (error > x.abs() / 17).any(), "the bound is not far off"


def test_opcheck(device: torch.device) -> None:
    x, weight = states(3, 16, device=device), torch.ones(16, device=device)
    for arguments in ((None, None, 0.0, False), (weight, x, 1e-5, False), (None, None, 0.0, True)):
        torch.library.opcheck(schema.quantize_op, (x, *arguments, "auto"))


def test_gradients_are_refused() -> None:
    q, _ = quantize_rows(states(3, 16).requires_grad_())
    with pytest.raises(RuntimeError, match="has no gradient"):
        q.float().sum().backward()
    q, _ = quantize_rows(states(3, 16), norm_weight=torch.ones(16).requires_grad_(), eps=1e-5)
    with pytest.raises(RuntimeError, match="has no gradient"):
        q.float().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_compiles_once_for_all_batches(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    weight = torch.ones(16, device=device)

    def plain(x: Tensor) -> tuple[Tensor, ...]:
        q, scale = quantize_rows(x, backend=backend)
        q_normed, scale_normed, summed = quantize_rows(x, norm_weight=weight, eps=0.1, residual=x, backend=backend)
        q_gated, scale_gated = quantize_rows(x, gated=True, backend=backend)
        return q.float() * scale, q_normed.float() * scale_normed, summed, q_gated.float() * scale_gated

    dequantized = torch.compile(plain, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (3, 9, 4):
        x = states(rows, 16, device=device)
        for one, other in zip(dequantized(x), plain(x), strict=True):
            assert torch.equal(one, other)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1], "another batch must not recompile"


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(16), ValueError, r"quantize_rows: x must be \[T, K\], got \[16\]"),
        ([[1.0]], TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 2, dtype=torch.float64), TypeError, "x must be float32 or bfloat16 or float16, got float64"),
    ],
)
def test_bad_input(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_rows(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"residual": torch.ones(3, 16)}, ValueError, "residual is added before a norm, got no norm_weight"),
        ({"norm_weight": torch.ones(8), "eps": 0.1}, ValueError, r"norm_weight must be \[16\], got \[8\]"),
        ({**NORM, "residual": torch.ones(2, 16)}, ValueError, r"residual must be \[3, 16\]"),
        ({**NORM, "residual": torch.ones(3, 16).half()}, TypeError, "residual must be float32"),
        ({**NORM, "gated": True}, ValueError, r"gated takes x \[T, 2 K\] alone, got \[3, 16\] norm_weight"),
        ({"residual": torch.ones(3, 16), "gated": True}, ValueError, r"alone, got \[3, 16\] residual"),
        (
            {"norm_weight": torch.ones(16)},
            ValueError,
            "norm_weight and eps go together, got eps=None and a norm_weight",
        ),
        ({"eps": 0.1}, ValueError, "go together, got eps=0.1 and no norm_weight"),
    ],
)
def test_bad_combinations(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_rows(torch.ones(3, 16), **options)
    with pytest.raises(ValueError, match=r"gated takes x \[T, 2 K\] alone, got \[3, 15\]$"):
        quantize_rows(torch.ones(3, 15), gated=True)


def test_the_kernel_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedBackendError, match=r"widths from 1 to 32768 .* What would work: reference"):
        quantize_rows(torch.ones(2, 40000), backend="triton")
    with pytest.raises(UnsupportedBackendError, match="widths from 1 to 16384 and the rows have 20000"):
        quantize_rows(torch.ones(2, 40000), gated=True, backend="triton")
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedBackendError, match="interpreter converts to 8-bit floats wrongly"):
            quantize_rows(torch.ones(2, 16), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedBackendError, match="TRITON_INTERPRET=1 is not set"):
        quantize_rows(torch.ones(2, 16), backend="triton")
