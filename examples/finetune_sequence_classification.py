"""LoRA fine-tuning for sentence pairs (NLI) with the Hugging Face Trainer. New: ``import mtllm_fast``.

python examples/finetune_sequence_classification.py [CHECKPOINT] [OUTPUT]
"""

import sys

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import mtllm_fast  # noqa: F401

checkpoint = (
    sys.argv[1] if len(sys.argv) > 1 else "fdschmidt93/NLLB-LLM2Vec-Meta-Llama-31-8B-Instruct-mntp-unsup-simcse"
)
output = sys.argv[2] if len(sys.argv) > 2 else "nli-lora"

tokenizer = AutoTokenizer.from_pretrained(checkpoint, src_lang="eng_Latn")
model = AutoModelForSequenceClassification.from_pretrained(
    checkpoint, trust_remote_code=True, num_labels=3, dtype=torch.bfloat16
)
lora = LoraConfig(
    task_type="SEQ_CLS",
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    target_modules=r".*llm2vec.*(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj).*",
    modules_to_save=["score"],
)
model = get_peft_model(model, lora)
model.print_trainable_parameters()

pairs = Dataset.from_dict(
    {
        "premise": ["The cat sleeps on the sofa.", "A man is cooking dinner.", "Two children play football."] * 8,
        "hypothesis": ["An animal is asleep.", "The man is swimming.", "They are brothers."] * 8,
        "label": [0, 2, 1] * 8,
    }
)
data = pairs.map(
    lambda row: tokenizer(row["premise"], row["hypothesis"], truncation=True, max_length=256),
    remove_columns=["premise", "hypothesis"],
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output, per_device_train_batch_size=8, num_train_epochs=2, learning_rate=1e-4, report_to=[], logging_steps=1
    ),
    train_dataset=data,
    eval_dataset=data,
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
)
trainer.train()
print(trainer.evaluate())
print("logits", trainer.predict(data).predictions.shape)
model.save_pretrained(output)
