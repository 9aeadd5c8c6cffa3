"""Bidirectional attention within each sentence of a packed batch."""

from mtllm_fast.ops.varlen_attention.api import varlen_attention

__all__ = ["varlen_attention"]
