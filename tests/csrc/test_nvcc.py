"""Every CUDA source compiled by nvcc, without a GPU: no spills, registers within what the intended occupancy allows."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("80", "89", "90")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH or in /usr/local/cuda/bin")

FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-ccbin", "g++", "-Xcompiler", "-fPIC"]
# By the name of a kernel and its threads per block (in its mangled name): the register limit, and why. A kernel that is
# not listed may use 128: two blocks of 256 threads.
REGISTERS = {
    # 65,536 registers per SM / 64 = 1024 threads, which is half of an SM's (two thirds on sm_89).
    "topk_select_kernel": 64,
}


def target(arch: str) -> str:
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def compile_all(arch: str, folder: Path) -> dict[str, str]:
    """ptxas's report per source, without the host's code: that is compiled once, below. They run side by side."""
    runs = {}
    for source in sorted(CUDA.glob("*.cu")):
        command = [NVCC, *FLAGS, target(arch), "-Xptxas", "-v", "-cubin", source, "-o", folder / source.stem]
        runs[source.stem] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reports = {}
    for name, run in runs.items():
        reports[name], _ = run.communicate()
        assert run.returncode == 0, reports[name][-3000:]
    return reports


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_and_the_registers_of_the_intended_occupancy(arch: str, tmp_path: Path) -> None:
    reports = compile_all(arch, tmp_path)
    assert {"topk_select", "group_select"} <= set(reports)
    for source, report in reports.items():
        assert "warning" not in report, report
        kernels = re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
            r"loads.*?Used (\d+) registers",
            report,
            re.DOTALL,
        )
        assert kernels, f"{source}: ptxas reported no kernel"
        for name, stack, stores, loads, registers in kernels:
            limit = next((limit for kernel, limit in REGISTERS.items() if kernel in name), 128)
            assert (stack, stores, loads) == ("0", "0", "0"), f"sm_{arch} {name} spills"
            assert int(registers) <= limit, f"sm_{arch} {name} uses {registers} registers, {limit} are meant"


def test_the_library_links_and_loads_without_a_gpu(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    sources = sorted(CUDA.glob("*.cu"))
    command = [NVCC, *FLAGS, target("90"), "--shared", "--cudart=static", *sources, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stdout + done.stderr, done.stderr
    call = ctypes.CDLL(str(library)).qscope_topk_select
    i32, i64, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    call.argtypes = [address, i32, i64, i64, i64, i32, i32, i32, i64, address, address, i32, address]
    # Neither call reaches a GPU: no rows to select from, then a k out of range (cudaErrorInvalidValue).
    assert call(None, 0, 0, 8, 8, 4, 0, 0, 0, None, None, 256, None) == 0
    assert call(None, 0, 1, 8, 8, 257, 0, 0, 0, None, None, 256, None) == 1
