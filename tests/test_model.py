"""The stack as a transformers model: families, layouts, training, what it refuses."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stacks import batch, new_encoder, new_llm, new_stack
from torch import nn

from mtllm_fast import MTLLM, MTLLMConfig
from mtllm_fast.core.errors import NotBidirectionalError
from mtllm_fast.models import probe
from mtllm_fast.packing import pack_token_ids

PACKED = ["llama", "mistral", "qwen2", "qwen3"]
OTHER = ["gemma", "gpt2"]
PUBLISHED_LORA = r".*llm2vec.*(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj).*"


def _modules_padded(model: MTLLM, input_ids, attention_mask):
    """The same stack as transformers runs its towers, padded."""
    states = model.nllb_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return model.llm2vec(inputs_embeds=model.up_proj(states), attention_mask=attention_mask).last_hidden_state


@pytest.mark.parametrize("family", PACKED + OTHER)
@torch.no_grad()
def test_every_family_equals_its_modules_run_padded(family):
    model = new_stack(family)
    inputs = batch(left=() if family == "gpt2" else (2,))  # GPT-2's learned positions count padding, ours never do
    mask = inputs["attention_mask"].bool()
    assert model.packed_llm == (family in PACKED)
    out = model(**inputs, output_hidden_states=True)
    want = _modules_padded(model, **inputs)
    torch.testing.assert_close(out.last_hidden_state[mask], want[mask], rtol=2e-5, atol=2e-6)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(out.hidden_states[-1], out.last_hidden_state)


@pytest.mark.parametrize("family", PACKED + OTHER)
@torch.no_grad()
def test_a_sentence_does_not_depend_on_its_batch(family):
    model = new_stack(family)
    inputs = batch()
    together = model(**inputs).pooler_output
    shuffled = model(**{name: value.flip(0) for name, value in inputs.items()}).pooler_output.flip(0)
    alone = torch.cat(
        [model(input_ids=ids[mask.bool()][None]).pooler_output for ids, mask in zip(*inputs.values(), strict=True)]
    )
    wider = model(**{name: nn.functional.pad(v, (0, 3), value=1 - (name != "input_ids")) for name, v in inputs.items()})
    for other in (shuffled, alone, wider.pooler_output):
        torch.testing.assert_close(other, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", PACKED)
@torch.no_grad()
def test_the_first_token_sees_the_last(family):
    model = new_stack(family)
    ids = batch((7,))["input_ids"]
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 300 + 4
    moved = model(ids).last_hidden_state[0, 0] - model(changed).last_hidden_state[0, 0]
    assert moved.abs().max() > 1e-4


@torch.no_grad()
def test_packed_padded_and_pooled_agree():
    model = new_stack()
    inputs = batch(left=())
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
    padded, packed = model(**inputs), model(**pack_token_ids(rows))
    torch.testing.assert_close(packed.last_hidden_state, padded.last_hidden_state[inputs["attention_mask"].bool()])
    torch.testing.assert_close(packed.pooler_output, padded.pooler_output)
    torch.testing.assert_close(model.encode_packed(**pack_token_ids(rows)), padded.pooler_output)
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], padded.last_hidden_state)


@torch.no_grad()
def test_no_mask_means_wherever_the_ids_are_not_padding():
    model = new_stack()
    inputs = batch()
    assert torch.equal(model(inputs["input_ids"]).pooler_output, model(**inputs).pooler_output)


@torch.no_grad()
def test_encoder_states_as_input():
    model = new_stack()
    inputs = batch()
    out = model(**inputs, output_hidden_states=True)
    cached = model(inputs_embeds=out.encoder_last_hidden_state, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(cached.pooler_output, out.pooler_output)


@torch.no_grad()
def test_texts_longer_than_the_position_table():
    model = new_stack()
    assert model.nllb_encoder.embed_positions.weights.shape[0] < 90
    inputs = batch((90, 3), left=())
    want = _modules_padded(model, **inputs)
    torch.testing.assert_close(model(**inputs).last_hidden_state[0], want[0], rtol=2e-5, atol=2e-6)


def test_sliding_windows_are_refused_beyond_their_reach():
    model = new_stack("mistral")
    with torch.no_grad():
        model(**batch((16, 3)))
        with pytest.raises(ValueError, match="sliding window of 16"):
            model(**batch((17, 3)))


@torch.no_grad()
def test_rope_frequencies_stay_float32_when_the_model_is_cast():
    model = new_stack()
    model.to(torch.bfloat16).to(torch.float32)
    model(**batch())
    fresh = new_llm("llama").model.rotary_emb.inv_freq
    assert torch.equal(model.llm2vec.rotary_emb.inv_freq, fresh)


@pytest.mark.parametrize("family", PACKED + OTHER)
def test_gradients_equal_those_of_the_modules_run_padded(family):
    model = new_stack(family).double()
    inputs = batch(left=())
    mask = inputs["attention_mask"].bool()
    weights = torch.randn(int(mask.sum()), 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = []
    for states in (model(**inputs).last_hidden_state, _modules_padded(model, **inputs)):
        model.zero_grad()
        (states[mask] * weights).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 40 if family in PACKED else grads[0]
    # The modules compute their norms and rotations in float32 whatever the model's dtype.
    scale = max(float(grad.abs().max()) for grad in grads[1].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-7 * scale, msg=name)


def test_gradient_checkpointing_changes_memory_not_gradients():
    model = new_stack().train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    model.nllb_encoder.layerdrop = 0.0
    for layer in model.nllb_encoder.layers:
        layer.self_attn.dropout = layer.activation_dropout = 0.0
    grads, saved = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = model(**batch()).pooler_output.square().sum()
        model.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        saved.append(sum(kept))
    assert saved[1] < 0.5 * saved[0]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_on_in_training_and_off_in_inference():
    model = new_stack()
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(model(**inputs).pooler_output, model(**inputs).pooler_output)
        model.train()
        assert model.nllb_encoder.dropout > 0
        assert not torch.equal(model(**inputs).pooler_output, model(**inputs).pooler_output)


def test_lora_on_the_published_regex():
    inputs = batch()
    base = new_stack()
    with torch.no_grad():
        before = base(**inputs).pooler_output
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=PUBLISHED_LORA, lora_dropout=0.0))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all("llm2vec" in name for name in trained)
    torch.testing.assert_close(model(**inputs).pooler_output, before)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    out = model(**inputs)
    assert (out.pooler_output - before).abs().max() > 1e-3
    out.pooler_output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(**inputs).pooler_output, before)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).pooler_output, out.pooler_output, rtol=1e-4, atol=1e-5)


class _HalvedLinear(nn.Module):
    """Stands for a quantised Linear: no usable ``weight``, only ``forward``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = nn.Parameter(linear.weight.detach().half(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x.dtype), self.bias)


