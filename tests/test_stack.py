"""The fused stage in training: live weights, LoRA beside them, and what runs as the modules it is."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from reference import load_case
from stacks import LORA, agree, batch, loss_and_gradients, new_stack, with_lora
from torch import nn

from mtllm_fast import MTLLM
from mtllm_fast.models import stack
from mtllm_fast.testing.tolerance import relative_error

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


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


def test_compiled_training_absorbs_too(absorbed):
    torch.compiler.reset()
    model = new_stack("llama").train()
    model.nllb_encoder.eval()
    expected = loss_and_gradients(model)
    absorbed.clear()
    found = loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert absorbed == [False]
    agree((found[0], {name.removeprefix("_orig_mod."): grad for name, grad in found[1].items()}), expected, 1e-5)


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
