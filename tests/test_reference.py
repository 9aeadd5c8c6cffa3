"""The same numbers: every forward case, both layouts, every attention that runs here; heads and LoRA gradients."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from reference import DTYPES, load_case, pack
from torch import nn

from mtllm_fast import MTLLM
from mtllm_fast.models import MTLLMForMultipleChoice, MTLLMForSequenceClassification

FORWARD = ["forward-small", "forward-gqa", "forward-single-and-full", "forward-larger"]


@pytest.fixture(autouse=True)
def _full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("attention", ["mtllm_varlen", "sdpa", "eager"])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_padded(name, mode, attention):
    case = load_case(name)
    model = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode], attn_implementation=attention)
    mask = case.inputs["attention_mask"].bool()
    out = model(**case.inputs, output_hidden_states=True)
    got = {
        "encoder_hidden": out.encoder_last_hidden_state[mask],
        "up_proj": out.hidden_states[0][mask],
        "last_hidden": out.last_hidden_state[mask],
    }
    for pooling in ("mean", "cls", "eos"):
        model.config.pooling = pooling
        got[f"pooled_{pooling}"] = model(**case.inputs).pooler_output
    case.check(mode, **{key: got[key] for key in case.expected})
    assert out.last_hidden_state.dtype == DTYPES[mode]
    assert not out.last_hidden_state[~mask].any(), "padded positions must be zero"


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("fused", [False, True])
def test_forward_packed(name, mode, fused):
    case = load_case(name)
    model = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode])
    if fused:
        assert model.fuse().form == "absorbed"
    inputs = pack(**case.inputs)
    out = model(**inputs)
    case.check(mode, last_hidden=out.last_hidden_state, pooled_mean=out.pooler_output)
    case.check(mode, pooled_mean=model.encode_packed(**inputs))


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["layerwise-C1", "layerwise-C2"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_layer(name, mode, fused):
    case = load_case(name)
    model = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode])
    if fused:
        model.fuse()
    mask = case.inputs["attention_mask"]
    out = model(input_ids=case.inputs["input_ids"], attention_mask=mask, output_hidden_states=True)
    got = {f"encoder_hidden_states.{i}": state for i, state in enumerate(out.encoder_hidden_states)}
    got |= {f"llm_hidden_states.{i}": state for i, state in enumerate(out.hidden_states[:-1]) if i}
    got |= {
        "encoder_last_hidden_state": out.encoder_last_hidden_state,
        "inputs_embeds": out.hidden_states[0],
        "last_hidden_state": out.hidden_states[-1],
        "pooled_mean": out.pooler_output,
    }
    case.check(mode, **{key: got[key] for key in case.expected if key in got})
    assert len(out.encoder_hidden_states) == len(model.nllb_encoder.layers) + 1


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_teacher_side_runs_the_plain_llm(mode):
    """The LLM called by itself, padded, on its own tokens: what a teacher is."""
    case = load_case("layerwise-C1")
    model = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode])
    mask = case.inputs["llm_attention_mask"]
    states = model.llm2vec(input_ids=case.inputs["llm_input_ids"], attention_mask=mask).last_hidden_state
    case.check(mode, teacher_last_hidden_state=states * mask[..., None])


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", ["a", "b", "c", "d"])
def test_edge_batches(batch, mode):
    """One sentence, all full, one token, left padding."""
    case = load_case("layerwise-C3")
    model = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode])
    mask = case.inputs[f"{batch}.attention_mask"]
    out = model(input_ids=case.inputs[f"{batch}.input_ids"], attention_mask=mask)
    case.check(mode, **{f"{batch}.last_hidden_state": out.last_hidden_state, f"{batch}.pooled_mean": out.pooler_output})


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_checkpoint_stored_in_bf16(mode):
    case = load_case("layerwise-C4")
    model = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode])
    out = model(**case.inputs)
    row = case.spec["stored_row"]
    length = case.spec["lengths"][row]
    case.check(mode, pooled_mean=out.pooler_output, last_hidden_state=out.last_hidden_state[row, :length])
    assert MTLLM.from_pretrained(case.checkpoint).dtype == torch.bfloat16, "the default dtype is the checkpoint's"


HEADS = {"cls": MTLLMForSequenceClassification, "mc": MTLLMForMultipleChoice}


def _stage2_model(task: str, mode: str) -> nn.Module:
    """As recorded: frozen parameters in the mode's dtype, the adapter in float32, the teacher's head frozen."""
    case = load_case("stage2-distillation")
    model = HEADS[task].from_pretrained(case.checkpoint, dtype=DTYPES[mode], num_labels=3)
    model.requires_grad_(False)
    PeftModel.from_pretrained(model.model.llm2vec, case.checkpoint.replace("checkpoint", "adapter"), is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "up_proj" in name.split(".")[:2]:
            parameter.data = parameter.data.float()
    model.score.weight.data.copy_(case.inputs[f"head_{task}.weight"])
    return model


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["cls", "mc"])
def test_heads_and_adapter_gradients(task, mode):
    case = load_case("stage2-distillation")
    model = _stage2_model(task, mode)
    inputs = {"input_ids": case.inputs["input_ids"], "attention_mask": case.inputs["attention_mask"]}
    labels, target, embeds = case.inputs["labels"], case.inputs["sequence_embeds"], []
    if task == "mc":
        inputs["mean_mask"] = case.inputs["mean_mask"]
        labels, target = case.inputs["labels_mc"], case.inputs["choice_embeds"]
    model.score.register_forward_pre_hook(lambda _, args: embeds.append(args[0]))
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
        out = model(**inputs, labels=labels)
        nn.functional.mse_loss(embeds[0].float(), target).backward()
    case.check(mode, **{f"{task}.logits": out.logits, f"{task}.embeds": embeds[0]})
    grads = {
        f"{task}.grad." + name.split("llm2vec.")[1].replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert len(grads) == sum(key.startswith(f"{task}.grad.layers") for key in case.expected)
    case.check_gradients(mode, **grads)
    truth, ref = case.spec["scalars"][f"{task}.ce"], case.spec["ref_scalars"][mode][f"{task}.ce"]
    allowed = 4e-6 * truth if mode == "fp32" else 1.5 * abs(ref - truth)
    assert abs(out.loss.item() - truth) <= allowed
    assert list(out.keys()) == ["loss", "logits"]
