"""The structure that the project promises: imports go one way, and every op has all its parts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mtllm_fast"

# A unit (a module or folder directly under mtllm_fast) may import its own and lower levels, but no unit beside it ...
LEVELS = [
    {"core"},
    {"ops", "text", "tiny"},
    {"configuration", "packing", "tables", "testing"},
    {"shards"},
    {"models"},
    {"training"},
    {"tasks"},
    {"evaluation"},
    {"environment"},
    {"bench"},
    {"cli"},
]
# ... and these are imported by no other unit of the library.
LEAVES = {"testing", "cli"}
# The package's own file names everything, lazily.
EXEMPT = {"__init__"}


def imports(source: str) -> Iterator[str]:
    """The dotted names under ``mtllm_fast`` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "mtllm_fast")


def level(unit: str) -> int:
    return next(i for i, units in enumerate(LEVELS) if unit in units)


def wrong_arrows(unit: str, source: str) -> list[str]:
    """The imports of a file in ``unit`` that go up or sideways."""
    units = [name.split(".")[1] for name in imports(source) if "." in name]
    others = [other for other in units if other != unit and other in set().union(*LEVELS)]
    return [other for other in others if level(other) >= level(unit) or other in LEAVES]


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    unit = unit_of(path)
    if unit not in EXEMPT:
        assert any(unit in units for units in LEVELS), f"{unit} has no level: give it one in this file"
        assert not wrong_arrows(unit, path.read_text()), f"{path.name} imports upward or sideways"


def test_a_wrong_arrow_is_found() -> None:
    assert wrong_arrows("core", "from mtllm_fast.ops.norm_pool import norm_pool") == ["ops"]
    assert wrong_arrows("bench", "def f():\n    import mtllm_fast.testing.tolerance") == ["testing"]
    assert wrong_arrows("ops", "from mtllm_fast import text") == ["text"]
    assert not wrong_arrows("models", "from mtllm_fast.ops.norm_pool import norm_pool\nimport mtllm_fast.core.checks")


def ops() -> list[Path]:
    return sorted(path.parent for path in (PACKAGE / "ops").glob("*/__init__.py"))


@pytest.mark.parametrize("op", ops(), ids=lambda path: path.name)
def test_every_op_has_all_its_parts(op: Path) -> None:
    parts = [op / f"{name}.py" for name in ("api", "schema", "reference")]
    parts += [ROOT / "tests" / f"test_{op.name}.py", ROOT / "benchmarks" / f"bench_{op.name}.py"]
    missing = [str(part.relative_to(ROOT)) for part in parts if not part.exists()]
    assert not missing
    assert "def explain(" in (op / "api.py").read_text()


@pytest.mark.parametrize("op", ops(), ids=lambda path: path.name)
def test_backends_know_nothing_of_one_another(op: Path) -> None:
    backends = {"reference", *(path.stem for path in op.glob("*_backend.py"))}
    for path in op.glob("*.py"):
        if path.stem in backends:
            imported = {
                name.split(".")[3]
                for name in imports(path.read_text())
                if name.startswith(f"mtllm_fast.ops.{op.name}.")
            }
            assert not imported & ((backends | {"api", "schema"}) - {path.stem})


def test_torch_stays_out_of_csrc_and_python_in_one_file() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "torch/" not in text
        assert path.name == "bindings.cpp" or "pybind11" not in text
