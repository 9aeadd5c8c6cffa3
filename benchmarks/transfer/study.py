"""The study: a world's data, its models, every system on every task, by the project's own commands.

Everything is a folder that has its name when it is complete, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mtllm_fast
from benchmarks.transfer import corpora, english, pretrain
from benchmarks.transfer.languages import ENGLISH
from benchmarks.transfer.names import ABLATIONS, BEAM, ENCODER, GREEDY, MT_LLM, STAGE_1_ONLY, ZERO_SHOT
from benchmarks.transfer.presets import Preset
from benchmarks.transfer.tasks import TASKS, WorldTask, items_of, rows_of, write_rows
from mtllm_fast import (
    MTLLM,
    DistillArguments,
    DistillTaskArguments,
    EvaluateArguments,
    FinetuneArguments,
    PreembedArguments,
    distill,
    distill_task,
    evaluate,
    finetune,
    init_up_proj_least_squares,
    preembed,
    task_training_arguments,
    training_arguments,
)
from mtllm_fast.core.digests import digest
from mtllm_fast.core.settings import BACKEND
from mtllm_fast.evaluation.translate import Translator
from mtllm_fast.tasks.examples import read_examples
from mtllm_fast.training.checkpoints import begin, finish
from mtllm_fast.training.runs import write_json

MAX_NEW = 160  # tokens of a translation
WORLD = "world-2"  # the seed of everything that all seeds share: data, MT model, LLM
# Stage 1: what differs from both losses, from least squares.
STAGE_1 = {
    "both": {},
    "sequence": {"sequence_weight": 1.0, "span_weight": 0.0},
    "span": {"sequence_weight": 0.0, "span_weight": 1.0},
    "random": {"up_proj_init": "random"},
}


class Run(NamedTuple):
    """A call of ``evaluate``: its folder's name, the models, and what the study calls each of its systems."""

    name: str
    models: dict[str, Any]
    systems: dict[str, str]


