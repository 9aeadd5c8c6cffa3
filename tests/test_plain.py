"""Which Linears may be read as their weight and bias."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtllm_fast.models.plain import is_linear, why_not_linear


class Half(torch.Tensor):
    """A tensor subclass, as quantisers make them."""


def as_it_is(module: nn.Linear) -> None:
    pass


def set_again(module: nn.Linear) -> None:
    """As ``torch.nn.utils.prune.remove`` leaves a module: the weight behind the bias."""
    weight = module.weight
    del module.weight
    module.weight = nn.Parameter(weight.detach())


def without_bias(module: nn.Linear) -> None:
    module.bias = None


def hook(module: nn.Linear) -> None:
    module.register_forward_hook(lambda *arguments: None)


def subclass(module: nn.Linear) -> None:
    module.__class__ = type("Other", (nn.Linear,), {})


def shard(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight[:2].detach())


def replicate(module: nn.Linear) -> None:
    """As ``DataParallel`` leaves a module: tensors in place of parameters."""
    for name in ("weight", "bias"):
        tensor = module._parameters.pop(name).detach()
        setattr(module, name, tensor)


def quantise_weight(module: nn.Linear) -> None:
    module._parameters["weight"] = module.weight.detach().as_subclass(Half)


def quantise_bias(module: nn.Linear) -> None:
    module._parameters["bias"] = module.bias.detach().as_subclass(Half)


@pytest.mark.parametrize("change", [as_it_is, set_again, without_bias])
def test_plain(change) -> None:
    module = nn.Linear(4, 8)
    change(module)
    assert why_not_linear(module) is None
    assert is_linear(module)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "is hooked"),
        (subclass, "is a Other of test_plain"),
        (shard, "is sharded or quantised"),
        (replicate, "is sharded or quantised"),
        (quantise_weight, "is sharded or quantised"),
        (quantise_bias, "is sharded or quantised"),
    ],
)
def test_not_plain(change, reason: str) -> None:
    module = nn.Linear(4, 8)
    change(module)
    assert why_not_linear(module) == reason
    if change not in (shard, quantise_bias):  # which each product has no time to look for
        assert not is_linear(module)
