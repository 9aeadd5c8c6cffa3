"""``token_kl_loss`` as torch sees it: registered, differentiated, compiled, counted; Liger's loss; bad input."""

from __future__ import annotations

import math

import pytest
import torch
from test_token_kl_loss import DIVERGENCES, problem, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mtllm_fast.core.errors import UnsupportedBackendError
from mtllm_fast.ops import explain
from mtllm_fast.ops.token_kl_loss import schema, token_kl_loss


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_width", [None, 4])
def test_gradcheck(divergence: str, teacher_width: int | None) -> None:
    inputs = problem(3, 7, 5, dtype=torch.float64, teacher_width=teacher_width)
    teacher_weight = inputs.get("teacher_weight", inputs["weight"].clone())

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"teacher_weight": teacher_weight, "temperature": 1.5, "divergence": divergence, "beta": 0.3}
        return token_kl_loss(hidden, inputs["teacher"], weight, **options)

    assert torch.autograd.gradcheck(loss, (inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()))


def test_second_gradient_is_refused() -> None:
    inputs = problem()
    hidden = inputs["hidden"].requires_grad_()
    loss = token_kl_loss(hidden, inputs["teacher"], inputs["weight"])
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_opcheck(grads: tuple[bool, bool], divergence: str, device: torch.device) -> None:
    inputs = problem(device=device, teacher_width=33)
    hidden, teacher, weight, teacher_weight = inputs.values()
    hidden.requires_grad_(grads[0])
    weight.requires_grad_(grads[1])
    options = (2.0, divergence, 0.3, "mean")
    torch.library.opcheck(schema.forward_op, (hidden, teacher, weight, teacher_weight, *options, "auto"))
    torch.library.opcheck(schema.forward_op, (hidden, hidden.detach(), weight, None, *options, "auto"))
    statistics = torch.zeros(3, hidden.shape[0], device=device)
    tensors = (torch.ones((), device=device), statistics, hidden.detach(), teacher, weight.detach(), teacher_weight)
    torch.library.opcheck(schema.backward_op, (*tensors, *options, *grads, "auto"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiles_once_for_all_batches(divergence: str, device: torch.device) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return 2 * token_kl_loss(hidden, teacher, weight, temperature=2.0, divergence=divergence)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (5, 37, 2, 300):
        inputs = problem(rows, device=device)
        found, expected = run(compiled, **inputs), run(loss, **inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4, "another batch must not recompile"


def test_whoever_watches_sees_the_op() -> None:
    inputs = problem()
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Spy():
        token_kl_loss(*inputs.values())
        run(token_kl_loss, **inputs)
    assert seen.count(schema.forward_op) == 2
    assert schema.backward_op in seen
    with torch._subclasses.FakeTensorMode() as mode:
        fake = token_kl_loss(*(mode.from_tensor(tensor) for tensor in inputs.values()))
        assert isinstance(fake, torch._subclasses.FakeTensor)
    loss = token_kl_loss(*(tensor.to("meta", torch.bfloat16) for tensor in inputs.values()))
    assert (loss.shape, loss.dtype) == ((), torch.float32)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_flops_are_counted(divergence: str) -> None:
    """The formulas say what the launchers do, whose products torch counts."""
    inputs = problem(teacher_width=33)
    with FlopCounterMode(display=False) as told:
        run(token_kl_loss, **inputs, divergence=divergence)
    hidden, teacher, weight, teacher_weight = inputs.values()
    arguments = (hidden, teacher, weight, teacher_weight, 1.0, divergence, 0.5, "mean")
    with FlopCounterMode(display=False) as counted:
        _, statistics = schema.launch_forward(*arguments, "auto")
        schema.launch_backward(torch.ones(()), statistics, *arguments, True, True, "auto")
    assert told.get_total_flops() == counted.get_total_flops() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    inputs = problem(device=device, dtype=dtype)
    expected = run(token_kl_loss, **inputs)
    with torch.autocast(device.type, torch.bfloat16):
        found = run(token_kl_loss, **inputs)
        with FlopCounterMode(display=False):
            watched = run(token_kl_loss, **inputs)
    for result in (found, watched):
        assert all(result[name].dtype == expected[name].dtype for name in expected)
        assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_inference_tensors_can_feed_a_trained_layer(device: torch.device) -> None:
    with torch.inference_mode():
        inputs = problem(device=device)
    hidden = inputs["hidden"].clone().requires_grad_()
    token_kl_loss(hidden, inputs["teacher"], inputs["weight"]).backward()
    assert hidden.grad is not None
    with torch.inference_mode():
        assert token_kl_loss(*inputs.values()).is_inference()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_ligers_loss(divergence: str, temperature: float) -> None:
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    inputs = problem(teacher_width=33)
    beta = 0.0 if divergence == "kl" else 0.3  # at 0 Liger's is KL(p‖q)
    options = {"beta": beta, "temperature": temperature, "compiled": False, "chunk_size": 16}
    liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **options)
    labels = torch.zeros(inputs["hidden"].shape[0], dtype=torch.long)

    def theirs(hidden: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor) -> Tensor:
        return liger(hidden, weight, teacher, teacher_weight, labels)

    expected = run(theirs, **inputs)
    found = run(token_kl_loss, **inputs, divergence=divergence, beta=beta or 0.5, temperature=temperature)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


HIDDEN, WEIGHT = torch.ones(7, 16), torch.ones(20, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": torch.ones(1, 7, 16)}, ValueError, r"hidden_states must be \[N, D\], got \[1, 7, 16\]"),
        ({"hidden_states": [[1.0]]}, TypeError, "token_kl_loss: hidden_states must be a tensor, got list"),
        ({"hidden_states": HIDDEN.int()}, TypeError, "hidden_states must be float32 or .*, got int32"),
        ({"weight": torch.ones(20, 8)}, ValueError, r"weight must be \[V, 16\], got \[20, 8\]"),
        ({"weight": torch.ones(0, 16)}, ValueError, r"weight must be \[V, D\] with V > 0, got \[0, 16\]"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like hidden_states, got meta"),
        ({"teacher_hidden_states": HIDDEN[:5]}, ValueError, r"teacher_hidden_states must be \[7, 16\], got \[5, 16\]"),
        (
            {"teacher_hidden_states": HIDDEN[:, :8]},
            ValueError,
            r"teacher_hidden_states must be \[7, 16\], got \[7, 8\]",
        ),
        ({"teacher_hidden_states": HIDDEN.bool()}, TypeError, "teacher_hidden_states must be float32 .*, got bool"),
        ({"teacher_weight": WEIGHT[:9]}, ValueError, r"teacher_weight must be \[20, 16\], got \[9, 16\]"),
        ({"teacher_weight": WEIGHT.long()}, TypeError, "teacher_weight must be float32 or .*, got int64"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
        ({"divergence": "js"}, ValueError, "divergence must be one of 'kl', 'jsd', got 'js'"),
        ({"beta": 1.0}, ValueError, "beta must be between 0 and 1, both excluded, got 1.0"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
        ({"backend": "triton"}, UnsupportedBackendError, "no backend 'triton'; there are auto, reference"),
    ],
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"hidden_states": HIDDEN, "teacher_hidden_states": HIDDEN, "weight": WEIGHT, **changes}
    with pytest.raises(error, match=message):
        token_kl_loss(**arguments)


def test_explain() -> None:
    assert explain("token_kl_loss", HIDDEN, HIDDEN, WEIGHT).chosen == "reference"
    assert explain("token_kl_loss", HIDDEN, HIDDEN, WEIGHT, backend="cuda").chosen is None
    with pytest.raises(ValueError, match="temperature must be positive"):
        explain("token_kl_loss", HIDDEN, HIDDEN, WEIGHT, temperature=-1.0)
