"""Dropout of ``lora_linear``: its masks, where their seed comes from, and that a checkpoint repeats them."""

from __future__ import annotations

import math

import pytest
import torch
from lora_cases import SEED, Case
from torch.utils.checkpoint import checkpoint

from mtllm_fast.ops.lora_linear import lora_linear
from mtllm_fast.ops.lora_linear.masks import keep_masks


def test_masks_are_independent_and_of_the_right_share():
    p, shape = 0.3, (400, 500)
    device = torch.device("cpu")
    masks = [
        m.double()
        for seed in (SEED, SEED + 1, -SEED)
        for m in keep_masks(seed, 4, slice(0, shape[0]), shape[1], p, device)
    ]
    error = 4 / math.sqrt(shape[0] * shape[1])  # four standard deviations
    deviation = math.sqrt(p * (1 - p))
    for i, mask in enumerate(masks):
        assert abs(mask.mean() - (1 - p)) < error * deviation
        centred = (mask - (1 - p)) / deviation
        neighbours = [centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[2:] * centred[:-2]]
        neighbours += [centred * (other - (1 - p)) / deviation for other in masks[i + 1 :]]
        assert all(abs(product.mean()) < 1.1 * error for product in neighbours), i
        for axis in (0, 1):  # rows and columns vary as much as binomial numbers do
            assert abs(centred.sum(axis).var() / shape[axis] - 1) < 4 * math.sqrt(2 / shape[1 - axis])


def test_a_mask_does_not_depend_on_which_tokens_are_asked_for():
    device = torch.device("cpu")
    longer, part = (keep_masks(SEED, 2, rows, 3000, 0.1, device)[1] for rows in (slice(0, 200), slice(50, 90)))
    assert torch.equal(longer[50:90], part)


def test_seeds_come_from_torch_s_generator(device):
    case = Case(device)

    def output(**options):
        return lora_linear(case.x, case.merged, case.adapters, dropout=0.5, **options)[0]

    torch.manual_seed(1)
    first, second = output(), output()
    torch.manual_seed(1)
    assert torch.equal(output(), first)
    assert not torch.equal(first, second)
    assert torch.equal(output(seed=SEED), output(seed=SEED))
    state = torch.get_rng_state()
    lora_linear(case.x, case.merged, case.adapters)
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_masks(reentrant, device):
    case = Case(device)

    def loss(x):
        return sum(y.square().sum() for y in lora_linear(x, case.merged, case.adapters, dropout=0.5))

    def gradients(function):
        torch.manual_seed(3)
        for tensor in case.leaves().values():
            tensor.grad = None
        function(case.x).backward()
        return [tensor.grad for tensor in case.leaves().values()]

    expected = gradients(loss)
    found = gradients(lambda x: checkpoint(loss, x, use_reentrant=reentrant))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
