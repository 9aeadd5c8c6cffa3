"""How large the world's texts and models are, and how long they are trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.transfer.languages import BY_NAME, Language


@dataclass(frozen=True)
class Preset:
    """Sizes.

    Attributes:
        paragraphs: of parallel text of the richest language; documents: of English for the LLM, and again for stage 1.
        mt_width, mt_layers, llm_width, llm_layers: of each of the MT model's towers, and of the LLM.
        mt_vocabulary, llm_vocabulary: how many pieces their tokenizers have.
        mt_steps, clm_steps, mntp_steps, simcse_steps: of pretraining; mt_batch, llm_batch: texts of a step.
        distill_steps: of stage 1, of 32 documents each.
        train_rows: of each task, which fine-tuning and stage 2 see once; dev_rows, test_rows.
        seeds: which; a seed is that of stages 1 and 2. The models that they start from are made once.
        languages: which.
        ablations: the tasks for which parts of the recipe are left out in turn.
    """

    name: str
    paragraphs: int
    documents: int
    mt_width: int
    mt_layers: int
    llm_width: int
    llm_layers: int
    mt_steps: int
    clm_steps: int
    mntp_steps: int
    simcse_steps: int
    distill_steps: int
    train_rows: dict[str, int]
    test_rows: int
    seeds: tuple[int, ...]
    ablations: tuple[str, ...] = ("inference",)
    languages: tuple[str, ...] = tuple(BY_NAME)
    dev_rows: int = 150
    mt_batch: int = 32
    llm_batch: int = 32
    mt_learning_rate: float = 3e-3
    llm_learning_rate: float = 5e-3
    mt_vocabulary: int = 3000
    llm_vocabulary: int = 1000

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.train_rows)

    @property
    def all_languages(self) -> tuple[Language, ...]:
        return tuple(BY_NAME[name] for name in self.languages)

    @property
    def seen(self) -> tuple[Language, ...]:
        """Those that the MT model is trained on."""
        return tuple(language for language in self.all_languages if language.parallel)

    @property
    def unseen(self) -> tuple[Language, ...]:
        """Read under a relative's code, or under the poorest's that there is."""
        codes = [language.code for language in self.seen]
        rest = (language for language in self.all_languages if not language.parallel)
        found = tuple(one if one.read_as in codes else replace(one, read_as=codes[-1]) for one in rest)
        assert len({one.read_as for one in found}) == len(found), "results are kept by code"
        return found


PRESETS = {
    "micro": Preset(
        "micro", paragraphs=2000, documents=3000, mt_width=128, mt_layers=2, llm_width=96, llm_layers=3, mt_steps=800,
        clm_steps=700, mntp_steps=100, simcse_steps=15, distill_steps=80, train_rows={"inference": 7000}, test_rows=300,
        seeds=(1,), ablations=(), mt_vocabulary=1500, languages=("rich-svo", "rich-sov", "unseen"),
    ),
    "mini": Preset(
        "mini", paragraphs=6000, documents=8000, mt_width=128, mt_layers=2, llm_width=96, llm_layers=4, mt_steps=4000,
        clm_steps=3000, mntp_steps=500, simcse_steps=40, distill_steps=150,
        train_rows={"reading": 9000, "inference": 9000, "sentiment": 12000}, test_rows=300, seeds=(1, 2, 3),
    ),
    "gpu": Preset(
        "gpu", paragraphs=20000, documents=30000, mt_width=256, mt_layers=4, llm_width=256, llm_layers=6,
        mt_steps=6000, clm_steps=6000, mntp_steps=800, simcse_steps=100, distill_steps=800,
        train_rows={"reading": 30000, "inference": 30000, "sentiment": 20000}, test_rows=600, seeds=(1, 2, 3),
        ablations=("reading", "inference", "sentiment"), mt_batch=128, llm_batch=64, mt_learning_rate=1e-3,
        llm_learning_rate=2e-3,
    ),
}  # fmt: skip
