"""`qscope doctor`: it tells the truth about this process, and reaches its end whatever is missing."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from qscope_kernels import cuda_library

import qscope.ops
from qscope import native
from qscope.report import doctor_text
from qscope.workflows import doctor
from qscope.workflows.doctor import OPERATORS, DoctorConfig, run

ROOT = Path(__file__).parents[1]


def found(result, name):
    return next(f for f in result.findings if f.name == name)


def backend(result, operator, device):
    return next(b for b in result.backends if (b.operator, b.device) == (operator, device))


def test_every_operator_is_reported_on_both_devices():
    exported = {name for name in qscope.ops.__all__ if hasattr(torch.ops.qscope, name)}
    assert exported == set(OPERATORS)
    result = run(DoctorConfig())
    pairs = [(operator, device) for operator in OPERATORS for device in ("cpu", "cuda")]
    assert [(b.operator, b.device) for b in result.backends] == pairs


def test_versions_are_those_of_this_process():
    result = run(DoctorConfig())
    assert found(result, "torch").value.startswith(torch.__version__)
    assert found(result, "transformers").value == importlib.metadata.version("transformers")
    assert result.gpu == torch.cuda.is_available()


def test_the_cpu_column_says_what_the_dispatcher_holds():
    loaded = native.load("cpu")
    result = run(DoctorConfig())
    for operator in OPERATORS:
        line = backend(result, operator, "cpu")
        part = {"decode_loss": "sparse_decode", "sparse_grads": "sparse_outer"}.get(operator, operator)
        assert line.native == native.implements(part, "cpu")
        assert line.backend.startswith("C++, ") == line.native
    assert found(result, "native CPU kernels").found == loaded


def test_the_cuda_column_names_the_triton_module_that_would_run():
    result = run(DoctorConfig())
    assert backend(result, "sparse_decode", "cuda").backend == "Triton (sparse_decode)"
    exact = {"topk_encode_certified", "topk_encode_packed", "pack_encoder"}
    for line in result.backends:
        if line.device == "cuda":
            assert line.native == line.backend.startswith(("Triton (", "CUDA C++ ("))
            assert line.native or (line.operator in exact and not cuda_library.nvcc())
    assert {b.operator for b in result.backends if b.backend.startswith("CUDA C++")} == (
        {"topk_encode", "topk_select", *exact} if cuda_library.nvcc() else set()
    )


def test_cuda_kernels_are_read_from_the_registered_function(monkeypatch):
    source = """
@_op.register_kernel("cuda")
def _(x):
    from qscope_kernels.fast_thing import launch
    return launch(x)

@_op.register_fake
def _(x):
    from qscope_kernels.other_thing import launch
"""
    monkeypatch.setattr(doctor.inspect, "getsource", lambda module: source)
    assert doctor._cuda_kernels("sparse_decode") == {"fast_thing"}


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = run(DoctorConfig())
    compiler = found(result, "C++ compiler")
    assert not compiler.found and "no-such-compiler" in compiler.value
    assert any("g++" in advice for advice in result.advice)


@pytest.mark.parametrize("launcher", ["env", "no-such-launcher"])
def test_it_looks_for_the_compiler_where_the_compile_does(monkeypatch, launcher):
    """CXX="ccache g++" was found here and not found by the compile."""
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CXX", f"{launcher} {shlex.join(native.compiler())}")
    assert found(run(DoctorConfig()), "C++ compiler").found == (native.compiler() is not None) == (launcher == "env")


def test_a_missing_compiler_is_advised_on_once(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor._compiler()[0].advice == doctor._native_advice("auto", None)


def test_missing_packages_are_named_with_the_extra_that_brings_them(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in ("pyarrow", "gguf", "triton", "pytorch-triton"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    result = run(DoctorConfig())
    assert not found(result, "triton").found
    assert "pyarrow missing" in found(result, "extra report").value
    assert any(re.fullmatch(r"pip install 'qscope\[report\]' adds (matplotlib, )?pyarrow\.", a) for a in result.advice)
    assert "pip install 'qscope[demo]' adds gguf." in result.advice
    decode = backend(result, "sparse_decode", "cuda")
    assert not decode.native and "triton is not installed" in decode.backend


def test_a_part_that_breaks_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("the driver is\nupset")

    monkeypatch.setattr(doctor, "_gpu", broken)
    gpu = found(run(DoctorConfig()), "GPU")
    assert not gpu.found
    assert gpu.value == "could not be asked: RuntimeError: the driver is"


def test_a_wrong_setting_is_a_finding():
    """In a process of its own: here the library may be loaded already, and the setting is not read again."""
    command = [sys.executable, "-m", "qscope", "doctor", "--json"]
    env = {**os.environ, "QSCOPE_NATIVE": "sometimes", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    kernels = next(f for f in report["findings"] if f["name"] == "native CPU kernels")
    assert not kernels["found"] and "auto, off, require" in kernels["value"]
    assert "auto, off, require" in next(b for b in report["backends"] if b["device"] == "cpu")["backend"]


def test_a_compiler_that_hangs_does_not_hang_the_report(monkeypatch, tmp_path):
    slow = tmp_path / "slow-cxx"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    begin = time.monotonic()
    assert not found(run(DoctorConfig()), "C++ compiler").found
    assert time.monotonic() - begin < 10


def test_the_cache_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights").write_bytes(b"0" * 3 * 2**20)
    assert found(run(DoctorConfig()), "cache").value == f"{tmp_path}, 3 MiB in 1 files"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_text_fits_the_terminal(width):
    result = run(DoctorConfig())
    text = doctor_text.tables(result, width)
    assert max(map(len, text.splitlines())) <= width
    for operator in OPERATORS:
        assert operator in text


def test_the_result_is_plain_data():
    result = run(DoctorConfig())
    assert json.loads(json.dumps(result.to_json()))["advice"] == result.advice


def test_switched_off_kernels_run_the_reference_and_nothing_is_compiled(tmp_path):
    """In a process of its own, because a loaded library stays loaded."""
    code = (
        "from qscope.workflows.doctor import run, DoctorConfig; from qscope.report.doctor_text import render;"
        "r = run(DoctorConfig()); print(render(r));"
        "assert {b.backend for b in r.backends if b.device == 'cpu'} == {'PyTorch reference'}"
    )
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    env = os.environ | {
        "PYTHONPATH": path,
        "QSCOPE_NATIVE": "off",
        "QSCOPE_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Unset QSCOPE_NATIVE" in done.stdout
    assert not (tmp_path / "cache").exists()
