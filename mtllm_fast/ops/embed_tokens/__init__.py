from mtllm_fast.ops.embed_tokens.api import embed_tokens

__all__ = ["embed_tokens"]
