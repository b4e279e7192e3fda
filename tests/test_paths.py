"""Where the cache lies."""

from pathlib import Path

from qscope.paths import cache_dir


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("QSCOPE_CACHE_DIR", "~/q")
    assert cache_dir() == Path.home() / "q"
    monkeypatch.delenv("QSCOPE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "qscope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "qscope"