@dataclass(frozen=True)
class Study:
    """Where everything lies, and how large it is."""

    root: Path
    preset: Preset

    def phases(self) -> list[list[tuple[Any, ...]]]:
        """Jobs (a method and what it is called with), those of a phase apart from each other, the longest first."""
        ablated = any(name in self.preset.ablations for name in self.preset.tasks)
        stage_1 = [*STAGE_1, "none"] if ablated else ["both"]
        seeds, tasks = self.preset.seeds, self.preset.tasks
        return [
            [("make_data",)], [("make_mt",), ("make_llm",)],
            [("make_stack", seed, name) for seed in seeds for name in stage_1]
            + [("translate", task, beams) for task in tasks for beams in (4, 1)],
            [("run_task", seed, task, part) for part in ("teacher", "encoder") for task in tasks for seed in seeds],
            [("run_task", seed, task, "students") for task in tasks for seed in seeds],
        ]  # fmt: skip

    def claim(self) -> bool:
        """Take the folder; whether it is new, and not that of a run that was cut off.

        Raises:
            FileExistsError: it holds a study of other sizes, of another version of this code, or on other backends.
        """
        folders = (Path(__file__).parent, Path(mtllm_fast.__file__).parent)
        code = {
            str(file.relative_to(root.parent)): digest(file) for root in folders for file in sorted(root.rglob("*.py"))
        }
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = {"preset": asdict(self.preset), "world": WORLD, "backend": BACKEND.value(), "device": device}
        settings["torch"] = torch.__version__
        settings = json.loads(json.dumps({**settings, "code": code}))
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "study.json"
        new = not file.exists()
        if not new and json.loads(file.read_text(encoding="utf-8")) != settings:
            raise FileExistsError(f"{self.root} holds another study: choose another output_dir")
        write_json(file, settings)
        return new

    def account(self, name: str, seconds: float, backends: Mapping[str, int]) -> None:
        """Note of a job how long it took and which backends served it; of one that was done before, nothing."""
        file = self.root / "jobs" / f"{name}.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"seconds": seconds, "backends": dict(backends)})

    def accounts(self) -> dict[str, Any]:
        """``seconds`` of each job, and how often each ``backend`` of each op was chosen in all."""
        jobs = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted((self.root / "jobs").glob("*.json"))}
        chosen = sum((Counter(one["backends"]) for one in jobs.values()), Counter())
        seconds = {name: one["seconds"] for name, one in jobs.items()}
        return {"job_seconds": seconds, "backends": dict(sorted(chosen.items()))}

    def mt_quality(self, count: int = 60) -> dict[str, float]:
        """Of each language that the MT model saw: the share of sentences whose translation is one of the wordings that
        English has for it; sentences that are in no training text."""
        known = {meaning for paragraph in corpora.parallel(self.preset.paragraphs, WORLD) for meaning in paragraph}
        new = (p for p in corpora.parallel(4 * count, f"{WORLD} held out") if len(p) == 1 and p[0] not in known)
        sentences = list(itertools.islice(new, count))
        translate = Translator(str(self.root / "mt"), max_new_tokens=MAX_NEW)
        known_wordings = english.wordings([paragraph[0] for paragraph in sentences])
        quality = {}
        for language in self.preset.seen:
            draw = random.Random(f"{WORLD} held out {language.name}")
            said = translate([language.say(p[0], draw) for p in sentences], [language.code] * len(sentences))
            right = [s in wordings for s, wordings in zip(said, known_wordings, strict=True)]
            quality[language.name] = sum(right) / len(right)
        return quality

    def tasks(self) -> Iterator[WorldTask]:
        return (TASKS[name] for name in self.preset.tasks)

    def rows(self, task: WorldTask, split: str) -> str:
        return str(self.root / "data" / task.name / f"{split}.jsonl")

    def make_data(self) -> None:
        """English documents for stage 1, and each task's rows: English ones to learn from, the same tests in all."""

        def make(folder: Path) -> None:
            documents = corpora.documents(self.preset.documents, f"{WORLD} stage 1")
            (folder / "documents.txt").write_text("\n".join(documents) + "\n", encoding="utf-8")
            for task in self.tasks():
                (folder / task.name).mkdir()
                test = items_of(task, "test", self.preset.test_rows, WORLD)
                dev = items_of(task, "dev", self.preset.dev_rows, WORLD, test)
                train = items_of(task, "train", self.preset.train_rows[task.name], WORLD, [*dev, *test])
                for split, items in (("train", train), ("dev", dev), (f"test-{ENGLISH.name}", test)):
                    rows = rows_of(task, items, ENGLISH, f"{WORLD} {split}")
                    write_rows(folder / task.name / f"{split}.jsonl", rows)
                for language in self.preset.all_languages:
                    rows = rows_of(task, test, language, f"{WORLD} test")
                    write_rows(folder / task.name / f"test-{language.name}.jsonl", rows)

        self._once("data", make)

    def make_mt(self) -> None:
        self._anew("mt", lambda folder: pretrain.train_mt(folder, self.preset, WORLD))

    def make_llm(self) -> None:
        self._anew("llm", lambda folder: pretrain.train_llm(folder, self.preset, WORLD))

    def run_task(self, seed: int, name: str, part: str) -> list[dict[str, Any]]:
        """Train and evaluate some of the systems; their records."""
        task = TASKS[name]
        runs = {"teacher": self._teachers, "encoder": self._encoders, "students": self._students}[part]
        return [record for run in runs(seed, task) for record in self._evaluate(seed, task, run)]

    # Stage 1

    def _stack(self, seed: int, name: str) -> Path:
        return self.root / f"seed-{seed}" / "stage-1" / name

    def make_stack(self, seed: int, name: str) -> None:
        """Stage 1 as ``name`` has it; ``"none"``: least squares and no more, which stage 2 alone starts from."""
        folder = self._stack(seed, name)
        if name == "none":
            self._once(f"seed-{seed}/stage-1/none/merged", lambda folder: self._least_squares_alone(seed, folder))
            return
        if (folder / "merged" / "manifest.json").exists():
            return
        arguments = DistillArguments(
            encoder=str(self.root / "mt"), llm=str(self.root / "llm"), data=[str(self.root / "data" / "documents.txt")],
            preset="span", documents_per_batch=32, max_length=256, shuffle=True, merge=True,
            **STAGE_1[name],  # type: ignore[arg-type]
        )  # fmt: skip
        how = training_arguments(
            arguments, folder, max_steps=self.preset.distill_steps, learning_rate=2e-3, save_strategy="no", seed=seed,
            logging_steps=20, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        distill(arguments, how)

    def _least_squares_alone(self, seed: int, folder: Path) -> None:
        from transformers import AutoTokenizer

        stack = MTLLM.from_encoder_and_llm(str(self.root / "mt"), str(self.root / "llm"), seed=seed)
        texts = (self.root / "data" / "documents.txt").read_text(encoding="utf-8").splitlines()[:1024]
        init_up_proj_least_squares(stack, texts, llm_tokenizer=AutoTokenizer.from_pretrained(str(self.root / "llm")))
        stack.save_pretrained(folder)
        stack.tokenizer.save_pretrained(folder)

    # Stage 2

    # Each trains systems of a task and yields what ``evaluate`` needs to know of them.

    def _teachers(self, seed: int, task: WorldTask) -> Iterator[Run]:
        teacher, mt = self._finetune(seed, task, "teacher", llm=str(self.root / "llm")), str(self.root / "mt")
        names = {"zero-shot": ZERO_SHOT, "translate-test": GREEDY}
        yield Run("teacher", {"teacher": teacher, "translator": mt}, names)
        yield Run("beams", {"teacher": teacher, "translator": mt, "num_beams": 4}, {"translate-test": BEAM})

    def _encoders(self, seed: int, task: WorldTask) -> Iterator[Run]:
        """Those that need no teacher."""
        encoder = self._finetune(seed, task, "encoder", encoder=str(self.root / "mt"))
        yield Run("encoder", {"student": encoder}, {"encoder": ENCODER})
        if task.name in self.preset.ablations:
            labels = self._finetune(seed, task, "labels", model=str(self._stack(seed, "both") / "merged"))
            yield Run("labels", {"student": labels}, {"mt-llm": STAGE_1_ONLY})

    def _students(self, seed: int, task: WorldTask) -> Iterator[Run]:
        ablations = ABLATIONS if task.name in self.preset.ablations else {}
        for stage_1, system in {"both": MT_LLM, **ablations}.items():
            yield Run(stage_1, {"student": self._distill_task(seed, task, stage_1)}, {"mt-llm": system})

    def _how(self, seed: int, task: Any, folder: Path) -> Any:
        return task_training_arguments(
            task, folder, dev=False, num_train_epochs=1, learning_rate=2e-3, seed=seed,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip

    def _finetune(self, seed: int, task: WorldTask, name: str, **base: str) -> str:
        folder = self.root / f"seed-{seed}" / task.name / name
        if not (folder / "final" / "manifest.json").exists():
            arguments = FinetuneArguments(
                task=task.preset, train=self.rows(task, "train"), dev=self.rows(task, "dev"), **base  # type: ignore[arg-type]
            )  # fmt: skip
            finetune(arguments, self._how(seed, arguments.resolve(), folder))
        return str(folder / "final")

    def _distill_task(self, seed: int, task: WorldTask, stage_1: str) -> str:
        folder = self.root / f"seed-{seed}" / task.name
        out, states = folder / f"student-{stage_1}", folder / "states.safetensors"
        if not (out / "final" / "manifest.json").exists():
            teacher, train = str(folder / "teacher" / "final"), self.rows(task, "train")
            if not states.exists():
                preembed(PreembedArguments(teacher=teacher, data=train, out=str(states)))
            arguments = DistillTaskArguments(
                model=str(self._stack(seed, stage_1) / "merged"), teacher=teacher, states=str(states), train=train,
                dev=self.rows(task, "dev"),
            )  # fmt: skip
            resolved = FinetuneArguments(task=task.preset).resolve()
            distill_task(arguments, self._how(seed, resolved, out))
        return str(out / "final")

    # Evaluation

    def _groups(self) -> list[dict[str, str]]:
        """Codes and the languages read under them: what the MT model saw, and what is read under a relative's code."""
        seen = {ENGLISH.code: ENGLISH.name, **{language.code: language.name for language in self.preset.seen}}
        return [seen, {str(language.read_as): language.name for language in self.preset.unseen}]

    def _translations(self, task: WorldTask, beams: int) -> str:
        return str(self.root / f"translations-{task.name}-{beams}.jsonl")

    def translate(self, name: str, beams: int) -> None:
        """The tests' translations, which do not depend on a seed; ``evaluate`` takes them from their file."""
        task = TASKS[name]
        translate = Translator(
            str(self.root / "mt"), num_beams=beams, max_new_tokens=MAX_NEW, cache=self._translations(task, beams)
        )
        resolved = FinetuneArguments(task=task.preset).resolve()
        for group in self._groups():
            for code, language in group.items():
                examples = read_examples(self.rows(task, f"test-{language}"), resolved, language=code)
                texts = [text for example in examples for text in (*example.text, *example.choices)]
                translate(texts, [code] * len(texts))

    def _evaluate(self, seed: int, task: WorldTask, run: Run) -> Iterator[dict[str, Any]]:
        """A record per system and language. A language that the MT model never saw is read under a relative's code."""
        for group, names in zip(("seen", "unseen"), self._groups(), strict=True):
            if not names:
                continue
            folder = self.root / f"seed-{seed}" / task.name / "evaluation" / f"{run.name}-{group}"
            result = self._results(folder, task, names, run.models)
            for name, system in run.systems.items():
                for code, language in names.items():
                    score = result["systems"][name]["languages"][code]
                    yield {
                        "seed": seed, "task": task.name, "system": system, "language": language,
                        "accuracy": score["accuracy"], "rows": score["count"],
                    }  # fmt: skip

    def _results(self, folder: Path, task: WorldTask, names: dict[str, str], models: dict[str, Any]) -> Any:
        if not (folder / "results.json").exists():
            data = [f"{code}={self.rows(task, f'test-{name}')}" for code, name in names.items()]
            if "translator" in models:
                models = {**models, "translations": self._translations(task, models.get("num_beams", 1))}
            evaluate(EvaluateArguments(data, output_dir=str(folder), max_new_tokens=MAX_NEW, **models))
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))

    # Folders

    def _once(self, name: str, make: Callable[[Path], None]) -> None:
        folder = self.root / name
        if (folder / "manifest.json").exists():
            return
        make(begin(folder))
        finish(folder)

    def _anew(self, name: str, make: Callable[[Path], None]) -> None:
        """Of a step that finishes its folder itself."""
        folder = self.root / name
        if (folder / "manifest.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
