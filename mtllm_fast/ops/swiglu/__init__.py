from mtllm_fast.ops.swiglu.api import swiglu

__all__ = ["swiglu"]
