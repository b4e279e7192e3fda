"""Where qscope keeps what it makes or fetches once, and what a file holds."""

import hashlib
import os
from pathlib import Path


def cache_dir() -> Path:
    """`QSCOPE_CACHE_DIR`, else `XDG_CACHE_HOME/qscope`, else `~/.cache/qscope`."""
    given = os.environ.get("QSCOPE_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qscope"


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
