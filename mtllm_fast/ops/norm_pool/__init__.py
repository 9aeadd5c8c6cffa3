from mtllm_fast.ops.norm_pool.api import norm_pool

__all__ = ["norm_pool"]
