"""CUDA graphs of ``encode`` on a GPU; ``test_graphs.py`` has what needs none."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from graphing import BATCHES, assert_right, eager, graphed, packed
from stacks import new_stack

from mtllm_fast import MTLLM
from mtllm_fast.models import graphs
from mtllm_fast.testing.tolerance import relative_error

GPU = torch.device("cuda")


@pytest.fixture
def on_gpu():
    def make(dtype: torch.dtype = torch.bfloat16) -> MTLLM:
        return new_stack(dtype=dtype).to(GPU).eval()

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_equals_eager(on_gpu, dtype, fused):
    model = on_gpu(dtype)
    with torch.no_grad():
        model.nllb_encoder.embed_tokens.weight[0] = float("nan")  # what dead tokens are made of
    if fused:
        model.fuse()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for output in ("pooled", "tokens"):
        for lengths in BATCHES:
            assert_right(model, *lengths, output=output, tolerance=tolerance)
    count = len(model.graphs)
    for lengths in BATCHES:
        assert_right(model, *lengths, tolerance=tolerance)
    assert len(model.graphs) == count


@pytest.mark.gpu
def test_gpu_results_are_the_same_bits_every_time(on_gpu):
    model = on_gpu()
    first = graphed(model, 40, 9)
    for _ in range(3):
        graphed(model, 100, 2)
        assert torch.equal(graphed(model, 40, 9), first)


@pytest.mark.gpu
def test_gpu_threads_on_streams_of_their_own(on_gpu):
    model = on_gpu(torch.float32)
    jobs = [(3 + i, 2 + i % 7) for i in range(12)] * 8

    def work(lengths: tuple[int, ...]) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = graphed(model, *lengths)
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, jobs))
    for lengths, states in zip(jobs, found, strict=True):
        assert relative_error(states, eager(model, *packed(*lengths))) < 1e-5


@pytest.mark.gpu
def test_gpu_memory_is_bounded_and_comes_back(on_gpu):
    model = on_gpu()
    eager(model, *packed(1000))
    graphed(model, 8)  # cuBLAS keeps a workspace for the stream of all captures
    model.release_graphs()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    one = 0
    for tokens in graphs.TOKENS[::-1]:
        for lengths in [(tokens,), (tokens // 4,) * 4, (tokens // 32,) * 32]:
            graphed(model, *lengths)
        one = one or torch.cuda.memory_reserved() - before
    assert torch.cuda.memory_reserved() - before <= 2 * one + 2**24  # the largest comes first, the others fit into it
    model.release_graphs()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**24


@pytest.mark.gpu
def test_gpu_a_batch_waits_for_nothing(on_gpu):
    model = on_gpu()
    graphed(model, 40)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(model, 41)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_one_text_is_faster():
    model = MTLLM.from_pretrained("tiny", dtype=torch.bfloat16, device_map="cuda")

    def seconds(switch: bool) -> float:
        found = []
        for _ in range(20):
            start = time.perf_counter()
            model.encode("Habari ya dunia", "swh_Latn", cuda_graphs=switch).cpu()
            found.append(time.perf_counter() - start)
        return sorted(found)[10]

    seconds(True)  # captures
    assert seconds(True) < seconds(False)
