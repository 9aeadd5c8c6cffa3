"""``stack_projection``: both forms and every backend against float64, its numerics on hard inputs, and its contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stack_cases import KINDS, attention, problem, random_weights, rope_tables, states
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.stack_projection import Composite, StackWeights, reference, schema, stack_projection
from mtllm_fast.ops.stack_projection.composite import (
    SplitProduct,
    absorb,
    break_even_tokens,
    building_cost,
    deinterleave,
    interleave,
)
from mtllm_fast.testing.poison import poisoned_memory
from mtllm_fast.testing.tolerance import INTERPRETED_RULES, RULES, assert_as_accurate, relative_error

BACKENDS = ["reference", "triton", "cuda"]
HALVES = [torch.bfloat16, torch.float16]
NAMES = ("x", "q", "k", "v")
# (T, d, D, H, KV, hd): one token; odd sizes; several tiles of few tokens; more than the CUDA kernel's few.
SIZES = [
    (1, 24, 40, 2, 1, 16),
    (33, 40, 80, 3, 1, 24),
    (64, 64, 136, 4, 2, 32),
    (70, 328, 72, 2, 2, 128),
    (9, 16, 24, 1, 1, 256),
]


def optional(weights: StackWeights) -> list[str]:
    return [name for name, value in vars(weights).items() if isinstance(value, Tensor)]


def serves(backend: str, dtype: torch.dtype, weights: StackWeights) -> bool:
    """The CUDA kernels take half precision and no norms of q and k."""
    return backend != "cuda" or (dtype in HALVES and weights.q_norm is None)


def rules(backend: str, device: torch.device):
    return INTERPRETED_RULES if backend == "triton" and device.type == "cpu" else RULES


def inputs(tokens: int, weights: StackWeights, dtype: torch.dtype, device: torch.device, positions: bool = False):
    e = states(tokens, weights.up.shape[1]).to(device, dtype)
    rows = tokens + 5 if positions else tokens
    cos, sin = (table.to(device, dtype) for table in rope_tables(rows, weights.head_dim))
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, rows, (tokens,), generator=generator).to(device) if positions else None
    return e, weights.map(lambda t: t.to(device, dtype)), cos, sin, ids


def double(e: Tensor, weights: StackWeights, cos: Tensor, sin: Tensor, ids: Tensor | None):
    return e.double(), weights.double(), cos.double(), sin.double(), ids


def named(outputs) -> dict[str, Tensor]:
    return dict(zip(NAMES, outputs, strict=True))


def run(e, weights, cos, sin, ids, **options) -> dict[str, Tensor]:
    with torch.no_grad():
        return named(stack_projection(e, weights, cos, sin, position_ids=ids, **options))


def gradients(e, weights, cos, sin, ids, *, frozen: tuple[str, ...] = (), **options) -> dict[str, Tensor]:
    """Of the states and of every weight that is not frozen, for a fixed random gradient of all outputs."""
    names = [name for name in optional(weights) if name not in frozen]
    leaves = {name: getattr(weights, name).detach().clone().requires_grad_() for name in names}
    e = e.detach().requires_grad_("e" not in frozen)
    out = stack_projection(e, replace(weights, **leaves), cos, sin, position_ids=ids, **options)
    generator = torch.Generator().manual_seed(3)
    grads_out = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in out]
    wanted = ({} if "e" in frozen else {"e": e}) | leaves
    return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grads_out), strict=True))


VARIANTS = {
    "llama": {"up_bias": False},
    "biases": {"qkv_biases": True},
    "head norms": {"head_norms": True},
}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(backend, dtype, variant, size, device):
    tokens, d, D, heads, kv_heads, head_dim = size
    weights = random_weights(d, D, heads, kv_heads, head_dim, **VARIANTS[variant])
    if not serves(backend, dtype, weights) or (variant == "head norms" and backend == "triton" and head_dim == 24):
        with pytest.raises(UnsupportedBackendError):
            run(*inputs(tokens, weights, dtype, device), form="absorbed", backend=backend)
        return
    call = inputs(tokens, weights, dtype, device, positions=variant == "biases")
    plain, truth = run(*call, form="unabsorbed"), run(*double(*call), form="unabsorbed")
    mean = states(64, d, seed=9).mean(0).to(device)
    for residual in (False, True):
        composite = absorb(call[1]).rounded(dtype, mean, residual=residual and dtype in HALVES)
        with poisoned_memory():
            fast = run(*call, composite=composite, backend=backend)
        assert_as_accurate(fast, plain, truth, rules(backend, device))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_against_float64(backend, dtype, variant, device):
    weights = random_weights(64, 136, 4, 2, 32, **VARIANTS[variant])
    call = inputs(70, weights, dtype, device, positions=variant == "biases")
    if not serves(backend, dtype, replace(weights, q_norm=None)):
        with pytest.raises(UnsupportedBackendError, match="half precision"):
            gradients(*call, form="absorbed", backend=backend)
        return
    plain, truth = gradients(*call, form="unabsorbed"), gradients(*double(*call), form="unabsorbed")
    with poisoned_memory():
        fast = gradients(*call, form="absorbed", backend=backend)
    assert_as_accurate(fast, plain, truth, rules(backend, device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_forms_are_one_function_and_its_gradient(variant):
    weights = random_weights(6, 10, 2, 1, 4, **VARIANTS[variant])
    e, weights, cos, sin, ids = inputs(5, weights, torch.float64, torch.device("cpu"))
    names = optional(weights)

    def absorbed(e, *tensors):
        return tuple(stack_projection(e, replace(weights, **dict(zip(names, tensors, strict=True))), cos, sin,
                                      position_ids=ids, form="absorbed"))  # fmt: skip

    leaves = [t.clone().requires_grad_() for t in (e, *(getattr(weights, name) for name in names))]
    assert torch.autograd.gradcheck(absorbed, leaves)
    call = inputs(40, random_weights(24, 40, 2, 1, 16, **VARIANTS[variant]), torch.float64, torch.device("cpu"))
    for function in (run, gradients):
        one, other = function(*call, form="absorbed"), function(*call, form="unabsorbed")
        assert max(relative_error(one[name], other[name]) for name in other) < 1e-9


def test_only_what_needs_a_gradient_gets_one():
    """As in stage 1: the encoder's states and the LLM's weights are frozen, the up-projection is trained."""
    call = inputs(20, random_weights(24, 40, 2, 1, 16), torch.float32, torch.device("cpu"))
    everything = gradients(*call, form="absorbed")
    found = gradients(*call, form="absorbed", frozen=("e", "norm", "q", "k", "v"))
    assert list(found) == ["up", "up_bias"]
    assert all(relative_error(found[name], everything[name]) < 1e-6 for name in found)


FULL = {"d": 1024, "D": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}
LENGTH, TOKENS = 64, 128


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_at_full_size_is_better_than_the_modules(kind):
    """q, k and v err no more than the modules', nor does the attention's output, where shared errors survive.

    A composite that is just rounded fails the latter on all but random inputs: its error is the same for all tokens.
    """
    weights, e = problem(kind, TOKENS, **FULL)
    calibration = problem(kind, 256, **FULL, seed=5)[1].to(torch.bfloat16)
    weights, e = weights.map(lambda t: t.to(torch.bfloat16)), e.to(torch.bfloat16)
    cos, sin = (table.to(torch.bfloat16) for table in rope_tables(LENGTH, 128))
    call = (e, weights, cos, sin, torch.arange(TOKENS) % LENGTH)
    truth, plain = run(*double(*call), form="unabsorbed"), run(*call, form="unabsorbed")
    composite = absorb(weights)
    fused = {
        "rounded": composite.rounded(torch.bfloat16, torch.zeros(1024)),
        "corrected": composite.rounded(torch.bfloat16, calibration.float().mean(0)),
        "residual": composite.rounded(torch.bfloat16, calibration.float().mean(0), residual=True),
    }
    attended = attention(*list(truth.values())[1:], LENGTH)

    def errors(out: dict[str, Tensor]) -> list[float]:
        own = attention(*list(out.values())[1:], LENGTH)
        return [relative_error(out[name], truth[name]) for name in NAMES] + [relative_error(own, attended)]

    reference_errors = errors(plain)
    reference_errors[0] *= 1.01  # x is one product in both: only the order of its sums differs
    for name in ("corrected", "residual"):
        found = errors(run(*call, composite=fused[name]))
        assert all(a <= b for a, b in zip(found, reference_errors, strict=True)), (name, found, reference_errors)
    live = errors(run(*call, form="absorbed"))
    assert all(a <= b for a, b in zip(live, reference_errors, strict=True)), (live, reference_errors)
    if kind != "random":
        assert errors(run(*call, composite=fused["rounded"]))[-1] > 3 * reference_errors[-1]


def test_half_precision_products_of_a_cpu_keep_the_bias_exact():
    """What a CPU with half-precision instructions computes: the bias as columns of the weight."""
    generator = torch.Generator().manual_seed(0)
    for dtype in HALVES:
        e, weight, residual = (torch.randn(n, 40, generator=generator).to(dtype) for n in (6, 10, 10))
        residual = residual / 256
        bias = 100 * torch.randn(10, generator=generator)
        truth = e.double() @ (weight.double() + residual.double()).t() + bias.double()
        found = reference._accumulated_in_halves(e, weight, residual, bias)
        assert found.dtype == dtype
        assert (found.double() - truth).abs().max() <= 1.01 * torch.finfo(dtype).eps / 2 * truth.abs().max()


def test_a_product_in_three_halves_and_its_gradients():
    """What stands in for a float32 product on a GPU; here its parts are multiplied in float32."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator) for size in ((40, 300), (300, 50)))
    assert relative_error(SplitProduct.apply(a, b), a.double() @ b.double()) < 2**-16
    a, b = a.requires_grad_(), b.requires_grad_()
    grad = torch.randn(40, 50, generator=generator)
    found = torch.autograd.grad(SplitProduct.apply(a, b), (a, b), grad)
    for one, exact in zip(found, (grad.double() @ b.double().t(), a.double().t() @ grad.double()), strict=True):
        assert relative_error(one, exact) < 2**-8


