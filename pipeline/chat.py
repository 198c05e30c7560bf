"""The conversation of ``corrigenda edit --chat``: questions to the edited model, and commands that edit it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from corrigenda.datamodules.records import Edit
from corrigenda.pipeline.edit_files import printable
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.session import SHOWN_AS_THEY_ARE, Fact, Session, show, write

ANSWER_TOKENS = 100
HELP = """\
Every line is a new question to the model. Commands:
  /edit PROMPT | SUBJECT | TARGET   another edit, such as /edit The capital of {} is | Chad | Oslo
  /undo                             remove the newest edit
  /edits                            list the active edits
  /save FILE                        write the active edits to a file (.safetensors)
  /help                             this list
  /quit                             end, as Ctrl-D does"""


def talk(session: Session) -> None:
    """Reads lines from standard input until it ends; mistakes are reported, and the conversation goes on."""
    commands: dict[str, Callable[[Session, str], None]] = {
        "/edit": _edit,
        "/undo": _undo,
        "/edits": _list,
        "/save": _save,
        "/help": lambda *_: write(HELP),
    }
    write("\nTalking to the edited model; /help lists the commands.")
    for line in _lines():
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return
        try:
            if word in commands:
                commands[word](session, rest.strip())
            elif word.startswith("/"):
                raise UserError(f"unknown command {word!r}: /help lists the commands")
            elif word:
                _answer(session, line.strip())
        except (UserError, ValueError, OSError) as error:
            write(f"error: {' '.join(str(error).split())}")


def _lines() -> Iterator[str]:
    """The lines that are typed, or come from a pipe or file, which are then shown."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            write(f"> {line.strip()}")
            yield line
        return
    import readline  # noqa: F401  lets input() edit its line

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _answer(session: Session, question: str) -> None:
    """Prints the answer token by token."""
    begun = False

    def show_more(text: str) -> None:
        nonlocal begun
        shown = text if begun else text.lstrip()
        begun = begun or bool(shown)
        sys.stdout.write(printable(shown, SHOWN_AS_THEY_ARE))
        sys.stdout.flush()

    session.lm.generate([question], ANSWER_TOKENS, on_text=show_more)
    sys.stdout.write("\n")


def _edit(session: Session, rest: str) -> None:
    parts = [part.strip() for part in rest.split("|")]
    if len(parts) != 3 or not all(parts):
        raise UserError("/edit needs three parts: /edit PROMPT | SUBJECT | TARGET")
    case = Fact(*parts).case()
    before = session.answers([case])
    seconds = session.edit(case.edits)
    show(before, session.answers([case]))
    write(f"1 edit in {seconds:.1f} s")


def _undo(session: Session, rest: str) -> None:
    for edit in session.undo():
        write(f"removed: {_stated(edit)}")


def _list(session: Session, rest: str) -> None:
    edits = [edit for _, some in session.made for edit in some]
    for number, edit in enumerate(edits, start=1):
        write(f"{number:>3}  {_stated(edit)}")
    if not edits:
        write("no edit is active")


def _stated(edit: Edit) -> str:
    return f"{edit.text} -> {edit.target_new}"


def _save(session: Session, rest: str) -> None:
    if not rest:
        raise UserError("/save needs a file: /save edits.safetensors")
    session.save(Path(rest).expanduser())
    write(f"saved in {rest}")
