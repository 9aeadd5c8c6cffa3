"""What a capture depends on is compared before every replay; each way to change it must show."""

from __future__ import annotations

import copy

import pytest
import torch
from stacks import new_stack
from torch import nn

from mtllm_fast.models.inspection import inspect


@pytest.fixture
def model():
    return new_stack("llama").eval()


def layer(model):
    return model.llm2vec.layers[1]


def replace_parameter(model):
    layer(model).mlp.up_proj.weight = nn.Parameter(layer(model).mlp.up_proj.weight.detach().clone())


def move_data(model):
    weight = layer(model).input_layernorm.weight
    weight.data = weight.data.clone()


def transpose_data(model):
    weight = layer(model).self_attn.q_proj.weight
    weight.data = weight.data.t()


def change_dtype_in_place(model):
    weight = layer(model).self_attn.q_proj.weight.requires_grad_(False)
    weight.data = weight.data.view(torch.int32)


def replace_child(model):
    layer(model).mlp.down_proj = copy.deepcopy(layer(model).mlp.down_proj)


def add_child(model):
    layer(model).mlp.extra = nn.Identity()


def drop_parameter(model):
    model.nllb_encoder.layers[0].fc1.bias = None


def replace_buffer(model):
    rotary = model.llm2vec.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()


def change_class(model):
    layer(model).mlp.gate_proj.__class__ = type("Other", (nn.Linear,), {})


def replace_up_proj(model):
    model.up_proj = copy.deepcopy(model.up_proj)


def replace_encoder(model):
    model.nllb_encoder = copy.deepcopy(model.nllb_encoder)


def replace_llm(model):
    model.llm2vec = copy.deepcopy(model.llm2vec)


def replace_module_without_tensors(model):
    layer(model).mlp.act_fn = nn.GELU("tanh")


CHANGES = [
    replace_up_proj, replace_encoder, replace_llm, replace_module_without_tensors,
    replace_parameter, move_data, transpose_data, change_dtype_in_place, replace_child, add_child, drop_parameter,
    replace_buffer, change_class,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_shows(model, change):
    before = inspect(model)
    assert before.reason is None
    assert before.holds(model)
    change(model)
    assert not before.holds(model)
    after = inspect(model)
    if after.reason is None:
        assert not after.is_same(before)


def nothing(*args):
    return None


def assign_hooks(module):
    module._forward_hooks = {1: nothing}


WATCHED = {
    "dict of hooks": assign_hooks,
    "forward hook": lambda module: module.register_forward_hook(nothing),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(nothing),
    "backward hook": lambda module: module.register_full_backward_hook(nothing),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(nothing),
    "patched forward": lambda module: setattr(module, "forward", module.forward),
    "compiled": lambda module: module.compile(backend="eager"),
}


@pytest.mark.parametrize("how", WATCHED)
@pytest.mark.parametrize("place", ["llm2vec.layers.1.mlp.up_proj", "nllb_encoder.layers.0", "up_proj", "llm2vec"])
def test_whoever_waits_for_a_module_to_be_called_shows(model, how, place):
    before = inspect(model)
    WATCHED[how](model.get_submodule(place))
    assert not before.holds(model)
    assert "hooked, patched or compiled" in inspect(model).reason


def test_edits_in_place_do_not_show(model):
    """A replay reads the weights' live memory."""
    before = inspect(model)
    with torch.no_grad():
        layer(model).mlp.up_proj.weight.mul_(2)
    assert before.holds(model)


def test_an_attribute_more_changes_nothing(model):
    before = inspect(model)
    layer(model).note = "anything"
    assert before.holds(model)
    assert inspect(model).is_same(before)


def test_fusing_shows(model):
    before = inspect(model)
    model.fuse()
    assert not before.holds(model)
    fused = inspect(model)
    assert not fused.is_same(before)
    assert fused.holds(model)
    weight = layer(model).mlp.up_proj.weight
    weight.data = weight.data.clone()
    assert not fused.holds(model)
    model.fuse()
    assert not fused.holds(model)


def test_a_table_that_grows_shows(model):
    from mtllm_fast.models.towers import reserve_positions

    before = inspect(model)
    reserve_positions(model.nllb_encoder, 4096)
    assert not before.holds(model)


def test_modules_that_may_do_anything_are_named(model):
    layer(model).mlp.act_fn = type("Odd", (nn.Module,), {"__module__": "elsewhere"})()
    assert "elsewhere.Odd may do anything" in inspect(model).reason
