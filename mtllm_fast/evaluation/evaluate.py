"""``evaluate``: a task in many languages by up to three systems, from predictions to a table and a plot."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtllm_fast import __version__
from mtllm_fast.core.digests import digest
from mtllm_fast.evaluation.metrics import by_language, read_predictions
from mtllm_fast.evaluation.translate import Translator, in_english
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.examples import Example, read_examples
from mtllm_fast.tasks.model import load_result, read_facts
from mtllm_fast.tasks.predict import predict, write_predictions
from mtllm_fast.tasks.presets import Task
from mtllm_fast.text.languages import resolve_language
from mtllm_fast.training.runs import write_json

logger = logging.getLogger("mtllm_fast")

SCHEMA = 1


@dataclass
class EvaluateArguments:
    """What ``evaluate`` is to do.

    Attributes:
        data: files of labelled rows, each ``LANGUAGE=FILE``, or plain files with ``language_column``.
        student: ``final`` of ``distill_task``, or of ``finetune`` with a stack (the system ``mt-llm``) or an encoder
            (``encoder``): it reads the texts as they are.
        teacher: ``final`` of ``finetune``: ``zero-shot``, which reads them too.
        translator: an NLLB model: ``translate-test``, which reads English translations with the teacher.
        num_beams: of the translations; 1: greedy.
        translations: file to keep translations in and take known ones from. (default: output_dir/translations.jsonl)
        output_dir: where ``results.json``, ``predictions-SYSTEM.jsonl`` and ``accuracy.png`` go.
    """

    data: list[str] = field(default_factory=list)
    student: str | None = None
    teacher: str | None = None
    translator: str | None = None
    num_beams: int = 1
    max_new_tokens: int = 256
    translations: str | None = None
    language_column: str | None = None
    id_column: str | None = None
    output_dir: str = "evaluation"
    dtype: str = "auto"
    device: str | None = None
    batch_tokens: int = 8192
    overwrite: bool = False


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Predict, score and report; what comes back is what ``results.json`` holds.

    Scores are computed from the written predictions: accuracy (with Wilson's 95 % interval) and macro-F1 per language,
    and their averages over languages.

    Raises:
        ValueError: no system, data that do not fit the task, a translator without a teacher, systems of several tasks.
        UnknownLanguageError: names the nearest codes.
        FileExistsError: ``output_dir`` holds results, and ``overwrite`` is not set.
    """
    folder = Path(arguments.output_dir)
    if (folder / "results.json").exists() and not arguments.overwrite:
        raise FileExistsError(f"{folder} holds results; overwrite replaces them")
    task = _task(arguments)
    files = _files(arguments)
    examples = [example for language, file in files for example in _read(arguments, task, language, file)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)  # of other predictions than those that are written now
    systems: dict[str, Any] = {}
    for name, run in _systems(arguments, folder).items():
        logger.info("%s: %d rows", name, len(examples))
        start = time.perf_counter()
        run(examples, folder / f"predictions-{name}.jsonl")
        seconds = time.perf_counter() - start
        scores = by_language(read_predictions(folder / f"predictions-{name}.jsonl"), task.labels)
        systems[name] = {"languages": scores, "seconds": seconds, "texts_per_second": len(examples) / seconds}
    chance = 1 / len(task.choices or task.labels)
    record = {
        "schema": SCHEMA, "version": __version__, "task": task.to_dict(), "chance": chance,
        "data": {str(file): {"language": language, "sha256": digest(file)} for language, file in files},
        "options": {name: getattr(arguments, name) for name in _OPTIONS}, "systems": systems,
    }  # fmt: skip
    write_json(folder / "results.json", record)
    plot(record, folder / "accuracy.png")
    return record


_OPTIONS = ("student", "teacher", "translator", "num_beams", "max_new_tokens", "dtype")


def _task(arguments: EvaluateArguments) -> Task:
    folders = [Path(folder) for folder in (arguments.student, arguments.teacher) if folder is not None]
    if not folders:
        raise ValueError("no system: give student (of distill-task), teacher (of finetune), or both")
    if arguments.translator is not None and arguments.teacher is None:
        raise ValueError("a translator needs a teacher, which reads the translations")
    if arguments.translations is not None and arguments.translator is None:
        raise ValueError("translations are a translator's: give translator too")
    tasks = [Task.from_dict(read_facts(folder)["task"]) for folder in folders]
    for name in ("kind", "labels", "text", "choices", "label"):
        if len({getattr(task, name) for task in tasks}) > 1:
            raise ValueError(f"student and teacher are of different tasks: {name} {[getattr(t, name) for t in tasks]}")
    if arguments.translator is not None and tasks[0].kind == "tokens":
        raise ValueError("words have no translations one by one: translate-test is for sequences and choices")
    return tasks[0]