@torch.no_grad()
def test_linears_of_another_kind_are_called_as_they_are():
    model = new_stack("qwen2")
    want = model(**batch()).pooler_output
    for layer in model.llm2vec.layers:
        for parent, name in [(layer.self_attn, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")] + [
            (layer.mlp, n) for n in ("gate_proj", "up_proj", "down_proj")
        ]:
            setattr(parent, name, _HalvedLinear(getattr(parent, name)))
    torch.testing.assert_close(model(**batch()).pooler_output, want, rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_hooks_of_layers_and_norms_run():
    model = new_stack()
    seen = []
    model.llm2vec.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    model.llm2vec.layers[1].input_layernorm.register_forward_hook(lambda *_: seen.append("norm"))
    model.nllb_encoder.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append("linear"))
    model(**batch())
    assert sorted(seen) == ["layer", "linear", "norm"]


@torch.no_grad()
def test_copies_and_pickles_are_independent_and_equal():
    model = new_stack()
    want = model(**batch()).pooler_output
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch()).pooler_output, want)
        twin.up_proj.weight.zero_()
    assert torch.equal(model(**batch()).pooler_output, want)


@torch.no_grad()
def test_the_padded_result_is_the_same_under_every_attention():
    model = new_stack("qwen3")
    want = model(**batch()).pooler_output
    for name in ("sdpa", "eager", "mtllm_varlen"):
        model.set_attn_implementation(name)
        torch.testing.assert_close(model(**batch()).pooler_output, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="attn_implementation must be one of"):
        model.set_attn_implementation("flex_attention")


def test_compiles_whole_and_once_for_all_lengths():
    model = new_stack("qwen3")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((3, 5), (9, 2, 2), (4, 4, 4, 17)):
            packed = pack_token_ids([list(range(10, 10 + n)) for n in lengths])
            torch.testing.assert_close(compiled(**packed).pooler_output, model(**packed).pooler_output)


