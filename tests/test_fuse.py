"""``MTLLM.fuse``: as accurate as the modules, and every way in which a fused weight could go stale."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from stacks import LORA, agree, batch, loss_and_gradients, new_stack, with_lora
from torch import nn

from mtllm_fast import MTLLM, MTLLMForSequenceClassification
from mtllm_fast.bench.counting import counted_work
from mtllm_fast.models import fusing
from mtllm_fast.testing.tolerance import relative_error

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def fused_stack(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> MTLLM:
    model = new_stack(family, dtype=dtype, up_proj_bias=True, **options).eval()
    model.fuse()
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(**batch()).pooler_output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_inference_is_as_accurate(family, dtype, absorbed):
    model = new_stack(family, dtype=dtype, up_proj_bias=True).eval()
    plain, truth = outputs(model), outputs(copy.deepcopy(model).double())
    report = model.fuse()
    assert report.form == "absorbed"
    assert "absorbed" in str(report)
    fused = outputs(model)
    assert absorbed == [True]
    bound = {torch.float32: (4, 2e-6), torch.bfloat16: (1.5, 0)}[dtype]
    assert relative_error(fused, truth) <= bound[0] * relative_error(plain, truth) + bound[1]
    model.unfuse()
    assert torch.equal(outputs(model), plain)


def test_fused_results_do_not_depend_on_the_batch(absorbed):
    model = fused_stack()
    with torch.no_grad():
        together = model(**batch((9, 4, 6), left=())).pooler_output
        alone = model(**{name: value[1:2, :4] for name, value in batch((9, 4, 6), left=()).items()}).pooler_output
    assert relative_error(alone[0], together[1]) < 1e-6
    assert absorbed == [True, True]


def test_nothing_derived_is_saved_and_nothing_is_left_out(tmp_path):
    model = fused_stack()
    before = new_stack(up_proj_bias=True).state_dict()
    assert model.state_dict().keys() == before.keys()
    assert not any("composite" in name for name, _ in [*model.named_buffers(), *model.named_parameters()])
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(MTLLM.from_pretrained(tmp_path)), outputs(new_stack(up_proj_bias=True).eval()))


def changed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(8)).to(tensor)


def load_other(model):
    model.load_state_dict({name: changed(value) for name, value in model.state_dict().items()})


def load_into_a_module(model):
    model.up_proj.load_state_dict({name: changed(value) for name, value in model.up_proj.state_dict().items()})


def optimizer_step(model):
    model.train()
    model(**batch()).pooler_output.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.zero_grad()
    model.eval()


def optimizer_step_elsewhere(model):
    """Gradients that never went through the fused model."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    model.zero_grad()


def edit_through_data(model):
    model.llm2vec.layers[0].self_attn.k_proj.weight.data[3, 5] += 1.0


def assign_data(model):
    model.llm2vec.layers[0].input_layernorm.weight.data = changed(model.llm2vec.layers[0].input_layernorm.weight.data)


def replace_a_parameter(model):
    model.up_proj.bias = nn.Parameter(changed(model.up_proj.bias.detach()))


def replace_a_module(model):
    attn = model.llm2vec.layers[0].self_attn
    attn.v_proj = copy.deepcopy(attn.v_proj)
    nn.init.normal_(attn.v_proj.weight)


def in_place_without_gradients(model):
    with torch.no_grad():
        model.up_proj.weight.mul_(1.5)


def merge_and_unload(model):
    """PEFT adds to ``weight.data`` and puts the same module back: neither an identity nor a version tells."""
    wrapped = with_lora(model)
    assert wrapped.merge_and_unload() is model


def permute_through_data(model):
    weight = model.llm2vec.layers[0].self_attn.q_proj.weight
    weight.data.copy_(weight.data.flip(0))


def swap_two_values(model):
    memory = model.up_proj.weight.data.view(-1)
    memory[[3, 9]] = memory[[9, 3]]


def set_through_vectors(model):
    vector = torch.nn.utils.parameters_to_vector(model.llm2vec.layers[0].self_attn.parameters())
    torch.nn.utils.vector_to_parameters(changed(vector.detach()), model.llm2vec.layers[0].self_attn.parameters())


STALE = [
    load_other,
    load_into_a_module,
    optimizer_step,
    optimizer_step_elsewhere,
    edit_through_data,
    assign_data,
    replace_a_parameter,
    replace_a_module,
    in_place_without_gradients,
    merge_and_unload,
    set_through_vectors,
    permute_through_data,
    swap_two_values,
]


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_a_changed_weight_is_never_stale(change):
    model = fused_stack()
    before = outputs(model)
    change(model)
    after = outputs(model)
    model.unfuse()
    exact = outputs(model)
    assert relative_error(exact, before) > 1e-6, "the change had no effect"
    assert relative_error(after, exact) < 0.1 * relative_error(exact, before) + 1e-6


