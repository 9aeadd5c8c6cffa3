"""What users do around a model: modes, random states, wrapped parts, odd inputs, NaN, resizing, half-made folders."""

from __future__ import annotations

import json
import os
import shutil

import peft
import pytest
import torch
from stacks import batch, new_encoder, new_llm, new_stack

from mtllm_fast import MTLLM, MTLLMForMultipleChoice
from mtllm_fast.core.errors import CheckpointError, NotBidirectionalError
from mtllm_fast.models.merging import merge_projections, split_projections
from mtllm_fast.packing import pack_token_ids
from mtllm_fast.tiny import tiny_path


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_path(), tmp_path / "stack")


def test_encode_leaves_each_modules_mode_alone():
    model = MTLLM.from_pretrained("tiny").train()
    model.nllb_encoder.eval()
    model.encode("a", "en")
    assert model.training
    assert model.llm2vec.training
    assert not model.nllb_encoder.training
    model.eval()
    model.nllb_encoder.train()
    assert torch.equal(model.encode("hello there", "en"), model.encode("hello there", "en")), "dropout was on"


def test_loading_and_joining_leave_the_random_state_of_gpus_alone(monkeypatch):
    def reseeded(seed):
        raise AssertionError("torch.manual_seed reseeds every GPU")

    encoder, llm = new_encoder(), new_llm("qwen2")
    monkeypatch.setattr(torch, "manual_seed", reseeded)
    before = torch.get_rng_state()
    MTLLM.from_encoder_and_llm(encoder, llm)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [None, "auto", "float16", torch.float32], ids=str)
def test_towers_of_different_dtypes_join_in_one(dtype):
    model = MTLLM.from_encoder_and_llm(new_encoder(), new_llm("llama").to(torch.bfloat16), dtype=dtype)
    wanted = {"float16": torch.float16, torch.float32: torch.float32}.get(dtype, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model(**batch()).pooler_output.dtype == wanted
    with pytest.raises(ValueError, match=r"dtype must be a torch\.dtype, its name or 'auto', got 'half-ish'"):
        MTLLM.from_encoder_and_llm(new_encoder(), new_llm("llama"), dtype="half-ish")


@torch.no_grad()
def test_nan_is_not_swallowed():
    for name in (
        "nllb_encoder.layers.0.fc1",
        "nllb_encoder.layers.0.self_attn.q_proj",
        "llm2vec.layers.1.mlp.gate_proj",
    ):
        model = new_stack("llama").eval()
        model.get_submodule(name).weight[1, 1] = float("nan")
        assert model(**batch()).pooler_output.isnan().any(), name


def test_the_probe_names_weights_that_are_not_finite(tmp_path):
    model = new_stack("llama")
    with torch.no_grad():
        model.llm2vec.layers[0].self_attn.q_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(NotBidirectionalError, match="not finite"):
        MTLLM.from_pretrained(tmp_path)


def test_replaced_and_wrapped_parts_are_called():
    model = new_stack("llama").eval()
    expected = model(**batch()).pooler_output
    tuned = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]))
    assert torch.allclose(tuned(**batch()).pooler_output, expected, atol=1e-5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "ln_tuning" in name:
                parameter.mul_(2)
    assert not torch.allclose(tuned(**batch()).pooler_output, expected, atol=1e-2)
    embedded = peft.get_peft_model(new_stack("llama"), peft.LoraConfig(target_modules=["embed_tokens"], r=2))
    embedded(**batch()).pooler_output.sum().backward()


def test_resized_embeddings_are_saved_and_loaded(tmp_path):
    model = new_stack("llama")
    model.resize_token_embeddings(330)
    assert model.config.nllb_config.vocab_size == model.config.vocab_size == 330
    model.save_pretrained(tmp_path)
    assert MTLLM.from_pretrained(tmp_path).nllb_encoder.embed_tokens.num_embeddings == 330


@pytest.mark.parametrize("family", ["gemma", "gpt2", "llama"])
def test_a_padded_batch_compiles_for_every_family(family):
    torch.compiler.reset()
    model = new_stack(family).eval()
    with torch.no_grad():
        expected = model(**batch())
        found = torch.compile(model, backend="eager")(**batch())
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-5)
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)


@torch.no_grad()
def test_packed_inputs_without_their_longest_length():
    """Two sentences that fit a window of 16, together longer than it."""
    model = new_stack("mistral").eval()
    packed = pack_token_ids([[5] * 10, [6] * 10])
    assert model(**packed).pooler_output.shape == (2, 64)
    model = new_stack("llama").eval()
    assert torch.equal(model(**packed, max_seqlen=1000).pooler_output, model(**packed).pooler_output)


