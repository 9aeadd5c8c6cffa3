"""The 202 languages that NLLB's tokenizer has a token for, and the other spellings of their codes that are accepted.

A code is ``<ISO 639-3 language>_<ISO 15924 script>`` as in FLORES-200 and in the ``FAIRSEQ_LANGUAGE_CODES`` of
transformers' ``NllbTokenizer``. Two FLORES-200 codes have no token there and so cannot be read: ``arb_Latn`` (romanised
Standard Arabic) and ``min_Arab`` (Minangkabau in Arabic script).
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import NamedTuple

from mtllm_fast.core.errors import UnknownLanguageError


class Language(NamedTuple):
    """One language that the encoder reads: NLLB code, English name, ISO 15924 script."""

    code: str
    name: str
    script: str


_TABLE = """
ace_Arab Acehnese
ace_Latn Acehnese
acm_Arab Mesopotamian Arabic
acq_Arab Ta'izzi-Adeni Arabic
aeb_Arab Tunisian Arabic
afr_Latn Afrikaans
ajp_Arab South Levantine Arabic
aka_Latn Akan
als_Latn Tosk Albanian
amh_Ethi Amharic
apc_Arab North Levantine Arabic
arb_Arab Modern Standard Arabic
ars_Arab Najdi Arabic
ary_Arab Moroccan Arabic
arz_Arab Egyptian Arabic
asm_Beng Assamese
ast_Latn Asturian
awa_Deva Awadhi
ayr_Latn Central Aymara
azb_Arab South Azerbaijani
azj_Latn North Azerbaijani
bak_Cyrl Bashkir
bam_Latn Bambara
ban_Latn Balinese
bel_Cyrl Belarusian
bem_Latn Bemba
ben_Beng Bengali
bho_Deva Bhojpuri
bjn_Arab Banjar
bjn_Latn Banjar
bod_Tibt Standard Tibetan
bos_Latn Bosnian
bug_Latn Buginese
bul_Cyrl Bulgarian
cat_Latn Catalan
ceb_Latn Cebuano
ces_Latn Czech
cjk_Latn Chokwe
ckb_Arab Central Kurdish
crh_Latn Crimean Tatar
cym_Latn Welsh
dan_Latn Danish
deu_Latn German
dik_Latn Southwestern Dinka
dyu_Latn Dyula
dzo_Tibt Dzongkha
ell_Grek Greek
eng_Latn English
epo_Latn Esperanto
est_Latn Estonian
eus_Latn Basque
ewe_Latn Ewe
fao_Latn Faroese
fij_Latn Fijian
fin_Latn Finnish
fon_Latn Fon
fra_Latn French
fur_Latn Friulian
fuv_Latn Nigerian Fulfulde
gaz_Latn West Central Oromo
gla_Latn Scottish Gaelic
gle_Latn Irish
glg_Latn Galician
grn_Latn Guarani
guj_Gujr Gujarati
hat_Latn Haitian Creole
hau_Latn Hausa
heb_Hebr Hebrew
hin_Deva Hindi
hne_Deva Chhattisgarhi
hrv_Latn Croatian
hun_Latn Hungarian
hye_Armn Armenian
ibo_Latn Igbo
ilo_Latn Ilocano
ind_Latn Indonesian
isl_Latn Icelandic
ita_Latn Italian
jav_Latn Javanese
jpn_Jpan Japanese
kab_Latn Kabyle
kac_Latn Jingpho
kam_Latn Kamba
kan_Knda Kannada
kas_Arab Kashmiri
kas_Deva Kashmiri
kat_Geor Georgian
kaz_Cyrl Kazakh
kbp_Latn Kabiye
kea_Latn Kabuverdianu
khk_Cyrl Halh Mongolian
khm_Khmr Khmer
kik_Latn Kikuyu
kin_Latn Kinyarwanda
kir_Cyrl Kyrgyz
kmb_Latn Kimbundu
kmr_Latn Northern Kurdish
knc_Arab Central Kanuri
knc_Latn Central Kanuri
kon_Latn Kikongo
kor_Hang Korean
lao_Laoo Lao
lij_Latn Ligurian
lim_Latn Limburgish
lin_Latn Lingala
lit_Latn Lithuanian
lmo_Latn Lombard
ltg_Latn Latgalian
ltz_Latn Luxembourgish
lua_Latn Luba-Kasai
lug_Latn Ganda
luo_Latn Luo
lus_Latn Mizo
lvs_Latn Standard Latvian
mag_Deva Magahi
mai_Deva Maithili
mal_Mlym Malayalam
mar_Deva Marathi
min_Latn Minangkabau
mkd_Cyrl Macedonian
mlt_Latn Maltese
mni_Beng Meitei
mos_Latn Mossi
mri_Latn Maori
mya_Mymr Burmese
nld_Latn Dutch
nno_Latn Norwegian Nynorsk
nob_Latn Norwegian Bokmål
npi_Deva Nepali
nso_Latn Northern Sotho
nus_Latn Nuer
nya_Latn Nyanja
oci_Latn Occitan
ory_Orya Odia
pag_Latn Pangasinan
pan_Guru Eastern Panjabi
pap_Latn Papiamento
pbt_Arab Southern Pashto
pes_Arab Western Persian
plt_Latn Plateau Malagasy
pol_Latn Polish
por_Latn Portuguese
prs_Arab Dari
quy_Latn Ayacucho Quechua
ron_Latn Romanian
run_Latn Rundi
rus_Cyrl Russian
sag_Latn Sango
san_Deva Sanskrit
sat_Beng Santali
scn_Latn Sicilian
shn_Mymr Shan
sin_Sinh Sinhala
slk_Latn Slovak
slv_Latn Slovenian
smo_Latn Samoan
sna_Latn Shona
snd_Arab Sindhi
som_Latn Somali
sot_Latn Southern Sotho
spa_Latn Spanish
srd_Latn Sardinian
srp_Cyrl Serbian
ssw_Latn Swati
sun_Latn Sundanese
swe_Latn Swedish
swh_Latn Swahili
szl_Latn Silesian
tam_Taml Tamil
taq_Latn Tamasheq
taq_Tfng Tamasheq
tat_Cyrl Tatar
tel_Telu Telugu
tgk_Cyrl Tajik
tgl_Latn Tagalog
tha_Thai Thai
tir_Ethi Tigrinya
tpi_Latn Tok Pisin
tsn_Latn Tswana
tso_Latn Tsonga
tuk_Latn Turkmen
tum_Latn Tumbuka
tur_Latn Turkish
twi_Latn Twi
tzm_Tfng Central Atlas Tamazight
uig_Arab Uyghur
ukr_Cyrl Ukrainian
umb_Latn Umbundu
urd_Arab Urdu
uzn_Latn Northern Uzbek
vec_Latn Venetian
vie_Latn Vietnamese
war_Latn Waray
wol_Latn Wolof
xho_Latn Xhosa
ydd_Hebr Eastern Yiddish
yor_Latn Yoruba
yue_Hant Yue Chinese
zho_Hans Chinese
zho_Hant Chinese
zsm_Latn Standard Malay
zul_Latn Zulu
"""
_LANGUAGES = {
    code: Language(code, name, code[4:]) for code, name in (row.split(" ", 1) for row in _TABLE.strip().splitlines())
}

LANGUAGES: tuple[str, ...] = tuple(_LANGUAGES)
"""The 202 codes, sorted."""

# Other spellings of a language subtag -> NLLB's. A macrolanguage stands for its only member in NLLB, or for the
# standard variety where NLLB has several (ara, aze, fas, msa, nor); kur and hbs have none and are refused (_AMBIGUOUS).
_LANGUAGE_SPELLINGS = (
    # ISO 639-1 of the same language
    "af:afr ak:aka am:amh as:asm ba:bak be:bel bg:bul bm:bam bn:ben bo:bod bs:bos ca:cat cs:ces cy:cym da:dan "
    "de:deu dz:dzo ee:ewe el:ell en:eng eo:epo es:spa et:est eu:eus fi:fin fj:fij fo:fao fr:fra ga:gle gd:gla "
    "gl:glg gn:grn gu:guj ha:hau he:heb hi:hin hr:hrv ht:hat hu:hun hy:hye id:ind ig:ibo is:isl it:ita ja:jpn "
    "jv:jav ka:kat kg:kon ki:kik kk:kaz km:khm kn:kan ko:kor ks:kas ky:kir lb:ltz lg:lug li:lim ln:lin lo:lao "
    "lt:lit mi:mri mk:mkd ml:mal mr:mar mt:mlt my:mya nb:nob nl:nld nn:nno ny:nya oc:oci pa:pan pl:pol pt:por "
    "rn:run ro:ron ru:rus rw:kin sa:san sc:srd sd:snd sg:sag si:sin sk:slk sl:slv sm:smo sn:sna so:som sr:srp "
    "ss:ssw st:sot su:sun sv:swe ta:tam te:tel tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn tr:tur ts:tso tt:tat "
    "tw:twi ug:uig uk:ukr ur:urd vi:vie wo:wol xh:xho yo:yor zh:zho zu:zul "
    # ISO 639-1 and 639-3 macrolanguages
    "ar:arb ara:arb ay:ayr aym:ayr az:azj aze:azj din:dik fa:pes fas:pes ff:fuv ful:fuv kau:knc kr:knc ku:kur "
    "lav:lvs lv:lvs mg:plt mlg:plt mn:khk mon:khk ms:zsm msa:zsm ne:npi nep:npi no:nob nor:nob om:gaz or:ory "
    "ori:ory orm:gaz ps:pbt pus:pbt qu:quy que:quy sh:hbs sq:als sqi:als sw:swh swa:swh tmh:taq uz:uzn uzb:uzn "
    "yi:ydd yid:ydd "
    # ISO 639-2 bibliographic
    "alb:als arm:hye baq:eus bur:mya chi:zho cze:ces dut:nld fre:fra geo:kat ger:deu gre:ell ice:isl mac:mkd "
    "mao:mri may:zsm per:pes rum:ron slo:slk tib:bod wel:cym "
    # the same language under another code: individual members (FLORES+, mteb) and retired codes
    "cmn:zho ekk:est fil:tgl gug:grn in:ind iw:heb ji:ydd jw:jav mo:ron mol:ron "
)
_LANGUAGE_ALIASES = dict(pair.split(":") for pair in _LANGUAGE_SPELLINGS.split())

# Tags that name another NLLB code than "<language>_<script>" does, after the language alias.
_TAG_ALIASES = {
    "zho": "zho_Hans",  # a bare "zh" is simplified Chinese, as in Unicode CLDR
    "kor_Kore": "kor_Hang",  # mteb, CLDR
    "sat_Olck": "sat_Beng",  # FLORES-200 calls Santali sat_Olck, the tokenizer sat_Beng
    "azj_Arab": "azb_Arab",
    "kur_Latn": "kmr_Latn",
    "kur_Arab": "ckb_Arab",
    "pes_AF": "prs_Arab",
}

# Regions that imply a script (CLDR likely subtags). Every other region is ignored: "pt-BR" is por_Latn.
_REGION_SCRIPTS = {
    **{f"zho_{region}": "Hans" for region in ("CN", "SG", "MY")},
    **{f"zho_{region}": "Hant" for region in ("TW", "HK", "MO")},
    **dict.fromkeys(("azj_IR", "kaz_CN", "kur_IQ", "kur_IR", "pan_PK", "uzn_AF"), "Arab"),
    "khk_CN": "Mong",
    "kur_TR": "Latn",
    "snd_IN": "Deva",
    "srp_ME": "Latn",
}

# No standard member and no script: refused with these candidates.
_AMBIGUOUS = {"kur": ("kmr_Latn", "ckb_Arab"), "hbs": ("bos_Latn", "hrv_Latn", "srp_Cyrl")}

_TAG = re.compile(r"(?P<language>[a-z]{2,3})(_(?P<script>[a-z]{4}))?(_(?P<region>[a-z]{2}|[0-9]{3}))?", re.IGNORECASE)


def languages() -> list[Language]:
    """The languages that NLLB reads, sorted by code.

    Example:
        >>> [language.code for language in languages() if language.name == "Chinese"]
        ['zho_Hans', 'zho_Hant']
    """
    return list(_LANGUAGES.values())


@lru_cache(maxsize=4096)
def resolve_language(code: str) -> str:
    """NLLB's code for a language given as FLORES-200, ISO 639, BCP-47 or mteb code.

    Case and ``-``/``_`` do not matter. A language written in one script in NLLB needs no script (``swh``); Chinese
    without script is simplified; other languages with two scripts need one. A script that NLLB does not read is
    refused, never dropped: ``srp_Latn`` has no code.

    Args:
        code: such as ``swh_Latn``, ``sw``, ``swa-Latn``, ``fas_Arab``, ``zh-TW`` or ``pt-BR``.

    Returns:
        One of :data:`LANGUAGES`.

    Raises:
        UnknownLanguageError: no such language, or several: the message names candidates.
        TypeError: not a string.

    Example:
        >>> resolve_language("sw"), resolve_language("zh-TW"), resolve_language("fas_Arab")
        ('swh_Latn', 'zho_Hant', 'pes_Arab')
    """
    if not isinstance(code, str):
        raise TypeError(f"a language must be a str such as 'swh_Latn', got {type(code).__name__}")
    if code in _LANGUAGES:
        return code
    tag = _TAG.fullmatch(code.strip().replace("-", "_"))
    if tag is None:
        raise UnknownLanguageError(f"unknown language {code!r}: {_nearest(code)}")
    language = tag["language"].lower()
    language = _LANGUAGE_ALIASES.get(language, language)
    region = f"{language}_{(tag['region'] or '').upper()}"
    script = tag["script"].title() if tag["script"] else _REGION_SCRIPTS.get(region)
    resolved = f"{language}_{script}" if script else _TAG_ALIASES.get(region, language)
    resolved = _TAG_ALIASES.get(resolved, resolved)
    if resolved in _LANGUAGES:
        return resolved
    candidates = _AMBIGUOUS.get(language) or tuple(c for c in LANGUAGES if c.startswith(f"{language}_"))
    if script is None and len(candidates) == 1:
        return candidates[0]
    if script is None and candidates:
        raise UnknownLanguageError(f"ambiguous language {code!r}: name one of {_named(candidates)}")
    raise UnknownLanguageError(f"unknown language {code!r}: {_nearest(code, known=candidates)}")


def _named(codes: tuple[str, ...]) -> str:
    return ", ".join(f"{code} ({_LANGUAGES[code].name})" for code in codes)


def _nearest(query: str, known: tuple[str, ...] = ()) -> str:
    """The three nearest codes: ``known`` first, then by spelling of code, language subtag or a word of the name."""
    spellings: dict[str, list[str]] = {}
    for code, name, _ in _LANGUAGES.values():
        for spelling in {code.lower(), code[:3], name.lower(), *name.lower().split()}:
            spellings.setdefault(spelling, []).append(code)
    ranked = difflib.get_close_matches(query.lower().replace("-", "_"), spellings, n=20, cutoff=0.0)
    nearest = tuple(dict.fromkeys([*known, *(code for spelling in ranked for code in spellings[spelling])]))[:3]
    return f"the nearest are {_named(nearest)}; mtllm_fast.languages() lists all {len(LANGUAGES)}"