def test_interleaving_is_undone():
    rows = torch.arange(24.0)[:, None].repeat(1, 2)
    mixed = interleave(rows, 8)
    assert mixed[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(deinterleave(mixed.t(), 8), rows.t())


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_results_repeat_and_do_not_depend_on_other_tokens(backend, device):
    weights = random_weights(24, 40, 2, 1, 16)
    e, weights, cos, sin, _ = inputs(40, weights, torch.float16, device)
    composite = absorb(weights).rounded(torch.float16, e.float().mean(0))
    first, again = (run(e, weights, cos, sin, None, composite=composite, backend=backend) for _ in range(2))
    other = run(torch.cat((e[:20], 2 * e[:20])), weights, cos, sin, None, composite=composite, backend=backend)
    for name in NAMES:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name][:20], other[name][:20])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_no_tokens_and_strided_states(backend, device):
    weights = random_weights(24, 40, 2, 1, 16)
    e, weights, cos, sin, _ = inputs(6, weights, torch.float16, device)
    composite = absorb(weights).rounded(torch.float16, e.float().mean(0))
    empty = run(e[:0], weights, cos[:0], sin[:0], None, composite=composite, backend=backend)
    assert [list(t.shape) for t in empty.values()] == [[0, 40], [0, 2, 16], [0, 1, 16], [0, 1, 16]]
    expected = run(e, weights, cos, sin, None, composite=composite, backend=backend)
    strided = torch.cat((e, e), 1)[:, :24]
    wide_tables = (torch.cat((t, t), 1)[:, :16] for t in (cos, sin))
    found = run(strided, weights, *wide_tables, None, composite=composite, backend=backend)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    for form in ("absorbed", "unabsorbed"):
        grads = gradients(e[:0], weights, cos[:0], sin[:0], None, form=form, backend=backend)
        assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strided_tables_and_positions(backend, device):
    weights = random_weights(24, 40, 2, 1, 16)
    e, weights, cos, sin, ids = inputs(9, weights, torch.float16, device, positions=True)
    composite = absorb(weights).rounded(torch.float16, e.float().mean(0))
    expected = run(e, weights, cos, sin, ids, composite=composite, backend=backend)
    doubled, wide_cos = torch.stack((ids, ids), 1).flatten()[::2], torch.cat((cos, cos), 1)[:, :16]
    found = run(e, weights, wide_cos, sin, doubled, composite=composite, backend=backend)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_a_token_that_is_not_finite_spoils_itself_alone(device):
    e, weights, cos, sin, _ = inputs(40, random_weights(24, 40, 2, 1, 16), torch.bfloat16, device)
    e[7, 3] = float("inf")
    q = run(e, weights, cos, sin, None, form="absorbed")["q"]
    assert not q[7].isfinite().all()
    assert q[:7].isfinite().all()
    assert q[8:].isfinite().all()


