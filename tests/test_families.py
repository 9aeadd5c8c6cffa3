"""Every LLM family on every NLLB encoder, at real widths: the packed path runs, with as few launches a layer."""

from __future__ import annotations

import pytest
import torch
from test_counts import Counter, encode
from transformers import (
    LlamaConfig,
    LlamaModel,
    M2M100Config,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from mtllm_fast import MTLLM, MTLLMConfig
from mtllm_fast.models.merging import merge_projections

ENCODERS = {"nllb-600M": (1024, 4096), "nllb-1.3B": (1024, 8192), "nllb-3.3B": (2048, 8192)}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 64, "is_causal": False, "use_cache": False}
WIDE = {**HEADS, "hidden_size": 4096, "intermediate_size": 14336}
LLMS = {
    "llama-3.1-8B": (LlamaModel, LlamaConfig, WIDE, 9),
    "mistral-7B": (MistralModel, MistralConfig, {**WIDE, "sliding_window": 4096}, 9),
    "qwen2-7B": (
        Qwen2Model, Qwen2Config,
        {**HEADS, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
        9,
    ),
    "qwen3-8B": (Qwen3Model, Qwen3Config, {**WIDE, "intermediate_size": 12288, "head_dim": 128}, 11),  # and q, k norms
}  # fmt: skip
PER_ENCODER_LAYER = 8


def launches(encoder: str, llm: str, encoder_layers: int, llm_layers: int) -> int:
    """Of ``encode_packed`` after ``fuse()``'s merging on a GPU, counted without data."""
    width, ffn = ENCODERS[encoder]
    model_class, config_class, options, _ = LLMS[llm]
    with torch.device("meta"):
        tower = M2M100Encoder(
            M2M100Config(
                vocab_size=64, d_model=width, encoder_layers=encoder_layers, encoder_attention_heads=16,
                encoder_ffn_dim=ffn, decoder_layers=1,
            )
        )  # fmt: skip
        decoder = model_class(config_class(**options, num_hidden_layers=llm_layers))
        config = MTLLMConfig(nllb_config=tower.config, llm2vec_config=decoder.config)
        model = MTLLM(config, tower, decoder).eval().to(torch.bfloat16)
    assert model.packed_llm
    merge_projections(model)
    counter = Counter(set())
    with torch.no_grad(), counter:
        encode(model)
    return counter.launches


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("llm", LLMS)
def test_a_layer_takes_as_few_launches_in_every_family(encoder, llm):
    base = launches(encoder, llm, 1, 1)
    assert launches(encoder, llm, 2, 1) - base == PER_ENCODER_LAYER
    assert launches(encoder, llm, 1, 2) - base == LLMS[llm][3]
