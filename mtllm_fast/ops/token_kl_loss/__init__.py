from mtllm_fast.ops.token_kl_loss.api import token_kl_loss

__all__ = ["token_kl_loss"]