def test_opcheck(device):
    weights = random_weights(24, 40, 2, 1, 16, qkv_biases=True).map(lambda t: t.to(device, torch.float32))
    e, weights, cos, sin, ids = inputs(7, weights, torch.float32, device, positions=True)
    wide = absorb(weights)
    differentiable = (e, weights.up, weights.up_bias, wide.weight, wide.bias, wide.qkv_bias)
    tensors = [t.detach().requires_grad_() for t in differentiable]
    arguments = (*tensors[:4], None, *tensors[4:], None, cos, sin, ids, 48, 16, 1e-5, "auto")
    torch.library.opcheck(schema.forward_op, arguments)
    x, qkv, rstd = (t.detach() for t in schema.forward_op(*arguments))
    grads = (torch.randn_like(x), torch.randn_like(qkv))
    torch.library.opcheck(schema.backward_op, (*grads, x, qkv, rstd, wide.qkv_bias, cos, sin, ids, 48, 16, "auto"))


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_compiles_once_for_all_lengths(backend, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weights = random_weights(24, 40, 2, 1, 16)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(e, weights, cos, sin):
        return stack_projection(e, weights, cos, sin, form="absorbed", backend=backend)

    graphs = []
    for tokens in (7, 12, 40, 3):
        e, cast, cos, sin, _ = inputs(tokens, weights, torch.float32, device)
        found = named(compiled(e, cast, cos, sin))
        expected = run(e, cast, cos, sin, None, form="absorbed", backend=backend)
        assert max(relative_error(found[name], expected[name]) for name in NAMES) < 1e-6
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4, "another length must not recompile"


def test_gradients_of_a_compiled_call(device):
    torch.compiler.reset()
    call = inputs(9, random_weights(24, 40, 2, 1, 16), torch.float32, device)

    def loss(e, up, cos, sin):
        return stack_projection(e, replace(call[1], up=up), cos, sin, form="absorbed").q.square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        up = call[1].up.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(call[0], up, call[2], call[3]), up)[0])
    assert relative_error(*grads) < 1e-6


