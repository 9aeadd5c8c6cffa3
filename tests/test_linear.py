"""A Linear and what follows it: oneDNN's one pass against the modules, and when it must not be taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mtllm_fast.core import onednn
from mtllm_fast.models import linear as linear_module
from mtllm_fast.models.linear import linear
from mtllm_fast.models.norms import norm as apply_norm
from mtllm_fast.testing.tolerance import assert_as_accurate

EPILOGUES = {
    "bare": {},
    "silu": {"activation": ACT2FN["silu"]},
    "relu": {"activation": nn.ReLU()},
    "gelu": {"activation": nn.GELU()},  # oneDNN is not asked for this one
    "times": {"times": True},
    "plus": {"plus": True},
}


def composed(module, x, activation=None, times=None, plus=None):
    y = module(x)
    y = y if activation is None else activation(y)
    y = y if times is None else y * times
    return y if plus is None else y + plus


def case(dtype, bias, tokens=37, name="bare"):
    torch.manual_seed(0)
    module = nn.Linear(48, 80, bias=bias, dtype=dtype)
    x = torch.randn(tokens, 48, dtype=dtype)
    operand = torch.randn(tokens, 80, dtype=dtype)
    return module, x, {k: operand if v is True else v for k, v in EPILOGUES[name].items()}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_as_accurate_as_the_modules(dtype, bias, name):
    module, x, follows = case(dtype, bias, name=name)
    got, plain = linear(module, x, **follows), composed(module, x, **follows)
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in follows.items()}
    truth = composed(module.double(), x.double(), **doubled)
    assert got.dtype == dtype
    assert_as_accurate({"y": got}, {"y": plain}, {"y": truth})


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("name", ["silu", "times", "plus"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_cpu_without_the_instructions_multiplies_in_float32(monkeypatch, dtype, name):
    monkeypatch.setattr(onednn, "product_dtype", lambda dtype: torch.float32)
    module, x, follows = case(dtype, True, name=name)
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in follows.items()}
    got = linear(module, x, **follows)
    expected = linear(module.float(), x.float(), **wide).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@pytest.fixture
def onednn_calls(monkeypatch):
    """How often oneDNN was found able to serve."""
    calls = []
    serves = linear_module.onednn_serves

    def counted(module, x):
        calls.append(serves(module, x))
        return calls[-1]

    monkeypatch.setattr(linear_module, "onednn_serves", counted)
    return calls


def test_onednn_serves_inference_only(onednn_calls):
    module, x, _ = case(torch.bfloat16, True)
    with torch.no_grad():
        linear(module, x)
    linear(module, x).sum().backward()
    assert onednn_calls == [torch.backends.mkldnn.is_available(), False]
    assert module.weight.grad is not None


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
@torch.no_grad()
def test_float32_is_left_to_mkl(onednn_calls):
    module, x, _ = case(torch.float32, True)
    linear(module, x)
    assert onednn_calls == [False]


@torch.no_grad()
def test_what_is_no_plain_linear_is_called_as_it_is(onednn_calls):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x, _ = case(torch.bfloat16, True)
    subclass = Doubled(48, 80, dtype=torch.bfloat16)
    subclass.load_state_dict(module.state_dict())
    torch.testing.assert_close(linear(subclass, x), 2 * module(x))
    module.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(linear(module, x), F.linear(x, module.weight, module.bias) + 1)
    assert onednn_calls == [False, False]


@torch.no_grad()
def test_autocast_decides_the_dtype():
    module, x, follows = case(torch.float32, True, name="silu")
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(module, x, **follows).dtype == torch.bfloat16


@pytest.mark.parametrize("name", EPILOGUES)
@torch.no_grad()
def test_no_rows_and_strided_rows(name):
    module, x, follows = case(torch.float32, True, tokens=0, name=name)
    assert linear(module, x, **follows).shape == (0, 80)
    module, x, follows = case(torch.float32, True, name=name)
    strided = torch.stack((x, x), dim=1)[:, 0]
    torch.testing.assert_close(linear(module, strided, **follows), composed(module, x, **follows), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_wrong_dtype_raises_as_the_module_does():
    module, x, _ = case(torch.float32, True)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(module, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rms_norm_on_the_cpu(dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.uniform_(0.5, 2)
    x = torch.randn(33, 4, 96).mul_(torch.logspace(-4, 3, 33)[:, None, None]).to(dtype)
    truth = F.rms_norm(x.double(), (96,), norm.weight.double(), norm.variance_epsilon)
    assert_as_accurate({"y": apply_norm(norm, x)}, {"y": norm(x)}, {"y": truth})
