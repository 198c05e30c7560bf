"""Changes that are made whole or not at all, whenever Ctrl-C or SIGTERM arrives.

Python runs signal handlers in the main thread, between two instructions of whatever is running there: a
KeyboardInterrupt may come between any two steps of a change, and also just before a ``finally``. Here such
signals are held back while a change is made and delivered right after it. In other threads, where no signal
arrives, nothing needs to be done and nothing is.
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
        self._before: dict[int, Any] = {}  # the handlers in whose place ours stands
        self._held: list[int] = []

    def __enter__(self) -> Any:  # noqa: ANN401
        try:
            self._install()
        except BaseException:  # a signal that came before
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
            if before is not None:  # it was not installed from Python
                self._before[number] = before
                signal.signal(number, self._receive)

    def _end(self) -> None:
        """Puts the handlers back, that of SIGINT last, and delivers what was held."""
        try:
            self._put_back(signal.SIGTERM)
        finally:
            self._put_back(signal.SIGINT)
        while self._held:
            signal.raise_signal(self._held.pop(0))

    def _put_back(self, number: int) -> None:
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
    """A change for as long as a ``with`` block lasts.

    Signals interrupt what runs inside, but neither the change nor its reversal.

    Args:
        do: makes the change.
        undo: takes it back, also one that was made in part or not at all.
        value: what ``as`` is given.
        ends: exceptions of this class end the block and go no further.
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
        """Whether the change is being made or taken back right now."""
        while frame is not None:
            if frame.f_code in _CHANGING and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False


_CHANGING = (Reversible.__enter__.__code__, Reversible.__exit__.__code__)


def replaced(owner: object, **values: object) -> Reversible:
    """Inside, attributes of an object have other values."""
    before = {name: getattr(owner, name) for name in values}

    def put(those: dict[str, Any]) -> None:
        for name, value in those.items():
            setattr(owner, name, value)

    return Reversible(lambda: put(values), lambda: put(before))
