"""Where qscope keeps what it makes or fetches once, and what a file holds."""

import hashlib
from pathlib import Path

from qscope_kernels._build import cache_dir

__all__ = ["cache_dir", "file_sha256"]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
