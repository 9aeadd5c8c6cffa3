"""What the study calls its systems and its groups of languages."""

from __future__ import annotations

from benchmarks.transfer.languages import ENGLISH, SEEN

ZERO_SHOT, GREEDY, BEAM = "zero-shot LLM", "translate-test, greedy", "translate-test, beam 4"
ENCODER, MT_LLM, STAGE_1_ONLY = "MT encoder alone", "MT-LLM", "MT-LLM, stage 1 only (labels)"
ABLATIONS = {
    "sequence": "MT-LLM, sequence loss", "span": "MT-LLM, span loss", "random": "MT-LLM, random up_proj",
    "none": "MT-LLM, stage 2 only",
}  # fmt: skip

GROUPS = {
    "English": (ENGLISH.name,),
    **{kind: tuple(one.name for one in SEEN if one.name.startswith(kind)) for kind in ("rich", "poor", "scarce")},
    "seen": tuple(language.name for language in SEEN),
    "dialect": ("dialect",),
    "unseen kin": ("unseen-kin",),
    "unseen": ("unseen",),
}