def test_adapters_of_a_fused_model_switch_merge_and_train(absorbed):
    model = fused_stack()
    wrapped = with_lora(model)
    wrapped.eval()

    def check(expect_fused: bool = True) -> torch.Tensor:
        absorbed.clear()
        fused = outputs(wrapped)
        assert absorbed == ([True] if expect_fused else [])
        kept, model._fused = model._fused, None
        plain = outputs(wrapped)
        model._fused = kept
        assert relative_error(fused, plain) < 1e-5
        return fused

    with_adapter = check()
    with wrapped.disable_adapter():
        without = check()
    assert relative_error(with_adapter, without) > 1e-4
    wrapped.merge_adapter()
    assert relative_error(check(), with_adapter) < 1e-5
    wrapped.unmerge_adapter()
    check()
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=LORA, init_lora_weights=False))
    wrapped.set_adapter("second")
    assert relative_error(check(), with_adapter) > 1e-4
    wrapped.train()
    loss_and_gradients(wrapped)
    assert model._fused is None, "training runs on live weights"


def test_moving_and_casting_drop_the_composite():
    model = fused_stack()
    plain = outputs(new_stack(up_proj_bias=True).eval().double())
    assert relative_error(outputs(model.double()), plain) < 1e-12
    model.fuse()
    assert relative_error(outputs(model.to(torch.bfloat16)), plain) < 3e-2
    assert model.to("meta")._fused is None


def test_gradients_in_evaluation_reach_every_weight():
    model = fused_stack()
    model(**batch()).pooler_output.square().mean().backward()
    assert model.llm2vec.layers[0].self_attn.q_proj.weight.grad is not None
    assert model.up_proj.weight.grad is not None


def test_copies_are_their_own():
    model = fused_stack()
    twin = copy.deepcopy(model)
    in_place_without_gradients(twin)
    expected = outputs(new_stack(up_proj_bias=True).eval())
    assert relative_error(outputs(model), expected) < 1e-5
    assert relative_error(outputs(twin), expected) > 1e-4


def test_encode_and_heads_use_the_fused_stage(tmp_path, absorbed):
    model = MTLLM.from_pretrained("tiny")
    plain = model.encode(["Habari ya dunia", "Wie geht's?"], ["swh_Latn", "deu_Latn"])
    model.fuse()
    assert relative_error(model.encode(["Habari ya dunia", "Wie geht's?"], ["swh_Latn", "deu_Latn"]), plain) < 1e-5
    assert absorbed == [True]
    head = MTLLMForSequenceClassification.from_pretrained("tiny", num_labels=3)
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        before = head(input_ids=ids).logits
        head.base_model.fuse()
        assert relative_error(head(input_ids=ids).logits, before) < 1e-5
    assert absorbed == [True, True]


def test_a_compiled_fused_model(absorbed):
    torch.compiler.reset()
    model = fused_stack()
    expected = outputs(model)
    absorbed.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(outputs(compiled), expected) < 1e-5
    assert absorbed == [True]
    plain = loss_and_gradients(new_stack("llama", up_proj_bias=True).eval())
    found = loss_and_gradients(compiled)  # in evaluation mode, with gradients: every weight gets its own
    agree((found[0], {name.removeprefix("_orig_mod."): grad for name, grad in found[1].items()}), plain, 1e-5)
    compiled.train()
    assert model._fused is None


def test_autocast_of_a_model_that_was_fused_in_float32(caplog):
    model = fused_stack()
    plain = new_stack("llama", up_proj_bias=True).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(model), outputs(plain))
    assert model._fused is None
    assert "another precision" in caplog.text


def test_what_cannot_be_fused_says_why(monkeypatch):
    other = new_stack("gpt2")
    with pytest.raises(ValueError, match="GPT2Model has no packed layers"):
        other.fuse()
    quantised = new_stack("llama")
    quantised.llm2vec.layers[0].self_attn.q_proj = nn.Sequential(quantised.llm2vec.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match="q_proj is a Sequential"):
        quantised.fuse()
    hooked = new_stack("llama")
    hooked.up_proj.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match="up_proj is hooked"):
        hooked.fuse()


def test_a_form_that_errs_too_much_gives_way(monkeypatch, caplog):
    """Errors as a badly conditioned stack would show them; the next safer form is taken, and it is said."""
    error = fusing._Check.error

    def pretend(bad: int):
        def worse(self, composite):
            rank = 0 if composite is None else 1 if composite.residual is None else 2
            qkv, out = error(self, composite)
            return (qkv, 10 * out) if 0 < rank <= bad else (qkv, out)

        return worse

    plain = outputs(new_stack(dtype=torch.bfloat16, up_proj_bias=True).eval())
    for bad, form in ((1, "absorbed + residual"), (2, "unabsorbed")):
        monkeypatch.setattr(fusing._Check, "error", pretend(bad))
        model = new_stack(dtype=torch.bfloat16, up_proj_bias=True).eval()
        report = model.fuse()
        assert report.form == form
        assert "next safer form" in caplog.text
        assert f"first stage: {form}" in str(report)
        assert relative_error(outputs(model), plain) < 2e-2
    assert torch.equal(outputs(model), plain)


def test_launches_of_the_forward_before_and_after(monkeypatch):
    """The op's 2 launches take the place of the stage's 6: four products, the norm and the rotation."""
    model = new_stack("llama").eval()
    before = counted_work(lambda: model(**batch()))
    model.fuse()
    monkeypatch.setattr(fusing, "is_fresh", lambda *_: True)  # checksums of the host's memory: no launches on a GPU
    after = counted_work(lambda: model(**batch()))
    assert before.launches - after.launches == 4, (before, after)
    assert after.flops < before.flops
