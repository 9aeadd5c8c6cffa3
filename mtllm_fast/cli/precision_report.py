"""``mtllm-fast evaluate --precision-report``: what 8-bit products change in a model's embeddings of some texts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mtllm_fast import MTLLM
from mtllm_fast.cli.check import check_exists
from mtllm_fast.cli.encode import pick_device
from mtllm_fast.models.fusing import FuseReport, why_not
from mtllm_fast.tables import open_table
from mtllm_fast.text.tokenization import tokenize
from mtllm_fast.tiny import article_1

_LISTED = 5  # texts that changed most
_LAYER_TEXTS = 32  # whose states are compared layer by layer


@dataclass(frozen=True)
class PrecisionJob:
    """The command's arguments."""

    model: str
    precision: str
    texts: Path | None
    src_lang: str | None
    lang_column: str | None
    dtype: str
    device: str | None
    max_length: int
    layers: bool
    out: Path | None


def precision_report(job: PrecisionJob) -> None:
    """Print the report; write it as JSON to ``job.out`` if there is one."""
    check_exists(job.model)
    texts, languages = _texts(job)
    dtype = job.dtype if job.dtype == "auto" else getattr(torch, job.dtype)
    device = pick_device(job.device)
    model = MTLLM.from_pretrained(job.model, dtype=dtype, device_map=str(device), llm_embeddings=False)
    precision = job.precision
    if precision == "fp8" and why_not(model, "fp8") is not None and why_not(model, "fp8-emulated") is None:
        precision = "fp8-emulated"
    arguments = (texts, languages, job.max_length)
    plain = _embed(model, *arguments)
    plain_layers = _layer_states(model, *arguments) if job.layers else []
    fused = model.fuse(precision)
    found = _embed(model, *arguments)
    found_layers = _layer_states(model, *arguments) if job.layers else []
    facts = {
        "model": job.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "precision": precision,
        "emulated": precision == "fp8-emulated",
        "fused": asdict(fused) | {"kept": dict(fused.kept)},
        **compare(plain, found, languages),
        "layer_errors": [_relative(a, b) for a, b in zip(found_layers, plain_layers, strict=True)],
    }
    if job.out is not None:
        job.out.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(facts, fused)


def compare(plain: Tensor, found: Tensor, languages: list[str]) -> dict[str, Any]:
    """How far the embeddings ``found`` ``[N, D]`` are from ``plain`` ones, and whether they find the same neighbours.

    Cosines in float64, per text with itself. The nearest neighbour of a text is taken among all the others; agreement
    is the share of texts that have the same one in both, None for fewer than three texts.
    """
    plain, found = (F.normalize(t.double(), dim=1) for t in (plain, found))
    cosines = (plain * found).sum(1)
    worst = cosines.argsort()[:_LISTED].tolist()
    agreement = None
    if len(plain) > 2:
        agreement = float((_nearest(plain) == _nearest(found)).double().mean())
    return {
        "texts": len(plain),
        "cosine": {"min": float(cosines.min()), "mean": float(cosines.mean())},
        "furthest": [{"text": i, "language": languages[i], "cosine": float(cosines[i])} for i in worst],
        "same_nearest_neighbour": agreement,
    }


def _nearest(normed: Tensor) -> Tensor:
    similarity = normed @ normed.t()
    return similarity.fill_diagonal_(-2).argmax(1)


def _texts(job: PrecisionJob) -> tuple[list[str], list[str]]:
    if job.texts is None:
        if job.src_lang is not None or job.lang_column is not None:
            raise ValueError("--src-lang and --lang-column belong to --texts FILE")
        languages, texts = zip(*article_1().items(), strict=True)
        return list(texts), list(languages)
    if (job.src_lang is None) == (job.lang_column is None):
        raise ValueError("give the language of the texts: either --src-lang CODE or --lang-column NAME")
    rows = list(open_table(job.texts, language=job.src_lang, language_column=job.lang_column).rows())
    if not rows:
        raise ValueError(f"{job.texts} holds no texts")
    return [row.text for row in rows], [row.language for row in rows]


def _embed(model: MTLLM, texts: list[str], languages: list[str], max_length: int) -> Tensor:
    return model.encode(texts, languages, max_length=max_length, show_progress_bar=False).cpu()


def _layer_states(model: MTLLM, texts: list[str], languages: list[str], max_length: int) -> list[Tensor]:
    """The LLM's states after each layer, of the first texts; the last ones are normed."""
    tokens = tokenize(model.tokenizer, texts[:_LAYER_TEXTS], languages[:_LAYER_TEXTS], max_length)
    ids, bounds = torch.as_tensor(tokens.ids), torch.as_tensor(tokens.offsets).to(torch.int32)
    with torch.no_grad():
        out = model(input_ids=ids.to(model.device), cu_seqlens=bounds.to(model.device), output_hidden_states=True)
    return [states.cpu() for states in out.hidden_states[1:]]


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def _show(facts: dict[str, Any], fused: FuseReport) -> None:
    title = f"{facts['precision']} against {facts['dtype']}"
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    if facts["emulated"]:
        table.add_row("emulated", "the numbers of fp8, multiplied in float32")
    table.add_row("texts", str(facts["texts"]))
    table.add_row(
        "cosine to the model's own dtype", f"min {facts['cosine']['min']:.6f}, mean {facts['cosine']['mean']:.6f}"
    )
    for text in facts["furthest"]:
        table.add_row("", f"text {text['text']} ({text['language']}): {text['cosine']:.6f}")
    agreement = facts["same_nearest_neighbour"]
    table.add_row("same nearest neighbour", "fewer than three texts" if agreement is None else f"{agreement:.1%}")
    for number, error in enumerate(facts["layer_errors"]):
        table.add_row(f"relative error after layer {number}", f"{error:.2e}")
    console = Console()
    console.print(table)
    console.print(str(fused), markup=False, highlight=False, soft_wrap=True)
    if facts["model"] == "tiny":
        typer.echo("warning: the model is the embedded tiny one, whose embeddings mean nothing; give --model", err=True)