@pytest.mark.parametrize("bounds", [[3, 5], [0, 4], [0, 6], [0, 4, 2, 5]], ids=str)
def test_bounds_that_do_not_fit_are_named(bounds):
    model = new_stack("llama")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 5"):
        model(input_ids=torch.arange(4, 9), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


class Table(dict):
    columns = ("text",)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Table(text=["a"]), "en"), {}, TypeError, "sentences must be a string or a sequence of strings, got Table"),
        (({"text": ["a"]}, "en"), {}, TypeError, "sentences must be .* got dict"),
        ((None, "en"), {}, TypeError, "sentences must be .* got NoneType"),
        ((["a", "b"], {"en", "de"}), {}, TypeError, "src_lang must be .* got set"),
        ((["a"], None), {}, TypeError, "src_lang must be .* got NoneType"),
        ((["a", "b\ud800"], "en"), {}, ValueError, r"texts\[\d\] holds half of a surrogate pair"),
        (("a", "en"), {"max_length": 5.0}, TypeError, "max_length must be an int, got float"),
        (("a", "en"), {"output_dtype": "float16"}, TypeError, "output_dtype must be a torch.dtype, got str 'float16'"),
    ],
)
def test_bad_arguments_of_encode(arguments, options, error, message):
    with pytest.raises(error, match=message):
        MTLLM.from_pretrained("tiny").encode(*arguments, **options)


def test_generators_are_sequences_too():
    model = MTLLM.from_pretrained("tiny")
    found = model.encode((text for text in ["a", "b"]), (code for code in ["en", "de"]))
    assert torch.equal(found, model.encode(["a", "b"], ["en", "de"]))


def test_inputs_that_are_no_tensors():
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        new_stack("llama")(input_ids=[[5, 6]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalised_embeddings_of_a_half_precision_model_have_unit_length(dtype):
    model = MTLLM.from_pretrained("tiny", dtype=dtype)
    options = {"normalize_embeddings": True, "output_dtype": torch.float32}
    norms = model.encode(["Habari ya dunia", "b"], "swh_Latn", **options).norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-6


def test_an_empty_choice_is_refused():
    model = MTLLMForMultipleChoice.from_pretrained("tiny")
    mask = torch.ones(1, 4, 2, dtype=torch.long)
    mask[0, :, 1] = 0
    with pytest.raises(ValueError, match="mean_mask has a choice without any token"):
        model(input_ids=torch.tensor([[5, 6, 7, 2]]), mean_mask=mask)


def test_folders_that_are_not_whole(folder):
    (folder / "config.json").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        MTLLM.from_pretrained(folder)
    (folder / "elsewhere").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"map": {}}))
    with pytest.raises(CheckpointError, match=r"index\.json: no index of shards"):
        MTLLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        MTLLM.from_pretrained("./nowhere")
    with pytest.raises(ValueError, match="variant is not supported"):
        MTLLM.from_pretrained("tiny", variant="fp16")
    with pytest.raises(ValueError, match="pooling must be one of mean, cls, eos, got 'max'"):
        MTLLM.from_pretrained("tiny", pooling="max")


def test_the_tokenizer_is_found_where_the_weights_were(folder, tmp_path, monkeypatch):
    inner = MTLLM.from_pretrained(tmp_path, subfolder="stack")
    assert inner.encode("a", "en").shape == (128,)
    monkeypatch.chdir(tmp_path)
    relative = MTLLM.from_pretrained("stack")
    monkeypatch.chdir(os.sep)
    assert relative.encode("a", "en").shape == (128,)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Products without oneDNN's epilogues, added in place onto the residual stream where nothing is recorded."""
    from mtllm_fast.models import layers, linear

    def accumulates(module, x, *others):
        return linear.is_linear(module) and not linear.needs_grad(x, *module.parameters(), *others)

    for home in (layers, linear):
        monkeypatch.setattr(home, "onednn_serves", lambda module, x: False)
    monkeypatch.setattr(layers, "accumulates", accumulates)
    return monkeypatch


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_merged_products_and_sums_in_place_give_the_same_states(family, as_on_a_gpu):
    model = new_stack(family).double().eval()
    merge_projections(model)
    found = model(**batch(), output_hidden_states=True)
    as_on_a_gpu.undo()
    split_projections(model)
    want = model(**batch(), output_hidden_states=True)
    for name in ("encoder_hidden_states", "hidden_states"):
        for one, other in zip(found[name], want[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", ["fc1", "fc2", "final_layer_norm", "self_attn.out_proj", "self_attn_layer_norm"])
def test_any_part_of_an_encoder_layer_can_be_trained(trained, as_on_a_gpu):
    gradients = []
    for _ in range(2):
        model = new_stack("llama").double().eval().requires_grad_(False)
        part = model.nllb_encoder.layers[0].get_submodule(trained).requires_grad_()
        model(**batch()).pooler_output.square().sum().backward()
        gradients.append(part.weight.grad)
        as_on_a_gpu.undo()
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
