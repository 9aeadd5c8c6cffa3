"""A first ``up_proj`` by least squares: the encoder's states of words onto the LLM's own embeddings of the same words.

With it the LLM reads vectors like those that it knows from the first step on (the authors' code after arXiv
2406.12739). One pass over the texts: only means and centred second moments, d x d and d x D, are kept.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtllm_fast.models.encoding import default_batch_tokens
from mtllm_fast.models.inputs import prepare_inputs
from mtllm_fast.models.modeling import MTLLM, MTLLMPreTrainedModel
from mtllm_fast.models.towers import evaluating, run_encoder
from mtllm_fast.training.collator import DataCollatorForSelfDistillation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("mtllm_fast")

# Of the states' root mean square. LayerNorm's output is constant in one direction but for rounding, and a weight that
# fits the rounding is huge: in bfloat16 it would need its bias to cancel it, from float32 it would blow up bfloat16's.
_LEAST_DEVIATION = 1e-5
_DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True)
class LeastSquaresReport:
    """What ``init_up_proj_least_squares`` achieved; ``print`` it.

    Attributes:
        fvu_before, fvu_after: the fraction of the variance of the LLM's embeddings, over the spans, that ``up_proj``
            leaves unexplained, ``mean((y - W x - b)²) / mean((y - mean(y))²)``: 0 is perfect, 1 no better than their
            mean, and there is no upper bound. After: of the weights as stored, in the model's dtype.
        texts, tokens, spans: how much was read; the tokens are the encoder's.
        rank: in how many of the d directions of the encoder's states the texts determine the weight.
    """

    fvu_before: float
    fvu_after: float
    texts: int
    tokens: int
    spans: int
    rank: int

    def __str__(self) -> str:
        read = f"{self.spans} spans of {self.texts} texts ({self.tokens} encoder tokens)"
        return f"up_proj: fvu {self.fvu_before:.4g} -> {self.fvu_after:.4g}, rank {self.rank}, from {read}"


def init_up_proj_least_squares(
    model: MTLLMPreTrainedModel,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    llm_tokenizer: PreTrainedTokenizerBase,
    encoder_tokenizer: PreTrainedTokenizerBase | None = None,
    src_lang: str = "eng_Latn",
    max_length: int = 512,
    batch_tokens: int | None = None,
    ridge: float = 0.0,
    only_overlapping_tokens: bool = False,
    dtype: torch.dtype = torch.float64,
) -> LeastSquaresReport:
    """Set ``up_proj`` to ``argmin_{W, b} Σ_s |y_s - W x_s - b|² + λ |W|²`` over the aligned spans s of the texts.

    x_s ``[d]`` is the mean of the encoder's output states (last LayerNorm included, no dropout) over a span's tokens,
    y_s ``[D]`` that of the LLM's input embeddings; b is there if the model's ``up_proj`` has a bias, and not penalised.
    ``λ = ridge · trace(G) / d`` with G the Gram matrix of the x_s (centred when there is a bias), so that one ``ridge``
    means the same for any number of texts and any size of states. Where G is singular the solution is the one of
    smallest norm: W is zero in directions where the deviation of the x_s (with λ) is less than the epsilon of the
    encoder's dtype, and at least 1e-5, times their root mean square, or than what ``dtype`` resolves.

    About a thousand documents do (the authors'). The weights are written in place and keep dtype, device and
    ``requires_grad``; nothing is written when anything raises. A fused model is unfused.

    Args:
        model: a stack, or a head on one, with the LLM's token embeddings.
        texts: strings, or mappings with a column ``"text"``, read once, to the end (``itertools.islice`` ends a
            stream that has none).
        llm_tokenizer: the LLM's; fast.
        encoder_tokenizer: default: the model's own.
        src_lang, max_length, only_overlapping_tokens: see ``DataCollatorForSelfDistillation``.
        batch_tokens: most tokens that a side's batch may hold: ``batch_tokens // max_length`` texts are run at once, at
            least one. Default: as in ``MTLLM.encode``.
        ridge: at least 0.
        dtype: of the moments and the solution, float64 or float32 (for devices without float64).

    Returns:
        LeastSquaresReport: fvu before and after, and how much was read.

    Raises:
        ValueError: no LLM embeddings, an ``up_proj`` that is no plain ``nn.Linear`` (PEFT's, a quantised one), texts
            without a span or with only one kind, states that are not finite, a tokenizer of another model.
        TypeError: ``model`` or ``texts`` of another kind.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from mtllm_fast import MTLLM, init_up_proj_least_squares
    >>> from mtllm_fast.tiny import article_1
    >>> letters = Tokenizer(models.BPE({byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    >>> letters.pre_tokenizer = pre_tokenizers.ByteLevel()
    >>> llm_tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    >>> model = MTLLM.from_pretrained("tiny")
    >>> report = init_up_proj_least_squares(model, article_1().values(), llm_tokenizer=llm_tokenizer)
    >>> report.fvu_after < 1 < report.fvu_before
    True
    """
    _check_options(texts, batch_tokens, ridge, dtype)
    stack, embeddings = _stack(model)
    collate = DataCollatorForSelfDistillation(
        llm_tokenizer, stack.tokenizer if encoder_tokenizer is None else encoder_tokenizer,
        src_lang=src_lang, max_length=max_length, only_overlapping_tokens=only_overlapping_tokens,
    )  # fmt: skip
    moments = _Moments.zeros(stack.up_proj, dtype)
    n_texts = n_tokens = 0
    budget = batch_tokens or default_batch_tokens(stack.device, 32, max_length)
    with torch.no_grad(), torch.autocast(stack.device.type, enabled=False), evaluating(stack):
        for examples in _batched(texts, max(1, budget // max_length)):
            batch = collate(examples)
            n_texts, n_tokens = n_texts + len(examples), n_tokens + len(batch["encoder_input_ids"])
            if len(batch["spans"]):
                moments.add(*_span_means(stack, embeddings, batch, dtype))
        moments.check(n_texts)
        before = moments.fvu(stack.up_proj)
        rounding = max(_LEAST_DEVIATION, torch.finfo(stack.nllb_encoder.dtype).eps)
        weight, bias, rank = moments.solve(ridge, rounding, stack.up_proj.bias is not None)
        stack.unfuse()
        stack.up_proj.weight.copy_(weight)
        if bias is not None:
            stack.up_proj.bias.copy_(bias)
        after = moments.fvu(stack.up_proj)
    return LeastSquaresReport(before, after, n_texts, n_tokens, moments.count, rank)


def _check_options(texts: Any, batch_tokens: int | None, ridge: float, dtype: torch.dtype) -> None:
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be an iterable of texts, got one {type(texts).__name__}")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be a finite number, at least 0, got {ridge}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")


def _stack(model: Any) -> tuple[MTLLM, nn.Module]:
    """The stack and its LLM's token embeddings."""
    if not isinstance(model, MTLLMPreTrainedModel):
        raise TypeError(f"model must be an MTLLM or a head on one, before PEFT wraps it, got {type(model).__name__}")
    stack: Any = model.base_model
    if not stack.config.llm_embeddings:
        raise ValueError(
            "the model was loaded without its LLM's token embeddings (llm_embeddings=False), which up_proj is to "
            "reproduce: load it with llm_embeddings=True"
        )
    up_proj = stack.up_proj
    if type(up_proj) is not nn.Linear:
        raise ValueError(
            f"up_proj must be a plain nn.Linear, got {type(up_proj).__module__}.{type(up_proj).__name__}: initialise "
            "it before it is wrapped or quantised"
        )
    whole = type(up_proj.weight) is nn.Parameter and up_proj.weight.shape == (up_proj.out_features, up_proj.in_features)
    if not whole or up_proj.weight.is_meta:
        raise ValueError("up_proj must hold its weight: initialise it before it is sharded or offloaded")
    return stack, stack.llm2vec.get_input_embeddings()


def _batched(texts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _span_means(stack: Any, embeddings: Any, batch: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the encoder's states ``[S, d]`` and of the LLM's embeddings ``[S, D]``, on the device of ``up_proj``."""
    _check_vocabulary("llm_tokenizer", batch["input_ids"], embeddings)
    _check_vocabulary("encoder_tokenizer", batch["encoder_input_ids"], stack.nllb_encoder.embed_tokens)
    encoder_ids, cu_seqlens = (batch[f"encoder_{name}"].to(stack.device) for name in ("input_ids", "cu_seqlens"))
    inputs = prepare_inputs(stack, encoder_ids, None, None, cu_seqlens, batch["encoder_max_seqlen"])
    states = run_encoder(stack.nllb_encoder, encoder_ids, inputs.layout)
    embedded = embeddings(batch["input_ids"].to(embeddings.weight.device))
    spans, device = batch["spans"], stack.up_proj.weight.device
    return (
        _means(states.to(device, dtype), spans.encoder_indices.to(device), spans.encoder_offsets.to(device)),
        _means(embedded.to(device, dtype), spans.llm_indices.to(device), spans.llm_offsets.to(device)),
    )


def _check_vocabulary(name: str, ids: Tensor, embeddings: Any) -> None:
    largest, known = int(ids.max()), embeddings.weight.shape[0]
    if largest >= known:
        raise ValueError(f"{name} must be the model's, which has {known} token embeddings; it gave id {largest}")


def _means(rows: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(rows.index_select(0, indices), "mean", offsets=offsets, axis=0)


@dataclass
class _Moments:
    """Means and centred second moments of x ``[d]`` and y ``[D]``, merged batch by batch (Chan, Golub, LeVeque, 1983).

    A variance from sums of raw squares would lose the digits by which the mean outweighs the deviations.

    Attributes:
        count: how many pairs; mean_x ``[d]``, mean_y ``[D]``.
        xx: ``[d, d]``, Σ (x - mean)(x - mean)ᵀ; xy: ``[d, D]``; yy: ``[]``, Σ |y - mean|².
    """

    count: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, up_proj: nn.Linear, dtype: torch.dtype) -> _Moments:
        d, D = up_proj.in_features, up_proj.out_features
        shapes: tuple[tuple[int, ...], ...] = ((d,), (D,), (d, d), (d, D), ())
        return cls(0, *(torch.zeros(shape, dtype=dtype, device=up_proj.weight.device) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows ``[S, d]`` and ``[S, D]``."""
        total = self.count + len(x)
        mean_x, mean_y = x.mean(0), y.mean(0)
        off_x, off_y = mean_x - self.mean_x, mean_y - self.mean_y
        x, y = x - mean_x, y - mean_y
        between = self.count * len(x) / total
        self.xx.addmm_(x.T, x).addr_(off_x, off_x, alpha=between)
        self.xy.addmm_(x.T, y).addr_(off_x, off_y, alpha=between)
        self.yy += y.square().sum() + between * off_y.square().sum()
        self.mean_x += off_x * (len(x) / total)
        self.mean_y += off_y * (len(x) / total)
        self.count = total

    def check(self, n_texts: int) -> None:
        """Raises unless there is something to fit."""
        if self.count == 0:
            raise ValueError(
                f"texts must hold a word that both tokenizers keep whole, got none in {n_texts} texts; "
                "only_overlapping_tokens=False and a larger max_length keep more"
            )
        for name, moments in (("the encoder's states", self.xx), ("the LLM's token embeddings", self.yy)):
            if not bool(moments.isfinite().all()):
                raise ValueError(f"{name} are not finite (float16 overflows: load the model in bfloat16 or float32)")
        if float(self.yy) == 0:
            raise ValueError(f"texts must hold different words, got {self.count} spans of one embedding")

    def solve(self, ridge: float, rounding: float, with_bias: bool) -> tuple[Tensor, Tensor | None, int]:
        """Weight ``[D, d]``, bias ``[D]`` or None, and the rank."""
        gram, cross = self.xx, self.xy
        if not with_bias:
            gram = gram.addr(self.mean_x, self.mean_x, alpha=self.count)
            cross = cross.addr(self.mean_x, self.mean_y, alpha=self.count)
        if self.count < len(gram) + with_bias and ridge == 0:
            logger.warning("up_proj: %d spans do not determine %d weights per output; more texts or a ridge would",
                           self.count, len(gram) + with_bias)  # fmt: skip
        values, vectors = torch.linalg.eigh(gram)
        values = values + ridge * values.mean()
        mean_square = (self.xx.trace() + self.count * self.mean_x.square().sum()) / len(gram)
        resolved = values[-1] * len(gram) * torch.finfo(gram.dtype).eps
        kept = values > torch.maximum(rounding**2 * mean_square, resolved)
        values, vectors = values[kept], vectors[:, kept]
        weight = (cross.T @ vectors / values) @ vectors.T
        return weight, self.mean_y - weight @ self.mean_x if with_bias else None, len(values)

    def fvu(self, up_proj: nn.Linear) -> float:
        """Σ |y - W x - b|² / Σ |y - mean|²."""
        weight = up_proj.weight.to(self.xx.dtype)
        offset = self.mean_y - weight @ self.mean_x
        if up_proj.bias is not None:
            offset = offset - up_proj.bias.to(self.xx.dtype)
        within = self.yy - 2 * (weight * self.xy.T).sum() + ((weight @ self.xx) * weight).sum()
        # Of a perfect fit, rounding may leave less than nothing.
        return float(within.clamp(min=0) + self.count * offset.square().sum()) / float(self.yy)
