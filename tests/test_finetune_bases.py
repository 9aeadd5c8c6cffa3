"""``finetune`` on labels of what is not an LLM: a stack, and a translation encoder alone, up to ``evaluate``."""

from __future__ import annotations

import json

import pytest
import tasks_data
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from mtllm_fast import (
    MTLLM,
    EvaluateArguments,
    FinetuneArguments,
    PreembedArguments,
    evaluate,
    finetune,
    preembed,
    task_training_arguments,
)
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.model import load_result
from mtllm_fast.tasks.predict import predict
from mtllm_fast.training.adapters import adapters_off

SENTIMENT = {"kind": "sequence", "text_columns": ["text"], "labels": ["good", "bad"], "max_length": 32}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    train = tasks_data.write(folder / "train.jsonl", tasks_data.rows(192))
    dev = tasks_data.write(folder / "dev.jsonl", tasks_data.rows(48, seed=1))
    return {"train": train, "dev": dev}


@pytest.fixture(scope="module", params=["encoder", "stack"])
def trained(request, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "encoder":
        base = {"encoder": tasks_data.translator_folder(folder / "nllb")}
    else:
        MTLLM.from_pretrained("tiny").save_pretrained(folder / "stack")
        MTLLM.from_pretrained("tiny").tokenizer.save_pretrained(folder / "stack")
        base = {"model": str(folder / "stack")}
    arguments = FinetuneArguments(**SENTIMENT, **rows, **base)
    how = task_training_arguments(
        arguments.resolve(), folder / "out", True, disable_tqdm=True, use_cpu=True, num_train_epochs=10,
        learning_rate=1e-2, per_device_train_batch_size=16,
    )  # fmt: skip
    return request.param, arguments, finetune(arguments, how)


def test_it_learns_and_is_loaded_as_it_was(trained):
    kind, arguments, result = trained
    assert result.metrics["accuracy"] > 0.8  # of a random encoder of width 32; chance is 0.5
    loaded = load_result(result.output_dir / "final")
    assert loaded.facts["kind"] == kind
    collate = TaskCollator(loaded.model.task, loaded.tokenizer, reads_languages=True)
    said = predict(loaded.model, collate, arguments.read(arguments.dev, loaded.model.task))
    lines = (result.output_dir / "predictions.jsonl").read_text().splitlines()
    torch.testing.assert_close(
        torch.tensor([p.logits for p in said]), torch.tensor([json.loads(line)["logits"] for line in lines])
    )


def test_what_is_trained_is_lora_and_the_head(trained):
    kind, _, result = trained
    adapter = load_file(result.output_dir / "final" / "adapter" / "adapter_model.safetensors")
    parts = {"q_proj", "k_proj", "v_proj"} | (
        {"out_proj", "fc1", "fc2"} if kind == "encoder" else {"o_proj", "gate_proj", "up_proj", "down_proj"}
    )
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter} == parts
    assert set(load_file(result.output_dir / "final" / "head.safetensors")) == {"score.weight"}


def test_the_encoders_states_are_means_of_the_reference_modules(trained):
    kind, arguments, result = trained
    if kind == "stack":  # tests/test_tasks.py has it against the reference
        return
    loaded = load_result(result.output_dir / "final")
    collate = TaskCollator(loaded.model.task, loaded.tokenizer, reads_languages=True)
    examples = arguments.read(arguments.dev, loaded.model.task)[:5]
    batch = collate(examples)
    with torch.no_grad(), adapters_off(loaded.model):
        states = loaded.model(**batch).states
    reference = AutoModel.from_pretrained(arguments.encoder).get_encoder().eval()
    for state, ids in zip(states, batch["input_ids"].split(batch["cu_seqlens"].diff().tolist()), strict=True):
        with torch.no_grad():
            want = reference(input_ids=ids[None]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(state, want, rtol=1e-4, atol=1e-5)


def test_evaluation_names_the_system_after_what_it_is(trained, rows, tmp_path):
    kind, _, result = trained
    record = evaluate(
        EvaluateArguments(
            data=[f"eng_Latn={rows['dev']}"], student=str(result.output_dir / "final"), output_dir=str(tmp_path)
        )
    )
    assert list(record["systems"]) == ["encoder" if kind == "encoder" else "mt-llm"]
    assert next(iter(record["systems"].values()))["languages"]["eng_Latn"]["accuracy"] == result.metrics["accuracy"]


def test_preembed_reads_with_languages(trained, rows, tmp_path):
    _, _, result = trained
    out = preembed(
        PreembedArguments(
            teacher=str(result.output_dir / "final"), data=rows["dev"], out=str(tmp_path / "states.safetensors")
        )
    )
    loaded = load_result(result.output_dir / "final")
    states = load_file(out)["rows"]
    with torch.no_grad():
        logits = loaded.model.score(states)
    lines = (result.output_dir / "predictions.jsonl").read_text().splitlines()
    torch.testing.assert_close(
        logits, torch.tensor([json.loads(line)["logits"] for line in lines]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "a", "model": "b"}, "give one of llm, model and encoder"),
        ({"encoder": "a", "llm": "b"}, "give one of llm, model and encoder"),
    ],
)
def test_one_base_at_a_time(options, message, rows):
    with pytest.raises(ValueError, match=message):
        finetune(FinetuneArguments(**SENTIMENT, **rows, **options))


def test_an_llm_is_no_encoder(rows, tmp_path):
    llm = tasks_data.llm_folder(tmp_path / "llm")
    with pytest.raises(ValueError, match="encoder must be an NLLB or M2M-100 model, is a llama"):
        finetune(FinetuneArguments(**SENTIMENT, **rows, encoder=llm))
