"""CUDA sources compiled for the CPU emulator, and memory whose end is a page that cannot be touched."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


class Emulated:
    """Kernels in a shared library on the emulator, with guarded arrays for them to read and write.

    `array(shape, dtype, offset)` lies `offset` elements after a 16-byte boundary and ends, if the offset and size
    allow it, at the end of accessible memory; its contents are poisoned. A kernel that runs past it stops the process.
    """

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.emulator_guarded_alloc.restype = ctypes.c_void_p
        self.lib.emulator_guarded_alloc.argtypes = [ctypes.c_size_t]
        self.lib.emulator_guarded_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._blocks: list[tuple[int, int]] = []

    def seed(self, seed: int) -> None:
        self.lib.emulator_seed(ctypes.c_uint(seed))

    def array(self, shape: tuple[int, ...], dtype: np.dtype, offset: int = 0) -> np.ndarray:
        itemsize = np.dtype(dtype).itemsize
        size = int(np.prod(shape)) * itemsize
        # Of all starts with the wanted offset from a 16-byte boundary, the last one before the guard page.
        block = size + (-(size + offset * itemsize)) % 16
        address = self.lib.emulator_guarded_alloc(block)
        self._blocks.append((address, block))
        raw = (ctypes.c_ubyte * block).from_address(address)
        np.frombuffer(raw, np.uint8)[:] = 0xA5
        start = (offset * itemsize - address) % 16
        return np.frombuffer(raw, np.uint8)[start : start + size].view(dtype).reshape(shape)

    def copy(self, values: np.ndarray, offset: int = 0) -> np.ndarray:
        out = self.array(values.shape, values.dtype, offset)
        out[...] = values
        return out

    def release(self) -> None:
        """Unmap every array handed out so far; none may be used afterwards."""
        for block in self._blocks:
            self.lib.emulator_guarded_free(*block)
        self._blocks.clear()


def compile_emulated(sources: list[Path], library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX to run the CUDA sources under the emulator")
    command = [compiler, *FLAGS, "-DQSCOPE_EMULATED", "-x", "c++", *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    """emulate("topk_select.cu", ...) compiles files of csrc/cuda/ together, once per session."""
    built: dict[tuple[str, ...], Emulated] = {}

    def build(*names: str) -> Emulated:
        if names not in built:
            library = tmp_path_factory.mktemp("emulated") / "kernels.so"
            compile_emulated([CSRC / "cuda" / name for name in names], library)
            built[names] = Emulated(library)
        return built[names]

    return build
