"""CUDA graphs of ``encode``. Without a GPU a capture is a fake one that runs the forward again on the static inputs."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from graphing import BATCHES, assert_right, eager, graphed, packed
from stacks import new_stack, with_lora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from mtllm_fast import MTLLM
from mtllm_fast.models import graphs
from mtllm_fast.testing.tolerance import relative_error

TEXTS = ["Habari ya dunia", "Wie geht's?", "", "Good morning, everyone, and welcome to the show.", "你好，世界", "Ja."]


class FakeBackend:
    """Keeps count; a replay runs the recorded function again and writes to the same output, as a graph does."""

    def __init__(self, device: torch.device) -> None:
        self.captures = 0
        self.alone = threading.Lock()

    @contextlib.contextmanager
    def turn(self):
        assert self.alone.acquire(blocking=False), "two batches on the same static memory"
        try:
            yield
        finally:
            self.alone.release()

    def upload(self, host, static):
        static.copy_(host)

    def capture(self, forward):
        self.captures += 1
        output = forward()
        return graphs.Captured(lambda: output.copy_(forward()), output)

    def wait(self):
        pass


@pytest.fixture
def made(monkeypatch) -> list[FakeBackend]:
    """The backends that have been made, each with its captures."""
    backends: list[FakeBackend] = []

    def make(device: torch.device) -> FakeBackend:
        backends.append(FakeBackend(device))
        return backends[-1]

    monkeypatch.setitem(graphs.BACKENDS, "cpu", make)
    return backends


@pytest.fixture
def model(made) -> MTLLM:
    return new_stack().eval()


def captures(made: list[FakeBackend]) -> int:
    return sum(backend.captures for backend in made)


@pytest.mark.parametrize("output", ["pooled", "tokens"])
@pytest.mark.parametrize(
    ("family", "fused"), [("llama", False), ("llama", True), ("llama", "fp8-emulated"), ("qwen3", False)]
)
def test_equals_eager(made, family, fused, output):
    model = new_stack(family).eval()
    if fused:
        model.fuse(None if fused is True else fused)
    for lengths in BATCHES:
        assert_right(model, *lengths, output=output)
    assert captures(made) == len(model.graphs) == len({graphs.bucket(sum(b), len(b), max(b)) for b in BATCHES})


@pytest.mark.parametrize("pooling", ["cls", "eos"])
def test_poolings(model, pooling):
    assert_right(model, 5, 3, 60)
    model.config.pooling = pooling
    assert_right(model, 5, 3, 60)


def test_nothing_reads_what_belongs_to_no_sentence(model):
    """Dead tokens are token 0. Were one row of theirs read, the result would be NaN."""
    with torch.no_grad():
        model.nllb_encoder.embed_tokens.weight[0] = float("nan")
    for lengths in [(40,), (60, 50, 3), (129,)]:
        assert_right(model, *lengths)
        assert_right(model, *lengths, output="tokens")


def test_no_length_is_captured_twice(model, made):
    results = {length: graphed(model, length) for length in (*range(1, 129, 21), 128)}
    assert captures(made) == 1
    for length, found in results.items():  # each result has memory of its own
        assert relative_error(found, eager(model, *packed(length))) < 1e-5


def test_a_shape_is_captured_when_it_comes_again(model, made):
    assert graphed(model, 20, at_once=False) is None
    assert captures(made) == 0
    assert graphed(model, 30, at_once=False) is not None
    assert graphed(model, 200, at_once=False) is None
    assert captures(made) == 1


@pytest.mark.parametrize("tokens", range(0, 1025, 41))
def test_every_small_batch_has_a_bucket_that_takes_it(tokens):
    for sentences in (1, 2, 8, 9, 200, 512):
        for longest in (1, 128, 129, tokens):
            shape = graphs.bucket(tokens, sentences, longest)
            assert shape.tokens >= tokens
            assert shape.sentences >= sentences
            assert shape.longest >= min(longest, tokens)
            assert shape.tokens - tokens <= 256


def test_there_are_no_more_shapes_than_graphs():
    shapes = {
        graphs.bucket(t, b, s) for t in range(1, 1025, 3) for b in (1, 8, 64, 512) for s in (1, t) if 2 * b <= t + 1
    }
    assert len(shapes) <= graphs.MAX_GRAPHS


def test_large_batches_run_eagerly(model, made):
    assert graphs.bucket(1025, 1, 1025) is graphs.bucket(1024, 513, 2) is None
    assert graphed(model, 1025) is None
    assert captures(made) == 0


def test_the_least_recently_used_graph_goes(model, made):
    model.graphs = graphs.GraphCache(max_graphs=2)
    for lengths in [(100,), (200,), (101,), (300,), (102,)]:
        assert_right(model, *lengths)
    assert (len(model.graphs), captures(made)) == (2, 3)
    assert_right(model, 201)
    assert captures(made) == 4


def _new_weight(model):
    model.llm2vec.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn(64, 96))


def _other_memory(model):
    model.nllb_encoder.layers[0].fc1.weight.data = torch.randn(64, 32)


def _swapped_layers(model):
    layers = model.llm2vec.layers
    layers[0], layers[1] = layers[1], layers[0]


def _longer_text(model):
    model.nllb_encoder.embed_positions.make_weights(3000, 32, 1)


def _other_attention(model):
    model.set_attn_implementation("sdpa")


CHANGES = {
    "fuse": lambda model: model.fuse(),
    "cast": lambda model: model.to(torch.bfloat16),
    "load": lambda model: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True),
    "train": lambda model: model.train().eval(),
    "new weight": _new_weight,
    "other memory": _other_memory,
    "swapped layers": _swapped_layers,
    "longer text": _longer_text,
    "other attention": _other_attention,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_captured_anew(model, made, change):
    assert_right(model, 20)
    CHANGES[change](model)
    assert_right(model, 21, tolerance=2e-2 if change == "cast" else 1e-5)
    assert captures(made) == 2


def test_unfusing_is_noticed(model, made):
    model.fuse()
    assert_right(model, 20)
    model.unfuse()
    assert len(model.graphs) == 0
    assert_right(model, 20)
    assert captures(made) == 2


def test_edits_in_place_show_without_a_capture(model, made):
    before = graphed(model, 20)
    with torch.no_grad():
        model.llm2vec.layers[0].mlp.up_proj.weight.mul_(2)
    assert_right(model, 20)
    assert relative_error(graphed(model, 20), before) > 1e-3
    assert captures(made) == 1


def test_releasing(model, made):
    assert_right(model, 20)
    model.release_graphs()
    assert len(model.graphs) == 0
    assert_right(model, 20)
    assert captures(made) == 2


def _hooked(model):
    model.llm2vec.layers[0].register_forward_hook(lambda *arguments: None)


def _parametrized(model):
    parametrizations.weight_norm(model.up_proj)


def _patched(model):
    model.llm2vec.layers[0].mlp.act_fn.forward = torch.relu


def _compiled(model):
    model.llm2vec.layers[0]._compiled_call_impl = torch.relu  # as compile() leaves it, without its import


def _quantised(model):
    class Packed(nn.Linear):
        pass

    model.llm2vec.layers[0].mlp.__dict__["_modules"]["up_proj"] = Packed(64, 96, bias=False)


def _sharded(model):
    class Shard(torch.Tensor):
        pass

    proj = model.llm2vec.layers[1].mlp.up_proj
    proj._parameters["weight"] = proj.weight.detach().as_subclass(Shard)


def _split(model):
    model.llm2vec.layers[1].mlp.up_proj.to("meta")


def _dynamic_rope(model):
    model.llm2vec.rotary_emb.rope_type = "dynamic"


OBSTACLES = {
    "hooked": _hooked,
    "hooked, patched or compiled": _patched,
    "a PackedLlamaDecoderLayer is hooked, patched or compiled": _compiled,
    "Packed may do anything": _quantised,
    "is a Shard": _sharded,
    "on cpu and meta": _split,
    "of type 'dynamic'": _dynamic_rope,
    "Parametrized": _parametrized,
    "peft": with_lora,
    "float64": lambda model: model.double(),
    'attn_implementation="eager"': lambda model: model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_cannot_be_captured_says_why(model, made, reason):
    assert model.graphs.why_not(model) is None
    OBSTACLES[reason](model)
    assert reason in model.graphs.why_not(model)
    assert graphed(model, 20) is None
    assert captures(made) == 0


@pytest.mark.parametrize(("family", "reason"), [("gpt2", "no packed layers"), ("mistral", "sliding window of 16")])
def test_families_that_cannot_be_captured(made, family, reason):
    model = new_stack(family).eval()
    assert reason in model.graphs.why_not(model)
    assert graphed(model, 10) is None


def test_autocast_and_modes_run_eagerly(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in model.graphs.why_not(model)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert "mode that watches" in model.graphs.why_not(model)
        assert graphed(model, 20) is None


def test_copies_have_graphs_of_their_own(model, made):
    assert_right(model, 20)
    twin = copy.deepcopy(model)
    assert len(twin.graphs) == 0
    with torch.no_grad():
        twin.up_proj.weight.mul_(2)
    assert_right(twin, 20)
    assert_right(model, 20)
    assert captures(made) == 2


def test_inference_mode_and_no_grad_share_a_graph(model, made):
    with torch.inference_mode():
        assert graphed(model, 20) is not None
    assert_right(model, 21)
    with torch.inference_mode():
        assert graphed(model, 22).is_inference()
    assert captures(made) == 1


def test_a_capture_that_fails_is_not_tried_again(model, made, monkeypatch, caplog):
    def fail(self, forward):
        self.captures += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeBackend, "capture", fail)
    with caplog.at_level(logging.WARNING, logger="mtllm_fast"):
        assert [graphed(model, length, at_once=False) for length in (20, 20, 20, 200, 200)] == [None] * 5
    assert len(caplog.records) == captures(made) == 1
    assert "not permitted" in model.graphs.why_not(model)
    model.release_graphs()
    with pytest.raises(ValueError, match=r"cuda_graphs=True cannot be served.*not permitted"):
        graphed(model, 20)
    monkeypatch.undo()
    monkeypatch.setitem(graphs.BACKENDS, "cpu", FakeBackend)
    model.release_graphs()
    assert_right(model, 20)


def test_threads_take_turns(model, made):
    jobs = [(3 + i, 2 + i % 7) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda lengths: graphed(model, *lengths), jobs))
    for lengths, states in zip(jobs, found, strict=True):
        assert relative_error(states, eager(model, *packed(*lengths))) < 1e-5
    assert captures(made) == 1


@pytest.fixture(scope="module")
def tiny() -> MTLLM:
    return MTLLM.from_pretrained("tiny")


@pytest.fixture
def fresh(tiny):
    yield tiny
    tiny.release_graphs()


@pytest.mark.parametrize("options", [{}, {"normalize_embeddings": True}, {"output": "tokens"}, {"batch_tokens": 20}])
@pytest.mark.parametrize("switch", [None, True])
def test_encode(made, fresh, options, switch):
    want = fresh.encode(TEXTS, "eng_Latn", cuda_graphs=False, **options)
    assert captures(made) == 0
    for _ in range(2):
        found = fresh.encode(TEXTS, "eng_Latn", cuda_graphs=switch, **options)
    assert captures(made) >= 1
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_encode_of_a_training_model(made, fresh):
    want = fresh.encode(TEXTS, "eng_Latn", cuda_graphs=False)
    fresh.train()
    try:
        torch.testing.assert_close(fresh.encode(TEXTS, "eng_Latn", cuda_graphs=True), want, rtol=1e-5, atol=1e-6)
    finally:
        fresh.eval()
    assert captures(made) == 1


def test_encode_says_why_not(tiny):
    with pytest.raises(ValueError, match="cuda_graphs=True cannot be served: the model is on cpu"):
        tiny.encode(TEXTS, "eng_Latn", cuda_graphs=True)
    with pytest.raises(TypeError, match="cuda_graphs must be None, True or False, got 'yes'"):
        tiny.encode(TEXTS, "eng_Latn", cuda_graphs="yes")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("output", ["pooled", "tokens"])
def test_the_forward_reads_no_value_on_the_host(family, output):
    """Fake tensors have none: whatever asks for one (``item``, ``nonzero``, a copy between devices) raises."""
    model = new_stack(family, dtype=torch.bfloat16).eval()
    graphs.reserve_positions(model.nllb_encoder, 1024)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: mode.from_tensor(t) for name, t in tensors.items() if t is not None})
        static = torch.empty(256 + 9, dtype=torch.int32)
        out = graphs._forward(model, static, graphs.Shape(256, 8, 128), output)
    assert out.shape == ((8, 64) if output == "pooled" else (256, 64))
