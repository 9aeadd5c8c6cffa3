"""The fused stack: up-projection, RMSNorm, QKV and RoPE of the LLM's first layer, with the projection absorbed."""

from mtllm_fast.ops.stack_projection.api import StackProjection, stack_projection
from mtllm_fast.ops.stack_projection.composite import Composite, StackWeights

__all__ = ["Composite", "StackProjection", "StackWeights", "stack_projection"]
