"""``MTLLMForSelfDistillation``: one step of stage 1, from tokens of both sides to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mtllm_fast.models import MTLLM
from mtllm_fast.models.inputs import packed_layout, prepare_inputs
from mtllm_fast.models.plain import is_rms_norm
from mtllm_fast.models.towers import evaluating, run_llm, run_other_llm
from mtllm_fast.ops.distillation_loss import distillation_loss
from mtllm_fast.ops.norm_pool import norm_pool
from mtllm_fast.packing import PackedLayout, packing_from_mask
from mtllm_fast.text.alignment import SpanAlignment
from mtllm_fast.training.adapters import adapter_modules, adapter_parameters, adapters_off


@dataclass
class SelfDistillationOutput(ModelOutput):
    """Scalars; only ``loss`` has a gradient. What they are: ``mtllm_fast.DistillationLoss``."""

    loss: Tensor | None = None
    sequence_loss: Tensor | None = None
    span_loss: Tensor | None = None
    fvu: Tensor | None = None
    fvu_student: Tensor | None = None
    cosine: Tensor | None = None
    norm_difference: Tensor | None = None
    span_cosine: Tensor | None = None
    span_norm_difference: Tensor | None = None


class MTLLMForSelfDistillation(nn.Module):
    """Stage 1 of MT-LLM (arXiv 2406.12739): the stack learns to say what its LLM says of the same text.

    Teacher: the LLM with its adapters switched off, on its own tokens, without a gradient; no second copy of the
    weights. Student: encoder → up-projection → the same LLM with its adapters on. Loss: their ``distillation_loss``.

    A plain ``nn.Module`` for any training loop. Building it puts the recipe in place: the encoder and the LLM's own
    weights are frozen (the teacher must not move), ``up_proj`` is trained, and adapters stay as they are. The encoder
    and the teacher run without dropout.

    Args:
        stack: an ``MTLLM``, plain, with PEFT adapters in its LLM, or wrapped by ``peft.get_peft_model``.
        sequence_weight: of the loss of pooled sentences; the paper's loss is (1, 0).
        span_weight: of the loss of aligned spans; the authors' follow-up is (0.333, 0.667), later (0.5, 0.5).
        kind, beta: of ``distillation_loss``.
        backend: of ``distillation_loss``.

    Raises:
        TypeError: ``stack`` is no ``MTLLM``.
        ValueError: a stack without the LLM's embeddings, or two weights of 0.

    Example:

        >>> import torch
        >>> from mtllm_fast import MTLLM, MTLLMForSelfDistillation
        >>> joint = MTLLMForSelfDistillation(MTLLM.from_pretrained("tiny"))
        >>> out = joint(torch.tensor([[1, 30, 31]]), encoder_input_ids=torch.tensor([[3000, 10, 11, 12, 2]]))
        >>> out.loss.backward()
        >>> sorted(name for name, parameter in joint.named_parameters() if parameter.grad is not None)
        ['stack.up_proj.weight']
    """

    def __init__(
        self,
        stack: nn.Module,
        *,
        sequence_weight: float = 1.0,
        span_weight: float = 0.0,
        kind: str = "mse",
        beta: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.stack = stack
        model = self.mtllm
        if not model.config.llm_embeddings:
            raise ValueError(
                "stack was loaded without the LLM's embeddings, which the teacher needs: llm_embeddings=True"
            )
        if not (sequence_weight >= 0 and span_weight >= 0 and sequence_weight + span_weight > 0):
            raise ValueError(
                "sequence_weight and span_weight must not be negative, nor both 0, "
                f"got {sequence_weight} and {span_weight}"
            )
        self.sequence_weight, self.span_weight = sequence_weight, span_weight
        self.options: dict[str, Any] = {"kind": kind, "beta": beta, "backend": backend}
        if adapter_modules(model.nllb_encoder):
            raise ValueError(
                "the encoder has PEFT adapters, and it is not trained: give target_modules that name the LLM's alone, "
                "such as r'.*llm2vec.*(q|k|v|o|gate|up|down)_proj'"
            )
        model.nllb_encoder.requires_grad_(False)
        adapters = adapter_parameters(model.llm2vec)
        for parameter in model.llm2vec.parameters():
            if parameter not in adapters:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.up_proj.parameters()):
            model.up_proj.requires_grad_(True)  # PEFT froze it

    @property
    def mtllm(self) -> MTLLM:
        """The stack itself, without PEFT's wrapper."""
        model: Any = self.stack
        if not isinstance(model, MTLLM) and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        if not isinstance(model, MTLLM):
            raise TypeError(f"stack must be an MTLLM, plain or wrapped by PEFT, got {type(self.stack).__name__}")
        return model

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Of the stack; a ``Trainer`` calls it, recent ones with more options."""
        self.mtllm.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.mtllm.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        spans: SpanAlignment | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        encoder_cu_seqlens: Tensor | None = None,
        encoder_max_seqlen: int | None = None,
        teacher_pooled: Tensor | None = None,
        teacher_spans: Tensor | None = None,
        sequence_share: float = 1.0,
        span_share: float = 1.0,
        return_loss: bool = True,
    ) -> SelfDistillationOutput:
        """The loss of one batch. ``DataCollatorForSelfDistillation`` makes its arguments from texts.

        Tensors on another device than the model's are moved there.

        Args:
            input_ids: the LLM's tokens, padded ``[N, L]`` with ``attention_mask`` (default: every token is real), or
                packed ``[T]`` with ``cu_seqlens`` int32 ``[N + 1]`` and at best ``max_seqlen``.
            encoder_input_ids: the encoder's tokens of the same texts, ``[src_lang] tokens </s>``, likewise (the
                default mask: wherever they are not the padding id).
            spans: which packed tokens say the same, from ``align_spans``; needed where ``span_weight`` is not 0.
            return_loss: changes nothing; it tells a ``Trainer`` that evaluation has a loss without labels.
            sequence_share, span_share: factors of the two terms of ``loss`` in a part of a larger batch: with n of
                its N texts (spans) and m parts ``n m / N``, so that the mean of the parts' losses is the whole's.
            teacher_pooled: ``[N, D]`` instead of ``input_ids``: what the teacher said of these texts before, and
                ``teacher_spans`` ``[S, D]`` where spans are used.

        Raises:
            ValueError, TypeError: inputs that do not fit together; see ``MTLLM.forward``.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError("nn.DataParallel cuts packed batches in two: run one process per GPU (torchrun)")
        model = self.mtllm
        if (spans is None) and self.span_weight:
            raise ValueError(f"span_weight is {self.span_weight}: pass spans, from align_spans or the collator")
        if (input_ids is None) == (teacher_pooled is None):
            raise ValueError("pass exactly one of input_ids and teacher_pooled")
        if encoder_input_ids is None:
            raise ValueError("encoder_input_ids are missing: the student reads them")
        model.unfuse()  # the teacher runs the layers as they are
        tensors = (
            input_ids, attention_mask, encoder_input_ids, encoder_attention_mask, cu_seqlens, encoder_cu_seqlens,
            teacher_pooled, teacher_spans,
        )  # fmt: skip
        moved = [None if tensor is None else tensor.to(model.device) for tensor in tensors]
        input_ids, attention_mask, encoder_input_ids, encoder_attention_mask, cu_seqlens, encoder_cu_seqlens = moved[:6]
        teacher_pooled, teacher_spans = moved[6:]
        batch = prepare_inputs(
            model, encoder_input_ids, encoder_attention_mask, None, encoder_cu_seqlens, encoder_max_seqlen
        )
        with torch.no_grad(), evaluating(model.nllb_encoder):
            encoded = model.encode_tokens(batch)
        side = _Side.of(model, *model.last_states(encoded, batch), batch.layout)
        if input_ids is None:
            teacher: dict[str, Any] = {
                "teacher_pooled": teacher_pooled,
                "teacher_spans": teacher_spans if self.span_weight else None,
            }
        else:
            teacher = self._teacher(input_ids, attention_mask, cu_seqlens, max_seqlen)
        if spans is not None and self.span_weight:
            teacher |= _csr(spans.to(side.states.device), known=input_ids is None)
        out = distillation_loss(
            side.states, side.weight, side.cu_seqlens, eps=side.eps, **teacher,
            sequence_weight=self.sequence_weight * sequence_share, span_weight=self.span_weight * span_share,
            **self.options,
        )  # fmt: skip
        return SelfDistillationOutput(**out._asdict())

    @torch.no_grad()
    def teacher_pooled(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What the teacher says of packed texts, ``[B, D]``: its mean states, which ``forward`` takes back."""
        said = self._teacher(input_ids.to(self.mtllm.device), None, cu_seqlens.to(self.mtllm.device), None)
        states, weight = said["teacher_states"], said["teacher_weight"]
        bounds = said["teacher_cu_seqlens"]
        if weight is None:
            return torch.segment_reduce(states.float(), "mean", offsets=bounds.long(), axis=0)
        return norm_pool(states, weight, bounds, eps=said["teacher_eps"])

    @torch.no_grad()
    def _teacher(
        self, input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> dict[str, Any]:
        llm: Any = self.mtllm.llm2vec
        ids, layout = _packed_ids(input_ids, attention_mask, cu_seqlens, max_seqlen)
        embeddings = llm.get_input_embeddings()
        if not ids.is_cuda and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < embeddings.num_embeddings:
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(f"input_ids holds {bad}; the LLM's vocabulary is 0 … {embeddings.num_embeddings - 1}")
        with adapters_off(llm), evaluating(llm):
            run = run_llm if self.mtllm.packed_llm else run_other_llm
            side = _Side.of(self.mtllm, run(llm, embeddings(ids), layout), not self.mtllm.packed_llm, layout)
        return {f"teacher_{name}": value for name, value in vars(side).items()}


@dataclass(frozen=True)
class _Side:
    """Packed states as ``distillation_loss`` takes them; no weight: they are normed already."""

    states: Tensor
    weight: Tensor | None
    eps: float
    cu_seqlens: Tensor

    @classmethod
    def of(cls, model: MTLLM, states: Tensor, is_normed: bool, layout: PackedLayout) -> _Side:
        cu_seqlens = layout.cu_seqlens.to(states.device)
        norm: Any = None if is_normed else model.llm2vec.norm
        if norm is not None and is_rms_norm(norm):
            return cls(states, norm.weight, norm.variance_epsilon, cu_seqlens)
        return cls(states if norm is None else norm(states), None, 0.0, cu_seqlens)


def _packed_ids(
    input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, PackedLayout]:
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seqlens exclude each other: packed tokens have no padding")
        if input_ids.dim() != 1:
            raise ValueError(f"with cu_seqlens, input_ids must be [T]; got shape {list(input_ids.shape)}")
        return input_ids, packed_layout(cu_seqlens, input_ids, max_seqlen)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [N, L], or packed with cu_seqlens; got shape {list(input_ids.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {list(input_ids.shape)}, got {list(mask.shape)}")
    packing = packing_from_mask(mask)
    return packing.pack(input_ids), packing


def _csr(spans: SpanAlignment, known: bool) -> dict[str, Tensor]:
    """The student reads the encoder's tokens, the teacher (unless its vectors are known) the LLM's."""
    csr = {"span_indices": spans.encoder_indices, "span_offsets": spans.encoder_offsets}
    if not known:
        csr |= {"teacher_span_indices": spans.llm_indices, "teacher_span_offsets": spans.llm_offsets}
    return csr
