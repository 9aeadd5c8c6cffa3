"""``import mtllm_fast`` costs nothing that is not used: no Triton, no model code, no device."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("triton", "transformers.models", "mtllm_fast._cuda", "mtllm_fast.models", "mtllm_fast.ops")


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_importing_the_package() -> None:
    script = f"""
import sys
import mtllm_fast
print([name for name in sys.modules if name.startswith({HEAVY!r})])
import torch
print(torch.cuda.is_initialized())
"""
    assert run(script) == "[]\nFalse\n"


@pytest.mark.parametrize(
    "module",
    [
        "transformers.models.llama.modeling_llama",
        "transformers.modeling_layers",
        "transformers.configuration_utils",
        "transformers.trainer",
        "peft",
    ],
)
def test_any_part_of_transformers_may_be_imported_next(module: str) -> None:
    """They import one another in circles, with the Auto classes somewhere on the way."""
    script = f"""
import mtllm_fast
import {module}
from transformers import AutoConfig, AutoModel
config = AutoConfig.for_model("nllb-llm2vec")
print(AutoModel._model_mapping[type(config)].__name__)
"""
    assert run(script) == "MTLLM\n"


@pytest.mark.parametrize("name", ["norm_pool", "explain"])
def test_importing_an_op(name: str) -> None:
    script = f"""
import sys
from mtllm_fast import {name}
print([name for name in sys.modules if name.startswith(("triton", "transformers", "mtllm_fast._cuda"))])
import torch
print(torch.cuda.is_initialized())
"""
    assert run(script) == "[]\nFalse\n"


def test_the_import_is_quick() -> None:
    """Less than a tenth of the time that torch takes, of which the package itself is a few files."""
    script = """
import time
start = time.perf_counter()
import mtllm_fast
middle = time.perf_counter()
import torch
print((middle - start) / (time.perf_counter() - middle))
"""
    assert "torch" not in run("import sys, mtllm_fast; print(*sys.modules)").split()
    assert float(run(script)) < 0.5
