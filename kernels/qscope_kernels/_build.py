"""Compile sources into a shared library on first use and keep it, named by the hash of all it depends on.

A library is written next to a file with its own hash, under a file lock and by atomic rename: processes that start
together compile once, and a truncated or damaged library is rebuilt instead of mapped, which would kill the process.
"""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock  # a dependency of torch

_HERE = Path(__file__).resolve().parent
_INSTALLED = _HERE.parent / "qscope" / "_csrc"
CSRC = _INSTALLED if _INSTALLED.is_dir() else _HERE.parents[1] / "csrc"


class BuildError(RuntimeError):
    """A compiler is missing or refused the sources."""


def cache_dir() -> Path:
    """`QSCOPE_CACHE_DIR`, else `XDG_CACHE_HOME/qscope`, else `~/.cache/qscope`."""
    given = os.environ.get("QSCOPE_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qscope"


def key(parts: Iterable[str], folders: Iterable[Path]) -> str:
    """Hash of the parts and of every file in the folders, 16 hex digits."""
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in sorted(p for folder in folders for p in folder.glob("*") if p.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def intact(library: Path) -> bool:
    """Whether the library is there and is what was once built."""
    try:
        expected = _digest_file(library).read_text()
        return hashlib.sha256(library.read_bytes()).hexdigest() == expected
    except (FileNotFoundError, NotADirectoryError):
        return False


def build(library: Path, compile_into: Callable[[Path, Path], None]) -> Path:
    """Return the library, built by compile_into(scratch folder, output file) unless an intact one is there."""
    if intact(library):
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock"):
        if not intact(library):  # another process may have built it while we waited
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                output = Path(scratch) / library.name
                compile_into(Path(scratch), output)
                digest = Path(scratch) / "digest"
                digest.write_text(hashlib.sha256(output.read_bytes()).hexdigest())
                output.replace(library)
                digest.replace(_digest_file(library))
    return library


def run_all(commands: list[list[str]]) -> None:
    """Run the commands side by side; raise BuildError with the first compiler error."""
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate()[1] for process in running]
    for command, process, error in zip(commands, running, errors, strict=True):
        if process.returncode != 0:
            raise BuildError(f"`{' '.join(command)}` failed with status {process.returncode}: {error[-2000:]}")


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")
