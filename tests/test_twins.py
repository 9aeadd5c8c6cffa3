"""The products in 8 bits in a linear layer's stead: against operands that are rounded by hand, and their corners."""

from __future__ import annotations

import pytest
import torch
from stacks import CPU_SCALES_ROWS, NEEDS_ROW_SCALES
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from mtllm_fast import quantize_rows
from mtllm_fast.core import int8
from mtllm_fast.models.linear import linear
from mtllm_fast.models.plain import TWIN
from mtllm_fast.models.precision import EmulatedFp8Twin, Fp8Twin, Int8Twin
from mtllm_fast.testing.tolerance import relative_error


def new_linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(160, 96, bias=bias, dtype=dtype)
    with torch.no_grad():
        module.weight *= torch.logspace(-3, 2, 96)[:, None]  # what a single scale could not represent
    return module


def new_rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return (torch.randn(37, 160) * torch.logspace(-4, 3, 37)[:, None]).to(dtype)


def integers(rows: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as integers in -levels..levels, with the scale of each."""
    scale = rows.double().abs().amax(1, keepdim=True) / levels
    return (rows.double() / scale).round(), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_int8_is_the_product_of_the_rounded_operands(dtype: torch.dtype, bias: bool) -> None:
    module, x = new_linear(bias, dtype), new_rows(dtype)
    levels = 2 ** (int8.activation_bits() - 1) - 1
    (q_x, scale_x), (q_w, scale_w) = integers(x, levels), integers(module.weight, 127)
    expected = (q_x @ q_w.t()) * scale_x * scale_w.t()
    y = Int8Twin(module)(x)
    assert y.dtype == dtype
    got = y if module.bias is None else y.double() - module.bias.double()
    # A value that lies between two integers may round to the other one in float32: one step in one of 160 products.
    assert relative_error(got, expected) < (1e-3 if dtype == torch.float32 else 5e-3)
    exact = F.linear(x.double(), module.weight.double())
    errors = (got.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.max() < 3 * (1 / levels + 1 / 127) / 12**0.5 * 3.5, "every row has a scale of its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_fp8_is_the_product_of_the_rounded_operands(dtype: torch.dtype, bias: bool) -> None:
    module, x = new_linear(bias, dtype), new_rows(dtype)
    (q_x, scale_x), (q_w, scale_w) = quantize_rows(x), quantize_rows(module.weight)
    rounded = (q_x.double() * scale_x), (q_w.double() * scale_w)
    expected = F.linear(*rounded, module.bias.double() if bias else None)
    twins = (Fp8Twin(module),) if dtype == torch.bfloat16 and CPU_SCALES_ROWS else ()
    for twin in (*twins, EmulatedFp8Twin(module)):
        assert twin(x[:0]).shape == (0, 96)
        y = twin(x)
        assert y.dtype == dtype
        assert relative_error(y, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("kind", [Int8Twin, EmulatedFp8Twin])
@torch.no_grad()
def test_corners_of_a_twin(kind: type) -> None:
    module, x = new_linear(bias=False), new_rows()
    twin = kind(module)
    assert twin(x[:0]).shape == (0, 96)
    assert torch.equal(twin(torch.zeros(3, 160)), torch.zeros(3, 96))
    assert torch.equal(twin(torch.stack((x, x), 1)[:, 0]), twin(x)), "rows may be strided"
    for bad in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[5, 7] = bad
        y = twin(spoilt)
        assert y[5].isnan().all()
        assert torch.equal(y[:5], twin(x)[:5])
    module.weight[3, 4] = float("nan")
    module.weight[8] = 0
    y = kind(module)(x)
    assert y[:, 3].isnan().all()
    assert torch.equal(y[:, 8], torch.zeros(37))
    assert y[:, 4:].isfinite().all()


def test_seven_bits_where_eight_would_saturate() -> None:
    assert int8.activation_bits() in (7, 8)
    weight = torch.full((16, 256), 1.0)
    y = int8.Int8Weight(weight).multiply(torch.ones(4, 256))  # the largest integers everywhere
    torch.testing.assert_close(y, torch.full((4, 16), 256.0))


@pytest.mark.parametrize("name", ["activation", "times", "plus"])
@torch.no_grad()
def test_what_follows_a_product(name: str) -> None:
    module, x = new_linear(), new_rows()
    twin = module.__dict__[TWIN] = Int8Twin(module)
    operand = torch.randn(37, 96)
    follows = {"activation": nn.SiLU()} if name == "activation" else {name: operand}
    y = twin(x)
    expected = {"activation": F.silu(y), "times": y * operand, "plus": y + operand}[name]
    assert torch.equal(linear(module, x, **follows), expected)


@pytest.mark.parametrize(
    "kind",
    [
        Int8Twin,
        EmulatedFp8Twin,
        pytest.param(Fp8Twin, marks=pytest.mark.skipif(not CPU_SCALES_ROWS, reason=NEEDS_ROW_SCALES)),
    ],
)
@torch.no_grad()
def test_compiled_once_for_all_batches(kind: type) -> None:
    torch.compiler.reset()
    module = new_linear(dtype=torch.bfloat16)
    module.__dict__[TWIN] = kind(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: linear(module, x), fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (37, 5, 20):
        x = new_rows(torch.bfloat16)[:rows].clone()
        assert torch.equal(compiled(x), linear(module, x))
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3, "another batch must not recompile"
