"""The CUDA C++ kernels: compiled by nvcc on first use for the GPU at hand, cached, loaded with ctypes.

The sources in csrc/cuda know nothing of PyTorch: `extern "C"` launchers take raw pointers and a stream and return a
cudaError_t. So they compile in a second or two, against any version of torch. Environment: QSCOPE_NATIVE=auto|off|
require and QSCOPE_CACHE_DIR as for the CPU kernels; nvcc is looked for in CUDA_HOME, on PATH and in /usr/local/cuda.
"""

import ctypes
import os
import shutil
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from qscope_kernels import _build
from qscope_kernels._build import BuildError

_FLAGS = ["-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-lineinfo"]

_lock = threading.Lock()
_libraries: dict[tuple[int, int], ctypes.CDLL | None] = {}
_problem: str | None = None


def nvcc() -> str | None:
    """Path of the CUDA compiler, None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [str(Path(home) / "bin") for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def load() -> ctypes.CDLL | None:
    """The library for the current GPU, compiled if need be; None if that is switched off or impossible.

    Why it is None is said once in a warning (unless QSCOPE_NATIVE=off) and by problem(). Call it once before a CUDA
    graph is captured: compiling takes seconds.
    """
    capability = torch.cuda.get_device_capability()
    if capability not in _libraries:
        with _lock:
            if capability not in _libraries:
                _libraries[capability] = _try_load(capability)
    return _libraries[capability]


def problem() -> str | None:
    """Why the library of the last load() is missing."""
    return _problem


def cached(capability: tuple[int, int]) -> bool:
    """Whether the library for a compute capability is compiled already, so that loading it takes milliseconds."""
    return _build.intact(_path(capability))


def build(capability: tuple[int, int]) -> Path:
    """Compile for one compute capability unless an intact library is cached; returns its path.

    Raises BuildError without nvcc or where it refuses the sources.
    """
    compiler = nvcc()

    def compile_into(_: Path, output: Path) -> None:
        if compiler is None:
            raise BuildError("nvcc was not found; install the CUDA toolkit or set CUDA_HOME to it.")
        sources = [str(path) for path in sorted((_build.CSRC / "cuda").glob("*.cu"))]
        _build.run_all([[compiler, *_FLAGS, _target(capability), *sources, "-o", str(output)]])

    return _build.build(_path(capability), compile_into)


def _target(capability: tuple[int, int]) -> str:
    arch = "".join(map(str, capability))
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def _path(capability: tuple[int, int]) -> Path:
    key = _build.key([*_FLAGS, _target(capability)], [_build.CSRC / "cuda"])
    return _build.cache_dir() / f"cuda-sm_{''.join(map(str, capability))}-{key}.so"


def check(status: int, launcher: str) -> None:
    """Raise RuntimeError if a launcher returned a CUDA error."""
    if status != 0:
        raise RuntimeError(f"{launcher} could not be launched: CUDA error {status} ({torch.cuda.get_device_name()}).")


def stream(tensor: Tensor) -> ctypes.c_void_p:
    """The current stream of the tensor's device."""
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)


def _try_load(capability: tuple[int, int]) -> ctypes.CDLL | None:
    global _problem
    mode = os.environ.get("QSCOPE_NATIVE", "auto")
    if mode == "off":
        _problem = "switched off by QSCOPE_NATIVE=off"
        return None
    try:
        return ctypes.CDLL(str(build(capability)))
    except (BuildError, OSError) as error:
        _problem = str(error)
        if mode == "require":
            raise BuildError(f"QSCOPE_NATIVE=require, but there are no CUDA C++ kernels: {error}") from error
        warnings.warn(
            f"qscope runs without its CUDA C++ kernels; Triton kernels of the same meaning take their place, slower: "
            f"{error} Set QSCOPE_NATIVE=off to silence this.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
