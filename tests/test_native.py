"""Building, caching and loading the C++ kernels, each case in a process of its own."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qscope_kernels import _build

from qscope import native

ROOT = Path(__file__).parents[1]
DECODE = """
import warnings, torch
from qscope import native
from qscope.ops import sparse_decode
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = sparse_decode(torch.ones(1, 2), torch.tensor([[0, 2]]), torch.arange(6.0).view(3, 2))
assert y.tolist() == [[4.0, 6.0]], y
status = native.status()
print(status.loaded, len([w for w in caught if w.category is RuntimeWarning]), status.problem)
"""


def run(code: str = DECODE, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


@pytest.fixture(scope="module")
def library() -> Path:
    """The library that this machine builds; compiled at most once for the whole test run."""
    if native.mode() == "off" or native.compiler() is None:
        pytest.skip("no C++ compiler, or QSCOPE_NATIVE=off")
    return native.build()


@pytest.fixture
def cache(library: Path, tmp_path: Path) -> Path:
    """A cache folder of its own that already holds the library."""
    for suffix in (".so", ".sha256"):
        shutil.copy(library.with_suffix(suffix), tmp_path)
    return tmp_path


def test_cached_library_is_loaded_without_a_compiler(cache):
    done = run(QSCOPE_CACHE_DIR=str(cache), QSCOPE_NATIVE="require", PATH="")
    assert done.stdout.split()[:2] == ["True", "0"], done.stderr
    assert sorted(p.suffix for p in cache.iterdir()) == [
        ".sha256",
        ".so",
    ]  # nothing was built, not even a lock


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no-digest"])
def test_damaged_library_is_rebuilt(cache, library, damage, monkeypatch):
    """A fake compiler that copies the good library stands in for the real one, which takes seconds."""
    copy, digest = cache / library.name, (cache / library.name).with_suffix(".sha256")
    good = copy.read_bytes()
    if damage == "truncated":
        copy.write_bytes(good[: len(good) // 2])
    elif damage == "flipped":
        copy.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    elif damage == "empty":
        copy.write_bytes(b"")
    else:
        digest.unlink()
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(cache))
    monkeypatch.setattr(_build, "run_all", lambda commands: copy_outputs(commands, good))
    assert native.build() == copy
    assert copy.read_bytes() == good and _build.intact(copy)
    assert not [p for p in cache.iterdir() if p.is_dir()]


def copy_outputs(commands: list[list[str]], content: bytes) -> None:
    for command in commands:
        Path(command[-1]).write_bytes(content)


def test_failed_compile_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    broken = tmp_path / "csrc"
    (broken / "cpu").mkdir(parents=True)
    (broken / "include").mkdir()
    (broken / "cpu" / "broken.cpp").write_text("int main( {")
    monkeypatch.setattr(native, "CSRC", broken)
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(native.NativeBuildError, match=r"broken\.cpp.*failed with status"):
        native.build()
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("launcher", ["env", "env -u NO_SUCH_VARIABLE"])
def test_a_compiler_behind_a_launcher_compiles(tmp_path, monkeypatch, launcher):
    """CXX is a command, as in `ccache g++`, not the name of one file."""
    if native.mode() == "off" or native.compiler() is None:
        pytest.skip("no C++ compiler, or QSCOPE_NATIVE=off")
    sources = tmp_path / "csrc"
    (sources / "cpu").mkdir(parents=True)
    (sources / "include").mkdir()
    (sources / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(native, "CSRC", sources)
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", f"{launcher} {shlex.join(native.compiler())}")
    assert native.compiler()[0] == shutil.which("env")
    assert ctypes.CDLL(str(native.build())).answer() == 42


@pytest.mark.parametrize(
    ("given", "command"),
    [("", "g++"), ("  ", "g++"), ("no-such-compiler -O2", None), ("'env", None), ("''", None)],
)
def test_what_cxx_may_hold(monkeypatch, given, command):
    monkeypatch.setenv("CXX", given)
    path = command and shutil.which(command)
    assert native.compiler() == (path and [path])


def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path):
    done = run(QSCOPE_CACHE_DIR=str(tmp_path), CXX="no-such-compiler", QSCOPE_NATIVE="auto")
    assert done.stdout.split()[:2] == ["False", "1"], done.stderr
    assert "'no-such-compiler' was not found" in done.stdout


def test_off_is_silent(tmp_path):
    done = run(QSCOPE_CACHE_DIR=str(tmp_path), QSCOPE_NATIVE="off")
    assert done.stdout.split()[:2] == ["False", "0"], done.stderr
    assert "QSCOPE_NATIVE=off" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "env, word",
    [
        (dict(QSCOPE_NATIVE="require", CXX="no-such-compiler"), "QSCOPE_NATIVE=require"),
        (dict(QSCOPE_NATIVE="yes"), "accepted are auto, off, require"),
    ],
)
def test_refuses(tmp_path, env, word):
    done = run(QSCOPE_CACHE_DIR=str(tmp_path), **env)
    assert done.returncode != 0 and word in done.stderr


def test_unwritable_cache_falls_back_with_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(QSCOPE_CACHE_DIR=str(tmp_path / "file" / "cache"), QSCOPE_NATIVE="auto")
    assert done.stdout.split()[:2] == ["False", "1"], done.stderr


def test_the_key_covers_every_source(tmp_path, monkeypatch):
    copy = tmp_path / "csrc"
    for folder in ("cpu", "include"):
        shutil.copytree(native.CSRC / folder, copy / folder)
    monkeypatch.setattr(native, "CSRC", copy)
    before = native._key()
    for path in sorted(copy.rglob("*.*")):
        text = path.read_text()
        path.write_text(text + "\n")
        assert native._key() != before, path
        path.write_text(text)
    assert native._key() == before


def test_the_operators_are_native(library):
    assert native.load("cpu") and not native.load("cuda")
    names = (
        "topk_select",
        "topk_encode",
        "sparse_decode",
        "sparse_dot",
        "sparse_outer",
        "steer_add_",
        "feature_stats_",
        "row_adam_",
    )
    for name in names:
        assert native.implements(name, "cpu"), name
    assert native.cpu_isa() in native.ISA_NAMES


def test_a_compiled_graph_loads_the_kernels_by_itself(library):
    """Under torch.compile the public function does not load anything: the operator's default body does."""
    code = """
import torch
from qscope import native, ops
f = torch.compile(lambda v, i, W: ops.sparse_decode(v, i, W), fullgraph=True, backend="aot_eager")
y = f(torch.ones(1, 2), torch.tensor([[0, 2]]), torch.arange(6.0).view(3, 2))
print(native.implements("sparse_decode", "cpu"), y.tolist())
"""
    assert run(code).stdout.strip() == "True [[4.0, 6.0]]"
