"""Changes that are made completely or not at all, even when Ctrl-C or SIGTERM arrives.

Python runs signal handlers in the main thread, between any two instructions: a KeyboardInterrupt may come in the
middle of a change, and also just before a ``finally``. Here such signals are held back while a change is made, and
delivered right after it. Signals do not reach other threads, where this does nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class uninterrupted:  # noqa: N801  used like a function
    """Inside, SIGINT and SIGTERM are held back; they are delivered at the end."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}  # handlers that ours replaces
        self._held: list[int] = []

    def __enter__(self) -> Any:  # noqa: ANN401
        try:
            self._install()
        except BaseException:  # from a signal that came before
            self._end()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool | None:
        self._end()
        return None

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before is not None:  # None: not installed from Python
                self._before[number] = before
                signal.signal(number, self._receive)

    def _end(self) -> None:
        """Restores the handlers, that of SIGINT last, and delivers the held signals."""
        try:
            self._restore(signal.SIGTERM)
        finally:
            self._restore(signal.SIGINT)
        while self._held:
            signal.raise_signal(self._held.pop(0))

    def _restore(self, number: int) -> None:
        if number in self._before and signal.getsignal(number) == self._receive:
            signal.signal(number, self._before[number])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._holds(frame):
            self._held.append(number)
        else:
            self._pass_on(number, frame)

    def _holds(self, frame: FrameType | None) -> bool:
        return True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(number, before)
            signal.raise_signal(number)


class Reversible(uninterrupted):
    """A change that lasts as long as a ``with`` block.

    Signals may interrupt the block, but neither the change nor its reversal.

    Args:
        do: makes the change.
        undo: reverses it, even if it was made in part or not at all.
        value: what ``with ... as`` receives.
        ends: exceptions of this class end the block and are not raised further.
    """

    def __init__(
        self,
        do: Callable[[], object],
        undo: Callable[[], object],
        value: object = None,
        ends: type[BaseException] | None = None,
    ) -> None:
        super().__init__()
        self._do, self._undo, self._value, self._ends = do, undo, value, ends

    def __enter__(self) -> Any:  # noqa: ANN401
        try:
            self._install()
            self._do()
            while self._held:
                self._pass_on(self._held.pop(0), None)
        except BaseException:
            try:
                self._undo()
            finally:
                self._end()
            raise
        return self._value

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool | None:
        try:
            self._undo()
        finally:
            self._end()
        return self._ends is not None and kind is not None and issubclass(kind, self._ends)

    def _holds(self, frame: FrameType | None) -> bool:
        """Whether the change is being made or reversed right now."""
        while frame is not None:
            if frame.f_code in _CHANGING and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False


_CHANGING = (Reversible.__enter__.__code__, Reversible.__exit__.__code__)


def replaced(owner: object, **values: object) -> Reversible:
    """Inside, the given attributes of an object have the given values."""
    before = {name: getattr(owner, name) for name in values}

    def put(those: dict[str, Any]) -> None:
        for name, value in those.items():
            setattr(owner, name, value)

    return Reversible(lambda: put(values), lambda: put(before))
