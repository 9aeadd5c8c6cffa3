"""What a system's answer costs: floating point operations by formula, and rows per second on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from benchmarks.transfer.names import BEAM, ENCODER, GREEDY, MT_LLM, ZERO_SHOT
from benchmarks.transfer.study import MAX_NEW, Study
from mtllm_fast import MTLLM
from mtllm_fast.evaluation.translate import Translator, in_english
from mtllm_fast.tasks.collators import TaskCollator
from mtllm_fast.tasks.examples import Example, read_examples
from mtllm_fast.tasks.model import Loaded, load_result
from mtllm_fast.tasks.predict import predict
from mtllm_fast.tasks.presets import Task
from mtllm_fast.text.tokenization import tokenize

_PER_LANGUAGE = 24


def costs_of(study: Study) -> dict[str, dict[str, Any]]:
    """Of each task and main system, on as many rows of every language that the MT model knows."""
    seed, found = study.preset.seeds[0], {}
    for task in study.tasks():
        folder, mt = study.root / f"seed-{seed}" / task.name, str(study.root / "mt")
        files = {language.code: study.rows(task, f"test-{language.name}") for language in study.preset.seen}
        teacher = str(folder / "teacher" / "final")
        found[task.name] = {
            MT_LLM: classifier_cost(str(folder / "student-both" / "final"), files),
            BEAM: translate_test_cost(teacher, mt, files, 4),
            GREEDY: translate_test_cost(teacher, mt, files, 1),
            ENCODER: classifier_cost(str(folder / "encoder" / "final"), files),
            ZERO_SHOT: classifier_cost(teacher, files),
        }
    return found


def examples_of(task: Task, files: Mapping[str, str], per_file: int) -> list[Example]:
    """The first rows of every file: code -> path."""
    return [e for code, file in files.items() for e in read_examples(file, task, language=code)[:per_file]]


def classifier_cost(result: str, files: Mapping[str, str]) -> dict[str, float]:
    """Of a system that reads the rows as they are."""
    loaded = load_result(result)
    examples = examples_of(loaded.model.task, files, _PER_LANGUAGE)
    return _cost(lambda: predict(loaded.model, _collator(loaded), examples), _flops(loaded, examples), len(examples))


def translate_test_cost(teacher: str, translator: str, files: Mapping[str, str], beams: int) -> dict[str, float]:
    """Of the teacher on translations, none of them known before."""
    loaded = load_result(teacher)
    examples = examples_of(loaded.model.task, files, _PER_LANGUAGE)
    translate = Translator(translator, num_beams=beams, max_new_tokens=MAX_NEW)

    def run() -> list[Example]:
        translate.forget()
        english = in_english(examples, translate)
        predict(loaded.model, _collator(loaded), english)
        return english

    english = run()
    flops = _flops(loaded, english) + _translation_flops(translate, examples, english, beams)
    return _cost(run, flops, len(examples))


def _collator(loaded: Loaded) -> TaskCollator:
    return TaskCollator(loaded.model.task, loaded.tokenizer, reads_languages=loaded.facts["kind"] != "llm")


def _cost(run: Callable[[], Any], flops: float, rows: int) -> dict[str, float]:
    """The best of two, after one that is not counted."""
    run()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"rows_per_second": rows / min(seconds), "mflop_per_row": flops / rows / 1e6}


def _flops(loaded: Loaded, examples: Sequence[Example]) -> float:
    """Of linear layers 2 P per token, of attention 4 d T^2 per layer and text; embeddings, norms and heads not."""
    lengths = _collator(loaded)(list(examples))["cu_seqlens"].diff().tolist()
    tower = loaded.model.tower
    towers = [tower.nllb_encoder, tower.llm2vec] if isinstance(tower, MTLLM) else [tower]
    total = 2.0 * tower.up_proj.weight.numel() * sum(lengths) if isinstance(tower, MTLLM) else 0.0
    return total + sum(_tower_flops(one, lengths) for one in towers)


def _tower_flops(tower: Any, lengths: Sequence[int]) -> float:
    layers = tower.encoder.layers if hasattr(tower, "encoder") else tower.layers
    width = tower.config.hidden_size
    return 2.0 * _linear(layers) * sum(lengths) + 4.0 * width * len(layers) * sum(n * n for n in lengths)


def _linear(module: nn.Module) -> int:
    """Weights of linear layers; LoRA, which merges into them, is not counted."""
    return sum(
        m.weight.numel() for name, m in module.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name
    )


def _translation_flops(
    translate: Translator, examples: Sequence[Example], english: Sequence[Example], beams: int
) -> float:
    """The encoder once; per beam the decoder and its head for each token it generates, and the source's keys."""
    model: Any = translate.model.model
    head, width = translate.model.lm_head.weight.numel(), model.config.d_model
    layers = model.decoder.layers
    keys = sum(
        part.weight.numel() for layer in layers for part in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
    )
    own, total = _linear(layers) - keys, 0.0
    for one, other in zip(examples, english, strict=True):
        sources = _tokens(translate, (*one.text, *one.choices), one.language)
        targets = _tokens(translate, (*other.text, *other.choices), translate.target)
        total += _tower_flops(model.encoder, sources)
        for source, target in zip(sources, targets, strict=True):
            attention = 4.0 * width * len(layers) * (target / 2 + source)
            total += beams * (target * (2.0 * (own + head) + attention) + source * 2.0 * keys)
    return total


def _tokens(translate: Translator, texts: Sequence[str], language: str) -> list[int]:
    return tokenize(translate.tokenizer, texts, [language] * len(texts), 512).lengths.tolist()
