"""``MTLLMForSelfDistillation``: the recorded steps, the teacher, the recipe, and what it refuses."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch
from recorded_stage1 import recorded, recorded_inputs, recorded_name
from stacks import batch, new_stack, with_lora
from torch import nn
from torch.nn import functional as F

from mtllm_fast import (
    MTLLM,
    DataCollatorForSelfDistillation,
    MTLLMForSelfDistillation,
    SpanAlignment,
    distillation_loss,
)
from mtllm_fast.testing.tolerance import relative_error
from mtllm_fast.tiny import article_1, tiny_path
from mtllm_fast.tiny import tiny_llm_tokenizer as llm_tokenizer

STAGE1 = {"stage1-sequence-step": (1.0, 0.0), "stage1-span-step": (0.333, 0.667)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STAGE1)
def test_the_recorded_steps(name, mode, packed, monkeypatch):
    case, joint = recorded(name, mode, *STAGE1[name])
    seen = {}

    def spy(states, weight, cu_seqlens, **options):
        seen.update(options, states=states.detach(), weight=weight, cu_seqlens=cu_seqlens)
        return distillation_loss(states, weight, cu_seqlens, **options)

    monkeypatch.setattr("mtllm_fast.training.self_distillation.distillation_loss", spy)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
        out = joint(**recorded_inputs(case.inputs, packed))
    out.loss.backward()
    case.check(mode, **vectors(case, seen))
    recorded_names = {"loss": "loss", "fvu_student": "train/fvu"}
    if "bag_ids" in case.inputs:
        recorded_names = {
            "loss": "loss", "sequence_loss": "train/seq_mse", "span_loss": "train/span_mse",
            "fvu_student": "train/seq_fvu", "cosine": "train/seq_cos_sim", "norm_difference": "train/seq_abs_diff_norm",
            "span_norm_difference": "train/span_abs_diff_norm",
        }  # fmt: skip
    for ours, theirs in recorded_names.items():
        true = case.spec["scalars"][theirs]
        # The recorded error of one number is one draw, and may be 0: hence a floor.
        own_error = abs(case.spec["ref_scalars"][mode][theirs] - true)
        allowed = max({"fp32": 4, "bf16": 1.5}[mode] * own_error, {"fp32": 2e-6, "bf16": 5e-3}[mode] * abs(true))
        assert abs(float(out[ours].detach()) - true) <= allowed, ours
    grads = {
        f"grad.{recorded_name(name)}": parameter.grad
        for name, parameter in joint.named_parameters()
        if parameter.grad is not None
    }
    assert grads.keys() == {key for key in case.expected if key.startswith("grad.")}
    case.check_gradients(mode, **grads)


def vectors(case, seen) -> dict[str, torch.Tensor]:
    """What was compared, pooled and by span, from the states that the loss was given."""
    found = {}
    for side, states in (("student", "states"), ("teacher", "teacher_states")):
        prefix = "" if side == "student" else "teacher_"
        weight, cu_seqlens = (seen[f"{prefix}{name}"] for name in ("weight", "cu_seqlens"))
        eps = seen["eps"]
        wide = seen[states].float()
        normed = weight.float() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ends = cu_seqlens.tolist()
        found[f"{side}_pooled"] = torch.stack([normed[i:j].mean(0) for i, j in itertools.pairwise(ends)])
        if "span_indices" in seen:
            offsets = seen[f"{prefix}span_offsets"]
            found[f"{side}_spans"] = F.embedding_bag(seen[f"{prefix}span_indices"], normed, offsets[:-1], mode="mean")
    return found


def llm_batch() -> dict[str, torch.Tensor]:
    inputs = batch()
    encoder = {f"encoder_{name}": value for name, value in inputs.items()}
    return {"input_ids": inputs["input_ids"] % 99, "attention_mask": inputs["attention_mask"], **encoder}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma"])
def test_the_teacher_is_the_llm_without_adapters(family):
    plain = MTLLMForSelfDistillation(new_stack(family)).eval()
    if family == "gpt2":
        adapted = peft.get_peft_model(
            new_stack(family), peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
        )
    else:
        adapted = with_lora(new_stack(family))
    joint = MTLLMForSelfDistillation(adapted).train()
    inputs = llm_batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    one, other = plain._teacher(ids, mask, None, None), joint._teacher(ids, mask, None, None)
    assert relative_error(other["teacher_states"], one["teacher_states"]) < 1e-6
    assert not joint(**inputs).loss.detach().equal(plain(**inputs).loss.detach())


def test_the_recipe_is_put_in_place_and_restored_after_the_teacher():
    wrapped = with_lora(new_stack("llama"), 0.1)
    joint = MTLLMForSelfDistillation(wrapped).train()
    trained = {name for name, parameter in joint.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"stack.base_model.model.up_proj.weight"}
    assert len(trained) == 1 + 2 * 2 * 7
    frozen = next(name for name in trained if "layers.1.mlp.up_proj.lora_A" in name)
    joint.get_parameter(frozen).requires_grad_(False)
    joint(**llm_batch()).loss.backward()
    now = {name for name, parameter in joint.named_parameters() if parameter.requires_grad}
    assert now == trained - {frozen}, "the switch must leave what the user froze as it is"
    assert {name for name, parameter in joint.named_parameters() if parameter.grad is not None} == now
    assert joint.training
    assert all(module.training for module in joint.mtllm.llm2vec.modules())


def test_known_teacher_vectors_are_the_same_as_the_teacher():
    joint = MTLLMForSelfDistillation(with_lora(new_stack("llama")), sequence_weight=0.3, span_weight=0.7)
    spans = SpanAlignment(*(torch.tensor(t) for t in ([1, 10, 11], [0, 1, 3], [2, 3, 12], [0, 2, 3])))
    inputs = llm_batch()
    expected = joint(**inputs, spans=spans)
    states = joint._teacher(inputs["input_ids"], inputs["attention_mask"], None, None)
    normed = joint.mtllm.llm2vec.norm(states["teacher_states"])
    ends = states["teacher_cu_seqlens"].tolist()
    pooled = torch.stack([normed[i:j].mean(0) for i, j in itertools.pairwise(ends)])
    known = {name: value for name, value in inputs.items() if name.startswith("encoder")}
    vectors_ = torch.stack([normed[1], normed[10:12].mean(0)])
    out = joint(**known, spans=spans, teacher_pooled=pooled, teacher_spans=vectors_)
    assert relative_error(out.loss, expected.loss) < 1e-5


def test_from_texts_to_a_falling_loss():
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    model = MTLLM.from_pretrained("tiny")
    peft.PeftModel(model.llm2vec, peft.LoraConfig(r=4, target_modules="all-linear"))
    joint = MTLLMForSelfDistillation(model, sequence_weight=0.5, span_weight=0.5).train()
    collate = DataCollatorForSelfDistillation(
        llm_tokenizer(), AutoTokenizer.from_pretrained(tiny_path()), only_overlapping_tokens=False
    )
    inputs = collate([text for text in article_1().values() if text.isascii()])
    optimizer = torch.optim.AdamW([p for p in joint.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        out = joint(**inputs)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert out.fvu > 0
    assert -1 <= out.span_cosine <= 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": None}, ValueError, "exactly one of input_ids and teacher_pooled"),
        ({"encoder_input_ids": None}, ValueError, "encoder_input_ids are missing"),
        ({"input_ids": torch.full((3, 9), 99)}, ValueError, "input_ids holds 99; the LLM's vocabulary is 0 … 98"),
        ({"input_ids": torch.ones(9, dtype=torch.int64)}, ValueError, r"input_ids must be \[N, L\]"),
        ({"attention_mask": torch.ones(3, 8)}, ValueError, r"attention_mask must be \[3, 9\], got \[3, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 27])}, ValueError, "exclude each other"),
        ({"encoder_input_ids": torch.ones(2, 9, dtype=torch.int64), "encoder_attention_mask": None}, ValueError, "."),
    ],
    ids=str,
)
def test_bad_inputs(changes, error, message):
    joint = MTLLMForSelfDistillation(new_stack("llama"))
    with pytest.raises(error, match=message):
        joint(**llm_batch() | changes)


def test_bad_stacks_and_weights():
    with pytest.raises(TypeError, match="stack must be an MTLLM, plain or wrapped by PEFT, got Linear"):
        MTLLMForSelfDistillation(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="nor both 0"):
        MTLLMForSelfDistillation(new_stack("llama"), sequence_weight=0)
    with pytest.raises(ValueError, match=r"span_weight is 0\.5: pass spans"):
        MTLLMForSelfDistillation(new_stack("llama"), span_weight=0.5)(**llm_batch())
    headless = MTLLM.from_pretrained("tiny", llm_embeddings=False)
    with pytest.raises(ValueError, match="loaded without the LLM's embeddings"):
        MTLLMForSelfDistillation(headless)


def test_what_a_trainer_asks_for():
    joint = MTLLMForSelfDistillation(with_lora(new_stack("llama"))).train()
    expected = joint(**llm_batch()).loss
    joint.gradient_checkpointing_enable({"use_reentrant": False})
    assert joint.mtllm.is_gradient_checkpointing
    found = joint(**llm_batch(), return_loss=True).loss
    found.backward()
    assert relative_error(found.detach(), expected.detach()) < 1e-6
    joint.gradient_checkpointing_disable()
    joint._is_replica = True
    with pytest.raises(RuntimeError, match="one process per GPU"):
        joint(**llm_batch())


def test_a_trained_stack_is_saved_whole(tmp_path):
    joint = MTLLMForSelfDistillation(with_lora(new_stack("llama"))).eval()
    with torch.no_grad():
        joint.mtllm.up_proj.weight.mul_(1.5)
        inputs = batch()
        expected = joint.mtllm(**inputs).pooler_output
        joint.stack.merge_and_unload().save_pretrained(tmp_path)
        assert relative_error(MTLLM.from_pretrained(tmp_path)(**inputs).pooler_output, expected) < 1e-5


def test_adapters_in_the_encoder_are_refused():
    everywhere = peft.get_peft_model(new_stack("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the encoder has PEFT adapters"):
        MTLLMForSelfDistillation(everywhere)


def test_a_fused_stack_is_unfused_first():
    model = new_stack("llama").eval()
    plain = MTLLMForSelfDistillation(model).eval()
    expected = plain(**llm_batch()).loss.detach()
    model.fuse()
    assert relative_error(plain(**llm_batch()).loss.detach(), expected) < 1e-5
    assert model._fused is None


def test_the_teacher_calls_no_adapter():
    joint = MTLLMForSelfDistillation(with_lora(new_stack("llama")))
    called = []
    for name, module in joint.named_modules():
        if "lora_B" in name and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: called.append(1))
    inputs = llm_batch()
    joint._teacher(inputs["input_ids"], inputs["attention_mask"], None, None)
    assert called == []
    joint(**inputs)
    assert len(called) == 2 * 7
