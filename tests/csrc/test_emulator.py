"""The emulator itself: it computes what CUDA would, and reports each fault that a kernel can have."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("emulator_faults.cu")
FAULTS = {
    1: "deadlock: this thread waits for its warp, others for the block",
    2: "barrier divergence",
    3: "a warp barrier names a lane",
    4: "deadlock: this thread has returned",
    5: "out of bounds",
}
RUN = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.emulator_guarded_alloc.restype = ctypes.c_void_p
a, b = (ctypes.c_void_p(lib.emulator_guarded_alloc(ctypes.c_size_t(256))) for _ in range(2))
lib.emulator_run(int(sys.argv[2]), a, b)
"""


@pytest.fixture(scope="module")
def emulated(emulate: Callable) -> object:
    return emulate(SOURCE)


def run(emulated, kind: int, values: np.ndarray) -> np.ndarray:
    given, out = emulated.copy(values.astype(np.uint32)), emulated.array((64,), np.uint32)
    emulated.lib.emulator_run(kind, ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    return out


def test_barriers_shuffles_and_atomics(emulated) -> None:
    x = np.random.default_rng(0).integers(0, 1000, 64).astype(np.uint32)
    left = x.copy()
    left[1:32], left[33:] = x[:31], x[32:63]
    ballots = [sum(int(x[w * 32 + i] & 1) << i for i in range(32)) for w in range(2)]
    want = x.sum() + (x & 1).sum() + left + np.repeat(ballots, 32) + x[::-1]
    for seed in range(20):
        emulated.seed(seed)
        assert np.array_equal(run(emulated, 0, x), want.astype(np.uint32))


def test_shared_memory_is_poisoned_at_the_start_of_a_block(emulated) -> None:
    run(emulated, 0, np.zeros(64))
    assert (run(emulated, 6, np.zeros(64)) == 0xA5A5A5A5).all()


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_stops_the_process_and_says_which(emulated, kind: int) -> None:
    command = [sys.executable, "-c", RUN, emulated.lib._name, str(kind)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode < 0 and f"emulator: {FAULTS[kind]}" in done.stderr


def test_half_precision_conversions_are_those_of_ieee(emulated) -> None:
    to_float, to_half = emulated.lib.emulator_half_to_float, emulated.lib.emulator_float_to_half
    to_float.argtypes, to_float.restype = [ctypes.c_uint16], ctypes.c_float
    to_half.argtypes, to_half.restype = [ctypes.c_float], ctypes.c_uint16
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    got = np.array([to_float(int(bits)) for bits in halves.view(np.uint16)], np.float32)
    np.testing.assert_array_equal(got, halves.astype(np.float32))
    finite = halves[np.isfinite(halves)].astype(np.float32)
    between = np.concatenate([finite, finite * np.float32(1 + 2**-11), finite + np.float32(2**-25)])[::7]
    want = between.astype(np.float16).view(np.uint16)
    assert [to_half(float(v)) for v in between] == want.tolist()
