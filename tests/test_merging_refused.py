"""Projections that are not merged, and are left as they are."""

from __future__ import annotations

import pytest
import torch
from test_merging import attention, flatten
from torch import nn

from mtllm_fast.models.merging import is_merged, merge_projections, merged, split_projections


def hook(module):
    module.k_proj.register_forward_hook(lambda module, args, out: out)


def subclass(module):
    module.k_proj.__class__ = type("Other", (nn.Linear,), {})


def offload(module):
    module.k_proj._hf_hook = object()


def other_dtype(module):
    module.k_proj.double()


def one_bias(module):
    module.k_proj.bias = nn.Parameter(torch.zeros(16))


def tie(module):
    module.v_proj.weight = module.k_proj.weight


def quantise(module):
    module.k_proj.weight = type("Quantised", (nn.Parameter,), {})(module.k_proj.weight.detach())


REASONS = {
    hook: "hooked", subclass: "Other", offload: "hooked", other_dtype: "dtype", one_bias: "some have a bias",
    tie: "tied", quantise: "quantised", flatten: "larger",
}  # fmt: skip


@pytest.mark.parametrize("change", REASONS)
@pytest.mark.parametrize("merge_first", [True, False])
@torch.no_grad()
def test_what_is_not_plain_is_left_as_it_is(change, merge_first):
    module = attention()
    if merge_first:
        assert merge_projections(module).merged == 1
    change(module)
    places = [parameter.data_ptr() for parameter in module.parameters()]
    assert merged([*module.values()]) is None
    report = merge_projections(module)
    assert report.merged == 0
    assert [*report.skipped] == ["q_proj/k_proj/v_proj"]
    assert REASONS[change] in str(report)
    assert not is_merged(module)
    split_projections(module)
    assert places == [parameter.data_ptr() for parameter in module.parameters()]


def test_parameters_side_by_side_in_memory_are_not_merged():
    """As an allocator may place them: one address follows the other, but a view of one must not reach the next."""
    module = attention()
    flat = torch.zeros(64, 24)
    start = 0
    for projection in module.values():
        memory = flat.untyped_storage()[start : start + projection.weight.nbytes]
        start += projection.weight.nbytes
        projection.weight.data = torch.empty(0).set_(memory, 0, projection.weight.shape, (24, 1))
    weights = [projection.weight for projection in module.values()]
    assert weights[1].data_ptr() == weights[0].data_ptr() + weights[0].nbytes
    with torch.no_grad():
        assert merged([*module.values()]) is None


def test_the_same_place_in_another_storage_is_not_merged():
    module = attention()
    merge_projections(module)
    module.k_proj.weight.data = torch.zeros(64, 24)[32:48]
    with torch.no_grad():
        assert merged([*module.values()]) is None
    assert merge_projections(module).merged == 1
    assert is_merged(module)
