"""A tokenizer for the tiny stack's LLM, whose checkpoint brings none: byte-level BPE of 512 tokens, BOS first."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mtllm_fast.tiny import article_1


def llm_tokenizer() -> PreTrainedTokenizerFast:
    """A new one at each call, so that a test may change it."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>")


@cache
def _trained() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        article_1().values(),
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    bpe.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return bpe.to_str()
