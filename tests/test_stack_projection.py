"""``stack_projection``: both forms and every backend against float64, its numerics on hard inputs, and its contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stack_cases import KINDS, attention, problem, random_weights, rope_tables, states
from torch import Tensor

from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops.stack_projection import StackWeights, reference, stack_projection
from mtllm_fast.ops.stack_projection.composite import (
    SplitProduct,
    absorb,
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