def test_whoever_watches_sees_the_op():
    call = inputs(7, random_weights(24, 40, 2, 1, 16), torch.float32, torch.device("cpu"))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = stack_projection(mode.from_tensor(call[0]), call[1].map(mode.from_tensor),
                                *map(mode.from_tensor, call[2:4]), form="absorbed")  # fmt: skip
    assert [list(t.shape) for t in fake] == [[7, 40], [7, 2, 16], [7, 1, 16], [7, 1, 16]]
    assert all(isinstance(t, torch._subclasses.FakeTensor) for t in fake)


def counted_flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_as_counted_at_full_size():
    with torch.device("meta"):
        weights = random_weights_meta()
        e, cos, sin = torch.empty(512, 1024), torch.empty(512, 128), torch.empty(512, 128)
        composite = Composite(torch.empty(6144, 1024), torch.empty(6144))
    unabsorbed = counted_flops(lambda: stack_projection(e, weights, cos, sin, form="unabsorbed"))
    absorbed = counted_flops(lambda: stack_projection(e, weights, cos, sin, composite=composite))
    assert unabsorbed / absorbed >= 2.7
    assert absorbed == 2 * 512 * 1024 * (4096 + 6144)
    small = inputs(20, random_weights(24, 40, 2, 1, 16), torch.float32, torch.device("cpu"))
    wide = absorb(small[1])
    arguments = (small[0], small[1].up, None, wide.weight, None, wide.bias, None, None, *small[2:4], None, 48, 16, 1e-5)
    with torch.no_grad():
        by_hand = counted_flops(lambda: schema.forward_op(*arguments, "reference"))
        assert by_hand == 2 * 20 * 24 * (40 + 64), "the formula counts what the reference multiplies"