def _files(arguments: EvaluateArguments) -> list[tuple[str | None, Path]]:
    if not arguments.data:
        raise ValueError("data is missing: LANGUAGE=FILE, or files with language_column")
    found: list[tuple[str | None, Path]] = []
    for item in arguments.data:
        code, sign, file = item.partition("=")
        if not sign:
            if arguments.language_column is None:
                raise ValueError(f"data must be LANGUAGE=FILE, or have language_column; got {item!r}")
            found.append((None, Path(item)))
        else:
            found.append((resolve_language(code), Path(file)))
    return found


def _read(arguments: EvaluateArguments, task: Task, language: str | None, file: Path) -> list[Example]:
    column = arguments.language_column if language is None else None
    return read_examples(
        file, task, language=language or "eng_Latn", language_column=column, id_column=arguments.id_column
    )


Predictor = Callable[[Sequence[Example], Path], None]


def _systems(arguments: EvaluateArguments, folder: Path) -> dict[str, Predictor]:
    systems: dict[str, Predictor] = {}
    if arguments.student is not None:
        name = "encoder" if read_facts(Path(arguments.student))["kind"] == "encoder" else "mt-llm"
        systems[name] = lambda examples, out: _predict(arguments, str(arguments.student), examples, out)
    if arguments.teacher is not None:
        systems["zero-shot"] = lambda examples, out: _predict(arguments, str(arguments.teacher), examples, out)
    if arguments.translator is not None:
        systems["translate-test"] = lambda examples, out: _translate_and_predict(arguments, folder, examples, out)
    return systems


def _predict(arguments: EvaluateArguments, result: str, examples: Sequence[Example], out: Path) -> None:
    loaded = load_result(result, dtype=arguments.dtype, device=arguments.device)
    collate = TaskCollator(loaded.model.task, loaded.tokenizer, reads_languages=loaded.facts["kind"] != "llm")
    predictions = predict(loaded.model, collate, examples, batch_tokens=arguments.batch_tokens)
    write_predictions(predictions, loaded.model.task.labels, out)


def _translate_and_predict(arguments: EvaluateArguments, folder: Path, examples: Sequence[Example], out: Path) -> None:
    translate = Translator(
        str(arguments.translator), num_beams=arguments.num_beams, max_new_tokens=arguments.max_new_tokens,
        cache=arguments.translations or folder / "translations.jsonl", dtype=arguments.dtype, device=arguments.device,
    )  # fmt: skip
    english = in_english(examples, translate)
    del translate
    _predict(arguments, str(arguments.teacher), english, out)


def plot(record: dict[str, Any], path: Path) -> bool:
    """Accuracy per language and system with intervals, and chance; without matplotlib say so and return False."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plot is drawn: matplotlib is missing (pip install 'mtllm-fast[bench]')")
        return False
    languages = [name for name in next(iter(record["systems"].values()))["languages"] if name != "average"]
    figure = Figure(figsize=(max(5, 1 + 0.6 * len(languages)), 3.8), layout="constrained")
    axes = figure.subplots()
    count = len(record["systems"])
    for number, (name, system) in enumerate(record["systems"].items()):
        scores = [system["languages"][language] for language in languages]
        places = [i + (number - (count - 1) / 2) * 0.2 for i in range(len(languages))]
        accuracy = [s["accuracy"] for s in scores]
        errors = [[abs(a - s["interval"][side]) for a, s in zip(accuracy, scores, strict=True)] for side in (0, 1)]
        axes.errorbar(places, accuracy, yerr=errors, fmt="o", capsize=3, label=name)
    axes.axhline(record["chance"], color="grey", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(languages)), languages, rotation=45, ha="right")
    axes.set(ylabel="accuracy", ylim=(0, 1.02))
    axes.legend()
    aside = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(aside, dpi=120)
    os.replace(aside, path)
    return True


def table(record: dict[str, Any]) -> Any:
    """A ``rich`` table: a row per language and one of averages, a column per system and figure."""
    from rich.table import Table

    made = Table(title=f"{record['task']['name']}: accuracy (95 % interval), macro-F1", title_justify="left")
    made.add_column("language")
    for name in record["systems"]:
        made.add_column(name, justify="right")
    for language in next(iter(record["systems"].values()))["languages"]:
        cells = []
        for system in record["systems"].values():
            s = system["languages"][language]
            bounds = f" ({s['interval'][0]:.1%} … {s['interval'][1]:.1%})" if "interval" in s else ""
            cells.append(f"{s['accuracy']:.1%}{bounds}, {s['macro_f1']:.3f}")
        made.add_row(language, *cells)
    rates = [f"{system['texts_per_second']:.1f} texts/s" for system in record["systems"].values()]
    made.add_row("speed", *rates)
    return made
