from mtllm_fast.ops.lora_linear.api import lora_linear
from mtllm_fast.ops.lora_linear.group import Adapter, Gated, RmsNormed

__all__ = ["Adapter", "Gated", "RmsNormed", "lora_linear"]
