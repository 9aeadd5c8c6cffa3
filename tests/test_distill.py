"""Stage 1 as a command: the recorded run through the Trainer, resuming, several processes, errors."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from recorded_stage1 import recorded, recorded_inputs, recorded_name

from mtllm_fast import (
    MTLLM,
    DistillArguments,
    MTLLMForSelfDistillation,
    SelfDistillationTrainer,
    distill,
    training_arguments,
)
from mtllm_fast.core.errors import BatchTooLargeError, CheckpointError
from mtllm_fast.tiny import tiny_documents, tiny_llm_tokenizer
from mtllm_fast.training.checkpoints import damage, newest
from mtllm_fast.training.teacher_cache import TeacherCache
from mtllm_fast.training.trainer import load_trained, read_trained

SMALL = {"preset": "tiny", "documents_per_batch": 4, "init_documents": 32, "eval_documents": 4, "max_length": 32}
PROGRAM = Path(__file__).with_name("distill_program.py")


def how(arguments, folder, **options):
    given = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no", "disable_tqdm": True}
    return training_arguments(arguments, folder, use_cpu=True, **given | options)


def small(**options):
    return DistillArguments(**SMALL | options)


class Recorded(torch.utils.data.IterableDataset):
    """The recorded batches in turn."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for step in range(10**6):
            yield dict(self.batches[step % len(self.batches)])


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_the_recorded_thirty_steps_through_the_trainer(mode, tmp_path):
    case, joint = recorded("stage1-training-run", mode)
    recipe = case.spec["optimizer"]
    arguments = training_arguments(
        small(), tmp_path, use_cpu=True, max_steps=recipe["steps"], learning_rate=recipe["lr"], warmup_steps=0,
        lr_scheduler_type="constant", adam_beta1=recipe["betas"][0], adam_beta2=recipe["betas"][1],
        adam_epsilon=recipe["eps"], weight_decay=recipe["weight_decay"], max_grad_norm=0.0, logging_steps=1,
        eval_strategy="no", save_strategy="no", bf16=mode == "bf16", disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    batches = Recorded([recorded_inputs(case.inputs, True, f"batch{i}.") for i in range(4)])
    trainer = SelfDistillationTrainer(joint, arguments, train_dataset=batches)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    case.check(mode, losses=torch.tensor(losses))
    final = {f"final.{recorded_name(n)}": p.detach() for n, p in joint.named_parameters() if p.requires_grad}
    case.check_together(mode, **final)
    if mode == "fp32":
        case.check_gradients(mode, **final)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = small(shuffle=True, merge=True)
    return distill(arguments, how(arguments, folder, save_total_limit=3))


def test_a_run_writes_what_it_says(whole):
    output = whole.output_dir
    assert whole.steps == 6
    assert [damage(output / name) for name in ("checkpoint-2", "checkpoint-6", "final", "merged")] == [None] * 4
    assert json.loads((output / "log.json").read_text()) == json.loads(json.dumps(whole.log))
    assert (output / "curve.png").stat().st_size > 1000
    line = next(line for line in whole.log if "loss" in line)
    wanted = {"sequence_loss", "span_loss", "fvu", "fvu_student", "cosine", "tokens_per_second", "tflops_per_second"}
    assert wanted | {"memory_gib", "seconds_left", "grad_norm", "learning_rate"} <= line.keys()
    assert whole.metrics["eval_fvu"] > 0
    assert whole.log[0].keys() >= {"eval_fvu", "eval_loss"}  # where least squares ended
    assert whole.log[0]["step"] == 0
    held = sum(path.stat().st_size for path in (output / "checkpoint-6").iterdir())
    frozen = sum(p.numel() for p in MTLLM.from_pretrained("tiny").parameters()) * 4
    assert held < frozen / 2  # LoRA, its optimiser and up_proj


def test_the_merged_stack_says_what_the_trained_one_does(whole):
    import peft

    merged = MTLLM.from_pretrained(whole.output_dir / "merged")
    model = MTLLM.from_pretrained("tiny")
    peft.PeftModel.from_pretrained(model.llm2vec, str(whole.output_dir / "final" / "adapter"))
    from safetensors.torch import load_file

    model.load_state_dict(load_file(whole.output_dir / "final" / "up_proj.safetensors"), strict=False)
    texts = ["Every human being", "tous les hommes"]
    ours, theirs = (m.encode(texts, ["eng_Latn", "fra_Latn"]) for m in (merged, model.eval()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs, MTLLM.from_pretrained("tiny").encode(texts, ["eng_Latn", "fra_Latn"]), atol=1e-2)


def losses(log):
    names = ("step", "loss", "sequence_loss", "span_loss", "cosine", "grad_norm")
    return [[line[name] for name in names if name in line] for line in log if "loss" in line]


def same_run(result, whole):
    ours, theirs = (read_trained(r.output_dir / "checkpoint-6") for r in (result, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(result.log) == losses(whole.log)
    first, of_whole = ({name: log[0].get(name) for name in ("step", "eval_fvu")} for log in (result.log, whole.log))
    assert first == of_whole


def test_killed_with_9_and_resumed_is_the_same_bit_for_bit(whole, tmp_path):
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(PROGRAM), str(tmp_path), json.dumps(SMALL | {"shuffle": True, "merge": True})]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-2").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "final").exists()
    arguments = small(shuffle=True, merge=True)
    same_run(distill(arguments, how(arguments, tmp_path, save_total_limit=3)), whole)


def test_a_damaged_checkpoint_is_passed_over_with_a_message(whole, tmp_path, caplog):
    for name in ("checkpoint-2", "checkpoint-4", "run_settings.json"):
        source = whole.output_dir / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    weights = next((tmp_path / "checkpoint-4").glob("trained-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = small(shuffle=True, merge=True)
    with caplog.at_level(logging.WARNING, "mtllm_fast"):
        result = distill(arguments, how(arguments, tmp_path, save_total_limit=3))
    assert "checkpoint-4 is damaged" in caplog.text
    assert "resuming from" in caplog.text
    same_run(result, whole)
    weights.write_bytes(b"")
    for name in ("checkpoint-2", "checkpoint-6"):
        (tmp_path / name / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        distill(arguments, how(arguments, tmp_path))


def test_a_finished_run_is_not_trained_again(whole):
    before = (whole.output_dir / "checkpoint-6" / "manifest.json").stat().st_mtime_ns
    arguments = small(shuffle=True)
    again = distill(arguments, how(arguments, whole.output_dir, save_total_limit=3))
    assert again.steps == 6
    assert again.metrics == pytest.approx(whole.metrics)
    assert (whole.output_dir / "checkpoint-6" / "manifest.json").stat().st_mtime_ns == before


def test_another_run_is_not_overwritten(whole):
    arguments = small(shuffle=True, lora_r=8)
    with pytest.raises(FileExistsError, match="lora_r was 16, is 8"):
        distill(arguments, how(arguments, whole.output_dir))
    arguments = small(shuffle=True)
    with pytest.raises(FileExistsError, match=r"learning_rate was 0.001, is 0.1"):
        distill(arguments, how(arguments, whole.output_dir, learning_rate=0.1))
    assert newest(whole.output_dir).path.name == "checkpoint-6"


def test_a_run_without_a_checkpoint_may_be_changed(tmp_path):
    """Such as one that ran out of memory in its first step."""
    arguments = small(documents_per_batch=8)
    distill(arguments, how(arguments, tmp_path, max_steps=1, save_strategy="no"))
    for name in ("final", "run_settings.json"):
        assert (tmp_path / name).exists()
    with pytest.raises(FileExistsError, match="documents_per_batch was 8, is 4"):
        distill(small(), how(small(), tmp_path, max_steps=1, save_strategy="no"))
    shutil.rmtree(tmp_path / "final")
    assert distill(small(), how(small(), tmp_path, max_steps=1, save_strategy="no")).steps == 1


def test_accumulated_batches_are_one(tmp_path):
    log = {}
    for accumulated in (1, 2):
        arguments = small(lora_dropout=0.0)
        options = {"max_steps": 3, "gradient_accumulation_steps": accumulated, "save_strategy": "no"}
        log[accumulated] = losses(distill(arguments, how(arguments, tmp_path / str(accumulated), **options)).log)
    for one, two in zip(log[1], log[2], strict=True):
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind, tmp_path):
    options = SMALL | {"lora_dropout": 0.0}
    arguments = DistillArguments(**options)
    one = distill(arguments, how(arguments, tmp_path / "one", max_steps=4))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(PROGRAM), str(tmp_path / "two"), json.dumps(options), kind]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "two" / "log.json").read_text())
    for ours, theirs in zip(losses(log), losses(one.log), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    checkpoint = tmp_path / "two" / "checkpoint-4"
    assert len(list(checkpoint.glob("trained-*-of-00002.safetensors"))) == 2
    two, single = read_trained(checkpoint), read_trained(tmp_path / "one" / "checkpoint-4")
    for name, weight in single.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)
    next(checkpoint.glob("trained-00001-*.json")).unlink()
    with pytest.raises(CheckpointError, match="not all of them"):
        read_trained(checkpoint)


def test_the_teacher_reads_a_document_once(tmp_path, monkeypatch):
    """Eight documents, read three times over: the same losses as without, and the teacher is asked of each once."""
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in tiny_documents()[:8]))
    options = {"data": [str(tmp_path / "texts.txt")], "span_weight": 0.0, "sequence_weight": 1.0}
    options |= {"lora_dropout": 0.0, "init_documents": 8}
    asked = []
    teacher = MTLLMForSelfDistillation.teacher_pooled

    def counted(self, ids, cu_seqlens):
        asked.append(len(cu_seqlens) - 1)
        return teacher(self, ids, cu_seqlens)

    monkeypatch.setattr(MTLLMForSelfDistillation, "teacher_pooled", counted)
    runs = []
    for cached in (False, True):
        arguments = small(model="tiny", llm_tokenizer=str(llm_folder(tmp_path)), teacher_cache=cached, **options)
        runs.append(distill(arguments, how(arguments, tmp_path / f"out-{cached}", save_strategy="no")))
    assert asked == [4, 4]
    for plain, kept in zip(*(losses(run.log) for run in runs), strict=True):
        assert kept == pytest.approx(plain, rel=1e-4)
    with pytest.raises(ValueError, match=r"span_weight must be 0, is 0\.5"):
        small(teacher_cache=True).check()


