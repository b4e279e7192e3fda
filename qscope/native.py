"""Compile csrc/ on first use, cache the library and load it.

The sources use only PyTorch's stable ABI (torch/csrc/stable), so the compile takes a few seconds and needs no
build system; the result registers its kernels with the dispatcher when it is loaded. It picks the instruction
set at run time, so that one cached library serves every machine of the same architecture.

Environment: QSCOPE_NATIVE=auto|off|require, QSCOPE_CACHE_DIR (else XDG_CACHE_HOME/qscope, else
~/.cache/qscope), CXX.
"""

import ctypes
import os
import platform
import shlex
import shutil
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from qscope_kernels import _build
from qscope_kernels._build import BuildError

from qscope.errors import QscopeError
from qscope.files import cache_dir

CSRC = _build.CSRC
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
    return _build.intact(cache_dir() / f"cpu-{_key()}.so")


def build() -> Path:
    """Compile the CPU library unless an intact one is cached; returns its path."""
    try:
        return _build.build(cache_dir() / f"cpu-{_key()}.so", _compile)
    except BuildError as error:
        raise NativeBuildError(str(error)) from error


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


def _key() -> str:
    """Hash of all that the library depends on: sources, flags, compiler, torch, kind of machine."""
    machine = [platform.machine(), *platform.libc_ver()]
    return _build.key([*_FLAGS, _cxx(), torch.__version__, *machine], [CSRC / "cpu", CSRC / "include"])


def _compile(scratch: Path, output: Path) -> None:
    cxx = compiler()
    if cxx is None:
        raise BuildError(f"the C++ compiler {_cxx()!r} was not found; install g++ or point CXX to a compiler.")
    include, lib = (str(Path(torch.__file__).parent / name) for name in ("include", "lib"))
    jobs = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        target = scratch / f"{source.stem}.o"
        includes = ["-I", str(CSRC / "include"), "-isystem", include]
        jobs.append((target, [*cxx, *_FLAGS, *includes, "-c", str(source), "-o", str(target)]))
    _build.run_all([command for _, command in jobs])
    objects = [str(target) for target, _ in jobs]
    _build.run_all([[*cxx, "-shared", *objects, "-L", lib, "-ltorch_cpu", "-o", str(output)]])
