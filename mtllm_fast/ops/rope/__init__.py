from mtllm_fast.ops.rope.api import rope, rope_qkv

__all__ = ["rope", "rope_qkv"]
