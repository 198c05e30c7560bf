"""Files are replaced in one step, and one process writes at a time."""

import ast
import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from corrigenda.modules.files import (
    file_name,
    locked,
    read_tensors,
    remove_unfinished,
    replacing,
    write_tensors,
    write_text,
)

HOLD = """
import sys, time
from pathlib import Path
from corrigenda.modules.files import locked
with locked(Path(sys.argv[1]), "the folder"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_an_error_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), replacing(file) as part:
        part.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_signal_while_the_temporary_folder_is_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, calls = shutil.rmtree, []

    def interrupted(folder: Path, ignore_errors: bool) -> None:
        calls.append(folder)
        if len(calls) == 2:  # the first call removes what an earlier process left
            raise KeyboardInterrupt
        remove(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "new")
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


def test_ids_that_file_systems_confuse_have_names_of_their_own() -> None:
    ids = ["a/b", "a_b", "A_b", "a\\b", "..", "", ".hidden", "ü", "x" * 300, "x" * 301, "a b"]
    names = [file_name(case_id) for case_id in ids]
    assert len({name.casefold() for name in names}) == len(ids)
    assert names[1] == "a_b" and names[0].startswith("a_b~") and names[7].startswith("ü~")
    assert all(len(name.encode()) < 200 and "/" not in name for name in names)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with replacing(tmp_path / "model") as part:
        part.mkdir()
        (part / "a").write_text("a")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "a"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=["OSError", "safetensors", "torch", "torch, at the end of a file"],
)  # fmt: skip
def test_a_full_disk_is_an_error_of_the_disk_and_keeps_the_old_file(tmp_path, error) -> None:
    file = tmp_path / "a"
    write_text(file, "old")
    with pytest.raises(OSError) as caught, replacing(file) as part:
        part.write_text("half")
        raise error
    assert "\n" not in str(caught.value)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_torchs_errors_about_a_full_disk_are_recognised(tmp_path: Path) -> None:
    """The message by which its error is known, from torch itself."""
    with pytest.raises(OSError, match="the disk may be full"), replacing(tmp_path / "a") as part:
        part.symlink_to(FULL)
        torch.save({"a": torch.zeros(100_000)}, part)
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    write_tensors(tmp_path / "a", {"a": one, "b": one, "c": one[2:]}, {})
    found, _ = read_tensors(tmp_path / "a")
    assert torch.equal(found["a"], one) and torch.equal(found["b"], one)
    assert torch.equal(found["c"], one[2:])


def test_other_numbers_under_the_same_header_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.ones(3)}, {"format": "x"})
    header = read_tensors(file)[1]
    for tensors in ({"a": torch.zeros(3)}, {"b": torch.ones(3)}, {"a": torch.ones(3, 1)}):
        save_file(tensors, file, header)
        with pytest.raises(
            ValueError, match="damaged: its tensors are not those that were written"
        ):
            read_tensors(file)
    save_file(
        {"a": torch.zeros(3)}, file, {"format": "x"}
    )  # of an earlier version, without a digest
    assert not read_tensors(file)[0]["a"].any()


def test_torch_reads_files_without_running_them_and_in_one_place() -> None:
    """No pickle is ever loaded; safetensors are written through corrigenda.modules.files
    alone."""
    root = Path(__file__).parents[1]
    for file in [
        f for part in ("modules", "pipeline", "datamodules") for f in (root / part).rglob("*.py")
    ]:
        name = file.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "LearnedEditor.load_from_checkpoint":  # ours, by read_checkpoint
                continue
            if called == "torch.load" or called.endswith("load_from_checkpoint"):
                assert given.get("weights_only") == "True", f"{name}:{node.lineno}"
                assert name == "modules/training/checkpoints.py", f"{name}:{node.lineno}"
            assert "pickle" not in called, f"{name}:{node.lineno}"
            if called in ("save_file", "torch.save"):
                assert name in ("modules/files.py", "pipeline/lightning_parts.py"), (
                    f"{name}:{node.lineno}"
                )
            if called in ("np.load", "numpy.load"):
                assert given.get("allow_pickle") == "False", f"{name}:{node.lineno}"
