from mtllm_fast.ops.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