def test_a_torn_cache_is_cut_and_another_teachers_refused(tmp_path):
    path, tokens, bounds = tmp_path / "cache", torch.arange(6), torch.tensor([0, 2, 6])
    states = torch.randn(2, 3)
    TeacherCache(path, 3, "a").pooled(tokens, bounds, lambda ids, cu_seqlens: states)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    cache = TeacherCache(path, 3, "a")
    assert len(cache) == 1
    asked = cache.pooled(tokens, bounds, lambda ids, cu_seqlens: states[1:])
    assert torch.equal(asked, states)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:50] + b"?" + whole[51:])
    assert len(TeacherCache(path, 3, "a")) == 0
    with pytest.raises(ValueError, match="another teacher"):
        TeacherCache(path, 3, "b")


def llm_folder(folder):
    tiny_llm_tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_weights_of_another_model_are_refused(whole):
    with pytest.raises(CheckpointError, match="not trained here"):
        load_trained(whole.output_dir / "checkpoint-6", torch.nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(CheckpointError, match="no weights of bias and 1 more"):
        load_trained(whole.output_dir / "checkpoint-6", torch.nn.Linear(2, 2))


def test_running_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mtllm_fast.training.self_distillation.distillation_loss", out_of_memory)
    arguments = small()
    with pytest.raises(BatchTooLargeError, match=r"4 texts, .* tokens for the LLM .* lower tokens_per_batch"):
        distill(arguments, how(arguments, tmp_path, do_eval=False, eval_strategy="no"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "preset must be one of"),
        ({"encoder": "nllb"}, "llm is missing"),
        ({"model": "tiny", "llm": "x"}, "either model, or"),
        ({"model": "some/stack"}, "give llm_tokenizer"),
        ({"encoder": "a", "llm": "b"}, "data is missing"),
        ({"tokens_per_batch": 100}, "either documents_per_batch or tokens_per_batch"),
        ({"tokens_per_batch": 16, "documents_per_batch": None}, "must hold one text of max_length=32"),
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"load_in_4bit": True}, "load_in_4bit needs"),
        ({"src_lang": "klingon"}, "klingon"),
        ({"data": ["nowhere/*.parquet"]}, "nowhere"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(options, message, tmp_path):
    def run():
        arguments = small(**options)
        distill(arguments, how(arguments, tmp_path / "out"))

    with pytest.raises((ValueError, OSError), match=message):
        run()
    assert not (tmp_path / "out" / "run_settings.json").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    arguments = small(documents_per_batch=6)
    with pytest.raises(ValueError, match=r"documents_per_batch=6 must be a multiple of 1 processes times .*=4"):
        distill(arguments, how(arguments, tmp_path, gradient_accumulation_steps=4))
    assert arguments.documents_per_process(2, 3) == 1
