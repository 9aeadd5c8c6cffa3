"""A translation encoder alone as the tower of a task: what the stack must beat to be worth its LLM."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, M2M100ForConditionalGeneration
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from mtllm_fast.models.attention import DEFAULT_ATTENTION
from mtllm_fast.models.layers import to_packed_layers
from mtllm_fast.models.towers import run_encoder
from mtllm_fast.packing import PackedLayout


class EncoderTower(nn.Module):
    """The encoder of an NLLB or M2M-100 model on packed tokens: ids ``[T]`` -> its last states ``[T, d]``."""

    def __init__(self, encoder: M2M100Encoder) -> None:
        super().__init__()
        to_packed_layers(encoder.layers)
        encoder.config._attn_implementation = DEFAULT_ATTENTION
        self.encoder, self.config = encoder, encoder.config

    def forward(self, input_ids: Tensor, layout: PackedLayout) -> Tensor:
        return run_encoder(self.encoder, input_ids, layout)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.encoder.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.encoder.gradient_checkpointing_disable()


def load_encoder(path: str, dtype: Any) -> EncoderTower:
    """The encoder of a folder or hub id, in evaluation mode.

    Raises:
        ValueError: another kind of model.
    """
    kind = AutoConfig.from_pretrained(path).model_type
    if kind != "m2m_100":
        raise ValueError(f"{path}: encoder must be an NLLB or M2M-100 model, is a {kind}")
    model = M2M100ForConditionalGeneration.from_pretrained(path, dtype=dtype)
    return EncoderTower(model.get_encoder()).eval()
