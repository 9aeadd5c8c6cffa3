"""The commands and their options. Each imports its work when it runs, so ``--help`` needs neither torch nor a model."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mtllm_fast.core.errors import BatchTooLargeError, CudaKernelError, NotBidirectionalError

app = typer.Typer(
    name="mtllm-fast",
    help="Multilingual text embeddings from a translation encoder stacked under a language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXPECTED_ERRORS = (ValueError, OSError, CudaKernelError, NotBidirectionalError, BatchTooLargeError)


class Dtype(str, Enum):
    """Number formats of the model's weights and arithmetic."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Precision(str, Enum):
    """Number formats of the LLM's linear layers."""

    fp8 = "fp8"
    int8 = "int8"
    fp8_emulated = "fp8-emulated"


@app.command()
def encode(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Texts: .txt (one per line), .jsonl, .csv, .tsv, .parquet.")
    ],
    out: Annotated[Path, typer.Option(help="Embeddings: .npy or .safetensors (rows x width), .parquet (with ids).")],
    src_lang: Annotated[str | None, typer.Option(help="Language of all texts, such as swh_Latn or sw.")] = None,
    lang_column: Annotated[str | None, typer.Option(help="Column that holds each text's language.")] = None,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id; tiny is the embedded one.")] = "tiny",
    text_column: Annotated[str | None, typer.Option(help="Column of the texts. (default: text)")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids, for .parquet. (default: the row number)")
    ] = None,
    max_length: Annotated[int, typer.Option(min=3, help="Most tokens per text; longer texts are cut.")] = 512,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per batch. (default: 32 * max length)")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale embeddings to unit length.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Format to compute in; auto is the checkpoint's.")] = Dtype.auto,
    precision: Annotated[
        Precision | None, typer.Option(help="Format of the LLM's linear layers: less accurate, see evaluate.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda, cuda:1 or cpu. (default: a GPU if there is one)")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Rows per shard: what a kill can cost.")] = 8192,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, drop unfinished work on it.")] = False,
) -> None:
    """Embed a file of texts. Killed at any moment, the same command (without --overwrite) goes on where it stopped."""
    from mtllm_fast.cli.encode import EncodeJob, run

    job = EncodeJob(
        source=source,
        out=out,
        src_lang=src_lang,
        lang_column=lang_column,
        model=model,
        text_column=text_column,
        id_column=id_column,
        max_length=max_length,
        batch_tokens=batch_tokens,
        normalize=normalize,
        dtype=dtype.value,
        precision=None if precision is None else precision.value,
        device=device,
        shard_size=shard_size,
        overwrite=overwrite,
    )
    run(job)


