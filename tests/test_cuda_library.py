"""Finding nvcc, and what happens without it. Compiling the sources is tests/csrc/test_nvcc.py."""

import warnings

import pytest
from qscope_kernels import cuda_library


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_library, "_libraries", {})
    monkeypatch.setattr(cuda_library.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda_library, "nvcc", lambda: None)
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("QSCOPE_NATIVE", raising=False)


def test_without_nvcc_one_warning_says_what_runs_instead():
    with pytest.warns(RuntimeWarning, match=r"Triton kernels .* nvcc was not found; .* CUDA_HOME"):
        assert cuda_library.load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_library.load() is None
    assert "nvcc was not found" in cuda_library.problem()


def test_off_is_silent_and_require_raises(monkeypatch, recwarn):
    monkeypatch.setenv("QSCOPE_NATIVE", "off")
    assert cuda_library.load() is None and not recwarn.list
    monkeypatch.setattr(cuda_library, "_libraries", {})
    monkeypatch.setenv("QSCOPE_NATIVE", "require")
    with pytest.raises(cuda_library.BuildError, match="QSCOPE_NATIVE=require"):
        cuda_library.load()


def test_each_architecture_has_its_own_cached_library(tmp_path, monkeypatch):
    built = []

    def fake(commands):
        built.append(next(arg for arg in commands[0] if arg.startswith("-gencode")))
        with open(commands[0][-1], "wb") as file:
            file.write(b"library")

    monkeypatch.setattr(cuda_library, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_library._build, "run_all", fake)
    paths = [cuda_library.build(capability) for capability in ((8, 0), (9, 0), (8, 0))]
    assert paths[0] == paths[2] != paths[1] and paths[0].read_bytes() == b"library"
    assert built == [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90")]
