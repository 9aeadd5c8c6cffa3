"""``encode``: same embeddings whatever the batching, languages per text, what is returned and what is refused."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mtllm_fast import MTLLM
from mtllm_fast.core.errors import TokenizerNotFoundError, UnknownLanguageError
from mtllm_fast.models import encoding

TEXTS = ["Habari ya dunia", "Wie geht's?", "", "Good morning, everyone, and welcome to the show.", "你好，世界", "Ja."]
LANGUAGES = ["swh_Latn", "deu_Latn", "eng_Latn", "eng_Latn", "zho_Hans", "deu_Latn"]


@pytest.fixture(scope="module")
def model():
    return MTLLM.from_pretrained("tiny")


@pytest.fixture(scope="module")
def one_by_one(model):
    """The specification: each text alone, through the tokenizer and forward."""
    rows = []
    for text, language in zip(TEXTS, LANGUAGES, strict=True):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        ids[0, 0] = model.tokenizer.convert_tokens_to_ids(language)
        with torch.no_grad():
            rows.append(model(ids))
    return rows


@pytest.mark.parametrize(
    "options", [{}, {"batch_tokens": 1}, {"batch_tokens": 20}, {"batch_size": 2, "max_length": 64}]
)
def test_equals_each_text_alone(model, one_by_one, options):
    got = model.encode(TEXTS, LANGUAGES, **options)
    want = torch.cat([row.pooler_output for row in one_by_one])
    assert isinstance(got, torch.Tensor)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_token_states(model, one_by_one):
    got = model.encode(TEXTS, LANGUAGES, output="tokens")
    for states, row in zip(got, one_by_one, strict=True):
        torch.testing.assert_close(states, row.last_hidden_state[0], rtol=1e-4, atol=1e-5)


def test_order_survives_many_chunks(model, monkeypatch):
    monkeypatch.setattr(encoding, "_TEXTS_PER_CHUNK", 7)
    texts = [f"{'word ' * (i % 13)}{i}" for i in range(60)]
    got = model.encode(texts, "eng_Latn", batch_tokens=50)
    want = torch.stack([model.encode(text, "eng_Latn") for text in texts])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_one_string_gives_one_vector(model):
    assert model.encode("Habari", "swh_Latn").shape == (128,)
    assert model.encode("Habari", "swh_Latn", output="tokens").dim() == 2
    assert model.encode([], "swh_Latn").shape == (0, 128)
    assert model.encode([], "swh_Latn", output="tokens") == []


def test_the_published_positional_call(model):
    torch.testing.assert_close(
        model.encode(TEXTS, "eng_Latn", 2), model.encode(TEXTS, src_lang="eng_Latn", batch_size=64)
    )


def test_the_language_matters_and_aliases_do_not(model):
    swahili = model.encode("Habari", "swh_Latn")
    assert torch.equal(model.encode("Habari", "sw"), swahili)
    assert not torch.allclose(model.encode("Habari", "eng_Latn"), swahili, atol=1e-3)


def test_numpy_dtype_and_normalisation(model):
    array = model.encode(TEXTS, LANGUAGES, convert_to_numpy=True, normalize_embeddings=True)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, rtol=1e-5)
    assert model.encode(TEXTS, LANGUAGES, output_dtype=torch.float16).dtype == torch.float16
    half = MTLLM.from_pretrained("tiny", dtype=torch.bfloat16)
    assert half.encode(TEXTS, LANGUAGES).dtype == torch.bfloat16
    assert half.encode(TEXTS, LANGUAGES, convert_to_numpy=True).dtype == np.float32
    assert half.encode(TEXTS, LANGUAGES, convert_to_numpy=True, output_dtype=torch.float16).dtype == np.float16


def test_truncation_is_counted_in_one_warning(model, caplog):
    with caplog.at_level(logging.WARNING, logger="mtllm_fast"):
        states = model.encode(["word " * 50, "word " * 60, "short"], "eng_Latn", max_length=16, output="tokens")
    assert [len(s) <= 16 for s in states] == [True] * 3
    assert [r.message for r in caplog.records] == [
        "2 of 3 texts were longer than max_length=16 tokens and were truncated"
    ]


def test_a_training_model_encodes_without_dropout_and_trains_on(model):
    want = model.encode(TEXTS, LANGUAGES)
    model.train()
    try:
        assert torch.equal(model.encode(TEXTS, LANGUAGES), want)
        assert model.training
        assert model.llm2vec.layers[0].training
    finally:
        model.eval()


def test_threads_do_not_mix_languages(model):
    want = {language: model.encode(TEXTS, language) for language in set(LANGUAGES)}
    jobs = [language for language in want for _ in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for language, got in zip(jobs, pool.map(lambda lang: model.encode(TEXTS, lang), jobs), strict=True):
            torch.testing.assert_close(got, want[language])


def test_progress_bar(model, capsys):
    model.encode(TEXTS, LANGUAGES, show_progress_bar=True)
    assert "6/6" in capsys.readouterr().err
    model.encode(TEXTS, LANGUAGES)
    assert capsys.readouterr().err == ""


def test_token_batches_keep_to_the_budget():
    lengths = np.array([5, 60, 3, 3, 9, 20])
    batches = [b.tolist() for b in encoding._batches(lengths, 25)]
    assert batches == [[1], [5], [4, 0, 2, 3]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"src_lang": "swahili"}, UnknownLanguageError, "swh_Latn"),
        ({"src_lang": ["eng_Latn"]}, ValueError, "got 1 codes for 6 texts"),
        ({"sentences": ["a", 3]}, TypeError, "got int at index 1"),
        ({"output": "sentences"}, ValueError, "output must be one of 'pooled', 'tokens'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_tokens": -1}, ValueError, "batch_tokens must be at least 1"),
        ({"max_length": 2}, ValueError, "max_length must be at least 3"),
    ],
)
def test_bad_input_is_named(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.encode(**({"sentences": TEXTS, "src_lang": "eng_Latn"} | arguments))


def test_a_missing_tokenizer_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    bare = MTLLM.from_pretrained(tmp_path)
    with pytest.raises(TokenizerNotFoundError, match="tokenizer"):
        bare.encode("Habari", "swh_Latn")
    bare.tokenizer = model.tokenizer
    assert torch.equal(bare.encode("Habari", "swh_Latn"), model.encode("Habari", "swh_Latn"))
    bare.save_pretrained(tmp_path / "whole")
    assert torch.equal(
        MTLLM.from_pretrained(tmp_path / "whole").encode("Habari", "swh_Latn"), model.encode("Habari", "swh_Latn")
    )
