"""The script behind `make`: what it asks pip for, and that a half-made environment is made again."""

import importlib.util
import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


def installs(monkeypatch, gpu: bool, configured: str, index: str) -> list[list[str]]:
    """The pip calls of `install`, with the machine and pip's configuration replaced."""
    calls: list[list[str]] = []
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(setup_env, "configured_torch", lambda python: configured)
    monkeypatch.setattr(setup_env.sys, "platform", "linux")
    monkeypatch.setattr(setup_env.subprocess, "run", lambda command, **_: calls.append(command))
    setup_env.install(Path("python"), "test", index)
    return calls


def test_a_gpu_machine_takes_the_torch_that_pip_chooses(monkeypatch):
    (call,) = installs(monkeypatch, gpu=True, configured="", index="auto")
    assert call[-2:] == ["-e", ".[test]"] and "-c" not in call


@pytest.mark.parametrize(
    ("configured", "index", "expected"),
    [
        ("2.13.0+cpu", "auto", None),
        ("2.13.0", "auto", setup_env.CPU_INDEX),
        ("", "auto", setup_env.CPU_INDEX),
        ("2.13.0+cpu", "https://mirror.example/simple", "https://mirror.example/simple"),
    ],
)
def test_without_a_gpu_torch_is_a_pinned_cpu_build(monkeypatch, configured, index, expected):
    torch_call, rest = installs(monkeypatch, gpu=False, configured=configured, index=index)
    assert torch_call[-1] == "torch" and rest[-2:] == ["-e", ".[test]"]
    assert all(str(ROOT / "constraints-cpu.txt") in call for call in (torch_call, rest))
    assert (torch_call[torch_call.index("--index-url") + 1] if "--index-url" in torch_call else None) == expected
    assert "--index-url" not in rest


def test_half_made_environment_is_not_taken_for_one(tmp_path):
    assert not setup_env.has_pip(tmp_path / "none" / "bin" / "python")
    venv.create(tmp_path / "half", with_pip=False)
    assert not setup_env.has_pip(tmp_path / "half" / "bin" / "python")
    assert setup_env.has_pip(Path(sys.executable))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit, match="not a virtual environment"):
        setup_env.create(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_stamp_covers_what_it_installed(tmp_path):
    """A second call does nothing: with a stamp, even an environment without pip is left alone."""
    stamp = {"fingerprint": setup_env.fingerprint(), "covers": ["test", "demo"]}
    (tmp_path / "qscope-env.json").write_text(json.dumps(stamp))
    command = [sys.executable, ROOT / "scripts" / "setup_env.py", "--venv", tmp_path, "--extra", "demo"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["qscope-env.json"]