@app.command()
def evaluate(
    data: Annotated[
        list[str] | None, typer.Option(help="Labelled rows: LANGUAGE=FILE, or files with --lang-column; several.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="System mt-llm (or encoder): OUTPUT_DIR/final of distill-task or finetune."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="System zero-shot: OUTPUT_DIR/final of finetune.")] = None,
    translator: Annotated[
        str | None, typer.Option(help="System translate-test: an NLLB model, whose English the teacher reads.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Of the translations; 1 is greedy.")] = 1,
    translations: Annotated[
        str | None, typer.Option(help="File of translations to use and add to. (default: in the output folder)")
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of ids. (default: the row number)")] = None,
    output_dir: Annotated[str, typer.Option(help="Folder of results.")] = "evaluation",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
    precision_report: Annotated[
        bool, typer.Option("--precision-report", help="In place of all this: embeddings in 8 bits against the model's.")
    ] = False,
    model: Annotated[str, typer.Option(help="Of the report: checkpoint or hub id; tiny is the embedded one.")] = "tiny",
    precision: Annotated[
        Precision, typer.Option(help="What to compare; fp8 is emulated where the GPU or the dtype cannot run it.")
    ] = Precision.fp8,
    texts: Annotated[
        Path | None, typer.Option(help="Texts as encode takes them. (default: an article in 51 languages)")
    ] = None,
    src_lang: Annotated[str | None, typer.Option(help="Language of all texts, such as swh_Latn or sw.")] = None,
    lang_column: Annotated[str | None, typer.Option(help="Column that holds each row's language.")] = None,
    max_length: Annotated[int, typer.Option(min=3, help="Of the report: most tokens per text.")] = 512,
    layers: Annotated[bool, typer.Option("--layers", help="Also the error after each layer of the LLM.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="The models' own format; auto is the checkpoint's.")] = Dtype.auto,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda, cuda:1 or cpu. (default: a GPU if there is one)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the precision report here, as JSON.")] = None,
) -> None:
    """A task in many languages: the stack, its LLM alone, translate-test. With --precision-report: 8-bit products."""
    if precision_report:
        from mtllm_fast.cli.precision_report import PrecisionJob
        from mtllm_fast.cli.precision_report import precision_report as report

        report(
            PrecisionJob(
                model=model,
                precision=precision.value,
                texts=texts,
                src_lang=src_lang,
                lang_column=lang_column,
                dtype=dtype.value,
                device=device,
                max_length=max_length,
                layers=layers,
                out=out,
            )
        )
        return
    if not data:
        raise ValueError(
            "say what to evaluate: --data LANGUAGE=FILE with --student or --teacher; or --precision-report"
        )
    from mtllm_fast.cli.encode import pick_device
    from mtllm_fast.cli.evaluate import EvaluateArguments, run

    run(
        EvaluateArguments(
            data=data,
            student=student,
            teacher=teacher,
            translator=translator,
            num_beams=num_beams,
            translations=translations,
            language_column=lang_column,
            id_column=id_column,
            output_dir=output_dir,
            dtype=dtype.value,
            device=str(pick_device(device)),
            overwrite=overwrite,
        )
    )


_TRAINING = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_TRAINING)
def finetune(context: typer.Context) -> None:
    """Stage 2: fine-tune an LLM on a task in English. `mtllm-fast finetune --help` lists the options."""
    from mtllm_fast.cli.tasks import run_finetune

    run_finetune(context.args)


@app.command()
def preembed(
    teacher: Annotated[str, typer.Option(help="OUTPUT_DIR/final of finetune.")],
    data: Annotated[str, typer.Option(help="The rows that the student will learn from.")],
    out: Annotated[str, typer.Option(help="File to write, .safetensors.")],
    language: Annotated[str, typer.Option(help="Language of the rows.")] = "eng_Latn",
    dtype: Annotated[Dtype, typer.Option(help="Format to compute in; auto is the checkpoint's.")] = Dtype.auto,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda, cuda:1 or cpu. (default: a GPU if there is one)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, drop unfinished work on it.")] = False,
) -> None:
    """Stage 2: the teacher's states of the training rows, once. Killed at any moment, the same command goes on."""
    from mtllm_fast.cli.encode import pick_device
    from mtllm_fast.tasks.preembed import PreembedArguments
    from mtllm_fast.tasks.preembed import preembed as run

    run(
        PreembedArguments(
            teacher=teacher,
            data=data,
            out=out,
            language=language,
            dtype=dtype.value,
            device=None if device is None else str(pick_device(device)),
            overwrite=overwrite,
        )
    )


@app.command(context_settings=_TRAINING)
def distill_task(context: typer.Context) -> None:
    """Stage 2: teach the stack the task, from preembed's states. `mtllm-fast distill-task --help` lists the options."""
    from mtllm_fast.cli.tasks import run_distill_task

    run_distill_task(context.args)


@app.command(context_settings=_TRAINING)
def distill(context: typer.Context) -> None:
    """Stage 1: train a stack of your own on texts of a language that the LLM knows; resumes what a kill interrupted.

    `mtllm-fast distill --help` lists the options, transformers.TrainingArguments' among them.
    """
    from mtllm_fast.cli.distill import run

    run(context.args)


@app.command()
def prepare_llm(
    llm: Annotated[str, typer.Argument(help="Decoder LLM: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    adapter: Annotated[list[str], typer.Option(help="LoRA to merge: folder or hub id; several in training's order.")],
    dtype: Annotated[Dtype, typer.Option(help="Format of the result; auto is the LLM's.")] = Dtype.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Merge LoRA adapters (MNTP, SimCSE, …) into an LLM, to a folder that distill takes."""
    from mtllm_fast.training.prepare import prepare_llm as prepare

    prepare(llm, adapter, out, dtype=dtype.value, overwrite=overwrite)


@app.command()
def languages(
    query: Annotated[str | None, typer.Argument(help="Part of a code or of an English name, or any alias.")] = None,
) -> None:
    """List the languages that the encoder reads, with their codes."""
    from mtllm_fast.cli.languages import show

    show(query)


@app.command()
def env(
    check: Annotated[str | None, typer.Option(metavar="MODEL", help="Also check a checkpoint, value by value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, GPU and backends (and why some do not work); exit code 1 when a checked model has problems."""
    from mtllm_fast.cli.environment import show

    if not show(check, as_json):
        raise typer.Exit(1)


@app.command(context_settings=_TRAINING)
def bench(context: typer.Context) -> None:
    """Measure throughput against the reference; `mtllm-fast bench --help` lists the options."""
    from mtllm_fast.bench.command import bench as run_bench

    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(run_bench)
    program(context.args, prog_name="mtllm-fast bench")


def main() -> None:
    """The ``mtllm-fast`` program: what the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except SystemExit as end:
        if not end.code:
            _leave_process_group()
        raise
    except _EXPECTED_ERRORS as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


def _leave_process_group() -> None:
    """Of a process under ``torchrun``: else threads of the group still run when it ends, and may abort it then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
