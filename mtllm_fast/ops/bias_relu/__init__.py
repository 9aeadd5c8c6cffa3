from mtllm_fast.ops.bias_relu.api import bias_relu

__all__ = ["bias_relu"]
