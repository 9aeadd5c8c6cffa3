"""The embedded default: a complete stack of a few MB, generated on first use, for everything that has no ``--model``.

It has the published checkpoint's layout and an NLLB tokenizer with all language codes, trained on article 1 of the
Universal Declaration of Human Rights. Its weights are random: embeddings differ from text to text and mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtllm_fast.core.settings import CACHE, cache_dir

if TYPE_CHECKING:
    from transformers import NllbTokenizer, PreTrainedTokenizerFast

_FOLDER = "tiny-1"  # new name whenever the files below would change
_BPE_VOCABULARY = 2869  # + <mask> + 202 codes = 3072

_CONFIG: dict[str, Any] = {
    "architectures": ["NLLBLLM2Vec"],
    "model_type": "nllb-llm2vec",
    "dtype": "float32",
    "nllb_config": {
        "model_type": "m2m_100",
        "vocab_size": 3072,
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 256,
        "max_position_embeddings": 1024,
        "scale_embedding": True,
        "dropout": 0.1,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
    "llm2vec_config": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def tiny_path() -> Path:
    """The folder of the tiny checkpoint, generated on first use (a second).

    Several processes may call this at once: each builds in a folder of its own, the first to finish gives it its name.

    Returns:
        ``$MTLLM_FAST_CACHE/tiny-1`` (by default under ``~/.cache/mtllm_fast``): config, weights, tokenizer.

    Raises:
        OSError: the cache folder cannot be written; the message names it and how to choose another.

    Example:
        >>> (tiny_path() / "model.safetensors").is_file()
        True
    """
    path = cache_dir() / _FOLDER
    if path.is_dir():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}-", dir=path.parent))
    except OSError as error:
        raise OSError(f"the cache folder {path.parent} cannot be written ({error}); set {CACHE.name}") from error
    try:
        built = workplace / _FOLDER  # mkdtemp's own folder is readable by its owner alone
        built.mkdir()
        generate(built)
        try:
            os.rename(built, path)
        except OSError:
            if not path.is_dir():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return path


def generate(folder: Path) -> None:
    """Write the checkpoint into an existing folder; the bytes are the same every time."""
    from safetensors.numpy import save

    nllb_tokenizer(article_1().values(), _BPE_VOCABULARY).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save(_weights(), metadata={"format": "pt"}))


def article_1() -> dict[str, str]:
    """Article 1 of the Universal Declaration of Human Rights: NLLB code -> text, 51 languages."""
    file = resources.files("mtllm_fast") / "data" / "udhr_article1.txt"
    return dict(line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())


def nllb_tokenizer(texts: Iterable[str], vocabulary: int) -> NllbTokenizer:
    """NLLB's kind of tokenizer: BPE of so many pieces, ``▁`` for a blank, and ``<mask>`` and the 202 codes besides."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.trainers import BpeTrainer
    from transformers import NllbTokenizer

    printable_ascii = [chr(code) for code in range(33, 127)]
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=printable_ascii,
        show_progress=False,
    )
    bpe = Tokenizer(BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="always", split=True)
    bpe.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(bpe.to_str())["model"]
    merges: list[Any] = [tuple(merge) for merge in model["merges"]]
    return NllbTokenizer(vocab=model["vocab"], merges=merges)


def _weights() -> dict[str, np.ndarray]:
    """Key -> float32 array, in the published layout. NumPy's legacy generator never changes its stream."""
    random = np.random.RandomState(0)
    weights = {}
    for key, shape in sorted(_shapes().items()):
        values = random.standard_normal(shape).astype(np.float32)
        if key.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif key.endswith(".bias"):
            values *= 0.1
        elif key.endswith("embed_tokens.weight"):
            values *= 2 / np.sqrt(
                shape[1], dtype=np.float32
            )  # the encoder scales by sqrt(d): tokens outweigh positions
        else:
            values *= 1 / np.sqrt(shape[1], dtype=np.float32)  # y = x W^T keeps the size of x
        weights[key] = values
    weights["nllb_encoder.embed_tokens.weight"][_CONFIG["nllb_config"]["pad_token_id"]] = 0
    return weights


def _shapes() -> dict[str, tuple[int, ...]]:
    nllb, llm = _CONFIG["nllb_config"], _CONFIG["llm2vec_config"]
    d, ffn = nllb["d_model"], nllb["encoder_ffn_dim"]
    D, intermediate = llm["hidden_size"], llm["intermediate_size"]
    queries, keys = (llm["head_dim"] * llm[heads] for heads in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {
        "nllb_encoder.embed_tokens.weight": (nllb["vocab_size"], d),
        "nllb_encoder.layer_norm.weight": (d,),
        "nllb_encoder.layer_norm.bias": (d,),
        "up_proj.weight": (D, d),
        "llm2vec.embed_tokens.weight": (llm["vocab_size"], D),
        "llm2vec.norm.weight": (D,),
    }
    for i in range(nllb["encoder_layers"]):
        layer = f"nllb_encoder.layers.{i}"
        linears = {f"self_attn.{name}_proj": (d, d) for name in "qkv"}
        linears |= {"self_attn.out_proj": (d, d), "fc1": (ffn, d), "fc2": (d, ffn)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{norm}.weight": (d,), f"{layer}.{norm}.bias": (d,)}
    for i in range(llm["num_hidden_layers"]):
        layer = f"llm2vec.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (queries, D),
            f"{layer}.self_attn.k_proj.weight": (keys, D),
            f"{layer}.self_attn.v_proj.weight": (keys, D),
            f"{layer}.self_attn.o_proj.weight": (D, queries),
            f"{layer}.mlp.gate_proj.weight": (intermediate, D),
            f"{layer}.mlp.up_proj.weight": (intermediate, D),
            f"{layer}.mlp.down_proj.weight": (D, intermediate),
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.post_attention_layernorm.weight": (D,),
        }
    return shapes


def tiny_llm_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny stack's LLM, whose checkpoint brings none."""
    return llama_tokenizer(article_1().values(), _CONFIG["llm2vec_config"]["vocab_size"])


def llama_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Llama's kind of tokenizer: byte-level BPE of so many tokens, BOS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def tiny_documents() -> list[str]:
    """About 1,300 paragraphs of English that every Python brings: its own reference manual, in a fixed order.

    Raises:
        ValueError: a Python that was stripped of ``pydoc_data``.
    """
    import random
    import re

    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python has no pydoc_data, the embedded texts: give texts of your own") from None
    paragraphs = (" ".join(part.split()) for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    documents = [text for text in paragraphs if len(text) > 60 and text[0].isalpha()]
    random.Random(0).shuffle(documents)
    return documents
