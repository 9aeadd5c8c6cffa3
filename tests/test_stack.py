"""The fused stage in the model: training with and without LoRA, ``fuse``, and every way in which it could go stale."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from reference import load_case
from stacks import batch, new_stack
from torch import nn

from mtllm_fast import MTLLM, MTLLMForSequenceClassification
from mtllm_fast.bench.counting import counted_work
from mtllm_fast.models import fusing, stack
from mtllm_fast.testing.tolerance import relative_error

LORA = r".*llm2vec.*(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj).*"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture
def absorbed(monkeypatch):
    """Absorb from the first token on, and count the calls that did."""
    calls = []
    projection = stack.stack_projection

    def counted(*args, **options):
        calls.append(options["composite"] is not None)
        return projection(*args, **options)

    monkeypatch.setattr(stack, "break_even_tokens", lambda *sizes: 0)
    monkeypatch.setattr(stack, "stack_projection", counted)
    return calls


def with_lora(model: nn.Module, dropout: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=LORA, lora_dropout=dropout, **options)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide mistakes
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(6)  # of the dropout
    out = model(**batch()).pooler_output
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(one, other, tolerance: float) -> None:
    """Outputs and gradients; a gradient that is zero in exact numbers (a key's bias) is compared with the largest."""
    assert relative_error(one[0], other[0]) < tolerance
    assert one[1].keys() == other[1].keys()
    largest = max(grad.norm() for grad in other[1].values())
    for name, grad in other[1].items():
        assert (one[1][name] - grad).norm() <= 20 * tolerance * (grad.norm() + 1e-3 * largest), name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_absorbs_live_weights_with_the_same_gradients(family, absorbed, monkeypatch):
    model = new_stack(family, up_proj_bias=True).double().train()
    fused = loss_and_gradients(model)
    assert absorbed == [False]
    monkeypatch.undo()
    agree(fused, loss_and_gradients(model), 1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_is_a_branch_with_pefts_numbers(dropout, absorbed, monkeypatch):
    model = with_lora(new_stack("llama").double(), dropout).double().train()
    for parameter in model.base_model.model.up_proj.parameters():
        parameter.requires_grad_()
    if dropout:  # other masks would be drawn in another order: make them all the same
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p == dropout:
                module.forward = lambda x: torch.where(torch.arange(x.shape[-1]) % 3 == 0, 0, x * 1.5)
    fused = loss_and_gradients(model)
    assert absorbed == [False]
    assert any("layers.0.self_attn.q_proj.lora_A" in name for name in fused[1])
    monkeypatch.undo()
    agree(fused, loss_and_gradients(model), 1e-10)


def test_lora_dropout_is_drawn_for_each_projection(absorbed):
    model = with_lora(new_stack("llama"), 0.5).train()
    seen = []
    attn = model.base_model.model.llm2vec.layers[0].self_attn
    for projection in (attn.q_proj, attn.k_proj, attn.v_proj):
        projection.lora_dropout["default"].register_forward_hook(lambda module, args, out: seen.append(out == 0))
    model(**batch())
    assert absorbed == [False]
    assert len(seen) == 3
    assert all(0.3 < mask.float().mean() < 0.7 for mask in seen)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_adapters_off_and_two_adapters(absorbed, monkeypatch):
    model = with_lora(new_stack("llama").double()).double().train()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=LORA, init_lora_weights=False))
    model.double()
    model.base_model.model.up_proj.weight.requires_grad_()
    results = {}
    for fast in (True, False):
        if not fast:
            monkeypatch.undo()
        model.base_model.model.nllb_encoder.eval()  # no dropout
        model.set_adapter("default")
        one = model(**batch()).pooler_output
        model.base_model.set_adapter(["default", "second"])
        both = model(**batch()).pooler_output
        with model.disable_adapter():
            off = model(**batch()).pooler_output
        results[fast] = (one, both, off)
    assert absorbed == [False] * 3
    for fast, plain in zip(results[True], results[False], strict=True):
        assert relative_error(fast, plain) < 1e-10
    assert not torch.allclose(results[True][0], results[True][1])
    assert not torch.allclose(results[True][0], results[True][2])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_other_kinds_of_lora(options, absorbed, monkeypatch):
    model = with_lora(new_stack("llama").double(), **options).double().train()
    fused = loss_and_gradients(model)
    assert absorbed == ([] if "use_dora" in options else [False]), "DoRA runs as the module it is"
    monkeypatch.undo()
    agree(fused, loss_and_gradients(model), 1e-10)


def test_gradient_checkpointing_and_autocast(absorbed, monkeypatch):
    model = with_lora(new_stack("llama")).train()
    plain_model = copy.deepcopy(model)
    model.base_model.model.gradient_checkpointing_enable()
    model.base_model.model.enable_input_require_grads()
    fused = loss_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_and_gradients(model)
    assert absorbed == [False, False]
    monkeypatch.undo()
    plain = loss_and_gradients(plain_model)
    agree(fused, plain, 1e-5)
    assert relative_error(half[0], plain[0]) < 2e-2


