"""Language codes: the 202 of NLLB's tokenizer, their aliases, and what is said about a code that is none."""

from __future__ import annotations

import re

import pytest

import mtllm_fast
from mtllm_fast.core.errors import UnknownLanguageError
from mtllm_fast.text.languages import _LANGUAGE_ALIASES, LANGUAGES, languages, resolve_language


def test_codes_are_those_of_the_tokenizer_of_transformers() -> None:
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    assert sorted(FAIRSEQ_LANGUAGE_CODES) == list(LANGUAGES)
    assert len(set(LANGUAGES)) == 202


def test_languages_lists_code_name_and_script() -> None:
    listed = mtllm_fast.languages()
    assert [language.code for language in listed] == list(LANGUAGES)
    assert listed == languages()
    assert all(code == f"{code[:3]}_{script}" and name for code, name, script in listed)


@pytest.mark.parametrize("code", LANGUAGES)
def test_case_and_separator_do_not_matter(code: str) -> None:
    assert resolve_language(code) == code
    assert resolve_language(code.lower()) == code
    assert resolve_language(code.upper().replace("_", "-")) == code


@pytest.mark.parametrize(
    ("alias", "code"),
    [
        # ISO 639-1 and 639-3
        ("sw", "swh_Latn"), ("swa", "swh_Latn"), ("swh", "swh_Latn"), ("en", "eng_Latn"), ("ja", "jpn_Jpan"),
        ("no", "nob_Latn"), ("zh", "zho_Hans"), ("cmn", "zho_Hans"), ("fre", "fra_Latn"), ("iw", "heb_Hebr"),
        # BCP-47
        ("zh-Hans", "zho_Hans"), ("zh-TW", "zho_Hant"), ("zh_CN", "zho_Hans"), ("zh-Hant-HK", "zho_Hant"),
        ("pt-BR", "por_Latn"), ("es-419", "spa_Latn"), ("fa-AF", "prs_Arab"), ("az-IR", "azb_Arab"),
        ("ku-TR", "kmr_Latn"), ("ku-Arab", "ckb_Arab"),
        # mteb
        ("swa-Latn", "swh_Latn"), ("fas_Arab", "pes_Arab"), ("arb-Arab", "arb_Arab"), ("ara-Arab", "arb_Arab"),
        ("cmn-Hant", "zho_Hant"), ("kor-Kore", "kor_Hang"), ("nor-Latn", "nob_Latn"), ("lav-Latn", "lvs_Latn"),
        ("aze-Latn", "azj_Latn"), ("msa-Latn", "zsm_Latn"), ("mon-Cyrl", "khk_Cyrl"), ("sqi-Latn", "als_Latn"),
        ("fil-Latn", "tgl_Latn"), ("pus-Arab", "pbt_Arab"), ("ori-Orya", "ory_Orya"), ("nep-Deva", "npi_Deva"),
        ("yid-Hebr", "ydd_Hebr"), ("uzb-Latn", "uzn_Latn"), ("orm-Latn", "gaz_Latn"), ("sat-Olck", "sat_Beng"),
        ("aze_Arab", "azb_Arab"),
    ],
)  # fmt: skip
def test_aliases(alias: str, code: str) -> None:
    assert resolve_language(alias) == code


@pytest.mark.parametrize("alias", sorted(_LANGUAGE_ALIASES))
def test_every_alias_is_a_language_or_ambiguous(alias: str) -> None:
    assert alias not in {code[:3] for code in LANGUAGES}  # it would hide a code of NLLB's own
    if alias in ("ks", "kr", "kau", "ku", "sh", "tmh"):
        with pytest.raises(UnknownLanguageError, match="ambiguous"):
            resolve_language(alias)
    else:
        assert resolve_language(alias) in LANGUAGES


@pytest.mark.parametrize(
    ("code", "candidates"),
    [
        ("kas", ["kas_Arab", "kas_Deva"]),
        ("ace", ["ace_Arab", "ace_Latn"]),
        ("kr", ["knc_Arab", "knc_Latn"]),
        ("ku", ["kmr_Latn", "ckb_Arab"]),
        ("sh", ["bos_Latn", "hrv_Latn", "srp_Cyrl"]),
    ],
)
def test_an_ambiguous_code_names_all_candidates(code: str, candidates: list[str]) -> None:
    with pytest.raises(UnknownLanguageError, match="ambiguous") as caught:
        resolve_language(code)
    assert _codes(caught.value) == candidates


@pytest.mark.parametrize(
    ("code", "nearest"),
    [
        ("swahili", "swh_Latn"),
        ("Norwegian", "nob_Latn"),
        ("english", "eng_Latn"),
        ("kazkh_Cyrl", "kaz_Cyrl"),
        ("swh_Latin", "swh_Latn"),
        ("deu_Latn\n_x", "deu_Latn"),
        # A script that NLLB does not read is not dropped; arb_Latn and min_Arab are FLORES-200 codes without a token.
        ("sr-Latn", "srp_Cyrl"),
        ("eng_Cyrl", "eng_Latn"),
        ("pa-PK", "pan_Guru"),
        ("arb_Latn", "arb_Arab"),
        ("min_Arab", "min_Latn"),
        ("", ""),
    ],
)
def test_an_unknown_code_names_the_three_nearest(code: str, nearest: str) -> None:
    with pytest.raises(UnknownLanguageError, match="unknown language") as caught:
        resolve_language(code)
    found = _codes(caught.value)
    assert len(found) == 3
    assert not nearest or nearest in found


def test_a_code_that_is_no_string() -> None:
    with pytest.raises(TypeError, match="must be a str such as 'swh_Latn', got int"):
        resolve_language(7)  # type: ignore[arg-type]


def _codes(error: Exception) -> list[str]:
    return re.findall(r"([a-z]{3}_[A-Z][a-z]{3}) \(", str(error))
