"""Commands whose options are two dataclasses: their own, and ``transformers.TrainingArguments``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser, TrainingArguments


def parse(words: Sequence[str], own: type, program: str, description: str, **defaults: Any) -> tuple[Any, Any]:
    """Both dataclasses; ``defaults`` stand in for what the words do not say."""
    both: Any = (own, TrainingArguments)
    parser = HfArgumentParser(both, prog=f"mtllm-fast {program}", allow_abbrev=False, description=description)
    parser.set_defaults(**defaults)
    arguments, how = parser.parse_args_into_dataclasses([*words], look_for_args_file=False)
    return arguments, how


def value_of(words: Sequence[str], name: str) -> str | None:
    """What an option is given, before its command's other defaults are known."""
    spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
    for at, word in enumerate(words):
        option, sign, value = word.partition("=")
        if option in spellings:
            return value if sign else next(iter(words[at + 1 : at + 2]), None)
    return None


def log_to_stderr() -> None:
    """The library's own messages, and warnings of others."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("mtllm_fast").setLevel(logging.INFO)
