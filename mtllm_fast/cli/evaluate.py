"""``mtllm-fast evaluate``: a task in many languages, printed as a table."""

from __future__ import annotations

from rich.console import Console

from mtllm_fast.cli.parsing import log_to_stderr
from mtllm_fast.evaluation.evaluate import EvaluateArguments, evaluate, table


def run(arguments: EvaluateArguments) -> None:
    """Evaluate, print the table, and say where everything is."""
    log_to_stderr()
    record = evaluate(arguments)
    console = Console()
    console.print(table(record))
    console.print(f"{arguments.output_dir}/results.json", highlight=False, soft_wrap=True)
