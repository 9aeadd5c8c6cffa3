"""``init_up_proj_least_squares``: torch's solution for materialised matrices, whatever the batches, and its report."""

from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
from stacks import with_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config

from mtllm_fast import MTLLM, MTLLMForSequenceClassification, align_spans, init_up_proj_least_squares
from mtllm_fast.testing.tolerance import relative_error
from mtllm_fast.text.tokenization import load_tokenizer
from mtllm_fast.tiny import article_1, tiny_path
from mtllm_fast.tiny import tiny_llm_tokenizer as llm_tokenizer

TEXTS = [*article_1().values()]


def stack(dtype: torch.dtype = torch.float64, bias: bool = False, **options) -> MTLLM:
    """The tiny stack with a new ``up_proj``."""
    model = MTLLM.from_pretrained("tiny", dtype=dtype, **options)
    torch.manual_seed(3)
    model.up_proj = nn.Linear(64, 128, bias=bias).to(dtype)
    return model


def fit(model, texts=TEXTS, **options):
    return init_up_proj_least_squares(model, texts, llm_tokenizer=llm_tokenizer(), **options)


@torch.no_grad()
def materialised(model: MTLLM, texts=TEXTS, overlap: bool = False) -> tuple[Tensor, Tensor]:
    """Span-averaged encoder states and LLM embeddings, text by text and span by span, float64."""
    llm, encoder = llm_tokenizer(), load_tokenizer(tiny_path())
    xs, ys = [], []
    for text in texts:
        batches = [tokenizer([text], truncation=True, max_length=512) for tokenizer in (llm, encoder)]
        spans = align_spans(*batches, only_overlapping_tokens=overlap)
        llm_ids, encoder_ids = (torch.tensor(batch["input_ids"]) for batch in batches)
        states = model(input_ids=encoder_ids, output_hidden_states=True).encoder_last_hidden_state[0].double()
        embedded = model.llm2vec.get_input_embeddings()(llm_ids[0]).double()
        xs += [states[part].mean(0) for part in spans.encoder_indices.split(spans.encoder_offsets.diff().tolist())]
        ys += [embedded[part].mean(0) for part in spans.llm_indices.split(spans.llm_offsets.diff().tolist())]
    return torch.stack(xs), torch.stack(ys)


def solved(x: Tensor, y: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """By torch, of least norm: LayerNorm leaves one direction without variance."""
    off_x, off_y = (x.mean(0), y.mean(0)) if bias else (0.0, 0.0)
    weight = torch.linalg.lstsq(x - off_x, y - off_y, rcond=1e-5, driver="gelsd").solution.T
    return weight, off_y - weight @ off_x if bias else None


@torch.no_grad()
def direct_fvu(model: MTLLM, x: Tensor, y: Tensor) -> float:
    up_proj = copy.deepcopy(model.up_proj).double()
    return float((y - up_proj(x)).square().mean() / (y - y.mean(0)).square().mean())


def weights(model: MTLLM) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.up_proj.parameters()])


def test_it_explains_the_embeddings_better_than_any_random_projection():
    """A random encoder leaves most of random embeddings unexplained: 64 of their 128 dimensions are out of reach."""
    model = stack(torch.float32)
    report = fit(model)
    assert report.spans > 10 * (64 + 1)
    assert report.fvu_after < 0.5 * report.fvu_before
    assert report.fvu_after < 0.95
    shuffled = random.Random(0)
    unseen = [" ".join(shuffled.sample(words := text.split(), len(words))) for text in TEXTS]
    assert direct_fvu(model, *materialised(model, unseen)) < 0.95


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_solution_is_torchs(bias, overlap):
    model = stack(bias=bias)
    x, y = materialised(model, overlap=overlap)
    before = direct_fvu(model, x, y)
    report = fit(model, only_overlapping_tokens=overlap)
    weight, offset = solved(x, y, bias)
    assert relative_error(model.up_proj.weight, weight) < 1e-6
    if bias:
        assert relative_error(model.up_proj.bias, offset) < 1e-6
    assert report.fvu_before == pytest.approx(before, rel=1e-9)
    assert report.fvu_after == pytest.approx(direct_fvu(model, x, y), rel=1e-9)
    assert (report.spans, report.texts, report.rank) == (len(x), len(TEXTS), 64 - bias)
    encoder = load_tokenizer(tiny_path())
    assert report.tokens == sum(len(encoder(text)["input_ids"]) for text in TEXTS)
    assert f"{report.spans} spans of 51 texts" in str(report)


