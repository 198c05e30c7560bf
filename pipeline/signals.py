"""Interrupts a command on Ctrl-C, on SIGTERM, or when the parent process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

INTERRUPTED = 130  # exit status after Ctrl-C
TERMINATED = 143  # exit status after SIGTERM
PARENT = "CORRIGENDA_PARENT"  # a pipe whose other end only the parent has open


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C except for the exit status."""


_stopping = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`Terminated`, and so does the end of the parent process.

    After the first signal the process may take the time it needs to close its files. A second Ctrl-C ends it
    immediately.
    """
    global _stopping
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _stopping = False
    listen()
    _watch_parent()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _stopping and before[signal.SIGINT] is not signal.SIG_IGN:
            # A second Ctrl-C also ends what runs at exit.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def listen() -> None:
    """Installs the handlers of both signals, again if a library has replaced them."""
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C is ignored in a shell's background jobs, and by a Trainer that is stopping.
        if _stopping or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, _: Any) -> None:  # noqa: ANN401
    global _stopping
    if _stopping:
        if number == signal.SIGINT:
            end_at_once()
        return
    _stopping = True
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def end_at_once() -> None:
    """Ends the process without closing anything, as a second Ctrl-C does."""
    os._exit(INTERRUPTED)


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status by which shells know the signal."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _watch_parent() -> None:
    end = os.environ.pop(PARENT, None)  # not passed on to child processes
    if end is None:
        return

    def watch() -> None:
        with suppress(OSError, ValueError):
            os.read(int(end), 1)  # blocks until the other end is closed
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run_child(command: Sequence[str], env: Mapping[str, str], seconds_to_close: float) -> int:
    """Runs a process that ends when this one does, even if this one is killed; returns its exit status.

    Signals are passed on to the child (which has already received a Ctrl-C in a terminal). It then has
    ``seconds_to_close`` seconds to close its files.
    """
    theirs, ours = os.pipe()
    try:
        process = subprocess.Popen(command, env={**env, PARENT: str(theirs)}, pass_fds=[theirs])
        os.close(theirs)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            try:
                process.wait(seconds_to_close)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    finally:
        os.close(ours)
