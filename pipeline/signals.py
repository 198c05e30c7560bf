"""How a command is interrupted: Ctrl-C, SIGTERM, or the end of the process that started it."""

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
PARENT = "CORRIGENDA_PARENT"  # a pipe of which nobody but the parent holds the other end


class Terminated(KeyboardInterrupt):
    """SIGTERM, which does what Ctrl-C does and ends with another exit status."""


_stopping = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGTERM raises :class:`Terminated`, also when the parent process has gone.

    After the first signal the process has the time it needs to close its files; a further Ctrl-C ends it at once.
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
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # nothing that runs at exit holds a further Ctrl-C up


def listen() -> None:
    """Takes the two signals over again from a library that has taken them."""
    if threading.current_thread() is threading.main_thread():
        # A shell's background job begins with Ctrl-C ignored, and a trainer that is stopping ignores it, too.
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
    """The exit status that tells shells which signal it was."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _watch_parent() -> None:
    end = os.environ.pop(PARENT, None)  # not for processes that this one starts
    if end is None:
        return

    def watch() -> None:
        with suppress(OSError, ValueError):
            os.read(int(end), 1)  # returns when the other end is closed
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run_child(command: Sequence[str], env: Mapping[str, str], seconds_to_close: float) -> int:
    """Exit status of a process that ends when this one does, however this one ends.

    A signal that this process gets is passed on (Ctrl-C in a terminal has reached both already). The child then
    has ``seconds_to_close`` to close its files.
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
