"""Where qscope keeps what it makes or fetches once."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`QSCOPE_CACHE_DIR`, else `XDG_CACHE_HOME/qscope`, else `~/.cache/qscope`."""
    given = os.environ.get("QSCOPE_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qscope"
