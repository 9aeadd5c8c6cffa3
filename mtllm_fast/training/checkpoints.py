"""Checkpoint folders that exist complete or not at all, and tell when a disk has damaged them.

A folder is filled under a temporary name, a manifest with the size and SHA-256 of every file is added, everything is
synced, and the folder gets its name. What a killed process leaves behind starts with a dot and is nobody's checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from mtllm_fast.core.digests import digest

logger = logging.getLogger("mtllm_fast")

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Found(NamedTuple):
    """The newest checkpoint that is whole, and why newer ones were passed over."""

    path: Path | None
    rejected: dict[Path, str]


def unfinished(final: Path) -> Path:
    """The name under which ``final`` is filled, the same on every process."""
    return final.with_name(f".{final.name}.unfinished")


def begin(final: Path) -> Path:
    """An empty folder to fill; what a killed process left under its name is dropped."""
    folder = unfinished(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(final: Path) -> None:
    """Give the filled folder its name, with a manifest; a folder that has the name already is replaced."""
    folder = unfinished(final)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": facts}, indent=1) + "\n", encoding="utf-8")
    for path in (*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)
    if final.exists():
        replaced = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        folder.rename(final)
        shutil.rmtree(replaced)
    else:
        folder.rename(final)
    _sync(final.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its manifest must list every file, with its size and SHA-256."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
            if digest(path) != facts["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable ({type(error).__name__}: {error})"
    return None


def all_checkpoints(output_dir: Path) -> list[Path]:
    """The folders named ``checkpoint-STEP``, oldest first."""
    if not output_dir.is_dir():
        return []
    found = {path: _NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir()}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.name.split("-")[1]))


def newest(output_dir: Path) -> Found:
    """The newest checkpoint of a run that is whole. Each that is passed over is reported in the log too."""
    rejected: dict[Path, str] = {}
    for path in reversed(all_checkpoints(output_dir)):
        reason = damage(path)
        if reason is None:
            return Found(path, rejected)
        rejected[path] = reason
        logger.warning("%s is damaged (%s): it is passed over", path, reason)
    return Found(None, rejected)


def prune(output_dir: Path, keep: int | None, keep_also: Path | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints (None: keep them all), and what killed processes left."""
    leftovers = [*output_dir.glob(".checkpoint-*.unfinished"), *output_dir.glob(".checkpoint-*.replaced")]
    old = [path for path in all_checkpoints(output_dir)[:-keep] if path != keep_also] if keep else []
    for path in (*leftovers, *old):
        # Under another name first: half a checkpoint must not be found under its own.
        doomed = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.replaced"))
        shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
