"""Compile csrc/ on first use, cache the library and load it.

The sources use only PyTorch's stable ABI (torch/csrc/stable), so the compile takes a few seconds and needs no
build system; the result registers its kernels with the dispatcher when it is loaded. It picks the instruction
set at run time, so that one cached library serves every machine of the same architecture.

Environment: QSCOPE_NATIVE=auto|off|require, QSCOPE_CACHE_DIR (else XDG_CACHE_HOME/qscope, else
~/.cache/qscope), CXX.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock  # a dependency of torch

from qscope.errors import QscopeError
from qscope.files import cache_dir

_HERE = Path(__file__).resolve().parent
CSRC = _HERE / "_csrc" if (_HERE / "_csrc").is_dir() else _HERE.parent / "csrc"
MODES = ("auto", "off", "require")
ISA_NAMES = ("portable", "avx2", "avx512")

_FLAGS = [
    "-O2",
    "-std=c++20",
    "-fPIC",
    "-ffp-contract=off",  # fused multiply-adds only where the source says so: equal bits everywhere
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11, the oldest we support
]


class NativeBuildError(QscopeError):
    """The C++ kernels could not be compiled or loaded."""


@dataclass(frozen=True)
class Status:
    """What `load` did, for `qscope doctor`."""

    mode: str
    loaded: bool
    library: str | None
    compiler: str | None
    isa: str | None
    problem: str | None


_lock = threading.Lock()
_loaded: dict[str, Path | None] = {}
_problem: str | None = None


def mode() -> str:
    """The value of QSCOPE_NATIVE."""
    value = os.environ.get("QSCOPE_NATIVE", "auto")
    if value not in MODES:
        raise QscopeError(f"QSCOPE_NATIVE={value!r}; accepted are {', '.join(MODES)}.")
    return value


def compiler() -> list[str] | None:
    """The command that compiles C++, its program as a full path; None if there is none.

    CXX may hold arguments and launchers ("ccache g++"), quoted as for a shell.
    """
    try:
        command = shlex.split(_cxx())
    except ValueError:  # a quote that is not closed: no program has that name
        return None
    program = shutil.which(command[0]) if command else None
    return None if program is None else [program, *command[1:]]


def _cxx() -> str:
    return os.environ.get("CXX", "").strip() or "g++"


def load(device: str = "cpu") -> bool:
    """True if native kernels for `device` are loaded; the first call may compile them."""
    if device not in _loaded:
        with _lock:
            if device not in _loaded:
                _loaded[device] = _try_load() if device == "cpu" else None
    return _loaded[device] is not None


def implements(name: str, device: str) -> bool:
    """True if operator `name` has a kernel of its own for `device`."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"qscope::{name}", device.upper())


def status() -> Status:
    """Load what can be loaded, and say what that was."""
    loaded = load("cpu")
    command = compiler()
    return Status(
        mode=mode(),
        loaded=loaded,
        library=str(_loaded["cpu"]) if loaded else None,
        compiler=None if command is None else shlex.join(command),
        isa=cpu_isa() if loaded else None,
        problem=_problem,
    )


def cpu_isa(limit: str | None = None) -> str:
    """The CPU kernels' instruction set; tests lower it with `limit`, for the rest of the process."""
    if not load("cpu"):
        raise NativeBuildError("The CPU kernels are not loaded, so there is no instruction set to report.")
    choose = ctypes.CDLL(str(_loaded["cpu"])).qscope_cpu_isa
    return ISA_NAMES[choose(-1 if limit is None else ISA_NAMES.index(limit))]


def cached() -> bool:
    """True if the library is compiled already, so that loading it takes milliseconds."""
    return _intact(cache_dir() / f"cpu-{_key()}.so")


def build() -> Path:
    """Compile the CPU library unless an intact one is cached; returns its path."""
    library = cache_dir() / f"cpu-{_key()}.so"
    if _intact(library):
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock"):
        if not _intact(library):  # another process may have built it while we waited
            _compile(library)
    return library


def _try_load() -> Path | None:
    global _problem
    if mode() == "off":
        _problem = "switched off by QSCOPE_NATIVE=off"
        return None
    try:
        library = build()
        torch.ops.load_library(str(library))
        return library
    except (NativeBuildError, OSError, RuntimeError) as error:
        _problem = str(error)
        if mode() == "require":
            raise NativeBuildError(f"QSCOPE_NATIVE=require, but there are no native CPU kernels: {error}") from error
        warnings.warn(
            f"qscope runs without its native CPU kernels, slower but with the same meaning: {error} "
            "Set QSCOPE_NATIVE=off to silence this.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None


def _sources() -> list[Path]:
    return sorted((CSRC / "cpu").glob("*.cpp"))


def _key() -> str:
    """Hash of all that the library depends on: sources, flags, compiler, torch, kind of machine."""
    machine = [platform.machine(), *platform.libc_ver()]
    parts = [*_FLAGS, _cxx(), torch.__version__, *machine]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in sorted(p for folder in ("cpu", "include") for p in (CSRC / folder).glob("*") if p.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _intact(library: Path) -> bool:
    """A truncated library would kill the process when mapped, so its hash is checked first."""
    try:
        expected = _digest_file(library).read_text()
        return hashlib.sha256(library.read_bytes()).hexdigest() == expected
    except (FileNotFoundError, NotADirectoryError):
        return False


def _compile(library: Path) -> None:
    cxx = compiler()
    if cxx is None:
        raise NativeBuildError(f"the C++ compiler {_cxx()!r} was not found; install g++ or point CXX to a compiler.")
    include, lib = (str(Path(torch.__file__).parent / name) for name in ("include", "lib"))
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        jobs = []
        for source in _sources():
            target = Path(scratch) / f"{source.stem}.o"
            includes = ["-I", str(CSRC / "include"), "-isystem", include]
            jobs.append((target, [*cxx, *_FLAGS, *includes, "-c", str(source), "-o", str(target)]))
        _run_all([command for _, command in jobs])
        output = Path(scratch) / library.name
        objects = [str(target) for target, _ in jobs]
        _run_all([[*cxx, "-shared", *objects, "-L", lib, "-ltorch_cpu", "-o", str(output)]])
        digest = Path(scratch) / "digest"
        digest.write_text(hashlib.sha256(output.read_bytes()).hexdigest())
        output.replace(library)
        digest.replace(_digest_file(library))


def _run_all(commands: list[list[str]]) -> None:
    """Run the commands side by side; raise with the first compiler error."""
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate()[1] for process in running]
    for command, process, error in zip(commands, running, errors, strict=True):
        if process.returncode != 0:
            raise NativeBuildError(f"`{' '.join(command)}` failed with status {process.returncode}: {error[-2000:]}")
