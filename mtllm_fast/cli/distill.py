"""``mtllm-fast distill``: the options of ``DistillArguments`` and of ``transformers.TrainingArguments`` together."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from transformers import TrainingArguments

from mtllm_fast.cli.parsing import log_to_stderr, parse, value_of
from mtllm_fast.training.distill import DistillResult, distill
from mtllm_fast.training.recipes import RECIPES, DistillArguments

_DESCRIPTION = "Stage 1: self-distil an encoder and an LLM into one stack, on texts that the LLM understands."


def run(words: Sequence[str]) -> None:
    """Parse the command's words, train, and say where the results are."""
    log_to_stderr()
    arguments, how = options(words)
    result = distill(arguments, how)
    if how.process_index == 0:
        _show(result)


def options(words: Sequence[str]) -> tuple[DistillArguments, TrainingArguments]:
    """The preset's values where no option replaces them; without a model or data of one's own it is ``tiny``."""
    preset = value_of(words, "preset")
    if preset is None:
        own = any(value_of(words, name) not in (None, "tiny") for name in ("encoder", "llm", "model", "data"))
        preset = "paper" if own else "tiny"
    recipe = RECIPES.get(preset, RECIPES["paper"])  # an unknown one is refused by the parser
    return parse(
        words, DistillArguments, "distill", _DESCRIPTION, output_dir="distilled", preset=preset, **recipe.trainer
    )


def _show(result: DistillResult) -> None:
    typer.echo(f"{result.steps} steps: {result.output_dir}")
    for name, value in sorted(result.metrics.items()):
        typer.echo(f"{name}: {value:.6g}")
