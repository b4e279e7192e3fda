"""Guards for traps that only show up after release."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def found_packages() -> set[str]:
    found = {"qscope._csrc", "qscope._bench"}
    for base in (ROOT, ROOT / "kernels"):
        for init in base.glob("qscope*/**/__init__.py"):
            found.add(".".join(init.parent.relative_to(base).parts))
    return found


def test_every_package_is_listed_in_pyproject():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(pyproject["tool"]["setuptools"]["packages"]) == found_packages()


def test_torch_is_not_a_build_requirement():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not any("torch" in r for r in pyproject["build-system"]["requires"])


def test_kernels_folder_is_not_an_importable_package():
    """transformers probes for a package called `kernels`; an __init__.py there breaks its model imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root():
    code = "from transformers import Qwen3ForCausalLM; print(Qwen3ForCausalLM.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "Qwen3ForCausalLM", done.stderr


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    """Built from a copy, without isolation: setuptools is a test requirement, so no network is needed."""
    out = tmp_path_factory.mktemp("wheel")
    copy = out / "src"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_package_and_source(wheel_names):
    for package in found_packages() - {"qscope._csrc"}:
        assert package.replace(".", "/") + "/__init__.py" in wheel_names, package
    for source in (ROOT / "csrc").rglob("*"):
        if source.suffix in (".cpp", ".cu", ".h", ".cuh"):
            assert f"qscope/_csrc/{source.relative_to(ROOT / 'csrc')}" in wheel_names, source
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in wheel_names)


def test_wheel_holds_the_shipped_sae_and_the_page(wheel_names):
    for folder, suffixes in (("assets", (".json", ".safetensors")), ("report", (".html", ".css", ".js"))):
        for path in (ROOT / "qscope" / folder).rglob("*"):
            if path.suffix in suffixes:
                assert str(path.relative_to(ROOT)) in wheel_names, path
    assert any(name.endswith("sae.safetensors") for name in wheel_names)


def test_import_is_fast_and_light():
    """Half a second is the promise; what it must not do is import torch, which alone costs more."""
    code = "import sys, qscope; print(qscope.__version__, 'torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["False", "False"]
