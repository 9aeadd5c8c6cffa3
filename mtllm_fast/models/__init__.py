"""The stack as transformers models. Importing this package registers the Auto classes for ``nllb-llm2vec``."""

from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from mtllm_fast.configuration import MTLLMConfig
from mtllm_fast.models.heads import (
    MTLLMForMultipleChoice,
    MTLLMForSequenceClassification,
    MTLLMForTokenClassification,
)
from mtllm_fast.models.modeling import MTLLM, MTLLMOutput

__all__ = [
    "MTLLM",
    "MTLLMConfig",
    "MTLLMForMultipleChoice",
    "MTLLMForSequenceClassification",
    "MTLLMForTokenClassification",
    "MTLLMOutput",
]

AutoModel.register(MTLLMConfig, MTLLM, exist_ok=True)
AutoModelForSequenceClassification.register(MTLLMConfig, MTLLMForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MTLLMConfig, MTLLMForTokenClassification, exist_ok=True)
AutoModelForMultipleChoice.register(MTLLMConfig, MTLLMForMultipleChoice, exist_ok=True)