def test_short_batches_and_frozen_models_run_the_modules(monkeypatch):
    calls = []
    monkeypatch.setattr(stack, "stack_projection", lambda *args, **options: calls.append(args))
    model = new_stack("llama").train()
    model(**batch())  # 19 tokens; at d=32, D=64 a composite pays from 64 on
    monkeypatch.setattr(stack, "break_even_tokens", lambda *sizes: 0)
    model.requires_grad_(False)
    model(**batch())
    model.requires_grad_(True).eval()(**batch())
    hooked = new_stack("llama").train()
    hooked.llm2vec.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: out)
    hooked(**batch())
    assert calls == []


STAGE1 = ("stage1-sequence-step", "stage1-span-step")


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STAGE1)
def test_recorded_stage_1_gradients(name, mode, absorbed):
    """The student of the recorded steps through the fused stage: pooled states, loss, every gradient."""
    case = load_case(name)
    model = MTLLM.from_pretrained(case.checkpoint, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[mode])
    model.requires_grad_(False).eval()
    adapter = str(Path(case.checkpoint).parent / "adapter")
    teacher_llm = copy.deepcopy(model.llm2vec)
    peft.PeftModel.from_pretrained(model.llm2vec, adapter, is_trainable=True)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name or parameter_name.startswith("up_proj"):
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
    model.train()
    for module in model.modules():  # as recorded: no dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.nllb_encoder.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
        losses = stage1_losses(case, model, teacher_llm)
        losses["loss"].backward()
    assert absorbed, "the stage was not fused"
    grads = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            key = parameter_name.removeprefix("llm2vec.").replace(".default", "")
            grads[f"grad.{key}"] = parameter.grad
    recorded = {key for key in case.expected if key.startswith("grad.")}
    assert recorded == set(grads)
    case.check_gradients(mode, **grads)


def stage1_losses(case, model, teacher_llm) -> dict[str, torch.Tensor]:
    """MSE of the mean-pooled states, and with bags of tokens 0.333 of it and 0.667 of the spans'."""
    inputs = case.inputs
    mask, teacher_mask = inputs["nllb_attention_mask"], inputs["attention_mask"]
    student = model(input_ids=inputs["nllb_input_ids"], attention_mask=mask)
    with torch.no_grad():
        teacher = teacher_llm(input_ids=inputs["input_ids"], attention_mask=teacher_mask).last_hidden_state.float()
    pooled = (teacher * teacher_mask[..., None]).sum(1) / teacher_mask.sum(1, keepdim=True)
    losses = {"sequence": nn.functional.mse_loss(student.pooler_output.float(), pooled)}
    losses["loss"] = losses["sequence"]
    if "bag_ids" in inputs:
        bags = [
            nn.functional.embedding_bag(ids, states.float().flatten(0, 1), mode="mean", padding_idx=0)
            for ids, states in ((inputs["nllb_bag_ids"], student.last_hidden_state), (inputs["bag_ids"], teacher))
        ]
        losses["loss"] = 0.333 * losses["sequence"] + 0.667 * nn.functional.mse_loss(*bags)
    return losses


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


def test_compiled_training_absorbs_too(absorbed):
    torch.compiler.reset()
    model = new_stack("llama").train()
    model.nllb_encoder.eval()
    expected = loss_and_gradients(model)
    absorbed.clear()
    found = loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert absorbed == [False]
    agree((found[0], {name.removeprefix("_orig_mod."): grad for name, grad in found[1].items()}), expected, 1e-5)


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


@pytest.mark.parametrize("training", [False, True])
def test_hooks_of_the_first_layer_run(training, absorbed):
    model = new_stack("llama").train(training)
    model.nllb_encoder.eval()
    model.llm2vec.layers[0].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    fired = []
    other = new_stack("llama").train(training)
    other.llm2vec.layers[0].self_attn.q_proj.register_full_backward_hook(lambda *_: fired.append(1))
    for stack_with_hook in (model, other):
        stack_with_hook(**batch()).pooler_output.sum().backward()
        with pytest.raises(ValueError, match="cannot be fused"):
            stack_with_hook.fuse()
    assert absorbed == []
    assert fired == [1]


def test_reentrant_checkpointing_runs_the_modules(absorbed):
    model = with_lora(new_stack("llama")).train()
    inner = model.base_model.model
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    inner.enable_input_require_grads()
    model(**batch()).pooler_output.sum().backward()
    assert absorbed == []


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
    """The op's 2 launches take the place of the stage's 24: four products, and the norm's and the rotation's passes."""
    model = new_stack("llama").eval()
    before = counted_work(lambda: model(**batch()))
    model.fuse()
    monkeypatch.setattr(fusing, "is_fresh", lambda *_: True)  # checksums of the host's memory: no launches on a GPU
    after = counted_work(lambda: model(**batch()))
    assert before.launches - after.launches >= 10, (before, after)
    assert after.flops < before.flops
