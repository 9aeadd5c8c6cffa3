"""``embed_tokens``: every backend against float64 and the modules, its corners, and its contract with torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.m2m_100.modeling_m2m_100 import (
    M2M100ScaledWordEmbedding,
    M2M100SinusoidalPositionalEmbedding,
)

from mtllm_fast.bench.counting import counted_work
from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.embed_tokens import embed_tokens, schema
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE, OFFSET, PADDING = 11.3, 2, 1


def plain(ids: Tensor, weight: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """What the modules of an encoder make of it, in the dtype of ``weight``."""
    embedded = torch.nn.functional.embedding(ids, weight, PADDING) * SCALE
    return embedded + table.index_select(0, positions + OFFSET).to(embedded)


def run(
    function, ids: Tensor, weight: Tensor, positions: Tensor, table: Tensor, **options: object
) -> dict[str, Tensor]:
    """Output and gradient for a fixed random gradient."""
    weight = weight.detach().requires_grad_()
    out = function(ids, weight, positions, table, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return {"out": out, "grad of weight": torch.autograd.grad(out, weight, grad)[0]}


def ours(*tensors: Tensor, backend: str = "auto") -> Tensor:
    return embed_tokens(*tensors, scale=SCALE, offset=OFFSET, padding_idx=PADDING, backend=backend)


def inputs(
    tokens: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    id_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, weight, positions, table): first and last rows of both are there, ids repeat, the padding is among them."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, rows = 13, 9
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    positions = torch.arange(tokens) % (rows - OFFSET)
    ids[:2], ids[-2:] = torch.tensor([0, PADDING])[:tokens], vocabulary - 1
    weight, table = (torch.randn(n, width, generator=generator) for n in (vocabulary, rows))
    tensors = (ids.to(id_dtype), weight.to(dtype), positions.to(id_dtype), table.to(table_dtype or dtype))
    return tuple(tensor.to(device) for tensor in tensors)


def check(backend: str, device: torch.device, tokens: int, width: int, **shape: object) -> None:
    """Output and gradient of one backend keep the error rule, with fresh memory full of NaN."""
    ids, weight, positions, table = inputs(tokens, width, device=device, **shape)
    with poisoned_memory():
        found = run(ours, ids, weight, positions, table, backend=backend)
    same_dtype = run(plain, ids, weight, positions, table)
    truth = run(plain, ids, weight.double(), positions, table.double())
    interpreted = backend == "triton" and device.type == "cpu"
    assert_as_accurate(found, same_dtype, truth, INTERPRETED_RULES if interpreted else RULES)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("table_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(
    backend: str, dtype: torch.dtype, table_dtype: torch.dtype | None, device: torch.device
) -> None:
    check(backend, device, 37, 96, dtype=dtype, table_dtype=table_dtype)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("width", [1, 41, 768, 2048, 5000])
def test_widths(backend: str, width: int, device: torch.device) -> None:
    check(backend, device, 5, width)
    check(backend, device, 5, width, table_dtype=torch.bfloat16, id_dtype=torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 768, 1024, 2047, 4096, 16384])
def test_every_compiled_shape(backend: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(backend, device, 3001, width, dtype=dtype, table_dtype=torch.float32)
    check(backend, device, 7, width, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_as_the_modules_of_the_encoder(backend: str, device: torch.device) -> None:
    words = M2M100ScaledWordEmbedding(20, 16, PADDING, embed_scale=4.0).to(device)
    sinusoid = M2M100SinusoidalPositionalEmbedding(30, 16, PADDING).to(device)
    ids = torch.tensor([[5, 6, 19, 2, 7]], device=device)
    expected = words(ids) + sinusoid(ids)
    positions = torch.arange(5, device=device)
    options = {"scale": 4.0, "offset": PADDING + 1, "padding_idx": PADDING, "backend": backend}
    found = embed_tokens(ids[0], words.weight, positions, sinusoid.weights, **options)
    torch.testing.assert_close(found, expected[0])
    (grad,) = torch.autograd.grad(found.sum(), words.weight)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), words.weight)[0])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides_and_no_tokens(backend: str, device: torch.device) -> None:
    ids, weight, positions, table = inputs(6, 16, device=device)
    expected = ours(ids, weight, positions, table, backend=backend)
    apart = (ids.repeat_interleave(2)[::2], weight.t().contiguous().t(), positions[:, None].expand(6, 2)[:, 0])
    assert torch.equal(ours(*apart, table.t().contiguous().t(), backend=backend), expected)
    result = run(ours, ids[:0], weight, positions[:0], table, backend=backend)
    assert result["out"].shape == (0, 16)
    assert torch.equal(result["grad of weight"], torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_stays_in_its_rows(backend: str, device: torch.device) -> None:
    ids, weight, positions, table = inputs(12, 16, device=device)
    weight[12, 3], table[OFFSET, 5] = float("nan"), float("nan")
    out = ours(ids, weight, positions, table, backend=backend)
    there = torch.zeros_like(out, dtype=torch.bool)
    there[ids == 12, 3] = there[positions == 0, 5] = True
    assert torch.equal(out.isnan(), there)


def _changed(tensor: Tensor, value: int) -> Tensor:
    changed = tensor.clone()
    changed[2] = value
    return changed


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        (0, 13, "input_ids must be 0 … 12, got 13"),
        (0, -1, "input_ids must be 0 … 12, got -1"),
        (2, 7, "position_ids must be -2 … 6, got 7"),
        (2, -3, "position_ids must be -2 … 6, got -3"),
    ],
)
def test_ids_out_of_range_on_a_cpu(backend: str, which: int, value: int, message: str) -> None:
    tensors = list(inputs(6, 16))
    tensors[which] = _changed(tensors[which], value)
    if not torch.cuda.is_available() or backend == "reference":
        with pytest.raises(IndexError, match=message):
            ours(*tensors, backend=backend)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(("which", "value"), [(0, 13), (0, -1), (0, 2**40), (2, 7), (2, -3), (2, 2**40)])
def test_the_kernel_reads_nothing_out_of_range(backend: str, which: int, value: int, device: torch.device) -> None:
    from mtllm_fast.ops.embed_tokens import triton_backend

    tensors = list(inputs(6, 16, device=device))
    good = triton_backend.forward(*tensors, SCALE, OFFSET)
    tensors[which] = _changed(tensors[which], value)
    out = triton_backend.forward(*tensors, SCALE, OFFSET)
    assert out[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(out[others], good[others])


def test_gradcheck() -> None:
    ids, weight, positions, table = inputs(6, 5, dtype=torch.float64)

    def embed(weight: Tensor) -> Tensor:
        return embed_tokens(ids, weight, positions, table, scale=SCALE, offset=OFFSET)

    assert torch.autograd.gradcheck(embed, (weight.requires_grad_(),))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad: bool, device: torch.device) -> None:
    ids, weight, positions, table = inputs(6, 16, device=device)
    tensors = (ids, weight.requires_grad_(needs_grad), positions, table)
    torch.library.opcheck(schema.forward_op, (*tensors, SCALE, OFFSET, PADDING, "auto"))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_compiles_once_for_all_batches(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def doubled(*tensors: Tensor) -> Tensor:
        return 2 * ours(*tensors, backend=backend)

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for tokens in (7, 14, 4, 301):
        tensors = inputs(tokens, 16, device=device)
        found, expected = run(compiled, *tensors), run(doubled, *tensors)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4, "another batch must not recompile"


def test_whoever_watches_sees_the_op() -> None:
    tensors = [tensor.to("meta") for tensor in inputs(7, 16)]
    assert ours(*tensors).shape == (7, 16)
    rows = 16 * 4
    # ids and positions, the rows of the tokens read and written, and those of the table
    assert counted_work(lambda: ours(*tensors)) == (0, 1, 2 * 7 * 8 + 2 * 7 * rows + 7 * rows)


def test_autocast_changes_nothing(device: torch.device) -> None:
    tensors = inputs(7, 16, device=device)
    expected = run(ours, *tensors)
    with torch.autocast(device.type, torch.bfloat16):
        found = run(ours, *tensors)
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]) for name in found)


def test_inference_tensors_can_feed_a_trained_layer(device: torch.device) -> None:
    with torch.inference_mode():
        ids, weight, positions, table = inputs(7, 16, device=device)
        assert ours(ids, weight, positions, table).is_inference()
    leaf = weight.clone().requires_grad_()
    ours(ids, leaf, positions, table).sum().backward()
    assert leaf.grad is not None


IDS, WEIGHT, TABLE = torch.tensor([1, 0]), torch.ones(3, 16), torch.ones(8, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": IDS[None]}, ValueError, r"embed_tokens: input_ids must be \[T\], got \[1, 2\]"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32, got float32"),
        ({"position_ids": IDS[:1]}, ValueError, r"position_ids must be \[2\], got \[1\]"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must be \[V, d\], got \[16\]"),
        ({"weight": WEIGHT.int()}, TypeError, "weight must be float32 or .*, got int32"),
        ({"table": TABLE[:, :8]}, ValueError, r"table must be \[P, 16\], got \[8, 8\]"),
        ({"table": TABLE.to("meta")}, ValueError, "table must be on cpu like weight, got meta"),
        ({"table": TABLE.clone().requires_grad_()}, ValueError, "table must be a constant, got one that requires"),
        ({"backend": "cuda"}, UnsupportedBackendError, "no backend 'cuda'; there are auto, triton, reference"),
    ],
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"input_ids": IDS, "weight": WEIGHT, "position_ids": IDS, "table": TABLE, **changes}
    with pytest.raises(error, match=message):
        embed_tokens(**arguments, scale=SCALE, offset=OFFSET)


def test_kernels_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"scale": SCALE, "offset": OFFSET}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedBackendError, match=r"weight or table is float64\. What would work: reference"):
        embed_tokens(IDS, WEIGHT, IDS, TABLE.double(), **options, backend="triton")
    with pytest.raises(UnsupportedBackendError, match="widths from 1 to 16384 and the rows have 0"):
        embed_tokens(IDS, WEIGHT[:, :0], IDS, TABLE[:, :0], **options, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedBackendError, match="TRITON_INTERPRET=1 is not set"):
        embed_tokens(IDS, WEIGHT, IDS, TABLE, **options, backend="triton")
    assert explain("embed_tokens", IDS, WEIGHT, IDS, TABLE, **options).chosen == "reference"
