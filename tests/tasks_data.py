"""Tasks that a tiny model can learn, and the folders that stage 2 starts from."""

from __future__ import annotations

import json
import random

import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration

from mtllm_fast import MTLLM
from mtllm_fast.tiny import tiny_llm_tokenizer, tiny_path

WORDS = {
    "eng_Latn": {"good": ["dignity", "freedom", "brotherhood"], "bad": ["reason", "born", "equal"]},
    "fra_Latn": {"good": ["dignité", "fraternité", "libres"], "bad": ["raison", "naissent", "égaux"]},
}


def rows(count, language="eng_Latn", seed=0):
    """Texts whose label is that of their one telling word."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        label = draw.choice(["good", "bad"])
        words = ["all", "human", "beings", draw.choice(WORDS[language][label]), "and"]
        draw.shuffle(words)
        made.append({"id": f"{language}-{seed}-{number}", "text": " ".join(words), "label": label, "lang": language})
    return made


def pairs(count, seed=0):
    draw = random.Random(seed)
    every = WORDS["eng_Latn"]["good"] + WORDS["eng_Latn"]["bad"]
    made = []
    for _ in range(count):
        one, other = draw.choice(every), draw.choice(every)
        made.append({"premise": f"all {one}", "hypothesis": f"and {other}", "label": int(one != other) * 2})
    return made


def choices(count, seed=0):
    draw = random.Random(seed)
    every = WORDS["eng_Latn"]["good"] + WORDS["eng_Latn"]["bad"]
    made = []
    for _ in range(count):
        options = draw.sample(every, 4)
        right = draw.randrange(4)
        row = {"flores_passage": f"all human beings {options[right]}", "question": "Which word?"}
        row |= {f"mc_answer{i + 1}": option for i, option in enumerate(options)}
        made.append(row | {"correct_answer_num": str(right + 1)})
    return made


def words(count, seed=0):
    return [
        {
            "words": row["text"].split(),
            "tags": ["X" if w in WORDS["eng_Latn"]["good"] else "O" for w in row["text"].split()],
        }
        for row in rows(count, seed=seed)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)


def llm_folder(folder):
    """The tiny stack's LLM with a tokenizer, as an LLM of its own."""
    MTLLM.from_pretrained("tiny").llm2vec.save_pretrained(folder)
    tiny_llm_tokenizer().save_pretrained(folder)
    return str(folder)


def translator_folder(folder):
    """A random M2M-100 with the tiny stack's tokenizer; what it says means nothing."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=3072, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
        decoder_start_token_id=2, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    M2M100ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder)
    return str(folder)
