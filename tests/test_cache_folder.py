"""Where converted models and statistics are kept, and what is said where that cannot be."""

from pathlib import Path

import pytest

from corrigenda.modules.model.loading import cache_dir


@pytest.fixture
def no_home(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    for name in ("HOME", "XDG_CACHE_HOME", "CORRIGENDA_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_the_cache_folder_needs_no_home(no_home, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="no home folder .*: set CORRIGENDA_CACHE to a folder"
    ):
        cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "corrigenda"
    monkeypatch.setenv("CORRIGENDA_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_statistics_without_a_usable_cache_folder(
    no_home, corrigenda, capsys, tiny_folder, monkeypatch, tmp_path
):
    args = ["moments", "--lm.name", tiny_folder("gpt2"), "--layers", "0", "--corpus.tokens", "500"]
    (tmp_path / "file").write_text("")
    for folder, message in (
        (None, "set CORRIGENDA_CACHE to a folder"),
        (
            str(tmp_path / "file"),
            f"{tmp_path / 'file'}, for converted models and statistics, is a file",
        ),
        ("/proc/nowhere", "/proc/nowhere"),
    ):
        if folder:
            monkeypatch.setenv("CORRIGENDA_CACHE", folder)
        assert corrigenda(*args) == 2
        error = capsys.readouterr().err
        last = error.splitlines()[-1]
        assert last.startswith("corrigenda: error: ") and message in last, error
    monkeypatch.setenv("CORRIGENDA_CACHE", str(tmp_path / "cache"))
    assert corrigenda(*args) == 0
