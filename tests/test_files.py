"""Where the cache lies, and what a file hashes to."""

from pathlib import Path

from qscope.files import cache_dir, file_sha256


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("QSCOPE_CACHE_DIR", "~/q")
    assert cache_dir() == Path.home() / "q"
    monkeypatch.delenv("QSCOPE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "qscope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "qscope"


def test_file_sha256(tmp_path):
    """The example of FIPS 180-4."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
