"""Task heads on a stack: sequence classification, token classification, multiple choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from mtllm_fast.configuration import MTLLMConfig
from mtllm_fast.models.inputs import prepare_inputs
from mtllm_fast.models.modeling import MTLLM, MTLLMPreTrainedModel


class _Head(MTLLMPreTrainedModel):
    """A stack and a linear ``score`` without bias, as in the reference.

    The outputs hold ``loss`` and ``logits`` only, unless ``output_hidden_states=True``: any other field would turn
    ``Trainer.predict().predictions`` into a tuple.
    """

    def __init__(self, config: MTLLMConfig) -> None:
        super().__init__(config)
        self.model = MTLLM(config)
        self.score = nn.Linear(config.hidden_size, self._num_scores(config), bias=False)
        self.post_init()

    def _num_scores(self, config: MTLLMConfig) -> int:
        return config.num_labels

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)


class MTLLMForSequenceClassification(_Head):
    """``logits = score(pooled)``, pooled by ``config.pooling`` (mean over all real tokens by default).

    ``labels``: int64 ``[N]`` (cross-entropy), float ``[N]`` or ``[N, C]`` (regression, or multi-label), chosen by
    ``config.problem_type`` or, when it is None, by the labels' dtype and ``num_labels`` as in transformers.

    Example:

        >>> import torch
        >>> from mtllm_fast import MTLLMForSequenceClassification
        >>> model = MTLLMForSequenceClassification.from_pretrained("tiny", num_labels=3)
        >>> out = model(input_ids=torch.tensor([[10, 11, 2]]), labels=torch.tensor([1]))
        >>> out.logits.shape
        torch.Size([1, 3])
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput:
        if _collects(self, output_hidden_states, output_attentions):
            out = self.model(input_ids, attention_mask, inputs_embeds, output_hidden_states=True)
            pooled, states = out.pooler_output, out.hidden_states
        else:
            batch = prepare_inputs(self.model, input_ids, attention_mask, inputs_embeds, None, None)
            pooled, states = self.model.pooled(batch), None
        logits = self.score(pooled)
        loss = None if labels is None else _sequence_loss(self.config, logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)


class MTLLMForTokenClassification(_Head):
    """``logits = score(last_hidden_state)`` per token, ``[N, L, C]``; labels of -100 are ignored.

    Example:

        >>> import torch
        >>> from mtllm_fast import MTLLMForTokenClassification
        >>> model = MTLLMForTokenClassification.from_pretrained("tiny", num_labels=5)
        >>> model(input_ids=torch.tensor([[10, 11, 2]])).logits.shape
        torch.Size([1, 3, 5])
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TokenClassifierOutput:
        if _collects(self, output_hidden_states, output_attentions):
            out = self.model(input_ids, attention_mask, inputs_embeds, output_hidden_states=True)
            logits, states = self.score(out.last_hidden_state), out.hidden_states
        else:
            batch = prepare_inputs(self.model, input_ids, attention_mask, inputs_embeds, None, None)
            logits, states = batch.unpack(self.score(self.model.hidden(batch))), None
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device))
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=states)


class MTLLMForMultipleChoice(_Head):
    """One logit per choice, ``[N, C]``, cross-entropy over the choices.

    Two layouts of the input: ids ``[N, C, L]``, a text per choice, each pooled (transformers' convention); or ids
    ``[N, L]``, one text that holds all choices, with ``mean_mask`` ``[N, L, C]`` marking the tokens of each (the
    reference's Belebele layout): ``embed[n, c] = sum_l mask[n, l, c] h[n, l] / sum_l mask[n, l, c]``.

    Example:

        >>> import torch
        >>> from mtllm_fast import MTLLMForMultipleChoice
        >>> model = MTLLMForMultipleChoice.from_pretrained("tiny")
        >>> model(input_ids=torch.randint(4, 100, (2, 4, 7))).logits.shape
        torch.Size([2, 4])
    """

    def _num_scores(self, config: MTLLMConfig) -> int:
        return 1

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mean_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MultipleChoiceModelOutput:
        if _collects(self, output_hidden_states, output_attentions):
            raise ValueError("output_hidden_states is not supported with multiple choice: call model.model for states")
        readable = mean_mask is not None and mean_mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not bool(mean_mask.any(1).all()):
            raise ValueError("mean_mask has a choice without any token: each column needs at least one 1")
        if mean_mask is None:
            embeds = self._pool_texts(input_ids, attention_mask, inputs_embeds)
        else:
            embeds = self._pool_spans(input_ids, attention_mask, inputs_embeds, mean_mask)
        logits = self.score(embeds).squeeze(-1)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.to(logits.device))
        return MultipleChoiceModelOutput(loss=loss, logits=logits)

    def _pool_texts(self, input_ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None) -> Tensor:
        given = input_ids if input_ids is not None else embeds
        if given is None or given.dim() != (3 if embeds is None else 4):
            shape = None if given is None else list(given.shape)
            raise ValueError(f"without mean_mask, input_ids must be [N, C, L], one text per choice; got {shape}")
        flat = [t if t is None else t.flatten(0, 1) for t in (input_ids, mask, embeds)]
        pooled = self.model.pooled(prepare_inputs(self.model, *flat, None, None))
        return pooled.unflatten(0, given.shape[:2])

    def _pool_spans(
        self, input_ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, mean_mask_NLC: Tensor
    ) -> Tensor:
        given = input_ids if input_ids is not None else embeds
        if given is None or mean_mask_NLC.dim() != 3 or mean_mask_NLC.shape[:2] != given.shape[:2]:
            shape = None if given is None else list(given.shape)
            raise ValueError(
                f"mean_mask must be [N, L, C] over inputs [N, L]; got {list(mean_mask_NLC.shape)}, {shape}"
            )
        batch = prepare_inputs(self.model, input_ids, mask, embeds, None, None)
        states_NLD = batch.unpack(self.model.hidden(batch))
        weights = mean_mask_NLC.to(states_NLD.dtype)
        return torch.einsum("nlc,nld->ncd", weights, states_NLD) / weights.sum(1)[..., None]


def _collects(model: _Head, output_hidden_states: bool | None, output_attentions: bool | None) -> bool:
    if output_attentions:
        raise ValueError("output_attentions is not supported: packed attention never forms the weights")
    return bool(output_hidden_states if output_hidden_states is not None else model.config.output_hidden_states)


def _sequence_loss(config: MTLLMConfig, logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.to(logits.device)
    problem = config.problem_type
    if problem is None:
        integers = not labels.is_floating_point()
        problem = "regression" if config.num_labels == 1 else (
            "single_label_classification" if integers else "multi_label_classification"
        )  # fmt: skip
    if problem == "regression":
        return F.mse_loss(logits.float().squeeze(-1), labels.float().squeeze(-1))
    if problem == "single_label_classification":
        return F.cross_entropy(logits.float(), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