def random_weights_meta() -> StackWeights:
    sizes = {"up": (4096, 1024), "norm": (4096,), "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096)}
    return StackWeights(**{name: torch.empty(size) for name, size in sizes.items()}, head_dim=128, eps=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels that a GPU has change what pays")
def test_auto_absorbs_where_it_pays():
    call = inputs(40, random_weights(24, 48, 2, 1, 16), torch.float32, torch.device("cpu"))
    assert break_even_tokens(24, 48) == 48
    assert building_cost(call[1].q) == 2
    assert "unabsorbed" in str(explain("stack_projection", *call[:4]))
    assert "96 tokens" in str(explain("stack_projection", *call[:4]))
    longer = inputs(96, random_weights(24, 48, 2, 1, 16), torch.float32, torch.device("cpu"))
    assert "absorbed from live weights" in str(explain("stack_projection", *longer[:4]))
    composite = absorb(call[1])
    told = explain("stack_projection", *call[:4], composite=composite)
    assert "absorbed from a composite" in str(told)
    assert told.chosen == "reference"
    assert break_even_tokens(64, 64) == float("inf")


@pytest.mark.parametrize("form", ["absorbed", "unabsorbed"])
def test_autocast_gives_what_modules_give(form, device):
    call = inputs(30, random_weights(24, 40, 2, 1, 16), torch.float32, device)
    truth = gradients(*double(*call), form="unabsorbed")
    with torch.autocast(device.type, torch.bfloat16):
        out = run(*call, form=form)
        fast, plain = gradients(*call, form=form), gradients(*call, form="unabsorbed")
    assert all(t.dtype == torch.bfloat16 for t in out.values())
    assert all(grad.dtype == torch.float32 for grad in fast.values())
    for name in fast:
        assert relative_error(fast[name], truth[name]) <= 1.5 * relative_error(plain[name], truth[name])


def test_inference_tensors_can_feed_a_trained_projection(device):
    call = inputs(8, random_weights(24, 40, 2, 1, 16), torch.float32, device)
    with torch.inference_mode():
        e = call[0].clone()
    up = call[1].up.clone().requires_grad_()
    stack_projection(e, replace(call[1], up=up), *call[2:4], form="absorbed").q.sum().backward()
    assert up.grad is not None


W = random_weights(8, 12, 2, 1, 4).map(Tensor.float)
E, COS, SIN = torch.ones(5, 8), torch.ones(5, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((E[0], W, COS, SIN), {}, ValueError, r"encoder_states must be \[T, d\], got \[8\]"),
        ((E.int(), W, COS, SIN), {}, TypeError, "encoder_states must be float32 or .*, got int32"),
        ((E[:, :6], W, COS, SIN), {}, ValueError, r"weights.up must be \[D, 6\], got \[12, 8\]"),
        ((E.double(), W, COS, SIN), {}, TypeError, "weights.up must be float64, got float32"),
        ((E, replace(W, head_dim=3), COS, SIN), {}, ValueError, "head_dim must be even and at least 2, got 3"),
        ((E, replace(W, head_dim=6), COS, SIN), {}, ValueError, "weights.q has 8 rows, no multiple of head_dim=6"),
        ((E, replace(W, q_norm=COS[0]), COS, SIN), {}, ValueError, "q_norm and weights.k_norm must both"),
        ((E, W, COS[:4], SIN), {}, ValueError, r"cos must be \[5, 4\], got \[4, 4\]"),
        ((E, W, COS, SIN[:4]), {}, ValueError, r"sin must be \[5, 4\], got \[4, 4\]"),
        ((E, W, COS, SIN), {"form": "fast"}, ValueError, "form must be one of 'auto', 'absorbed', 'unabsorbed'"),
        ((E, W, COS, SIN), {"position_ids": torch.arange(4)}, ValueError, r"position_ids must be \[5\], got \[4\]"),
        ((E, W, COS, SIN), {"position_ids": torch.arange(5).int()}, TypeError, "position_ids must be int64, got int32"),
        ((E, W, COS, SIN), {"composite": Composite(E, E)}, ValueError, r"composite.weight must be \[16, 8\]"),
        ((E, W, COS, SIN), {"composite": replace(absorb(W), bias=E[0])}, ValueError, r"composite.bias must be \[16\]"),
        ((E, W, COS, SIN), {"composite": replace(absorb(W), bias=E.half()[0].repeat(2))}, TypeError, "bias must"),
        ((E, W, COS, SIN), {"composite": absorb(W), "form": "unabsorbed"}, ValueError, "takes no composite"),
        ((E, W, COS, SIN), {"form": "absorbed", "backend": "tpu"}, ValueError, "there is no backend 'tpu'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        stack_projection(*arguments, **options)


def test_norms_of_heads_and_a_residual_have_no_gradient_of_their_own():
    call = inputs(6, random_weights(24, 40, 2, 1, 16), torch.float16, torch.device("cpu"))
    composite = absorb(call[1]).rounded(torch.float16, torch.zeros(24), residual=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        stack_projection(call[0].requires_grad_(), *call[1:4], composite=composite)
