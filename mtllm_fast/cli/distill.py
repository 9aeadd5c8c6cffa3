"""``mtllm-fast distill``: the options of ``DistillArguments`` and of ``transformers.TrainingArguments`` together."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from mtllm_fast.training.distill import distill
from mtllm_fast.training.recipes import RECIPES, DistillArguments


def run(words: Sequence[str]) -> None:
    """Parse the command's words, train, and say where the results are."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("mtllm_fast").setLevel(logging.INFO)
    arguments, how = parse(words)
    result = distill(arguments, how)
    if how.process_index == 0:
        _show(result)


def parse(words: Sequence[str]) -> tuple[DistillArguments, TrainingArguments]:
    """The preset's values where no option replaces them. ``output_dir`` is ./distilled unless given."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    preset = early.parse_known_args(words)[0].preset
    if preset is None:
        own = any(word.startswith(("--encoder", "--llm", "--model", "--data")) for word in words)
        preset = "paper" if own else "tiny"
    both: Any = (DistillArguments, TrainingArguments)
    parser = HfArgumentParser(
        both, prog="mtllm-fast distill", allow_abbrev=False,
        description="Stage 1: self-distil an encoder and an LLM into one stack, on texts that the LLM understands.",
    )  # fmt: skip
    recipe = RECIPES.get(preset, RECIPES["paper"])  # an unknown one is refused below
    parser.set_defaults(output_dir="distilled", preset=preset, **recipe.trainer)
    arguments, how = parser.parse_args_into_dataclasses([*words], look_for_args_file=False)
    return arguments, how


def _show(result: object) -> None:
    for name, value in dataclasses.asdict(result).items():  # type: ignore[call-overload]
        if name == "metrics":
            for key, number in sorted(value.items()):
                print(f"{key}: {number:.6g}")  # noqa: T201
        elif name != "log":
            print(f"{name}: {value}")  # noqa: T201
