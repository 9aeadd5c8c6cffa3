"""Memory of large CPU temporaries: used again when nobody looks at it any more, never before, and given back."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from mtllm_fast import MTLLM
from mtllm_fast.core import buffers
from mtllm_fast.core.buffers import SMALLEST, empty, reused
from mtllm_fast.models import linear as linears
from mtllm_fast.testing.inputs import cu_seqlens_of

FLOATS = SMALLEST // 4


def test_memory_is_used_again_once_its_last_view_is_gone() -> None:
    with reused():
        first = empty(2, FLOATS)
        place, view = first.data_ptr(), first[1, 5:]
        del first
        other = empty(2, FLOATS)
        assert other.data_ptr() != place, "a view still looked at it"
        view.fill_(7.0)
        other.fill_(8.0)
        assert (view == 7).all()
        del view
        assert empty(2, FLOATS).data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8], ids=str)
def test_a_block_serves_other_shapes_and_dtypes(dtype: torch.dtype) -> None:
    with reused():
        place = empty(8, FLOATS).data_ptr()
        count = 7 * FLOATS * 4 // dtype.itemsize
        tensor = empty(count // 16, 16, dtype=dtype)
        assert tensor.data_ptr() == place
        assert (tensor.dtype, tensor.shape) == (dtype, (count // 16, 16))
        assert tensor.is_contiguous()
        assert tensor._base is None, "a view could not be saved by an autograd.Function"


def test_a_block_much_too_large_is_left_alone() -> None:
    with reused():
        place = empty(8, FLOATS).data_ptr()
        assert empty(2, FLOATS).data_ptr() != place


def test_small_tensors_and_others_outside_are_torch_s_own() -> None:
    with reused():
        small = empty(FLOATS - 1)
        assert small.untyped_storage().resizable()
    assert not buffers.is_active()
    assert empty(2, FLOATS).untyped_storage().resizable()


def test_free_memory_is_bounded() -> None:
    """Ever larger requests, each alone: what was ever in use is one block, so no more than two are held."""
    with reused():
        for size in range(1, 40):
            tensor = empty(size, 2 * FLOATS)
            del tensor
            pool = buffers._active.pool
            assert pool.in_use == 0
            assert sum(block.nbytes for block in pool.free) <= 2 * pool.most


def test_memory_is_given_back_at_the_end_of_the_outermost() -> None:
    with reused():
        with reused():
            kept, gone = empty(FLOATS), empty(FLOATS)
            del gone
        pool = buffers._active.pool
        assert len(pool.free) == 1, "the inner one ends nothing"
    assert pool.free == []
    freed = weakref.ref(pool)
    del pool
    assert freed() is None, "not even what is in use keeps it"
    kept.fill_(1.0)
    assert (kept == 1).all()


def test_an_exception_ends_it() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), reused():
        raise RuntimeError("on purpose")
    assert not buffers.is_active()


def test_threads_have_memory_of_their_own() -> None:
    seen = []
    with reused():
        place = empty(FLOATS).data_ptr()
        thread = threading.Thread(target=lambda: seen.append(buffers.is_active()))
        thread.start()
        thread.join()
        assert seen == [False]
        assert empty(FLOATS).data_ptr() == place


def _packed(model: MTLLM, lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, model.nllb_encoder.config.vocab_size - 300, (sum(lengths),))
    return {"input_ids": ids, "cu_seqlens": cu_seqlens_of(lengths)}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_forward_has_the_same_bits(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    """Every block is filled with NaN when it is lent, so a reader of what the last tenant left would show."""
    model = MTLLM.from_pretrained("tiny").eval()
    inputs = _packed(model, [40] * 50 + [3, 200])
    lent = 0

    def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        nonlocal lent
        tensor = real(*shape, dtype=dtype)
        if buffers.is_active():
            lent += 1
            tensor.fill_(float("nan") if dtype.is_floating_point else 77)
        return tensor

    real = buffers.empty
    with torch.set_grad_enabled(grad):
        with monkeypatch.context() as patch:
            patch.setattr(buffers, "is_active", lambda: False)
            patch.setattr(buffers, "reused", lambda: torch.no_grad())
            expected = model(**inputs)
        monkeypatch.setattr(buffers, "empty", poisoned)
        found = model(**inputs)
    assert (lent > 0) == (not grad)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=0)


def test_states_that_are_kept_stay_what_they_were() -> None:
    """All hidden states of two forwards within one ``reused()``, and what a hook has kept."""
    model = MTLLM.from_pretrained("tiny").eval()
    kept: list[torch.Tensor] = []
    handle = model.llm2vec.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: kept.extend(args))
    first, second = (_packed(model, [length] * 40) for length in (50, 60))
    with torch.no_grad(), reused():
        out = model(**first, output_hidden_states=True)
        copies = [state.clone() for state in (*out.hidden_states, *out.encoder_hidden_states, kept[0])]
        states = [*out.hidden_states, *out.encoder_hidden_states, kept[0]]
        model(**second, output_hidden_states=True)
    handle.remove()
    assert len(kept) == 2
    for state, copy in zip(states, copies, strict=True):
        torch.testing.assert_close(state, copy, rtol=0, atol=0)


def test_products_are_the_modules_own_bit_for_bit() -> None:
    for bias in (False, True):
        module = torch.nn.Linear(300, 700, bias=bias)
        x = torch.randn(513, 300)
        with torch.no_grad(), reused():
            y = linears.linear(module, x)
            assert not y.untyped_storage().resizable(), "in memory that is used again"
            assert torch.equal(y, module(x))
            assert torch.equal(linears.linear(module, x, activation=torch.nn.ReLU()), module(x).relu())
        assert linears.linear(module, x).requires_grad
