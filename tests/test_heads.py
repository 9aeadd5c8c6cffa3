"""The heads: losses on labels, and that they train."""

from __future__ import annotations

import copy

import pytest
import torch
from stacks import batch, new_stack
from torch import nn

from mtllm_fast import MTLLMForSequenceClassification, MTLLMForTokenClassification


def test_heads_train_on_their_labels():
    config = new_stack().config
    for head, labels in (
        (MTLLMForSequenceClassification, torch.tensor([0, 2, 1])),
        (MTLLMForTokenClassification, torch.where(batch()["attention_mask"] == 1, 2, -100)),
    ):
        torch.manual_seed(0)
        config.num_labels = 3
        model = head(copy.deepcopy(config))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(8):
            out = model(**batch(), labels=labels)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.loss.item())
        assert list(out.keys()) == ["loss", "logits"]
        assert losses[-1] < 0.7 * losses[0], (head.__name__, losses)
        out = model(**batch(), output_hidden_states=True)
        assert len(out.hidden_states) == 3


@pytest.mark.parametrize(
    ("labels", "num_labels", "loss"),
    [
        (torch.tensor([0.5, -1.0, 2.0]), 1, lambda z, y: nn.functional.mse_loss(z[:, 0], y)),
        (torch.tensor([[1.0, 0], [0, 1], [1, 1]]), 2, nn.functional.binary_cross_entropy_with_logits),
        (torch.tensor([1, 0, 1]), 2, nn.functional.cross_entropy),
    ],
)
def test_sequence_losses(labels, num_labels, loss):
    config = new_stack().config
    config.num_labels = num_labels
    model = MTLLMForSequenceClassification(config).eval()
    out = model(**batch(), labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels))
