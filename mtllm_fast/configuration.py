"""``MTLLMConfig``: the published ``config.json``, plus what the published checkpoint leaves implicit.

Importing this file makes the model type known to ``AutoConfig``. The model classes follow when the first config is
made, not before: this file may be imported from within an import of transformers, where model code (and the docstring
of any single model's config) cannot be had yet.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

POOLINGS = ("mean", "cls", "eos")
# The published checkpoint names no tokenizer; it is NLLB's, which this vocabulary identifies.
PUBLISHED_ENCODER = "facebook/nllb-200-distilled-600M"
PUBLISHED_VOCABULARY = 256206


class MTLLMConfig(PreTrainedConfig):
    """Configuration of a translation encoder stacked under a bidirectional LLM.

    Args:
        nllb_config (`dict | M2M100Config`): the encoder.
        llm2vec_config (`dict | PreTrainedConfig`): the LLM; a dict without ``model_type`` is a Llama.
        pooling (`str`): ``"mean"`` over all real tokens (language code and ``</s>`` included; what was trained),
            ``"cls"`` (first token) or ``"eos"`` (last token).
        up_proj_bias (`bool`, *optional*): whether ``up_proj`` has a bias. ``None``: read from the checkpoint's keys
            by ``from_pretrained``, and no bias for a model made from scratch.
        llm_embeddings (`bool`): keep the LLM's token embedding table. The stacked forward never reads it (the
            teacher does), and it weighs 1 GB at Llama-3 size.
        tokenizer_name (`str`, *optional*): where the tokenizer comes from when none lies beside the checkpoint.

    Example:

        >>> from mtllm_fast import MTLLMConfig
        >>> config = MTLLMConfig(nllb_config={"d_model": 64}, llm2vec_config={"hidden_size": 128})
        >>> config.llm2vec_config.model_type, config.llm2vec_config.is_causal
        ('llama', False)
    """

    model_type = "nllb-llm2vec"
    sub_configs: ClassVar[dict[str, Any]] = {"nllb_config": AutoConfig, "llm2vec_config": AutoConfig}

    def __init__(  # written out: configs are dataclasses from transformers 5.4 on only
        self,
        nllb_config: dict | PreTrainedConfig | None = None,
        llm2vec_config: dict | PreTrainedConfig | None = None,
        pooling: str = "mean",
        up_proj_bias: bool | None = None,
        llm_embeddings: bool = True,
        tokenizer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        importlib.import_module("mtllm_fast.models")  # registers the classes that the Auto classes look up next
        self.nllb_config = _sub_config(nllb_config, "m2m_100")
        self.llm2vec_config = _sub_config(llm2vec_config, "llama")
        self.pooling = pooling
        self.up_proj_bias = up_proj_bias
        self.llm_embeddings = llm_embeddings
        self.tokenizer_name = tokenizer_name
        if self.nllb_config.model_type != "m2m_100":
            raise ValueError(f"nllb_config must be of model_type 'm2m_100', got {self.nllb_config.model_type!r}")
        check_pooling(pooling)
        # The supported switch for bidirectional attention from transformers 5.2 on; checked by a probe at load.
        self.llm2vec_config.is_causal = False
        self.llm2vec_config.use_cache = False
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width D of the embeddings: the LLM's."""
        return self.llm2vec_config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary that is read: the encoder's. Resizing the token embeddings sets it."""
        return self.nllb_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.nllb_config.vocab_size = value

    @property
    def default_tokenizer(self) -> str | None:
        """Where to look for the tokenizer when the checkpoint folder has none; None: nowhere."""
        published = PUBLISHED_ENCODER if self.nllb_config.vocab_size == PUBLISHED_VOCABULARY else None
        return self.tokenizer_name or self.nllb_config.name_or_path or published


def check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def _sub_config(config: dict | PreTrainedConfig | None, model_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    values = {"model_type": model_type, **(config or {})}
    return AutoConfig.for_model(values.pop("model_type"), **values)


AutoConfig.register(MTLLMConfig.model_type, MTLLMConfig, exist_ok=True)
