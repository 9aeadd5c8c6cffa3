"""Stage 1's published recipes, and the arguments of ``distill``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Loss weights, and what of ``transformers.TrainingArguments`` differs from its defaults."""

    sequence_weight: float
    span_weight: float
    documents_per_batch: int
    trainer: dict[str, Any]


_TRAINER: dict[str, Any] = {
    "max_steps": 10_000,
    "warmup_steps": 0.01,  # of all steps
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,  # it would log the mean of the losses before in place of a NaN
    "ddp_broadcast_buffers": False,  # sinusoids and RoPE's frequencies, the same everywhere: LoRA alone is exchanged
    "ddp_find_unused_parameters": False,
}

RECIPES = {
    # arXiv 2406.12739, section 4: 10,000 steps of 256 FineWeb documents cut at 512 tokens.
    "paper": Recipe(1.0, 0.0, 256, {**_TRAINER, "learning_rate": 2e-4}),
    # The authors' later runs: sentences and aligned spans, half each.
    "span": Recipe(0.5, 0.5, 256, {**_TRAINER, "learning_rate": 5e-4}),
    # The embedded stack, in minutes on a CPU.
    "tiny": Recipe(
        0.5, 0.5, 32,
        {**_TRAINER, "learning_rate": 1e-3, "max_steps": 300, "save_steps": 100, "eval_strategy": "steps",
         "eval_steps": 50},
    ),
}  # fmt: skip


@dataclass
class DistillArguments:
    """What ``distill`` is to do; how the Trainer does it, say ``transformers.TrainingArguments``.

    Without ``encoder``, ``llm`` and ``model`` the embedded stack learns from embedded texts.
    """

    encoder: str | None = field(default=None, metadata={"help": "NLLB or M2M-100 model: folder or hub id."})
    llm: str | None = field(default=None, metadata={"help": "Decoder LLM: folder or hub id; see prepare-llm."})
    model: str | None = field(
        default=None, metadata={"help": "In place of encoder and llm: a stack in the published layout, or tiny."}
    )
    llm_tokenizer: str | None = field(default=None, metadata={"help": "Folder or id. (default: llm)"})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, folders or patterns of .parquet, .jsonl, .csv, .tsv, .txt, or a datasets name."},
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "Held-out texts, likewise."})
    eval_documents: int = field(default=256, metadata={"help": "How many of eval_data to read."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of eval_data. (default: split)"})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    split: str = field(default="train", metadata={"help": "Split of a datasets name."})
    src_lang: str = field(default="eng_Latn", metadata={"help": "Language of the texts, which the LLM must know."})
    shuffle: bool = field(
        default=False, metadata={"help": "Shuffle the documents, by the Trainer's data_seed or seed."}
    )
    preset: str = field(default="paper", metadata={"help": f"Recipe: {', '.join(RECIPES)}.", "choices": [*RECIPES]})
    sequence_weight: float | None = field(default=None, metadata={"help": "Of the loss of texts. (default: preset's)"})
    span_weight: float | None = field(default=None, metadata={"help": "Of the loss of spans. (default: preset's)"})
    all_spans: bool = field(
        default=False, metadata={"help": "Use spans of any length, not only those of one token on both sides."}
    )
    max_length: int = field(default=512, metadata={"help": "Most tokens per text on either side."})
    documents_per_batch: int | None = field(
        default=None,
        metadata={"help": "Documents per step, over all processes and accumulated batches. (default: preset's)"},
    )
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "In place of documents_per_batch: most tokens of a side per process and batch."}
    )
    up_proj_init: str = field(
        default="least-squares",
        metadata={"help": "How up_proj starts: least-squares or random.", "choices": ["least-squares", "random"]},
    )
    up_proj_bias: bool = field(default=False, metadata={"help": "Give up_proj a bias, as the paper's first code."})
    init_documents: int = field(default=1024, metadata={"help": "Documents for least-squares."})
    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA in all linear layers of the LLM."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's alpha."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA's dropout."})
    dtype: str = field(default="auto", metadata={"help": "Of frozen weights: auto (the LLM's), float32, bfloat16."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the LLM in NF4 by bitsandbytes."})
    teacher_cache: bool = field(
        default=False,
        metadata={"help": "Keep what the teacher says of a document for the next epoch; needs span_weight 0."},
    )
    merge: bool = field(default=False, metadata={"help": "At the end, also write OUTPUT_DIR/merged, adapters merged."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew in an output_dir that holds a run."})

    @property
    def recipe(self) -> Recipe:
        if self.preset not in RECIPES:
            raise ValueError(f"preset must be one of {', '.join(RECIPES)}, got {self.preset!r}")
        return RECIPES[self.preset]

    @property
    def is_tiny(self) -> bool:
        return self.model == "tiny" or (self.model is None and self.encoder is None and self.llm is None)

    def check(self) -> None:
        """Raises ValueError for values that cannot be, or not together."""
        if self.model is not None and (self.encoder is not None or self.llm is not None):
            raise ValueError("give either model, or encoder and llm")
        if self.model is None and (self.encoder is None) != (self.llm is None):
            raise ValueError(f"encoder and llm go together; {'encoder' if self.encoder is None else 'llm'} is missing")
        if self.model not in (None, "tiny") and self.llm_tokenizer is None:
            raise ValueError("a stack brings its encoder's tokenizer alone: give llm_tokenizer")
        if not self.data and not self.is_tiny:
            raise ValueError("data is missing: files, folders, patterns or a datasets name")
        if self.load_in_4bit and self.merge:
            raise ValueError("adapters of a 4-bit LLM cannot be merged without loss: load final/adapter onto the LLM")
        if self.documents_per_batch is not None and self.tokens_per_batch is not None:
            raise ValueError("give either documents_per_batch or tokens_per_batch")
        if self.tokens_per_batch is not None and self.tokens_per_batch < self.max_length:
            raise ValueError(
                f"tokens_per_batch must hold one text of max_length={self.max_length}, got {self.tokens_per_batch}"
            )
        weight = self.recipe.span_weight if self.span_weight is None else self.span_weight
        if self.teacher_cache and weight:
            raise ValueError(
                f"teacher_cache keeps the states of texts, not of spans: span_weight must be 0, is {weight}"
            )
        for name in ("max_length", "init_documents", "lora_r", "eval_documents", "documents_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.up_proj_init not in ("least-squares", "random"):
            raise ValueError(f"up_proj_init must be least-squares or random, got {self.up_proj_init!r}")

    def documents_per_process(self, processes: int, accumulated: int) -> int | None:
        """Documents of one batch of one process; None with a token budget.

        Raises:
            ValueError: documents_per_batch is no multiple of processes times gradient_accumulation_steps.
        """
        if self.tokens_per_batch is not None:
            return None
        whole = self.documents_per_batch or self.recipe.documents_per_batch
        if whole % (processes * accumulated):
            raise ValueError(
                f"documents_per_batch={whole} must be a multiple of {processes} processes times "
                f"gradient_accumulation_steps={accumulated}; change one of them, or give tokens_per_batch"
            )
        return whole // (processes * accumulated)
