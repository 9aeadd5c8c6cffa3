"""``mtllm-fast languages``: the codes, as a table on a terminal, tab-separated in a pipe."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from mtllm_fast.text.languages import Language, languages, resolve_language


def show(query: str | None) -> None:
    """Print the languages whose code or name contains ``query``, or the one that it is an alias of."""
    found = _matching(query)
    console = Console()
    if not console.is_terminal:
        for language in found:
            typer.echo("\t".join(language))
        return
    table = Table("code", "language", "script")
    for language in found:
        table.add_row(*language)
    console.print(table)


def _matching(query: str | None) -> list[Language]:
    if query is None:
        return languages()
    wanted = query.lower()
    found = [language for language in languages() if wanted in language.code.lower() or wanted in language.name.lower()]
    if found:
        return found
    code = resolve_language(query)  # raises with the nearest codes
    return [language for language in languages() if language.code == code]
