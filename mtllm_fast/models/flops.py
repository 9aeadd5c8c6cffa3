"""FLOPs of a stack, from its configs."""

from __future__ import annotations

from typing import Any, NamedTuple


class Flops(NamedTuple):
    """Of one forward pass, 2 per multiply-add. Norms and activations are not counted."""

    encoder: float
    up_proj: float
    llm_linear: float
    llm_attention: float


def forward_flops(encoder_config: Any, llm_config: Any, tokens: float, pairs: float) -> Flops:
    """FLOPs of texts with so many tokens, and so many pairs of tokens of one text (the sum of squared lengths).

    Per token: ``2 (4 d^2 + 2 d ffn)`` per encoder layer, ``2 d D``, and ``2 (D (H + 2 KV) hd + H hd D + 3 D ffn)`` per
    LLM layer; plus attention's two products, ``4 width`` per pair and layer.
    """
    enc, llm = encoder_config, llm_config
    d, D = enc.d_model, llm.hidden_size
    head_dim = getattr(llm, "head_dim", None) or D // llm.num_attention_heads
    kv_heads = getattr(llm, "num_key_value_heads", None) or llm.num_attention_heads
    q_width, kv_width = llm.num_attention_heads * head_dim, kv_heads * head_dim
    inner = getattr(llm, "intermediate_size", None) or 4 * D  # GPT-2's n_inner is None where it is 4 D
    encoder_layer = 2 * (4 * d * d + 2 * d * enc.encoder_ffn_dim)
    llm_layer = 2 * (D * (q_width + 2 * kv_width) + q_width * D + 3 * D * inner)
    return Flops(
        encoder=enc.encoder_layers * (encoder_layer * tokens + 4 * d * pairs),
        up_proj=2 * d * D * tokens,
        llm_linear=llm.num_hidden_layers * llm_layer * tokens,
        llm_attention=llm.num_hidden_layers * 4 * q_width * pairs,
    )


def step_flops(
    encoder_config: Any, llm_config: Any, encoder_tokens: float, encoder_pairs: float, llm_tokens: float,
    llm_pairs: float,
) -> float:  # fmt: skip
    """FLOPs of a step of self-distillation: the teacher's and the student's forward, and the student's backward, in
    which frozen weights have no gradient of their own. LoRA's products, which are small, are not counted, and nothing
    that gradient checkpointing computes twice."""
    student = forward_flops(encoder_config, llm_config, encoder_tokens, encoder_pairs)
    teacher = forward_flops(encoder_config, llm_config, llm_tokens, llm_pairs)
    own = student.encoder + 2 * student.up_proj + 2 * student.llm_linear + 3 * student.llm_attention
    return own + teacher.llm_linear + teacher.llm_attention
