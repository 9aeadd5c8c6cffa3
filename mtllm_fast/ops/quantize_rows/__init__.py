from mtllm_fast.ops.quantize_rows.api import quantize_rows
from mtllm_fast.ops.quantize_rows.schema import MAX_FUSED_WIDTH

__all__ = ["MAX_FUSED_WIDTH", "quantize_rows"]
