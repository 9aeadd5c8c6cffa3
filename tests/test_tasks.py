"""Stage 2: reading rows, batches, the recorded case, and finetune -> preembed -> distill-task -> evaluate."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tasks_data
import torch
from sklearn.metrics import accuracy_score, f1_score

from mtllm_fast import (
    MTLLM,
    DistillTaskArguments,
    EvaluateArguments,
    FinetuneArguments,
    MTLLMForSequenceClassification,
    PreembedArguments,
    distill_task,
    evaluate,
    finetune,
    preembed,
    task_training_arguments,
)
from mtllm_fast.core.errors import CheckpointError, UnknownLanguageError
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.examples import read_examples
from mtllm_fast.tasks.model import load_result, read_facts
from mtllm_fast.tasks.predict import predict
from mtllm_fast.tasks.preembed import States
from mtllm_fast.tasks.presets import Task
from mtllm_fast.tasks.training import TaskTrainer

SENTIMENT = {"kind": "sequence", "text_columns": ["text"], "labels": ["good", "bad"], "max_length": 32}


def how(arguments, folder, dev=True, **options):
    task = arguments if isinstance(arguments, Task) else arguments.resolve()
    given = {"disable_tqdm": True, "use_cpu": True, "logging_steps": 5}
    return task_training_arguments(task, folder, dev, **given | options)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    llm = tasks_data.llm_folder(folder / "llm")
    train = tasks_data.write(folder / "train.jsonl", tasks_data.rows(192))
    dev = tasks_data.write(folder / "dev.jsonl", tasks_data.rows(48, seed=1))
    arguments = FinetuneArguments(**SENTIMENT, llm=llm, train=train, dev=dev)
    options = {"num_train_epochs": 3, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    return folder, arguments, finetune(arguments, how(arguments, folder / "out", **options)), options


@pytest.fixture(scope="module")
def states(teacher):
    folder, arguments, result, _ = teacher
    out = folder / "states.safetensors"
    preembed(
        PreembedArguments(teacher=str(result.output_dir / "final"), data=arguments.train, out=str(out), shard_size=50)
    )
    return out


@pytest.fixture(scope="module")
def student(teacher, states):
    folder, arguments, result, _ = teacher
    given = DistillTaskArguments(
        teacher=str(result.output_dir / "final"),
        states=str(states),
        train=arguments.train,
        dev=arguments.dev,
        merge=True,
    )
    options = {"num_train_epochs": 6, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    return given, distill_task(given, how(arguments, folder / "student", **options)), options


def test_the_teacher_learns_and_its_predictions_say_what_its_metrics_do(teacher):
    _, _, result, _ = teacher
    assert result.metrics["accuracy"] > 0.9
    lines = [json.loads(line) for line in (result.output_dir / "predictions.jsonl").read_text().splitlines()]
    truth, said = ([line[name] for line in lines] for name in ("label", "prediction"))
    assert accuracy_score(truth, said) == result.metrics["accuracy"]
    assert f1_score(truth, said, average="macro") == pytest.approx(result.metrics["macro_f1"])
    assert json.loads((result.output_dir / "metrics.json").read_text()) == result.metrics
    facts = read_facts(result.output_dir / "final")
    assert facts["kind"] == "llm"
    assert Task.from_dict(facts["task"]) == teacher[1].resolve()


def test_a_teacher_that_is_loaded_says_the_same(teacher):
    _, arguments, result, _ = teacher
    loaded = load_result(result.output_dir / "final")
    collate = TaskCollator(loaded.model.task, loaded.tokenizer, reads_languages=False)
    examples = read_examples(arguments.dev, loaded.model.task)
    with torch.no_grad():
        logits = loaded.model(**collate(examples)).logits
    lines = [json.loads(line) for line in (result.output_dir / "predictions.jsonl").read_text().splitlines()]
    torch.testing.assert_close(logits, torch.tensor([line["logits"] for line in lines]), rtol=1e-4, atol=1e-4)


def test_states_are_the_teachers(teacher, states):
    _, arguments, result, _ = teacher
    loaded = load_result(result.output_dir / "final")
    task = loaded.model.task
    examples = read_examples(arguments.train, task)
    found = States(states, result.output_dir / "final", arguments.train, [1] * len(examples))
    assert len(found) == 192
    collate = TaskCollator(task, loaded.tokenizer, reads_languages=False)
    with torch.no_grad():
        want = loaded.model(**collate(examples[60:64])).states
    torch.testing.assert_close(torch.cat([found[i] for i in range(60, 64)]), want.float(), rtol=1e-4, atol=1e-4)


def test_states_of_other_data_or_teachers_are_refused(teacher, states, tmp_path):
    _, arguments, result, _ = teacher
    other = tasks_data.write(tmp_path / "other.jsonl", tasks_data.rows(192, seed=3))
    with pytest.raises(CheckpointError, match="of another data"):
        States(states, result.output_dir / "final", other, [1] * 192)
    with pytest.raises(CheckpointError, match="holds 192 vectors, the rows have 5"):
        States(states, result.output_dir / "final", arguments.train, [1] * 5)
    with pytest.raises(CheckpointError, match="no such file"):
        States(tmp_path / "none.safetensors", result.output_dir / "final", other, [1])
    (tmp_path / "torn.safetensors").write_bytes(states.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a file of preembed"):
        States(tmp_path / "torn.safetensors", result.output_dir / "final", other, [1])
    with pytest.raises(FileExistsError):
        preembed(PreembedArguments(teacher=str(result.output_dir / "final"), data=arguments.train, out=str(states)))


def test_preembed_goes_on_after_a_kill(teacher, states, tmp_path):
    _, arguments, result, _ = teacher
    out = tmp_path / "states.safetensors"
    command = [sys.executable, "-m", "mtllm_fast.cli", "preembed", "--teacher", str(result.output_dir / "final")]
    command += ["--data", arguments.train, "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not (tmp_path / "states.safetensors.partial").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    subprocess.run(command, check=True)
    found, want = (States(path, result.output_dir / "final", arguments.train, [1] * 192) for path in (out, states))
    torch.testing.assert_close(torch.cat(list(found)), torch.cat(list(want)), rtol=1e-4, atol=1e-5)


def test_the_student_learns_what_the_teacher_says(student, teacher):
    _, result, _ = student
    losses = [line["loss"] for line in result.log if "loss" in line]
    assert losses[-1] < losses[0] / 2
    loaded = load_result(result.output_dir / "final")
    head = load_result(teacher[2].output_dir / "final").model.score.weight
    assert torch.equal(loaded.model.score.weight, head)
    assert loaded.model.tower.up_proj.weight.equal(MTLLM.from_pretrained("tiny").up_proj.weight)
    assert isinstance(loaded.model.tower, MTLLM)
    assert result.metrics["accuracy"] > 0.8


def test_the_merged_student_is_a_head_of_the_library(student, teacher):
    _, result, _ = student
    model = MTLLMForSequenceClassification.from_pretrained(result.output_dir / "merged").eval()
    assert model.config.id2label == {0: "good", 1: "bad"}
    loaded = load_result(result.output_dir / "final")
    collate = TaskCollator(loaded.model.task, loaded.tokenizer, reads_languages=True)
    examples = read_examples(teacher[1].dev, loaded.model.task)[:8]
    batch = collate(examples)
    with torch.no_grad():
        want = loaded.model(**batch).logits
    rows = torch.split(batch["input_ids"], batch["cu_seqlens"].diff().tolist())
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    with torch.no_grad():
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_evaluation_says_what_the_predictions_do(student, teacher, tmp_path):
    _, result, _ = student
    data = []
    for language in ("eng_Latn", "fra_Latn"):
        path = tasks_data.write(tmp_path / f"{language}.jsonl", tasks_data.rows(40, language, seed=5))
        data.append(f"{language}={path}")
    arguments = EvaluateArguments(
        data=data, student=str(result.output_dir / "final"), teacher=str(teacher[2].output_dir / "final"),
        translator=tasks_data.translator_folder(tmp_path / "nllb"), max_new_tokens=8, id_column="id",
        output_dir=str(tmp_path / "results"),
    )  # fmt: skip
    record = evaluate(arguments)
    assert list(record["systems"]) == ["mt-llm", "zero-shot", "translate-test"]
    for name, system in record["systems"].items():
        lines = (tmp_path / "results" / f"predictions-{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 80
        for language in ("eng_Latn", "fra_Latn"):
            own = [row for row in rows if row["language"] == language]
            truth, said = [row["label"] for row in own], [row["prediction"] for row in own]
            scores = system["languages"][language]
            assert scores["accuracy"] == accuracy_score(truth, said)
            assert scores["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))
            assert scores["interval"][0] <= scores["accuracy"] <= scores["interval"][1]
            assert rows[0]["id"] == "eng_Latn-5-0"
    assert record["systems"]["zero-shot"]["languages"]["eng_Latn"]["accuracy"] > 0.9
    # English is not translated, so there translate-test is the teacher.
    english = [record["systems"][name]["languages"]["eng_Latn"]["accuracy"] for name in ("zero-shot", "translate-test")]
    assert english[0] == english[1]
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == json.loads(json.dumps(record))
    assert (tmp_path / "results" / "accuracy.png").stat().st_size > 1000
    with pytest.raises(FileExistsError):
        evaluate(arguments)


def test_a_run_that_ended_is_not_trained_a_step_more(teacher, tmp_path):
    _, arguments, _, options = teacher
    short = options | {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    short |= {"load_best_model_at_end": False}
    first = finetune(arguments, how(arguments, tmp_path, **short))
    head = (tmp_path / "final" / "head.safetensors").read_bytes()
    again = finetune(arguments, how(arguments, tmp_path, **short))
    assert (tmp_path / "final" / "head.safetensors").read_bytes() == head
    assert again.metrics == first.metrics
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_fsdp_is_refused(teacher, tmp_path):
    loaded = load_result(teacher[2].output_dir / "final")
    with pytest.raises(ValueError, match="use DDP"):
        TaskTrainer(loaded.model, how(teacher[1], tmp_path, fsdp=True, fsdp_config={"version": 2}))


def test_the_commands_do_the_same(student, teacher, tmp_path):
    arguments = teacher[1]
    run = [sys.executable, "-m", "mtllm_fast.cli"]
    quick = ["--max_steps", "2", "--use_cpu", "True", "--disable_tqdm", "True"]
    task = ["--kind", "sequence", "--text_columns", "text", "--labels", "good", "bad", "--max_length", "32"]
    one = [
        *run,
        "finetune",
        *task,
        "--llm",
        arguments.llm,
        "--train",
        arguments.train,
        "--output_dir",
        str(tmp_path / "t"),
    ]
    done = subprocess.run([*one, *quick], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    final = str(tmp_path / "t" / "final")
    states = str(tmp_path / "s.safetensors")
    two = [*run, "preembed", "--teacher", final, "--data", arguments.train, "--out", states, "--device", "cpu"]
    assert subprocess.run(two, capture_output=True).returncode == 0
    three = [*run, "distill-task", "--teacher", final, "--states", states, "--train", arguments.train]
    done = subprocess.run([*three, "--output_dir", str(tmp_path / "d"), *quick], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    four = [
        *run,
        "evaluate",
        "--data",
        f"en={arguments.dev}",
        "--student",
        str(tmp_path / "d" / "final"),
        "--device",
        "cpu",
    ]
    done = subprocess.run([*four, "--output-dir", str(tmp_path / "e")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mt-llm" in done.stdout
    assert "eng_Latn" in done.stdout


def test_a_run_goes_on_where_it_was_and_belongs_to_its_arguments(teacher, tmp_path):
    _, arguments, result, options = teacher
    shutil.copytree(result.output_dir, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "final")
    newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again = finetune(arguments, how(arguments, tmp_path / "out", **options))
    assert again.metrics == result.metrics
    assert newest.exists()
    with pytest.raises(FileExistsError, match=r"learning_rate was 0.003, is 0.1"):
        finetune(arguments, how(arguments, tmp_path / "out", **options | {"learning_rate": 0.1}))


def test_a_student_killed_with_9_goes_on_bit_for_bit(student, tmp_path):
    given = student[0]
    program = [sys.executable, "-m", "mtllm_fast.cli", "distill-task", "--teacher", given.teacher]
    program += ["--states", given.states, "--train", given.train, "--use_cpu", "True", "--disable_tqdm", "True"]
    options = ["--max_steps", "9", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"]
    folders = [tmp_path / "whole", tmp_path / "killed"]
    whole, killed = ([*program, *options, "--output_dir", str(folder)] for folder in folders)
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folders[1] / "checkpoint-4").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folders[1] / "final").exists()
    for command in (whole, killed):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    trained = [
        {path.name: path.read_bytes() for path in (folder / "final").rglob("*.safetensors")} for folder in folders
    ]
    assert len(trained[0]) >= 2
    assert trained[0] == trained[1]


def test_a_folder_that_is_no_result_is_refused(tmp_path, teacher):
    with pytest.raises(CheckpointError, match=r"no task\.json"):
        load_result(tmp_path)
    shutil.copytree(teacher[2].output_dir / "final", tmp_path / "final")
    head = tmp_path / "final" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_result(tmp_path / "final")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "data is missing"),
        ({"data": ["rows.jsonl"]}, "LANGUAGE=FILE"),
        ({"data": ["swahil=rows.jsonl"]}, "swahil"),
        ({"teacher": None}, "no system"),
        ({"teacher": None, "student": "x", "translator": "y"}, "a translator needs a teacher"),
    ],
)
def test_bad_evaluations_are_refused(options, message, teacher, tmp_path):
    given = {"data": [f"en={teacher[1].dev}"], "teacher": str(teacher[2].output_dir / "final")}
    with pytest.raises((ValueError, UnknownLanguageError), match=message):
        evaluate(EvaluateArguments(**given | options, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_model_that_says_nan_has_no_prediction(teacher):
    loaded = load_result(teacher[2].output_dir / "final")
    collate = TaskCollator(loaded.model.task, loaded.tokenizer, reads_languages=False)
    examples = read_examples(teacher[1].dev, loaded.model.task)
    loaded.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="says NaN"):
        predict(loaded.model, collate, examples)
