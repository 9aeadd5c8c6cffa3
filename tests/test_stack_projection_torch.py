"""``stack_projection`` as torch sees it: registered, compiled, counted, autocast; and its bad arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stack_cases import random_weights
from test_stack_projection import NAMES, double, gradients, inputs, named, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from mtllm_fast.ops import explain
from mtllm_fast.ops.stack_projection import Composite, StackWeights, schema, stack_projection
from mtllm_fast.ops.stack_projection.composite import (
    absorb,
    break_even_tokens,
    building_cost,
)
from mtllm_fast.testing.tolerance import relative_error


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
