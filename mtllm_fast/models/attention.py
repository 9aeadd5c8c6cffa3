"""The library's name among Hugging Face's attention implementations.

``attn_implementation="mtllm_varlen"`` (the default of a stack) lets the packed path choose the best installed
variable-length attention. A tower that is called by itself, padded, uses PyTorch's SDPA under that name.
"""

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DEFAULT_ATTENTION = "mtllm_varlen"

AttentionInterface.register(DEFAULT_ATTENTION, sdpa_attention_forward)
# Without the mask's twin transformers builds no mask at all and padding would be attended to, without a word.
AttentionMaskInterface.register(DEFAULT_ATTENTION, sdpa_mask)
