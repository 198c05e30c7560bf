"""Files are replaced in one step, and one process writes at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modules.files import locked, remove_unfinished, replacing, write_tensors, write_text

HOLD = """
import sys, time
from pathlib import Path
from modules.files import locked
with locked(Path(sys.argv[1]), "the folder"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_an_error_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), replacing(file) as part:
        part.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "edits" / ".a.txt.unfinished"
    left.mkdir(parents=True)
    (left / ".tmp123").write_text("half")
    write_text(tmp_path / "edits" / "a.txt", "new")
    assert not left.exists()
    left.mkdir()
    remove_unfinished(tmp_path)
    assert not left.exists()
    assert (tmp_path / "edits" / "a.txt").read_text() == "new"


def test_tensors_are_written_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T}  # not contiguous
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "test"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensors["a"])


def test_a_lock_is_refused_while_its_process_lives_and_free_once_it_is_killed(
    tmp_path: Path,
) -> None:
    lock = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match=rf"the folder .*\({holder.pid}\)"),
            locked(lock, "the folder"),
        ):
            pass
        holder.kill()
    with locked(lock, "the folder"):
        pass