@pytest.mark.parametrize("bias", [False, True])
def test_ridge_is_the_closed_form(bias):
    model = stack(bias=bias)
    x, y = materialised(model)
    fit(model, ridge=0.3)
    off_x, off_y = (x.mean(0), y.mean(0)) if bias else (0.0, 0.0)
    gram, cross = (x - off_x).T @ (x - off_x), (x - off_x).T @ (y - off_y)
    penalty = 0.3 * gram.trace() / 64 * torch.eye(64, dtype=torch.float64)
    weight = torch.linalg.solve(gram + penalty, cross).T
    assert relative_error(model.up_proj.weight, weight) < 1e-9
    if bias:
        assert relative_error(model.up_proj.bias, off_y - weight @ off_x) < 1e-9


@pytest.mark.parametrize("bias", [False, True])
def test_batches_do_not_matter(bias):
    wanted = stack(bias=bias)
    report = fit(wanted, batch_tokens=1)
    for texts, tokens in ((TEXTS, 512 * 7), (TEXTS[::-1], 10**6), (iter([{"text": text} for text in TEXTS]), None)):
        model = stack(bias=bias)
        other = fit(model, texts, batch_tokens=tokens)
        assert relative_error(weights(model), weights(wanted)) < 1e-9
        assert other.fvu_after == pytest.approx(report.fvu_after, rel=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("states", [torch.float32, torch.float64], ids=str)
def test_moments_in_float32_are_close(bias, states):
    wanted, model = stack(bias=bias), stack(states, bias=bias)
    one, other = fit(wanted), fit(model, dtype=torch.float32)
    assert relative_error(weights(model), weights(wanted)) < 1e-2
    assert other.fvu_before == pytest.approx(one.fvu_before, rel=1e-6)
    assert other.fvu_after == pytest.approx(one.fvu_after, rel=1e-6)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=str)
def test_rounding_of_the_states_is_not_fitted(dtype, error):
    """LayerNorm's output is constant in one direction; what rounding adds there would be fitted by huge weights."""
    wanted, model = stack(bias=True), stack(dtype, bias=True)
    assert (fit(wanted).rank, fit(model).rank) == (63, 63)
    assert relative_error(weights(model), weights(wanted)) < error


def test_states_far_from_zero_do_not_cancel():
    model = stack(torch.float32, bias=True)
    with torch.no_grad():
        model.nllb_encoder.layer_norm.bias.add_(100)
        model.llm2vec.embed_tokens.weight.add_(100)
    x, y = materialised(model)
    report = fit(model, dtype=torch.float32, batch_tokens=1)
    assert report.fvu_after == pytest.approx(direct_fvu(model, x, y), rel=1e-2)
    assert report.fvu_after < 0.95


@pytest.mark.parametrize("bias", [False, True])
def test_fewer_spans_than_weights_give_the_smallest_solution(bias, caplog):
    model = stack(bias=bias)
    x, y = materialised(model, TEXTS[:1])
    assert len(x) < 64
    with caplog.at_level(logging.WARNING, "mtllm_fast"):
        report = fit(model, TEXTS[:1])
    assert f"{len(x)} spans do not determine {64 + bias} weights per output" in caplog.text
    weight, _ = solved(x, y, bias)
    assert relative_error(model.up_proj.weight, weight) < 1e-6
    assert report.rank == torch.linalg.matrix_rank(x - x.mean(0) * bias, rtol=1e-5)
    assert 0 <= report.fvu_after < 0.5


def test_the_report_is_of_the_weights_as_stored():
    model = stack()
    x, y = materialised(model)
    exact = fit(model).fvu_after
    model.up_proj.bfloat16()
    report = fit(model)
    assert model.up_proj.weight.dtype == torch.bfloat16
    assert report.fvu_after == pytest.approx(direct_fvu(model, x, y), rel=1e-9)
    assert report.fvu_after > exact * (1 + 1e-6)


def test_only_the_values_change():
    model = stack(torch.float32, bias=True).train()
    model.up_proj.requires_grad_(False)
    model.nllb_encoder.layers[1].eval()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    fit(model)
    for name, parameter in model.named_parameters():
        same, values = before[name]
        assert parameter is same
        assert torch.equal(parameter, values) != name.startswith("up_proj"), name
        assert parameter.requires_grad != name.startswith("up_proj")
    assert [module.training for module in model.modules()] == modes
    evaluated = stack(torch.float32, bias=True)
    fit(evaluated)
    assert torch.equal(weights(model), weights(evaluated))  # no dropout


