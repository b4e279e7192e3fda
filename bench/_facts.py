"""Where a figure was measured: what a row needs to mean anything later."""

import hashlib
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def device_name(device: str) -> str:
    """The name of the processor that is measured."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A processor's name as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def common_facts(device: str) -> dict[str, Any]:
    """What every row of a result file says about where it was measured."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "triton": _version("triton") or _version("pytorch-triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "uncommitted": uncommitted(),
        "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit; where there is none (an installed wheel, a bare copy), `sources-` and a digest of what runs."""
    return _git("rev-parse", "HEAD") or f"sources-{_digest()}"


def uncommitted() -> str | None:
    """Whether tracked files differ from the commit: yes or no, None without git."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else "yes" if status else "no"


def _digest() -> str:
    """sha256 over names and bytes of all sources, so that a figure can be matched with a checkout later."""
    digest = hashlib.sha256()
    folders = [folder for name in ("qscope", "kernels", "csrc", "bench") if (folder := ROOT / name).is_dir()]
    for folder in folders or [ROOT]:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists():
        return None  # not ours: site-packages may lie inside the repository of somebody else
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
