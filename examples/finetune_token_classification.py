"""LoRA fine-tuning for named entities with the Hugging Face Trainer. New: ``import mtllm_fast``.

python examples/finetune_token_classification.py [CHECKPOINT] [OUTPUT]
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

import mtllm_fast  # noqa: F401

checkpoint = (
    sys.argv[1] if len(sys.argv) > 1 else "fdschmidt93/NLLB-LLM2Vec-Meta-Llama-31-8B-Instruct-mntp-unsup-simcse"
)
output = sys.argv[2] if len(sys.argv) > 2 else "ner-lora"
labels = ["O", "PER", "LOC"]

tokenizer = AutoTokenizer.from_pretrained(checkpoint, src_lang="eng_Latn")
model = AutoModelForTokenClassification.from_pretrained(
    checkpoint, trust_remote_code=True, num_labels=len(labels), dtype=torch.bfloat16
)
lora = LoraConfig(
    task_type="TOKEN_CLS",
    r=16,
    lora_alpha=32,
    target_modules=r".*llm2vec.*(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj).*",
    modules_to_save=["score"],
)
model = get_peft_model(model, lora)

sentences = Dataset.from_dict(
    {
        "words": [["Amina", "lives", "in", "Nairobi"], ["Paul", "met", "Wanjiru", "in", "Kisumu"]] * 8,
        "tags": [[1, 0, 0, 2], [1, 0, 1, 0, 2]] * 8,
    }
)


def tokenize(row: dict) -> dict:
    """The label of a word goes to its first token; the others are ignored."""
    encoded = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=256)
    aligned, previous = [], None
    for word in encoded.word_ids():
        aligned.append(-100 if word is None or word == previous else row["tags"][word])
        previous = word
    return {**encoded, "labels": aligned}


data = sentences.map(tokenize, remove_columns=["words", "tags"])
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output, per_device_train_batch_size=8, num_train_epochs=2, learning_rate=1e-4, report_to=[], logging_steps=1
    ),
    train_dataset=data,
    processing_class=tokenizer,
    data_collator=DataCollatorForTokenClassification(tokenizer),
)
trainer.train()
print("logits", trainer.predict(data).predictions.shape)
model.save_pretrained(output)