def test_a_fused_model_computes_with_the_new_weights():
    model, plain = stack(torch.float32), stack(torch.float32)
    model.fuse()
    with torch.no_grad():
        stale = model.encode(TEXTS[:2], "eng_Latn")
    fit(model)
    fit(plain)
    assert torch.equal(model.encode(TEXTS[:2], "eng_Latn"), plain.encode(TEXTS[:2], "eng_Latn"))
    assert relative_error(model.encode(TEXTS[:2], "eng_Latn"), stale) > 0.1


def test_a_head_on_a_stack():
    head, model = MTLLMForSequenceClassification.from_pretrained("tiny"), MTLLM.from_pretrained("tiny")
    assert fit(head) == fit(model)
    assert torch.equal(weights(head.model), weights(model))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=512, n_embd=48, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2),
        GemmaConfig(vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16),
    ],
    ids=["gpt2", "gemma"],
)  # fmt: skip
def test_any_llm(config):
    encoder = stack(torch.float32).nllb_encoder
    model = MTLLM.from_encoder_and_llm(encoder, AutoModelForCausalLM.from_config(config), up_proj_bias=True)
    report = fit(model, encoder_tokenizer=load_tokenizer(tiny_path()))
    assert report.fvu_after == pytest.approx(direct_fvu(model, *materialised(model)), rel=1e-4)
    assert report.fvu_after < 1 < report.fvu_before


def fails(model, match: str, error=ValueError, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        fit(model, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_models_that_cannot_be_initialised():
    fails(MTLLM.from_pretrained("tiny", llm_embeddings=False), "loaded without its LLM's token embeddings")
    fails(nn.Linear(2, 2), "model must be an MTLLM or a head on one, before PEFT wraps it, got Linear", TypeError)
    fails(with_lora(stack(torch.float32)), "before PEFT wraps it, got PeftModel", TypeError)
    wrapped = stack(torch.float32)
    with_lora(wrapped, modules_to_save=["up_proj"])
    fails(wrapped, r"up_proj must be a plain nn\.Linear, got peft\..*ModulesToSaveWrapper: initialise it before")
    offloaded = stack(torch.float32)
    offloaded.up_proj.to("meta")
    fails(offloaded, "up_proj must hold its weight")


def test_states_that_are_not_finite():
    model = stack(torch.float32)
    model.nllb_encoder.layer_norm.weight.data[3] = float("nan")
    fails(model, "the encoder's states are not finite")
    model = stack(torch.float32)
    model.llm2vec.embed_tokens.weight.data[:, 3] = float("inf")
    fails(model, "the LLM's token embeddings are not finite")


def broken():
    yield from TEXTS[:9]
    raise OSError("the stream broke")


def test_texts_that_give_nothing():
    model = stack(torch.float32)
    fails(model, "must hold a word that both tokenizers keep whole, got none in 0 texts", texts=[])
    fails(model, "got none in 2 texts", texts=["", ""])
    fails(model, "must hold different words, got 2 spans of one embedding", texts=["a", "a"])
    fails(model, "the stream broke", OSError, texts=broken(), batch_tokens=512)
    fails(model, "texts must be an iterable of texts, got one str", TypeError, texts="a text")
    fails(model, "texts must be an iterable of texts, got one int", TypeError, texts=3)
    fails(model, "the text of example 1 must be a str, got int", TypeError, texts=["a", 3])


def test_bad_options():
    model = stack(torch.float32)
    fails(model, "ridge must be a finite number, at least 0, got -1", ridge=-1)
    fails(model, "ridge must be a finite number, at least 0, got nan", ridge=float("nan"))
    fails(model, "batch_tokens must be at least 1, got 0", batch_tokens=0)
    fails(model, r"dtype must be one of torch\.float64, torch\.float32, got torch\.bfloat16", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="llm_tokenizer must be the model's, which has 512 token embeddings; it gave"):
        init_up_proj_least_squares(model, TEXTS, llm_tokenizer=model.tokenizer)
    model.nllb_encoder.embed_tokens = nn.Embedding(2000, 64)
    fails(model, "encoder_tokenizer must be the model's, which has 2000 token embeddings; it gave id")
