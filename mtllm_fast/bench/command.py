"""``mtllm-fast bench`` and ``benchmarks/throughput.py``: options, table, files, exit code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtllm_fast.core.errors import WrongResultError

# Options repeat the defaults of BenchOptions: importing it here would import torch for ``mtllm-fast --help``.


def bench(
    mode: Annotated[
        str, typer.Option(help="encode many texts, train (a step of self-distillation), or latency of one sentence.")
    ] = "encode",
    sweep: Annotated[
        str | None, typer.Option(help="Comma-separated batch sizes: encode with each, e.g. 1,4,16,64.")
    ] = None,
    size: Annotated[str, typer.Option(help="tiny (the embedded stack), small, 1b or 8b (random weights).")] = "tiny",
    workload: Annotated[str, typer.Option(help="Length law: sentences, documents, mixed or full.")] = "sentences",
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16. Default: fp32 on CPU, bf16 on GPU.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Interleaved rounds; each times every peer once. Default: 5, of latency 50.")
    ] = None,
    sentences: Annotated[int | None, typer.Option(help="Texts per round.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per batch of the padded peers.")] = 32,
    batch_tokens: Annotated[int | None, typer.Option(help="Real tokens per batch of ours.")] = None,
    peers: Annotated[str | None, typer.Option(help="Comma-separated. Default: all that the mode has.")] = None,
    translate_sentences: Annotated[int | None, typer.Option(help="Texts per round of translate-test.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and texts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Append one JSON line here.")] = None,
    plot: Annotated[bool | None, typer.Option(help="Chart OUT.png. Default: where matplotlib is.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two result files: print how they differ, and run nothing.")
    ] = None,
) -> None:
    """Measure encoding, a training step or latency beside the padded reference and other ways.

    Every result is checked against float64 first; a wrong one ends the run with exit code 1 and no speed.
    """
    console, progress = Console(), Console(stderr=True)
    if compare is not None:
        from mtllm_fast.bench.compare import comparison

        try:
            console.print(comparison(*compare))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        return
    if plot and out is None:
        raise typer.BadParameter("--plot writes next to --out; give --out too")
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    if plot and not has_matplotlib:
        raise typer.BadParameter("--plot needs matplotlib: pip install 'mtllm_fast[bench]'")

    from mtllm_fast.bench import BenchOptions, run
    from mtllm_fast.bench.report import append_json, draw, table

    try:
        batch_sizes = tuple(int(size) for size in sweep.split(",")) if sweep else ()
    except ValueError as error:
        raise typer.BadParameter(f"--sweep takes numbers, as in 1,4,16, got {sweep!r}") from error
    options = BenchOptions(
        mode=mode,
        batch_sizes=batch_sizes,
        size=size,
        workload=workload,
        dtype=dtype,
        device=device,
        rounds=rounds,
        sentences=sentences,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        peers=None if peers is None else tuple(name.strip() for name in peers.split(",") if name.strip()),
        translate_sentences=translate_sentences,
        seed=seed,
    )
    try:
        options = options.resolved()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        with progress.status("starting") as status:
            record = run(options, say=status.update)
    except WrongResultError as error:
        progress.print(f"[bold red]wrong result[/] {error}")
        raise typer.Exit(1) from error
    console.print(table(record))
    if out is not None:
        append_json(record, out)
        progress.print(f"wrote {out}")
        if plot or (plot is None and has_matplotlib):
            draw(record, out.with_suffix(".png"))
            progress.print(f"wrote {out.with_suffix('.png')}")


def main() -> None:
    """Run ``bench`` as a program of its own."""
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(bench)
    program()
