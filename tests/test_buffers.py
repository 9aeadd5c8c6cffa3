"""Memory of large CPU temporaries: used again when nobody looks at it any more, never before, and given back."""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from mtllm_fast import MTLLM
from mtllm_fast.bench import peers
from mtllm_fast.core import buffers
from mtllm_fast.core.buffers import SMALLEST, empty, reused
from mtllm_fast.models import linear as linears
from mtllm_fast.models.modeling import MTLLMOutput
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_block_serves_other_shapes_and_dtypes(dtype: torch.dtype) -> None:
    with reused():
        place = empty(8, FLOATS).data_ptr()
        count = 30 * FLOATS // dtype.itemsize  # a little less
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
        kept = [empty(size, 2 * FLOATS) for size in range(1, 10)]
        assert pool.in_use >= sum(tensor.nbytes for tensor in kept)
        assert pool.in_use + sum(block.nbytes for block in pool.free) <= 2 * pool.most


def test_memory_that_is_free_is_released_before_an_allocation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_block(nbytes: int) -> np.ndarray:
        if buffers._active.pool.free:
            raise RuntimeError("out of memory")
        return real(nbytes)

    real = buffers._new_block
    with reused():
        for _ in range(2):
            held = [empty(FLOATS), empty(4 * FLOATS)]
            del held
        monkeypatch.setattr(buffers, "_new_block", new_block)
        assert empty(64 * FLOATS).shape == (64 * FLOATS,)


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
    pools = []

    def work(tensors: list[torch.Tensor]) -> None:
        assert not buffers.is_active()
        with reused():
            pools.append(buffers._active.pool)
            tensors.clear()  # of the other thread's pool

    with reused():
        pool = buffers._active.pool
        tensors = [empty(FLOATS)]
        place = tensors[0].data_ptr()
        thread = threading.Thread(target=work, args=(tensors,))
        thread.start()
        thread.join()
        assert pools[0] is not pool
        assert empty(FLOATS).data_ptr() == place


def _packed(model: MTLLM, lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, model.nllb_encoder.config.vocab_size - 300, (sum(lengths),))
    return {"input_ids": ids, "cu_seqlens": cu_seqlens_of(lengths)}


def _fresh(model: MTLLM, **inputs: object) -> MTLLMOutput:
    """A forward whose temporaries are torch's own."""
    with torch.no_grad(), mock.patch.object(buffers, "reused", contextlib.nullcontext):
        return model(**inputs)


def test_a_forward_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is filled with NaN when it is lent, so a reader of what the last tenant left would show."""
    model = MTLLM.from_pretrained("tiny").eval()
    inputs = _packed(model, [40] * 50 + [3, 200])
    places = []

    def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        tensor = real(*shape, dtype=dtype)
        if not tensor.untyped_storage().resizable():
            places.append(tensor.data_ptr())
        return tensor.fill_(float("nan"))

    expected = _fresh(model, **inputs)
    real = buffers.empty
    monkeypatch.setattr(buffers, "empty", poisoned)
    with torch.no_grad():
        found = model(**inputs)
    assert len(places) > 2 * len(set(places)) > 0, "no block had several tenants"
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    places.clear()
    model(**inputs).pooler_output.sum().backward()
    assert places == [], "autograd keeps what it will read"


def test_states_that_are_kept_stay_what_they_were() -> None:
    """All hidden states of the first of three forwards within one ``reused()``, and what a hook has kept."""
    model = MTLLM.from_pretrained("tiny").eval()
    kept: list[torch.Tensor] = []
    model.llm2vec.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: kept.extend(args))
    first, *others = (_packed(model, [50] * 40) for _ in range(3))
    expected = _fresh(model, **first, output_hidden_states=True)
    with torch.no_grad(), reused():
        found = model(**first, output_hidden_states=True)
        for inputs in others:
            model(**inputs)
    assert torch.equal(kept[0], kept[1])
    for name in ("hidden_states", "encoder_hidden_states"):
        assert all(map(torch.equal, found[name], expected[name]))


def test_states_of_tokens_hold_no_more_than_themselves() -> None:
    model = MTLLM.from_pretrained("tiny")
    texts = ["Habari ya dunia " * count for count in range(1, 30)]
    for state in model.encode(texts, "swh_Latn", output="tokens"):
        assert state.untyped_storage().nbytes() == state.nbytes
        assert state.untyped_storage().resizable()


def test_a_hook_of_all_modules_sees_products() -> None:
    """And what it keeps is not written over."""
    module, x, kept = torch.nn.Linear(300, 700), torch.randn(513, 300), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: kept.append(output))
    try:
        with torch.no_grad(), reused():
            linears.linear(module, x, activation=torch.nn.ReLU())
    finally:
        handle.remove()
    assert kept[0].min() < 0


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


def test_the_comparison_with_fresh_memory_runs_and_changes_nothing_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import fresh_memory

    seen = []
    real = buffers.empty
    monkeypatch.setattr(
        buffers, "empty", lambda *shape, **options: seen.append(buffers.is_active()) or real(*shape, **options)
    )
    with fresh_memory.fresh_memory():
        assert isinstance(peers.reused(), contextlib.nullcontext)
    assert peers.reused is buffers.reused
    out = tmp_path / "record.jsonl"
    monkeypatch.setattr(
        "sys.argv", ["fresh_memory.py", "--size", "tiny", "--sentences", "40", "--rounds", "1", "--out", str(out)]
    )
    fresh_memory.main()
    record = json.loads(out.read_text())
    assert {name: len(rows) for name, rows in record["turns"].items()} == {"used again": 1, "fresh": 1, "bare GEMMs": 1}
    assert set(seen) == {True, False}, "one way within a pool, the other without"
