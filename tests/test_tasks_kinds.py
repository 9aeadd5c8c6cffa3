"""Stage 2 beside the shared teacher: the recorded step, choices and words, translations."""

from __future__ import annotations

from pathlib import Path

import pytest
import tasks_data
import torch
from reference import DTYPES, load_case
from test_tasks import how
from torch.nn import functional as F

from mtllm_fast import (
    MTLLM,
    DistillTaskArguments,
    EvaluateArguments,
    FinetuneArguments,
    MTLLMForMultipleChoice,
    MTLLMForTokenClassification,
    PreembedArguments,
    distill_task,
    evaluate,
    finetune,
    preembed,
)
from mtllm_fast.evaluation.translate import Translator
from mtllm_fast.tasks.model import TaskModel
from mtllm_fast.tasks.presets import Task


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["cls", "mc"])
def test_the_recorded_step_of_task_distillation(kind, mode):
    import peft

    case = load_case("stage2-distillation")
    mask = case.inputs["attention_mask"].bool()
    classes = case.inputs[f"head_{kind}.weight"].shape[0]
    count = case.inputs["mean_mask"].shape[2] if kind == "mc" else classes
    names = tuple(map(str, range(1, count + 1)))
    choices = {"kind": "choice", "text": ("c", "q"), "choices": names}
    task = Task(
        "recorded", label="label", labels=names, **choices if kind == "mc" else {"kind": "sequence", "text": ("t",)}
    )
    stack = MTLLM.from_pretrained(case.checkpoint, dtype=DTYPES[mode])
    model = TaskModel(stack, task)
    with torch.no_grad():
        model.score.weight.copy_(case.inputs[f"head_{kind}.weight"])
    model.score.to(DTYPES[mode])
    model.requires_grad_(False)
    adapter = str(Path(case.checkpoint).parent / "adapter")
    peft.PeftModel.from_pretrained(stack.llm2vec, adapter, is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "up_proj" in name.split(".")[:2]:
            parameter.data = parameter.data.float()
    lengths = mask.sum(1)
    batch = {
        "input_ids": case.inputs["input_ids"][mask],
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen": int(lengths.max()),
    }
    target = case.inputs["sequence_embeds"]
    if kind == "mc":
        place = (mask.flatten().cumsum(0) - 1).view(mask.shape)
        units = [place[n][case.inputs["mean_mask"][n, :, c].bool()] for n in range(len(mask)) for c in range(count)]
        batch["unit_indices"] = torch.cat(units)
        batch["unit_offsets"] = F.pad(torch.tensor([len(unit) for unit in units]).cumsum(0), (1, 0))
        target = case.inputs["choice_embeds"].flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
        out = model(**batch, states=target)
    out.loss.backward()
    case.check(
        mode, **{f"{kind}.logits": out.logits, f"{kind}.embeds": out.states.view(case.expected[f"{kind}.embeds"].shape)}
    )
    grads = {
        f"{kind}.grad." + name.split("llm2vec.")[1].replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    case.check_gradients(mode, **grads)
    assert stack.up_proj.weight.grad is None


@pytest.mark.parametrize(
    ("kind", "head"), [("choice", MTLLMForMultipleChoice), ("tokens", MTLLMForTokenClassification)]
)
def test_choices_and_words_go_all_the_way(kind, head, tmp_path):
    llm = tasks_data.llm_folder(tmp_path / "llm")
    made = {"choice": tasks_data.choices, "tokens": tasks_data.words}[kind]
    train = tasks_data.write(tmp_path / "train.jsonl", made(24))
    dev = tasks_data.write(tmp_path / "dev.jsonl", made(8, seed=1))
    columns = {"choice": {"task": "belebele", "max_length": 96},
               "tokens": {"kind": "tokens", "text_columns": ["words"], "label_column": "tags", "labels": ["O", "X"],
                          "max_length": 24}}[kind]  # fmt: skip
    arguments = FinetuneArguments(**columns, llm=llm, train=train, dev=dev)
    quick = {"max_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "no", "load_best_model_at_end": False}
    result = finetune(arguments, how(arguments, tmp_path / "t", **quick))
    out = tmp_path / "s.safetensors"
    preembed(PreembedArguments(teacher=str(result.output_dir / "final"), data=train, out=str(out), shard_size=7))
    given = DistillTaskArguments(
        teacher=str(result.output_dir / "final"), states=str(out), train=train, dev=dev, merge=True
    )
    student = distill_task(given, how(arguments, tmp_path / "d", **quick))
    assert 0 <= student.metrics["accuracy"] <= 1
    assert head.from_pretrained(student.output_dir / "merged").score.weight.shape[0] == arguments.resolve().num_scores
    record = evaluate(EvaluateArguments(data=[f"en={dev}"], student=str(student.output_dir / "final"),
                                        output_dir=str(tmp_path / "e")))  # fmt: skip
    assert record["systems"]["mt-llm"]["languages"]["eng_Latn"]["accuracy"] == student.metrics["accuracy"]


def test_translations_are_kept_and_do_not_depend_on_their_batch(tmp_path):
    folder = tasks_data.translator_folder(tmp_path / "nllb")
    cache = tmp_path / "cache.jsonl"
    texts = ["Tous les êtres", "human", "Alle Menschen sind frei und gleich", "libres"]
    languages = ["fra_Latn", "eng_Latn", "deu_Latn", "fra_Latn"]
    translate = Translator(folder, max_new_tokens=6, cache=cache)
    found = translate(texts, languages)
    assert found[1] == "human"
    assert [translate([text], [code])[0] for text, code in zip(texts, languages, strict=True)] == found
    alone = Translator(folder, max_new_tokens=6)
    assert [alone([text], [code])[0] for text, code in zip(texts, languages, strict=True)] == found
    cache.write_bytes(cache.read_bytes() + b'{"key": "half')  # killed while it wrote
    again = Translator(folder, max_new_tokens=6, cache=cache)
    again._translate = None  # everything is known
    assert again(texts, languages) == found
    assert len(Translator(folder, num_beams=3, max_new_tokens=6, cache=cache)(texts, languages)) == 4
    torch.nn.init.normal_(again.model.lm_head.weight.data)
    again.model.save_pretrained(folder)
    changed = Translator(folder, max_new_tokens=6, cache=cache)
    changed._translate = lambda texts, languages: ["anew"] * len(texts)
    assert changed(texts, languages)[0] == "anew"  # other weights under the same path
    cache.write_text("no json\n")
    with pytest.raises(ValueError, match="line 1: not a translation"):
        Translator(folder, cache=cache)
    with pytest.raises(ValueError, match="must be at least 1"):
        Translator(folder, num_beams=0)