def test_compiles_padded_batches_too():
    model = new_stack()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((9, 4, 6), (5, 7, 3, 11)):
            inputs = batch(lengths)
            out, want = compiled(**inputs), model(**inputs)
            torch.testing.assert_close(out.pooler_output, want.pooler_output)
            torch.testing.assert_close(out.last_hidden_state, want.last_hidden_state)


def test_gradients_under_compile():
    model = new_stack()
    torch._dynamo.reset()
    packed = pack_token_ids([[5, 6, 7], [8, 9]])
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(**packed).pooler_output.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def _attend(q, k, v, scale, is_causal):
    heads_first = (t.transpose(0, 1) for t in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(*heads_first, is_causal=is_causal, scale=scale, enable_gqa=True)
    return out.transpose(0, 1)


def test_the_probe_catches_a_causal_llm(monkeypatch):
    def causal(q, k, v, cu_seqlens, max_seqlen, *, scale, **_):
        bounds = itertools.pairwise(cu_seqlens.tolist())
        return torch.cat([_attend(q[a:b], k[a:b], v[a:b], scale, is_causal=True) for a, b in bounds])

    model = new_stack()
    monkeypatch.setattr("mtllm_fast.models.layers.varlen_attention", causal)
    with pytest.raises(NotBidirectionalError, match="LlamaModel is causal"):
        probe.check_bidirectional(model)


def test_the_probe_catches_a_transformers_that_ignores_the_switch(monkeypatch):
    model = new_stack("gemma")
    model.llm2vec.config.is_causal = True
    with pytest.raises(NotBidirectionalError, match="GemmaModel is causal"):
        probe.check_bidirectional(model)


def test_the_probe_catches_mixed_sentences(monkeypatch):
    def mixed(q, k, v, cu_seqlens, max_seqlen, *, scale, **_):
        return _attend(q, k, v, scale, is_causal=False)

    model = new_stack()
    monkeypatch.setattr("mtllm_fast.models.layers.varlen_attention", mixed)
    with pytest.raises(NotBidirectionalError, match="mixes the sentences"):
        probe.check_bidirectional(model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": torch.full((3, 9), 320)},
            ValueError,
            "input_ids holds 320; the encoder's vocabulary is 0 … 319",
        ),
        ({"input_ids": torch.full((3, 9), -1)}, ValueError, "input_ids holds -1"),
        ({"input_ids": torch.ones(3, 9)}, TypeError, "int64 or int32, got torch.float32"),
        ({"input_ids": torch.full((9,), 5)}, ValueError, r"input_ids must be \[N, L\]"),
        ({"attention_mask": torch.ones(3, 8)}, ValueError, r"attention_mask must be \[3, 9\], got \[3, 8\]"),
        ({"attention_mask": torch.tensor([[1, 0, 1] * 3] * 3)}, ValueError, "padding between real tokens"),
        ({"cu_seqlens": torch.tensor([0, 27], dtype=torch.int32)}, ValueError, "exclude each other"),
        ({"input_ids": torch.full((3, 9), 5, device="meta")}, ValueError, "inputs are on meta, the model is on cpu"),
        ({"output_attentions": True}, ValueError, "output_attentions is not supported"),
        ({"max_seqlen": 9}, ValueError, "max_seqlen goes with cu_seqlens"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        new_stack()(**(batch() | change))


def test_bad_encoder_states_are_named():
    with pytest.raises(ValueError, match="encoder states of width 32, got 31"):
        new_stack()(inputs_embeds=torch.randn(1, 3, 31))


def test_joining_refuses_what_it_cannot_join():
    with pytest.raises(TypeError, match="encoder must be an M2M-100 or NLLB model"):
        MTLLM.from_encoder_and_llm(new_llm("llama"), new_llm("llama"))
    with pytest.raises(TypeError, match="decoder-only"):
        MTLLM.from_encoder_and_llm(new_encoder(), new_encoder())
    with pytest.raises(TypeError, match="merge a PEFT adapter first"):
        MTLLM.from_encoder_and_llm(
            new_encoder(), get_peft_model(new_llm("llama"), LoraConfig(target_modules="all-linear"))
        )
    with pytest.raises(ValueError, match="pooling must be one of mean, cls, eos"):
        MTLLMConfig(pooling="max")
