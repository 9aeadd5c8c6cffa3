"""``lora_linear``: every backend against float64 with its own masks, the masks, and its contract with torch."""

from __future__ import annotations

import pytest
import torch
from lora_cases import SEED, SIZES, Case, saved_tensors
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from mtllm_fast.bench.counting import counted_work
from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.core.registered import touched_bytes
from mtllm_fast.ops import explain
from mtllm_fast.ops.lora_linear import Adapter, Gated, RmsNormed, api, lora_linear, schema
from mtllm_fast.ops.lora_linear.columns import merged
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate, relative_error

BACKENDS = ["reference", "triton"]


def check(case: Case, device: torch.device, backend: str, dropout: float = 0.0, **options) -> None:
    with poisoned_memory():
        fast = case.fast(dropout, backend=backend, **options)
    rules = INTERPRETED_RULES if backend == "triton" and device.type == "cpu" else RULES
    assert_as_accurate(fast, case.peft(dropout), case.double().peft(dropout), rules)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "adapters"), DTYPES, ids=str)
def test_against_float64(backend, dtype, adapters, device):
    check(Case(device, dtype, adapters), device, backend, 0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_dropout(backend, device):
    check(Case(device), device, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", [(1,), (0, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_projections_without_an_adapter(backend, missing, bias, device):
    check(Case(device, missing=missing, bias=bias), device, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_separate_weights_and_strided_rows(backend, device):
    case = Case(device, bias=True, row_stride=108)
    check(case, device, backend, 0.2, weight=case.weights)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.bfloat16), ("triton", torch.float16)],  # the interpreter truncates to bfloat16
    ids=str,
)
@pytest.mark.parametrize("kind", ["rms_norm", "swiglu"])
def test_x_is_computed_again_from_its_source(backend, kind, dtype, device):
    case = Case(device, dtype)
    one, two = (torch.randn(75, 100, generator=torch.Generator().manual_seed(s)).to(device, dtype) for s in (1, 2))
    if kind == "rms_norm":
        rstd, gain = torch.rsqrt(one.float().square().mean(1) + 1e-5), two[0]
        source = RmsNormed(one, rstd, gain)
        x = (one.float() * rstd[:, None] * gain.float()).to(dtype)
    else:
        both = torch.cat((one, two), 1)  # strided rows
        source = Gated(both[:, :100], both[:, 100:])
        x = (F.silu(one.float()) * two.float()).to(dtype)
    case.x = x.requires_grad_()
    check(case, device, backend, 0.2, source=source)
    kept = saved_tensors(lambda: case.fast(0.2, source=source, backend=backend))
    assert not any(t.data_ptr() == case.x.data_ptr() for t in kept)


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_tokens(backend, tokens, device, monkeypatch):
    if backend == "triton":
        from mtllm_fast.ops.lora_linear import triton_backend

        monkeypatch.setattr(triton_backend, "_LEAST_TOKENS", 90)  # so that 300 tokens are three ranges
        assert triton_backend.token_ranges(300, 4) == (3, 100)
    case = Case(device, tokens=tokens)
    if tokens:
        check(case, device, backend, 0.1)
    else:
        assert all(not t.any() for name, t in case.fast(0.1, backend=backend).items() if "grad" in name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_repeat(backend, device):
    one, two = (Case(device, tokens=20, width=40).fast(0.3, backend=backend) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_needs_a_gradient_gets_one(backend, device):
    small = {"tokens": 20, "width": 40}
    both = Case(device, **small).fast(0.3, backend=backend)
    case = Case(device, **small)
    case.x.requires_grad_(False)
    named = {k: v for k, v in case.leaves().items() if k != "x"}
    y = lora_linear(case.x, case.merged, case.adapters, dropout=0.3, seed=SEED, backend=backend)
    for name, grad in zip(named, torch.autograd.grad(y, [*named.values()], case.grads), strict=True):
        assert torch.equal(grad, both[f"grad of {name}"])
    case = Case(device, **small)
    for tensor in case.leaves().values():
        tensor.requires_grad_(tensor is case.x)
    y = lora_linear(case.x, case.merged, case.adapters, dropout=0.3, seed=SEED, backend=backend)
    assert torch.equal(torch.autograd.grad(y, case.x, case.grads)[0], both["grad of x"])
    case = Case(device, **small)
    y = lora_linear(case.x, case.merged, case.adapters, dropout=0.3, seed=SEED, backend=backend)
    (partial,) = torch.autograd.grad(y[1], case.x, case.grads[1])  # the other outputs got no gradient
    assert partial.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan(backend, device):
    case = Case(device, tokens=20, width=40)
    with torch.no_grad():
        case.x[3, 5] = float("nan")
        y = lora_linear(case.x, case.merged, case.adapters, dropout=0.3, backend=backend)
    assert all(t[3].isnan().all() and t[4:].isfinite().all() for t in y)


# Memory and work


def llama_layer(tokens: int = 256) -> dict[str, tuple]:
    """Llama-3.1-8B's four groups of projections, r=16, bf16, on no device: (x, weight, adapters, source)."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def group(x, sizes, source=None):
        rank, width = 16, x.shape[1]
        pairs = [Adapter(empty(rank, width), empty(n, rank)) for n in sizes]
        for tensor in (x, *(t for pair in pairs for t in pair[:2])):
            tensor.requires_grad_()
        return x, empty(sum(sizes), width), pairs, source

    def normed():
        return RmsNormed(empty(tokens, 4096), empty(tokens, dtype=torch.float32), empty(4096))

    gated = Gated(empty(tokens, 14336), empty(tokens, 14336))
    return {
        "qkv": group(empty(tokens, 4096), (4096, 1024, 1024), normed()),
        "o": group(empty(tokens, 4096), (4096,)),
        "gate_up": group(empty(tokens, 4096), (14336, 14336), normed()),
        "down": group(empty(tokens, 14336), (4096,), gated),
    }


def test_what_a_layer_saves_for_the_backward():
    tokens = 256
    groups = llama_layer(tokens)
    weights = {id(t) for _, weight, pairs, _ in groups.values() for t in (weight, *(t for p in pairs for t in p[:2]))}

    def saved(source) -> float:
        """KB a token."""
        kept = saved_tensors(
            lambda: [
                lora_linear(x, weight, pairs, dropout=0.05, seed=SEED, source=given if source else None)
                for x, weight, pairs, given in groups.values()
            ]
        )
        return sum(t.nbytes for t in kept if id(t) not in weights and t is not SEED) / tokens / 1024

    # Residual, attention's output, residual, gate and up; the low-rank states and two rstd; gains.
    assert saved(source=True) == pytest.approx(8 + 8 + 8 + 56 + 0.22 + 0.008, abs=0.1)
    # With the rotated q, k and v (12) that attention keeps: a whole layer.
    assert saved(source=True) + 12 <= 95
    assert saved(source=False) == pytest.approx(8 + 8 + 8 + 28 + 0.22, abs=0.1)


def test_what_a_layer_launches_and_moves():
    tokens = 256
    totals = {"forward": [0, 0.0], "backward": [0, 0.0]}
    for x, weight, pairs, source in llama_layer(tokens).values():
        sizes = [pair.b.shape[0] for pair in pairs]
        inputs, _ = api._arguments(x, weight, pairs, sizes, None, 0.05, SEED, source, "auto")
        _, weights, _, a, b, scales, at, dropout, seed, kept, kind, backend = inputs
        y, low = schema.forward_op(*inputs)
        rest = (scales, at, dropout, seed, kind, True, True, backend)
        work = {
            "forward": counted_work(lambda inputs=inputs: schema.forward_op(*inputs)),
            "backward": counted_work(
                lambda y=y, kept=kept or [x], low=low, w=weights, a=a, b=b, rest=rest: schema.backward_op(
                    torch.empty_like(y), kept, low, w, a, b, *rest
                )
            ),
        }
        products = touched_bytes(x, y, weight)  # of the base: not LoRA's
        parameters = touched_bytes(a, b)
        for name, done in work.items():
            totals[name][0] += done.launches
            totals[name][1] += (done.bytes - products - parameters) / tokens / 1024
        width = sum(sizes)
        low_rank = sum(2 * tokens * r * (x.shape[1] + n) for r, n in zip([16] * len(sizes), sizes, strict=True))
        assert work["forward"].flops == 2 * tokens * x.shape[1] * width + low_rank
        assert work["backward"].flops == 2 * tokens * x.shape[1] * width + 2 * low_rank
    # docs/lora.md adds the rest of a layer to these, and says what PEFT's modules take.
    assert totals["forward"][0] == 8
    assert totals["backward"][0] == 16
    assert totals["forward"][1] == pytest.approx(220, abs=1)
    assert totals["backward"][1] == pytest.approx(353, abs=40)  # at few tokens the adapters and gains show


def test_gradients_side_by_side_are_taken_as_they_lie():
    buffer = torch.randn(5, 12)
    pieces = buffer[:, 1:11].split((3, 4, 3), dim=1)
    together = merged(pieces, (3, 4, 3))
    assert together.data_ptr() == buffer[:, 1:].data_ptr()
    assert torch.equal(together, buffer[:, 1:11])
    apart = (pieces[0], pieces[1].contiguous(), None)
    assert torch.equal(merged(apart, (3, 4, 3)), torch.cat((buffer[:, 1:8], torch.zeros(5, 3)), 1))
    assert torch.equal(merged((pieces[1], pieces[0]), (4, 3)), torch.cat((pieces[1], pieces[0]), 1))
    assert merged(pieces[:1], (3,)) is pieces[0]


# The contract with torch


def test_gradcheck():
    case = Case("cpu", tokens=3, width=5, missing=(1,)).double()
    leaves = case.leaves()

    def outputs(x, a0, b0, a2, b2):
        adapters = [Adapter(a0, b0, 0.5), None, Adapter(a2, b2, 2.0)]
        return lora_linear(x, case.merged, adapters, sizes=SIZES, dropout=0.3, seed=SEED)

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), fast_mode=True)


def arguments(case: Case, dropout: float, backend: str = "auto") -> tuple:
    a, b = zip(*((adapter.a, adapter.b) for adapter in case.adapters), strict=True)
    at = [0, SIZES[0], SIZES[0] + SIZES[1]]
    return (case.x, [case.merged], None, [*a], [*b], [0.5, 1.0, 1.5], at, dropout, SEED, [], "x", backend)


@pytest.mark.parametrize("trained", ["everything", "x", "adapters", "nothing"])
def test_opcheck(trained, device):
    case = Case(device, tokens=9, width=16)
    for name, tensor in case.leaves().items():
        tensor.requires_grad_(trained == "everything" or (trained != "nothing" and (name == "x") == (trained == "x")))
    inputs = arguments(case, 0.3)
    torch.library.opcheck(schema.forward_op, inputs)
    with torch.no_grad():
        low = schema.launch_forward(*inputs)[1]
        x, weights, _, a, b, scales, at, dropout, seed, _, kind, backend = inputs
        a, b = [t.detach() for t in a], [t.detach() for t in b]
        grad = torch.randn(9, sum(SIZES), device=device)
        backward = (grad, [x.detach()], low, weights, a, b, scales, at, dropout, seed, kind, True, True, backend)
        torch.library.opcheck(schema.backward_op, backward)


def test_compiles_once_for_all_batches(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def project(x, weight, adapters, seed):
        return lora_linear(2 * x, weight, adapters, dropout=0.3, seed=seed)

    graphs = []
    for tokens in (5, 9, 70):
        case = Case(device, tokens=tokens, width=16)
        compiled = case.run(project(case.x, case.merged, case.adapters, SEED))
        eager = case.run(lora_linear(2 * case.x, case.merged, case.adapters, dropout=0.3, seed=SEED))
        for name, value in eager.items():
            assert relative_error(compiled[name], value) < 1e-6, name
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3, "another batch must not recompile"


def test_compiled_code_draws_new_masks_on_every_call(device):
    torch.compiler.reset()
    case = Case(device, tokens=9, width=16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def project():
        return lora_linear(case.x, case.merged, case.adapters, dropout=0.5)[0]

    torch.manual_seed(0)
    first, second = project(), project()
    torch.manual_seed(0)
    assert torch.equal(project(), first)
    assert not torch.equal(first, second)


def test_second_gradient_is_refused():
    case = Case("cpu")
    y = lora_linear(case.x, case.merged, case.adapters)
    (grad,) = torch.autograd.grad(y[0].square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_changes_nothing(device):
    expected = Case(device).fast(0.3)
    with torch.autocast(device.type, torch.bfloat16):
        found = Case(device).fast(0.3)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


CASE = Case("cpu", tokens=4, width=8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(1, 4, 8)}, ValueError, r"lora_linear: x must be \[T, K\], got \[1, 4, 8\]"),
        ({"x": torch.ones(4, 8).int()}, TypeError, "x must be float32 or .*, got int32"),
        ({"weight": torch.ones(9, 8)}, ValueError, r"weight must be \[260, 8\], got \[9, 8\]"),
        ({"weight": CASE.merged.bfloat16()}, TypeError, "weight must be float32, got bfloat16"),
        ({"weight": CASE.merged.requires_grad_()}, ValueError, "weight must be frozen"),
        ({"weight": CASE.weights[:2]}, ValueError, "adapters must be one or None for each of the 2 projections"),
        ({"adapters": [None] * 3, "sizes": SIZES}, ValueError, "not all None"),
        (
            {"adapters": [*CASE.adapters[:2], None]},
            ValueError,
            "sizes must be the projections' widths where one has no",
        ),
        ({"sizes": (150, 70, 41)}, ValueError, r"weight must be \[261, 8\]"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \[260\], got \[3\]"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"dropout": 0.1, "seed": torch.ones(2)}, ValueError, r"seed must be \[1\], got \[2\]"),
        ({"dropout": 0.1, "seed": torch.ones(1)}, TypeError, "seed must be int64, got float32"),
        ({"source": 1}, TypeError, "source must be RmsNormed, Gated or None, got int"),
        (
            {"source": Gated(torch.ones(3, 8), torch.ones(4, 8))},
            ValueError,
            r"source.gate must be \[4, 8\], got \[3, 8\]",
        ),
        ({"backend": "cuda"}, UnsupportedBackendError, "no backend 'cuda'; there are auto, triton, reference"),
    ],
)
def test_bad_input(changes, error, message):
    given = {"x": CASE.x, "weight": CASE.merged, "adapters": CASE.adapters, **changes}
    with pytest.raises(error, match=message):
        lora_linear(**given)


def test_bad_adapters():
    good = CASE.adapters[0]
    for bad, error, message in (
        (Adapter(torch.ones(2, 7), good.b), ValueError, r"adapters\[0\].a must be \[r, 8\], got \[2, 7\]"),
        (Adapter(good.a, torch.ones(150, 3)), ValueError, r"adapters\[0\].b must be \[150, 16\], got \[150, 3\]"),
        (Adapter(good.a[:0], good.b[:, :0]), ValueError, r"adapters\[0\] must have a rank of at least 1"),
        (Adapter(good.a, good.b.bfloat16()), TypeError, r"adapters\[0\].b must be float32, got bfloat16"),
    ):
        with pytest.raises(error, match=message):
            lora_linear(CASE.x, CASE.merged, [bad, *CASE.adapters[1:]], sizes=SIZES)


def test_kernels_refuse_what_they_cannot_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    double = CASE.double()
    with pytest.raises(UnsupportedBackendError, match=r"something is float64\. What would work: reference"):
        lora_linear(double.x, double.merged, double.adapters, backend="triton")
    wide = [Adapter(torch.ones(65, 8), torch.ones(260, 65))]
    with pytest.raises(UnsupportedBackendError, match="up to 3 adapters of rank 64"):
        lora_linear(CASE.x, CASE.merged, wide, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert explain("lora_linear", CASE.x, CASE.merged, CASE.adapters).chosen == "reference"
