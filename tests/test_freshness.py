"""Samples of weights on the host."""

from __future__ import annotations

import pytest
import torch

from mtllm_fast.models.freshness import Sample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(300, 200), (3,), (7, 11), (512,)], ids=str)
def test_an_edit_of_all_values_is_seen_whatever_the_size(dtype, shape):
    tensors = [torch.ones(shape, dtype=dtype), torch.ones(64, 64), torch.empty(0)]
    sample = Sample(tensors)
    assert sample.unchanged()
    tensors[0].data.mul_(3)
    assert not sample.unchanged()
    tensors[0].data.fill_(1)
    assert sample.unchanged()
    tensors[1].data.neg_()
    assert not sample.unchanged()


def test_both_ends_are_looked_at_and_views_see_their_own_part_alone():
    whole = torch.zeros(4, 1000)
    sample = Sample([whole[1:3]])
    whole[0], whole[3] = 1, 1
    assert sample.unchanged()
    for place in ((1, 0), (2, 990)):
        whole[place] = 1
        assert not sample.unchanged()
        whole[place] = 0
    assert Sample([whole.t()]).unchanged()


def test_nothing_on_the_host_is_never_changed():
    assert Sample([]).unchanged()
    assert Sample([torch.empty(5, device="meta")]).unchanged()
