"""Commands as processes of their own, forked from one that has imported everything: each starts at once."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

UNCAUGHT = 70  # exit status of a command that ends with a traceback
MEMORY = (
    16 * 2**30
)  # bytes of address space; a command that wants more fails rather than fills the machine


def import_everything() -> None:
    """What commands import when they start, for the process that others are forked from."""
    import torch
    from lightning.pytorch.cli import LightningCLI  # noqa: F401
    from lightning.pytorch.loggers import CSVLogger, WandbLogger  # noqa: F401
    from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import corrigenda.modules.statistics.moments  # noqa: F401
    import corrigenda.pipeline.cli  # noqa: F401
    import corrigenda.pipeline.compare
    import corrigenda.pipeline.doctor
    import corrigenda.pipeline.edits
    import corrigenda.pipeline.fit
    import corrigenda.pipeline.report  # noqa: F401

    corrigenda.pipeline.fit.import_methods()
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Ended:
    """How a process came to its end.

    Attributes:
        status: exit status, negative for a signal; None where it had to be stopped after the time limit.
        out, err: what it wrote.
        seconds: how long it took.
    """

    status: int | None
    out: str
    err: str
    seconds: float


class Process:
    """One ``corrigenda`` command in a forked process that leads a process group, like one typed into a shell.

    Args:
        words: the command line.
        folder: its working directory; its output goes into ``FOLDER.out`` and ``FOLDER.err``.
        env: environment variables to set; None removes one.
        before: called in the new process before the command, to patch what is to fail.
    """

    def __init__(
        self,
        words: Sequence[object],
        folder: Path,
        env: Mapping[str, str | None] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.folder, self.started = folder, time.monotonic()
        self._files = [folder.with_name(f"{folder.name}.{end}") for end in ("out", "err")]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._run([str(word) for word in words], env or {}, before))

    def _run(
        self,
        words: list[str],
        env: Mapping[str, str | None],
        before: Callable[[], object] | None,
    ) -> int:
        from corrigenda.pipeline import cli

        status = 0
        try:
            os.setsid()
            os.chdir(self.folder)
            for number, path in enumerate(self._files, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = (
                open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
                for number, mode in enumerate("rww")
            )
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for name, value in env.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            if before is not None:
                before()
            cli.main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            status = UNCAUGHT
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        return status

    def is_running(self) -> bool:
        """Whether it has not ended yet; leaves its exit status to :meth:`end`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def send(self, number: int) -> None:
        """Sends a signal to the process and to those it has started, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def end(self, seconds: float = 300.0) -> Ended:
        """Waits for the end, at most so long; then kills it."""
        until, pause = time.monotonic() + seconds, 0.001
        while self.is_running() and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        late = self.is_running()
        if late:
            self.send(signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        took = time.monotonic() - self.started
        out, err = (path.read_text("utf-8", errors="replace") for path in self._files)
        return Ended(None if late else code, out, err, took)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path there; empty folders count, with a slash at the end."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not any(path.iterdir()):
            found[f"{name}/"] = b""
        elif path.is_file():
            found[name] = path.read_bytes()
    return found
