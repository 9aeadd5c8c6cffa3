"""Packing and unpacking, and the masks that are refused."""

from __future__ import annotations

import pytest
import torch

from mtllm_fast.packing import (
    PackedLayout,
    pack_token_ids,
    packing_from_mask,
    position_ids_from_cu_seqlens,
    right_padded,
)

LEFT_RIGHT_FULL = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]])


def test_round_trip_keeps_real_tokens_and_zeroes_padding():
    packing = packing_from_mask(LEFT_RIGHT_FULL)
    grid = torch.randn(3, 4, 5)
    packed = packing.pack(grid)
    assert packed.shape == (7, 5)
    assert packing.cu_seqlens.tolist() == [0, 2, 3, 7]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.position_ids.tolist() == [0, 1, 0, 0, 1, 2, 3]
    assert packing.max_seqlen == 4
    assert torch.equal(packing.unpack(packed), grid * LEFT_RIGHT_FULL[..., None])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_dtypes(dtype):
    assert packing_from_mask(LEFT_RIGHT_FULL.to(dtype)).cu_seqlens.tolist() == [0, 2, 3, 7]


def test_empty_batch():
    packing = packing_from_mask(torch.ones(0, 4, dtype=torch.int64))
    assert packing.cu_seqlens.tolist() == [0]
    assert packing.unpack(torch.empty(0, 3)).shape == (0, 4, 3)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1]], "row 0 has padding between real tokens"),
        ([[1, 1, 1], [0, 0, 0]], "row 1 has no real token"),
        ([[1, 2, 1]], "must hold 0 and 1"),
        ([1, 1], r"must be \[N, L\]"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        packing_from_mask(torch.tensor(mask))


def test_fractions_in_a_float_mask_are_refused():
    with pytest.raises(ValueError, match="must hold 0 and 1"):
        packing_from_mask(torch.tensor([[1.0, 0.5]]))


def test_positions_restart_in_every_sentence_even_empty_ones():
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert position_ids_from_cu_seqlens(cu_seqlens, 5).tolist() == [0, 1, 2, 0, 1]


def test_right_padded_inverts_packing():
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    layout = PackedLayout(cu_seqlens=cu_seqlens, position_ids=position_ids_from_cu_seqlens(cu_seqlens, 5), max_seqlen=3)
    packed = torch.arange(1, 6)
    assert right_padded(layout).unpack(packed).tolist() == [[1, 2, 0], [3, 4, 5]]


def test_gradients_flow_both_ways():
    packing = packing_from_mask(LEFT_RIGHT_FULL)
    grid = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x) ** 2), (grid,))


def test_the_plan_of_a_traced_graph_gives_the_same_padded_result():
    """Under torch.compile nothing is read from the mask: static size, padding in a dead tail."""

    def round_trip(mask, grid):
        packing = packing_from_mask(mask)
        return packing.unpack(packing.pack(grid) * 2), packing.cu_seqlens

    grid = torch.randn(3, 4, 5)
    compiled = torch.compile(round_trip, fullgraph=True, backend="eager")
    for got, want in zip(compiled(LEFT_RIGHT_FULL, grid), round_trip(LEFT_RIGHT_FULL, grid), strict=True):
        assert torch.equal(got, want)


def test_pack_token_ids():
    packed = pack_token_ids([[5], [], [6, 7]])
    assert packed["input_ids"].tolist() == [5, 6, 7]
    assert packed["cu_seqlens"].tolist() == [0, 1, 1, 3]
