"""``mtllm-fast env``: the facts of ``mtllm_fast.environment`` as a table or JSON, and the check of a checkpoint."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtllm_fast.environment import environment


def show(model: str | None, as_json: bool) -> bool:
    """Print everything; False when the checked model has problems."""
    problems: list[str] = []
    if model is not None:
        from mtllm_fast.cli.check import check_model

        problems = check_model(model)
    sections = environment()
    if as_json:
        checked = {} if model is None else {"model": {"name": model, "problems": problems}}
        typer.echo(json.dumps(sections | checked, indent=2))
        return not problems
    console = Console()
    for title, facts in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, text in facts.items():
            table.add_row(f"  {name}", Text(text))  # no markup: reasons hold square brackets
        console.print(table)
    if model is not None:
        console.print(f"{model}: {f'{len(problems)} problems' if problems else 'no problems'}", markup=False)
        for problem in problems:
            console.print(f"  - {problem}", markup=False, soft_wrap=True)
    return not problems
