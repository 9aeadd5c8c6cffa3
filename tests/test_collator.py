"""``DataCollatorForSelfDistillation``: each text as tokenised alone, whatever carries it, and nothing shared."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from mtllm_fast import DataCollatorForSelfDistillation, SpanAlignment, align_spans
from mtllm_fast.core.errors import UnknownLanguageError
from mtllm_fast.text.tokenization import load_tokenizer, tokenize
from mtllm_fast.tiny import article_1, tiny_path
from mtllm_fast.tiny import tiny_llm_tokenizer as llm_tokenizer

TEXTS = [*article_1().values()][:12]
KEYS = {
    *("input_ids", "cu_seqlens", "max_seqlen", "spans"),
    *("encoder_input_ids", "encoder_cu_seqlens", "encoder_max_seqlen"),
}


@pytest.fixture
def tokenizers():
    return llm_tokenizer(), load_tokenizer(tiny_path())


def collator(tokenizers, **options) -> DataCollatorForSelfDistillation:
    return DataCollatorForSelfDistillation(*tokenizers, **{"only_overlapping_tokens": False, **options})


def rows(batch, prefix: str = "") -> list[list[int]]:
    lengths = batch[f"{prefix}cu_seqlens"].diff().tolist()
    return [part.tolist() for part in batch[f"{prefix}input_ids"].split(lengths)]


def same(one, other) -> bool:
    tensors = [
        [value for key in sorted(batch) for value in (vars(batch[key]).values() if key == "spans" else [batch[key]])]
        for batch in (one, other)
    ]
    return one.keys() == other.keys() and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*tensors, strict=True)
    )


@pytest.mark.parametrize("max_length", [3, 20, 512])
def test_the_batch_is_each_text_tokenised_alone(tokenizers, max_length):
    llm, encoder = copy.deepcopy(tokenizers)
    batch = collator(tokenizers, src_lang="sw", max_length=max_length)(TEXTS)
    assert batch.keys() == KEYS
    llm_ids = [llm(text, truncation=True, max_length=max_length)["input_ids"] for text in TEXTS]
    encoder_ids = [tokenize(encoder, [text], ["swh_Latn"], max_length).ids.tolist() for text in TEXTS]
    for prefix, alone in (("", llm_ids), ("encoder_", encoder_ids)):
        assert rows(batch, prefix) == alone
        assert batch[f"{prefix}input_ids"].dtype == torch.int64
        assert batch[f"{prefix}cu_seqlens"].dtype == torch.int32
        assert batch[f"{prefix}max_seqlen"] == max(map(len, alone))
    assert rows(batch)[0][0] == 1
    assert rows(batch, "encoder_")[0][:: len(rows(batch, "encoder_")[0]) - 1] == [
        encoder.convert_tokens_to_ids("swh_Latn"), encoder.eos_token_id,
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"only_overlapping_tokens": True}, {"complete": True}], ids=str)
def test_spans_are_those_of_the_two_tokenizations(tokenizers, options):
    batch = collator(tokenizers, max_length=40, **options)(TEXTS)
    both = [tokenizer(TEXTS, truncation=True, max_length=40) for tokenizer in tokenizers]
    wanted = align_spans(*both, **{"only_overlapping_tokens": False, **options})
    assert len(wanted) > 0
    assert all(torch.equal(t, vars(batch["spans"])[name]) for name, t in vars(wanted).items())


def test_spans_can_be_declined(tokenizers):
    assert collator(tokenizers, spans=False)(TEXTS).keys() == KEYS - {"spans"}


def test_a_text_is_the_same_in_any_order_and_company(tokenizers):
    collate = collator(tokenizers)
    forward, backward = collate(TEXTS), collate(TEXTS[::-1])
    for prefix in ("", "encoder_"):
        assert rows(forward, prefix) == rows(backward, prefix)[::-1]
    alone = [collate([text]) for text in TEXTS]
    assert len(forward["spans"]) == len(backward["spans"]) == sum(len(batch["spans"]) for batch in alone)
    second = alone[1]["spans"]
    first_spans, first_tokens = len(alone[0]["spans"]), len(alone[0]["input_ids"])
    begin, end = forward["spans"].llm_offsets[[first_spans, first_spans + len(second)]]
    assert torch.equal(forward["spans"].llm_indices[begin:end] - first_tokens, second.llm_indices)


def test_the_users_tokenizers_neither_change_nor_matter(tokenizers):
    wanted = collator(tokenizers, max_length=30)(TEXTS)
    for tokenizer in tokenizers:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.truncation_side = "left"
        tokenizer(TEXTS, padding="max_length", truncation=True, max_length=5)
    tokenizers[1].src_lang = "deu_Latn"
    before = [tokenizer.backend_tokenizer.to_str() for tokenizer in tokenizers]
    collate = collator(tokenizers, max_length=30)
    assert same(collate(TEXTS), wanted)
    assert [tokenizer.backend_tokenizer.to_str() for tokenizer in tokenizers] == before
    assert (tokenizers[1].src_lang, tokenizers[1].truncation_side) == ("deu_Latn", "left")
    tokenizers[0](TEXTS, truncation=True, max_length=4)
    assert same(collate(TEXTS), wanted)


def test_pickled_it_does_the_same(tokenizers):
    tokenizers[1].split_special_tokens = True  # lost in the pickle of a Rust tokenizer
    texts = [*TEXTS, "</s> <s>"]
    collate = collator(tokenizers, max_length=30)
    assert same(pickle.loads(pickle.dumps(collate))(texts), collate(texts))
    assert rows(collate(texts), "encoder_")[-1] == tokenizers[1]("</s> <s>")["input_ids"]


def test_threads_share_one(tokenizers):
    collate = collator(tokenizers)
    wanted = [collate(TEXTS[i : i + 3]) for i in range(9)]
    wrong = []

    def work():
        for _ in range(5):
            wrong.extend(i for i, batch in enumerate(wanted) if not same(collate(TEXTS[i : i + 3]), batch))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(tokenizers, context):
    collate = collator(tokenizers)
    loader = DataLoader(TEXTS, batch_size=5, collate_fn=collate, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert len(batches) == 3
    assert all(same(batch, collate(TEXTS[5 * i :][:5])) for i, batch in enumerate(batches))


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_datasets(tokenizers, kind):
    datasets = pytest.importorskip("datasets")
    examples = [{"id": i, "document": text} for i, text in enumerate(TEXTS)]
    if kind == "map":
        dataset = datasets.Dataset.from_list(examples)
    else:
        dataset = datasets.IterableDataset.from_generator(lambda: iter(examples))
    collate = collator(tokenizers, text_column="document")
    batches = list(DataLoader(dataset, batch_size=5, collate_fn=collate))
    assert len(batches) == 3
    assert all(same(batch, collate(TEXTS[5 * i :][:5])) for i, batch in enumerate(batches))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"text": text} for text in TEXTS])


@pytest.mark.parametrize("longer_side", ["llm", "encoder"])
@pytest.mark.parametrize("dataset", [Stream(), [{"text": text} for text in TEXTS]], ids=["stream", "map"])
def test_accelerate_passes_batches_on_whole(tokenizers, dataset, longer_side):
    """Its loader of streams slices every tensor to the length of the first."""
    from accelerate import Accelerator

    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    llm = tokenizers[0] if longer_side == "llm" else PreTrainedTokenizerFast(tokenizer_object=words)
    collate = collator((llm, tokenizers[1]))
    batches = list(Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=5, collate_fn=collate)))
    lengths = [batches[0][name].shape[0] for name in ("input_ids", "encoder_input_ids")]
    assert (lengths[0] > lengths[1]) == (longer_side == "llm")
    assert len(batches) == 3
    assert all(same(batch, collate(TEXTS[5 * i :][:5])) for i, batch in enumerate(batches))


@pytest.mark.parametrize("dataset", [Stream(), [{"text": text} for text in TEXTS]], ids=["stream", "map"])
def test_a_trainer_hands_the_batch_to_the_model(tokenizers, dataset, tmp_path):
    from transformers import Trainer, TrainingArguments

    made, seen = [], []
    collate = collator(tokenizers)

    def recorded(examples):
        made.append(collate(examples))
        return made[-1]

    class Model(torch.nn.Linear):
        def forward(self, **batch):
            seen.append(batch)
            return {"loss": self.weight.sum()}

    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=6, remove_unused_columns=False, report_to=[], use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    Trainer(Model(1, 1), arguments, data_collator=recorded, train_dataset=dataset).train()
    assert len(made) == len(seen) == 2
    assert all(map(same, seen, made))


def test_spans_are_pinned_and_moved_with_the_batch(tokenizers, monkeypatch):
    from accelerate.utils import send_to_device
    from torch.utils.data._utils.pin_memory import pin_memory

    batch = collator(tokenizers)(TEXTS)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: pinned.append(self) or self.clone())
    assert same(pin_memory(batch), batch)
    assert {id(t) for t in vars(batch["spans"]).values()} <= {id(t) for t in pinned}
    moved = send_to_device(batch, "meta", non_blocking=True)
    assert isinstance(moved["spans"], SpanAlignment)
    assert all(t.is_meta for t in (moved["input_ids"], *vars(moved["spans"]).values()))


def test_bad_arguments(tokenizers):
    with pytest.raises(ValueError, match=r"max_length must be at least 3 .*, got 2"):
        collator(tokenizers, max_length=2)
    with pytest.raises(TypeError, match="max_length must be an int, got NoneType"):
        collator(tokenizers, max_length=None)
    with pytest.raises(UnknownLanguageError, match=r"unknown language 'swahilli': the nearest are swh_Latn"):
        collator(tokenizers, src_lang="swahilli")
    with pytest.raises(UnknownLanguageError, match=r"encoder_tokenizer, a \w+, has no token for 'eng_Latn'"):
        collator((tokenizers[1], tokenizers[0]))
    with pytest.raises(TypeError, match=r"llm_tokenizer must be a fast tokenizer, .*, got str"):
        collator(("meta-llama/Llama-3.1-8B", tokenizers[1]))
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizers[1].backend_tokenizer)
    with pytest.raises(ValueError, match=r"encoder_tokenizer must have an end token \(eos_token\), this \w+ has none"):
        collator((tokenizers[0], endless))


def test_a_slow_tokenizer_is_refused(tokenizers):
    from transformers import ByT5Tokenizer

    with pytest.raises(TypeError, match=r"llm_tokenizer must be a fast tokenizer, .*, got ByT5Tokenizer"):
        collator((ByT5Tokenizer(), tokenizers[1]))


def test_bad_examples(tokenizers):
    collate = collator(tokenizers)
    with pytest.raises(ValueError, match="examples must hold at least one text, got none"):
        collate([])
    with pytest.raises(TypeError, match="examples must be a list of texts or mappings, got one str"):
        collate("one text")
    with pytest.raises(ValueError, match=r"example 1 must have the column 'text' .*\['content'\].*remove_unused_colu"):
        collate([{"text": "a"}, {"content": "b"}])
    with pytest.raises(TypeError, match="the text of example 1 must be a str, got NoneType"):
        collate(["a", {"text": None}])
    with pytest.raises(ValueError, match=r"examples\[1\] holds half of a surrogate pair"):
        collate(["a", "\ud800"])
    tokenizers[0].backend_tokenizer.post_processor = None  # no BOS
    with pytest.raises(ValueError, match="the text of example 1 has no token: ''; filter such texts out"):
        collator(tokenizers)(["a", ""])
