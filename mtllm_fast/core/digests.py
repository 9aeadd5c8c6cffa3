"""What files hold, in short: so that work begun on some contents is not gone on with on others under the same path."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_BLOCK, _SAMPLES = 4096, 256


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    result = hashlib.sha256()
    with Path(path).open("rb") as file:  # Python 3.10 has no hashlib.file_digest
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's size and of 256 blocks of 4 KiB, evenly spread: of corpora and weights, which are large.

    Files of up to 1 MiB are read whole. Of a model's folder: of its weights, configuration and tokenizer.
    """
    path = Path(path)
    result = hashlib.sha256()
    if path.is_dir():
        for file in sorted(f for f in path.iterdir() if _of_model(f)):
            result.update(f"{file.name} {fingerprint(file)}\n".encode())
        return result.hexdigest()
    size = path.stat().st_size
    result.update(str(size).encode())
    with path.open("rb") as opened:
        for number in range(_SAMPLES):
            opened.seek(max(0, size - _BLOCK) * number // (_SAMPLES - 1))
            result.update(opened.read(_BLOCK))
    return result.hexdigest()


def _of_model(file: Path) -> bool:
    names = ("config.json", "tokenizer", "vocab", "merges", "special_tokens")
    return file.suffix in (".safetensors", ".bin", ".model") or file.name.startswith(names)


def contents(**paths: str | os.PathLike[str] | None) -> dict[str, str]:
    """For the settings of a run: digests of files, fingerprints of folders; nothing of what is None, a hub's id or the
    embedded ``"tiny"``."""
    found = {name: Path(path) for name, path in paths.items() if path not in (None, "tiny") and Path(path).exists()}
    return {f"contents of {name}": fingerprint(p) if p.is_dir() else digest(p) for name, p in found.items()}
