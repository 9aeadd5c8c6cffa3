"""Tokenisation: the ids that the tokenizer itself gives with ``src_lang`` set, without its state."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from mtllm_fast.core.errors import TokenizerNotFoundError, UnknownLanguageError
from mtllm_fast.text.languages import LANGUAGES
from mtllm_fast.text.tokenization import TokenizedTexts, load_tokenizer, tokenize
from mtllm_fast.tiny import article_1, tiny_path

TEXTS = [
    *article_1().values(),
    "",
    "  two  spaces ",
    "\n",
    "word " * 600,
    "</s> eng_Latn <unk> <mask><s>",
    "😀 ☃ \u200b\u0301",
]


@pytest.fixture
def tokenizer():
    return load_tokenizer(tiny_path())


@pytest.mark.parametrize("max_length", [3, 7, 512])
def test_ids_equal_the_tokenizers_own(tokenizer, max_length: int) -> None:
    own = load_tokenizer(tiny_path())
    for language in LANGUAGES[::7]:
        own.src_lang = language
        wanted = own(TEXTS, truncation=True, max_length=max_length)["input_ids"]
        assert _rows(tokenize(tokenizer, TEXTS, [language] * len(TEXTS), max_length)) == wanted


def test_one_language_per_text(tokenizer) -> None:
    languages = [LANGUAGES[i % len(LANGUAGES)] for i in range(len(TEXTS) * 4)]
    mixed = _rows(tokenize(tokenizer, TEXTS * 4, languages, 64))
    for row, text, language in zip(mixed, TEXTS * 4, languages, strict=True):
        assert [row] == _rows(tokenize(tokenizer, [text], [language], 64))
        assert row[0] == tokenizer.convert_tokens_to_ids(language)


def test_packed_result(tokenizer) -> None:
    found = tokenize(tokenizer, ["", "a b", "word " * 50], ["swh_Latn", "eng_Latn", "deu_Latn"], max_length=10)
    assert found.ids.dtype == found.offsets.dtype == np.int64
    assert found.lengths.tolist() == [2, found.lengths[1], 10]
    assert found.offsets.tolist() == [0, *np.cumsum(found.lengths)]
    assert found.n_truncated == 1
    assert _rows(found)[0] == [tokenizer.convert_tokens_to_ids("swh_Latn"), tokenizer.eos_token_id]

    nothing = tokenize(tokenizer, [], [], max_length=10)
    assert nothing.ids.shape == (0,)
    assert nothing.offsets.tolist() == [0]


def test_length_that_just_fits_is_not_truncated(tokenizer) -> None:
    length = int(tokenize(tokenizer, [TEXTS[0]], ["afr_Latn"], 512).lengths[0])
    assert tokenize(tokenizer, [TEXTS[0]], ["afr_Latn"], length).n_truncated == 0
    assert tokenize(tokenizer, [TEXTS[0]], ["afr_Latn"], length - 1).n_truncated == 1


def test_state_that_a_user_leaves_behind_changes_nothing_and_is_not_changed(tokenizer) -> None:
    wanted = _rows(tokenize(load_tokenizer(tiny_path()), TEXTS, ["swh_Latn"] * len(TEXTS), 512))
    tokenizer.src_lang = "deu_Latn"
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=4)  # stays in the Rust tokenizer
    state = tokenizer.backend_tokenizer.to_str()
    assert _rows(tokenize(tokenizer, TEXTS, ["swh_Latn"] * len(TEXTS), 512)) == wanted
    assert tokenizer.src_lang == "deu_Latn"
    assert tokenizer.backend_tokenizer.to_str() == state


def test_tokens_that_a_user_adds_are_seen(tokenizer) -> None:
    before = _rows(tokenize(tokenizer, ["qzqzqz"], ["swh_Latn"], 512))
    tokenizer.add_tokens(["qzqzqz"])
    after = _rows(tokenize(tokenizer, ["qzqzqz"], ["swh_Latn"], 512))
    assert before != after
    assert tokenizer.convert_tokens_to_ids("qzqzqz") in after[0]


def test_threads_share_one_tokenizer(tokenizer) -> None:
    languages = ["swh_Latn", "deu_Latn", "amh_Ethi", "zho_Hans"]
    wanted = {code: _rows(tokenize(tokenizer, TEXTS, [code] * len(TEXTS), 64)) for code in languages}
    done, wrong = threading.Event(), []

    def meddle() -> None:
        while not done.is_set():
            tokenizer.src_lang = "fra_Latn"
            tokenizer("a b c", truncation=True, max_length=3, padding="max_length")

    def work(code: str) -> None:
        for _ in range(20):
            if _rows(tokenize(tokenizer, TEXTS, [code] * len(TEXTS), 64)) != wanted[code]:
                wrong.append(code)

    meddler = threading.Thread(target=meddle)
    workers = [threading.Thread(target=work, args=[code]) for code in languages]
    for thread in (meddler, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    meddler.join()
    assert wrong == []


def test_bad_arguments(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"max_length must be at least 3 .*, got 2"):
        tokenize(tokenizer, ["a"], ["swh_Latn"], 2)
    with pytest.raises(ValueError, match="one code per text: got 1 for 2 texts"):
        tokenize(tokenizer, ["a", "b"], ["swh_Latn"], 8)
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str, got NoneType"):
        tokenize(tokenizer, ["a", None], ["swh_Latn"] * 2, 8)  # type: ignore[list-item]


def test_a_tokenizer_of_another_kind() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(TypeError, match="must be NLLB's with a Rust backend and an end token"):
        tokenize(endless, ["a"], ["swh_Latn"], 8)


def test_language_without_a_token() -> None:
    from transformers import NllbTokenizer

    small = NllbTokenizer(extra_special_tokens=["eng_Latn"])
    with pytest.raises(UnknownLanguageError, match="no token for 'swh_Latn'; it has 1 of NLLB's 202"):
        tokenize(small, ["a"], ["swh_Latn"], 8)


def test_a_checkpoint_without_tokenizer_takes_the_fallback(tmp_path: Path, caplog) -> None:
    found = load_tokenizer(tmp_path, None, str(tiny_path()), revision="of the checkpoint alone")
    assert found.convert_tokens_to_ids("swh_Latn") == load_tokenizer(tiny_path()).convert_tokens_to_ids("swh_Latn")
    assert f"{tmp_path} holds no tokenizer.json" in caplog.text


def test_no_tokenizer_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(TokenizerNotFoundError, match=r"holds no tokenizer.json.*nobody/nothing.*save_pretrained"):
        load_tokenizer(tmp_path, "nobody/nothing", local_files_only=True)


def test_a_broken_tokenizer_is_not_replaced_by_the_fallback(tmp_path: Path) -> None:
    shutil.copytree(tiny_path(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=f"tokenizer in {tmp_path} cannot be loaded"):
        load_tokenizer(tmp_path, str(tiny_path()))


def test_legacy_layout_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny_path(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy_behaviour": True}))
    with pytest.raises(ValueError, match="legacy_behaviour=True"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_alone_has_no_language_codes(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(article_1().values()),
        model_prefix=str(tmp_path / "sentencepiece.bpe"),
        model_type="bpe",
        vocab_size=1200,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NllbTokenizer"}')
    with pytest.raises(TokenizerNotFoundError, match="has a tokenizer without NLLB language codes"):
        load_tokenizer(tmp_path)


def _rows(found: TokenizedTexts) -> list[list[int]]:
    return [row.tolist() for row in np.split(found.ids, found.offsets[1:-1])] if len(found.offsets) > 1 else []
