"""The models that a stack is made of, from nothing: an MT model, and an LLM made an encoder the LLM2Vec way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from benchmarks.transfer import corpora
from benchmarks.transfer.languages import ENGLISH, SEEN, AnyLanguage, Language
from benchmarks.transfer.presets import Preset
from benchmarks.transfer.world import Meaning
from mtllm_fast.text.tokenization import tokenize
from mtllm_fast.tiny import llama_tokenizer, nllb_tokenizer
from mtllm_fast.training.checkpoints import begin, finish
from mtllm_fast.training.prepare import prepare_llm
from mtllm_fast.training.runs import write_json
from mtllm_fast.training.stacks import add_lora

_TEMPERATURE = 0.1  # of the contrast between texts and their translations
_MASKED = 0.2  # of the tokens, as LLM2Vec's recipe for Llama


class Batches(Dataset[Any]):
    """Batches that are drawn beforehand; the Trainer takes one per step."""

    def __init__(self, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batches[index]


def train(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], folder: Path, *, learning_rate: float, **more: Any
) -> list[dict[str, Any]]:
    """``transformers.Trainer`` on batches, one step each; its log comes back."""
    how = TrainingArguments(
        output_dir=str(folder), max_steps=len(batches), per_device_train_batch_size=1, learning_rate=learning_rate,
        warmup_steps=0.05, lr_scheduler_type="linear", weight_decay=0.01, save_strategy="no", report_to="none",
        logging_steps=max(1, len(batches) // 50), disable_tqdm=True, remove_unused_columns=False, seed=1, **more,
    )  # fmt: skip
    trainer = Trainer(model=model, args=how, train_dataset=Batches(batches), data_collator=lambda rows: rows[0])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return list(trainer.state.log_history)


def parallel_texts(
    paragraphs: Sequence[tuple[Meaning, ...]], languages: Sequence[Language] = SEEN
) -> dict[str, list[str]]:
    """Of English and each language that the MT model sees: the first paragraphs, as many as it has."""
    texts = {}
    every: tuple[AnyLanguage, ...] = (ENGLISH, *languages)
    for language in every:
        draw = random.Random(f"parallel text in {language.name}")
        own = paragraphs[: int(language.parallel * len(paragraphs))]
        texts[language.code] = [corpora.say_all(paragraph, language, draw) for paragraph in own]
    return texts


def _directions(texts: dict[str, list[str]], count: int, draw: random.Random) -> Iterator[tuple[str, str, int]]:
    """Source, target and number of a paragraph; more of the small languages than there is text of them.

    A quarter has one language on both sides, to be repaired. Without it no decoder reads English and another language
    to say the same, and nothing makes the encoder's states of the two alike. (NLLB learnt so from monolingual text too,
    arXiv 2207.04672.)
    """
    names = [name for name in texts if name != ENGLISH.code]
    weights = [len(texts[name]) ** 0.5 for name in names]
    for _ in range(count):
        one = draw.choices(names, weights)[0]
        other = draw.choice([name for name in names if name != one] or [one])
        pairs = ((one, ENGLISH.code), (ENGLISH.code, one), (one, other), (ENGLISH.code, ENGLISH.code), (one, one))
        source, target = draw.choices(pairs, (40, 20, 15, 15, 10))[0]
        yield source, target, draw.randrange(min(len(texts[source]), len(texts[target])))


def _damaged(text: str, draw: random.Random) -> str:
    """Without one word in five, and with neighbours exchanged now and then."""
    words = [word for word in text.split() if draw.random() > 0.2] or text.split()
    for i in range(len(words) - 1):
        if draw.random() < 0.1:
            words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def train_mt(folder: Path, preset: Preset, seed: str) -> None:
    """``folder``: an NLLB-like model with its tokenizer, many-to-many on the parallel texts."""
    set_seed(1)
    texts = parallel_texts(corpora.parallel(preset.paragraphs, seed), preset.seen)
    tokenizer = nllb_tokenizer((text for own in texts.values() for text in own), preset.mt_vocabulary)
    config = M2M100Config(
        vocab_size=len(tokenizer), d_model=preset.mt_width, encoder_layers=preset.mt_layers,
        decoder_layers=preset.mt_layers, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=4 * preset.mt_width, decoder_ffn_dim=4 * preset.mt_width, max_position_embeddings=512,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, dropout=0.0, attention_dropout=0.0, scale_embedding=True,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        init_std=preset.mt_width**-0.5,  # NLLB's 0.02 at this width leaves words weaker than their positions
    )  # fmt: skip
    ids = {name: _ids(tokenizer, own, name) for name, own in texts.items()}
    draw = random.Random(f"{seed} directions")
    drawn = list(_directions(texts, preset.mt_steps * preset.mt_batch, draw))
    lengths = [len(ids[source][number]) + len(ids[target][number]) for source, target, number in drawn]
    batches = []
    for chosen in _like_lengths(lengths, preset.mt_batch, random.Random(f"{seed} batches")):
        rows = [drawn[i] for i in chosen]
        sources = [_source(tokenizer, texts, ids, row, draw) for row in rows]
        batches.append(_seq2seq(sources, [ids[target][number] for _, target, number in rows], config))
    model = M2M100ForConditionalGeneration(config)
    model.generation_config.max_length = 512
    log = train(Aligned(model), batches, folder, learning_rate=preset.mt_learning_rate, adam_beta2=0.98)
    begun = begin(folder)
    model.save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    write_json(begun / "log.json", log)
    finish(folder)


class Aligned(nn.Module):
    """Translation, and contrast: the encoder's mean state of a source is that of its target, and of no other in the
    batch (mRASP2, arXiv 2105.09501)."""

    def __init__(self, model: M2M100ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        out = self.model(labels=labels, **batch)
        mask = (labels != -100).long()
        targets = labels.masked_fill(labels == -100, int(self.model.config.pad_token_id or 0))
        other = self.model.model.encoder(input_ids=targets, attention_mask=mask).last_hidden_state
        ours = _mean(out.encoder_last_hidden_state, batch["attention_mask"])
        scores = ours @ _mean(other, mask).T / _TEMPERATURE
        alike = (targets[:, None] == targets[None]).all(-1)  # no contrast between two of one text
        scores = scores.masked_fill(alike.fill_diagonal_(False), float("-inf"))
        aims = torch.arange(len(scores), device=scores.device)
        return {"loss": out.loss + (F.cross_entropy(scores, aims) + F.cross_entropy(scores.T, aims)) / 2}


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(hidden)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _source(
    tokenizer: Any, texts: dict[str, list[str]], ids: dict[str, list[Tensor]], row: tuple[str, str, int],
    draw: random.Random,
) -> Tensor:  # fmt: skip
    source, target, number = row
    if source != target:
        return ids[source][number]
    return _ids(tokenizer, [_damaged(texts[source][number], draw)], source)[0]


def _ids(tokenizer: Any, texts: Sequence[str], language: str) -> list[Tensor]:
    found = tokenize(tokenizer, texts, [language] * len(texts), 512)
    return list(torch.from_numpy(found.ids).split(found.lengths.tolist()))


def _like_lengths(lengths: Sequence[int], size: int, draw: random.Random) -> list[list[int]]:
    """Batches of texts of like length, in random order; each pool of 50 batches is sorted for itself."""
    batches = []
    for start in range(0, len(lengths), 50 * size):
        pool = sorted(range(start, min(start + 50 * size, len(lengths))), key=lambda i: lengths[i])
        own = [pool[i : i + size] for i in range(0, len(pool), size)]
        draw.shuffle(own)
        batches += own
    return batches


def _seq2seq(sources: Sequence[Tensor], targets: Sequence[Tensor], config: Any) -> dict[str, Tensor]:
    """The decoder reads ``</s> [language] words`` and says ``[language] words </s>``."""
    ids = pad_sequence(list(sources), batch_first=True, padding_value=config.pad_token_id)
    starts = [torch.cat([target.new_tensor([config.decoder_start_token_id]), target[:-1]]) for target in targets]
    return {
        "input_ids": ids, "attention_mask": (ids != config.pad_token_id).long(),
        "decoder_input_ids": pad_sequence(starts, batch_first=True, padding_value=config.pad_token_id),
        "labels": pad_sequence(list(targets), batch_first=True, padding_value=-100),
    }  # fmt: skip


def train_llm(folder: Path, preset: Preset, seed: str) -> None:
    """``folder``: a Llama trained on English alone, made bidirectional: causal, masked, then contrastive (LLM2Vec,
    arXiv 2404.05961). The last two are LoRA, which ``prepare-llm`` merges."""
    set_seed(2)
    texts = list(corpora.documents(preset.documents, seed))
    parts = folder.with_name(f"{folder.name}-parts")
    tokenizer = llama_tokenizer(texts, preset.llm_vocabulary)
    tokenizer.pad_token = tokenizer.eos_token
    ids = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=preset.llm_width, intermediate_size=3 * preset.llm_width,
        num_hidden_layers=preset.llm_layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, initializer_range=preset.llm_width**-0.5,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    draw = random.Random(f"{seed} order of documents")
    batches = list(_drawn(ids, preset.clm_steps, preset.llm_batch, draw, _causal))
    log = train(model, batches, parts, learning_rate=preset.llm_learning_rate, adam_beta2=0.98)
    base = parts / "causal"
    begun = begin(base)
    model.save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    finish(base)
    log += _train_adapter(
        parts / "mntp",
        str(base),
        AutoModelForCausalLM,
        _drawn(ids, preset.mntp_steps, preset.llm_batch, draw, _masked_with(draw)),
        preset,
    )
    prepare_llm(base, [parts / "mntp"], parts / "masked", overwrite=True)
    log += _train_adapter(
        parts / "simcse",
        str(parts / "masked"),
        AutoModel,
        _drawn(ids, preset.simcse_steps, preset.llm_batch, draw, _causal),
        preset,
        contrastive=True,
    )
    prepare_llm(base, [parts / "mntp", parts / "simcse"], folder, overwrite=True)
    write_json(parts / "log.json", log)


Collate = Callable[[Sequence[Tensor]], dict[str, Tensor]]


def _drawn(
    ids: Sequence[Tensor], steps: int, size: int, draw: random.Random, collate: Collate
) -> Iterator[dict[str, Tensor]]:
    """Batches of distinct texts, as a contrastive loss needs them: one permutation after another."""
    chosen: list[int] = []
    while len(chosen) < steps * size:
        chosen += draw.sample(range(len(ids)), len(ids))
    del chosen[steps * size :]
    for batch in _like_lengths([len(ids[i]) for i in chosen], size, draw):
        yield collate([ids[chosen[i]] for i in batch])


def _causal(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence(list(rows), batch_first=True, padding_value=2)
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def _masked_with(draw: random.Random) -> Collate:
    """A fifth of the tokens is hidden (by ``<unk>``) and said by the state of the token before, as MNTP has it."""

    def collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
        batch, random_ = _causal(rows), torch.Generator().manual_seed(draw.randrange(2**31))
        hidden = torch.rand(batch["input_ids"].shape, generator=random_) < _MASKED
        hidden[:, 0] = False
        batch["labels"] = batch["labels"].masked_fill(~hidden, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden & (batch["attention_mask"] == 1), 0)
        return batch

    return collate


class Contrastive(nn.Module):
    """SimCSE: two passes with dropout over one text are alike, those over others in the batch are not."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        views = []
        for _ in range(2):
            hidden = self.decoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask[..., None].to(hidden)
            views.append(F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1))
        scores = views[0] @ views[1].T / 0.05
        return {"loss": F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))}


def _train_adapter(
    folder: Path, base: str, model_class: Any, batches: Iterator[dict[str, Tensor]], preset: Preset,
    contrastive: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """LoRA on a bidirectional ``base``, written to ``folder`` as PEFT does."""
    config = LlamaConfig.from_pretrained(base)
    config.is_causal, config.attention_dropout = False, 0.1 if contrastive else 0.0
    decoder = model_class.from_pretrained(base, config=config)
    wrapped = add_lora(decoder, r=32, alpha=64, dropout=0.1 if contrastive else 0.0)
    model = Contrastive(wrapped) if contrastive else wrapped
    rate = 2e-4 if contrastive else 2e-3
    log = train(model, list(batches), folder.with_name(f"{folder.name}-run"), learning_rate=rate)
    wrapped.save_pretrained(str(folder))
    return log
