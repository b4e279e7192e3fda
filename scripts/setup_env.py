"""Create .venv and install qscope into it; do nothing where that was done before. Standard library only.

    python3 scripts/setup_env.py --venv .venv --extra test --torch-index auto

Without an NVIDIA GPU, torch is pinned by constraints-cpu.txt and taken as a CPU build: from what pip is
configured to find if that is one (`auto` asks pip, without downloading), else from PyTorch's CPU index.
With a GPU, pip's own choice of torch is taken.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What a stamp of one extra covers besides itself.
COVERS = {"dev": ("dev", "test", "demo"), "test": ("test", "demo"), "demo": ("demo",)}


def has_nvidia_gpu() -> bool:
    """True if nvidia-smi lists a GPU: the driver is what a CUDA build of torch needs."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


def fingerprint() -> str:
    """What the environment depends on: these files and the interpreter."""
    h = hashlib.sha256(sys.version.encode())
    for name in ("pyproject.toml", "constraints-cpu.txt", "scripts/setup_env.py"):
        h.update((ROOT / name).read_bytes())
    return h.hexdigest()[:16]


def has_pip(python: Path) -> bool:
    """False for no environment, and for one whose creation failed half-way."""
    return (
        python.exists() and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0
    )


def create(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        sys.exit(f"{folder} is not empty and not a virtual environment. Give another folder: make VENV=FOLDER.")
    print(f"creating {folder}", flush=True)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, ModuleNotFoundError):  # Debian packs ensurepip apart
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit("python3 cannot create a virtual environment: on Debian or Ubuntu install python3-venv.")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--upgrade", "pip"]
    subprocess.run(pip, check=False)  # the oldest supported Pythons bring a pip without --dry-run; else no loss


def configured_torch(python: Path) -> str:
    """The torch build that pip would install now, for example `2.13.0+cpu`; empty if it finds none."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--report", "-", "-c", ROOT / "constraints-cpu.txt", "torch"]
    asked = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if asked.returncode != 0:
        return ""
    found = json.loads(asked.stdout)["install"][0]
    return str(found["metadata"]["version"])


def install(python: Path, extra: str, torch_index: str) -> None:
    def pip(*args: object) -> None:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *map(str, args)], check=True, cwd=ROOT)

    constraint: tuple[object, ...] = ()
    if not has_nvidia_gpu():
        constraint = ("-c", ROOT / "constraints-cpu.txt")
        if torch_index != "auto":
            index: tuple[object, ...] = ("--index-url", torch_index)
        elif "+cpu" in configured_torch(python) or sys.platform == "darwin":
            index = ()
        else:
            index = ("--index-url", CPU_INDEX)
        pip(*constraint, *index, "torch")
    pip(*constraint, "-e", f".[{extra}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--extra", choices=sorted(COVERS), required=True)
    parser.add_argument("--torch-index", default="auto")
    args = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036  (python3 of the machine runs this, whatever it is)
        sys.exit(f"qscope needs Python 3.10 or newer; this is {sys.version.split()[0]}.")

    stamp = args.venv / "qscope-env.json"
    done = json.loads(stamp.read_text()) if stamp.exists() else {}
    if done.get("fingerprint") == fingerprint() and args.extra in done.get("covers", ()):
        return
    python = args.venv / "bin" / "python"
    if not has_pip(python):
        create(args.venv)
    print(f"installing qscope[{args.extra}] into {args.venv} (once)", flush=True)
    try:
        install(python, args.extra, args.torch_index)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"pip failed (exit status {error.returncode}): its message stands above. "
            "A machine without network access needs the packages of pyproject.toml beforehand."
        )
    covers = set(COVERS[args.extra])
    if done.get("fingerprint") == fingerprint():
        covers |= set(done["covers"])
    scratch = stamp.with_suffix(".tmp")
    scratch.write_text(json.dumps({"fingerprint": fingerprint(), "covers": sorted(covers)}))
    os.replace(scratch, stamp)


if __name__ == "__main__":
    main()
