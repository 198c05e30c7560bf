"""Commands that are killed, terminated, interrupted, or run out of disk space: see ``python -m tests.faults``.

A few points in every kind of command; ``make faults`` tries all of them.
"""

import ctypes
import os
import subprocess
import sys
from unittest import mock

import pytest

from tests.faults import FAULTS, Bench, differences
from tests.processes import import_everything

POINTS = {  # by kind and fault: where it strikes, as shares of all operations
    ("validate", "kill"): (0.4, 0.95),
    ("validate", "SIGTERM"): (0.6, 0.99),  # 0.99: what was written is removed, after the summary
    ("validate", "Ctrl-C twice"): (0.7,),
    ("validate", "disk full"): (0.1, 0.5, 0.9),
    ("validate epoch", "disk full"): (0.5,),
    ("stream", "kill"): (0.2, 0.7),
    ("stream", "SIGTERM"): (0.5,),
    ("stream", "Ctrl-C twice"): (0.5,),
    ("stream", "disk full"): (0.4, 0.8),
    ("mend", "kill"): (0.7,),
    ("mend", "SIGTERM"): (0.5,),
    ("lora", "kill"): (0.8,),
    ("moments", "kill"): (0.5,),
    ("moments", "disk full"): (0.5, 0.9),
    ("merge", "disk full"): (0.5,),
    ("export", "kill"): (0.6,),
    ("export", "disk full"): (0.8,),
    ("report", "disk full"): (0.6,),
}


@pytest.fixture(scope="module")
def bench():
    import_everything()
    with mock.patch.dict(os.environ):  # it has a cache folder of its own
        found = Bench()
        yield found
        found.close()


@pytest.mark.parametrize(("kind", "fault"), POINTS, ids=lambda word: word.replace(" ", "-"))
def test_a_run_resumed_after_a_fault_equals_an_uninterrupted_one(bench, kind, fault):
    _, operations = bench.whole(kind)
    assert operations > 3  # else nothing strikes
    for share in POINTS[kind, fault]:
        assert not bench.trial(kind, fault, int(share * operations)), f"at {share:.0%}"


@pytest.mark.parametrize("kind", ["stream", "mend", "export"])
def test_a_write_that_fails_in_the_middle(bench, kind):
    """Also one of another language's code: torch's, and that of safetensors."""
    assert not bench.trial(kind, "file too large", 2)
    assert not bench.trial(kind, "file too large", 12)


# ---------------------------------------------------------------------------- folders


@pytest.fixture
def mounted(tmp_path):
    """``mounted(options)``: a file system of its own in memory, which only the system's administrator can make."""
    libc, places = ctypes.CDLL(None, use_errno=True), []

    def mount(options, flags=0):
        place = tmp_path / f"disk-{len(places)}"
        place.mkdir()
        if os.geteuid() or libc.mount(
            b"tmpfs", str(place).encode(), b"tmpfs", flags, options.encode()
        ):
            pytest.skip("needs the right to mount file systems")
        places.append(place)
        return place

    yield mount
    for place in places:
        libc.umount2(str(place).encode(), 2)


@pytest.mark.parametrize("kind", ["validate", "stream", "moments", "export"])
def test_a_disk_that_is_full(bench, mounted, kind):
    """A real one, of a few pages; when there is space again the command resumes."""
    whole, _ = bench.whole(kind)
    disk = mounted("size=16k")
    ended = bench.start(kind, disk).end()
    assert ended.status == 2, ended.err
    line = ended.err.strip().rpartition("\n")[2]
    assert line.startswith("corrigenda: error: ") and "Traceback" not in ended.err, ended.err
    assert not [*disk.rglob("*.unfinished")]
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    again = bench.start(kind, disk, again=True).end()
    assert again.status == 0, again.err
    assert not differences(whole, disk)


@pytest.mark.parametrize("kind", ["validate", "stream", "moments", "merge", "export", "report"])
def test_a_folder_that_cannot_be_written(bench, mounted, kind):
    read_only = 1
    disk = mounted("size=1m", read_only)
    ended = bench.start(kind, disk).end()
    assert ended.status == 2, ended.err
    assert ended.err.strip().rpartition("\n")[2].startswith("corrigenda: error: "), ended.err
    assert "Read-only" in ended.err and not [*disk.iterdir()]


# ---------------------------------------------------------------------------- two at once


def _wait_at(gate, name):
    """Before a command: it stops when it makes a folder of this name, until the gate is gone."""

    def watch(event, args):
        if event == "os.mkdir" and name in os.fsdecode(args[0]):
            gate.with_name("waiting").touch()
            while gate.exists():
                os.sched_yield()

    return lambda: sys.addaudithook(watch)


@pytest.mark.parametrize(("kind", "name"), [("validate", "edits"), ("stream", "checkpoints")])
def test_two_processes_in_one_folder(bench, tmp_path, kind, name):
    """The second is refused; the first does not notice."""
    whole, _ = bench.whole(kind)
    folder, gate = bench.folder("two"), tmp_path / "gate"
    gate.touch()
    first = bench.start(kind, folder, _wait_at(gate, name))
    while not gate.with_name("waiting").exists():
        assert first.is_running()
    for again in (False, True):
        second = bench.start(kind, folder, again=again).end()
        assert second.status == 2
        assert f"another process ({first.pid})" in second.err, second.err
    gate.unlink()
    assert first.end().status == 0
    assert not differences(whole, folder)


def test_two_gatherings_of_one_cache(bench, tmp_path):
    """The second waits, then reads what the first has made."""
    whole, _ = bench.whole("moments")
    folder, gate = bench.folder("two"), tmp_path / "gate"
    gate.touch()
    first = bench.start("moments", folder, _wait_at(gate, "partial"))
    while not gate.with_name("waiting").exists():
        assert first.is_running()
    other = bench.folder("other")
    (other / "cache").symlink_to(folder / "cache")
    second = bench.start("moments", other)
    gate.unlink()
    ended = [process.end() for process in (first, second)]
    assert [end.status for end in ended] == [0, 0], ended
    layers = [[line for line in end.out.splitlines() if line.startswith("layer")] for end in ended]
    assert layers[0] == layers[1] != []
    assert not differences(whole, folder)


def test_every_fault_is_tried():
    assert {fault for _, fault in POINTS} | {"file too large"} == FAULTS.keys()
