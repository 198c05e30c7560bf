"""A model that is edited from the shell: its edits, its answers before and after, and how they are shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corrigenda.datamodules.files import Row
from corrigenda.datamodules.own import own_case
from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editing.editor import Editor, editing_mode
from corrigenda.modules.editing.memory import MemoryPatch
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.model.delta import add_deltas
from corrigenda.modules.model.handle import EditHandle
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline.edit_files import printable, refuse_existing
from corrigenda.pipeline.errors import UserError

WIDTH = 80
SHOWN = 20  # questions whose answers are printed
SHOWN_AS_THEY_ARE = "\n\t"  # control characters
# Criterion to what its questions are called.
CRITERIA = {
    "efficacy": "prompt",
    "generality": "paraphrase",
    "portability": "follows from it",
    "locality": "neighbour",
}


@dataclass(frozen=True)
class Fact:
    """A fact given on the command line, and questions about it.

    Attributes:
        prompt: a text with its subject, or with ``{}`` in the subject's place.
        subject: what the fact is about.
        target: the new answer.
        rephrase: other wordings of the prompt.
        locality: prompts whose answers should stay.
    """

    prompt: str
    subject: str
    target: str
    rephrase: Sequence[str] = ()
    locality: Sequence[str] = ()

    def case(self) -> EditCase:
        """The case of the fact; raises DataError, which names the option, if it cannot be edited."""
        fields = {
            "prompt": self.prompt,
            "subject": self.subject,
            "target_new": self.target,
            "rephrase": list(self.rephrase),
        }
        case = own_case(Row("the edit", 0, fields))
        near = tuple(Probe(text.replace("{}", self.subject)) for text in self.locality)
        return replace(case, probes={**case.probes, "locality": near})


@dataclass(frozen=True)
class Answer:
    """A question and a model's answer.

    Attributes:
        criterion: what the question tests.
        probe: the question.
        text: the model's continuation.
        probability: of the expected answer; None where none is expected.
        is_exact: whether every token of the expected answer is the most likely one.
    """

    criterion: str
    probe: Probe
    text: str
    probability: float | None
    is_exact: bool


class Session:
    """A model, a method, and the edits made so far.

    Args:
        lm: the model.
        editor: the method.
        tokens: length of an answer.
    """

    def __init__(self, lm: LanguageModel, editor: Editor, tokens: int) -> None:
        self.lm, self.editor, self.tokens = lm, editor, tokens
        self.made: list[tuple[EditHandle, list[Edit]]] = []

    def prepare(self) -> float:
        """Computes what the first edit needs; returns the seconds."""
        start = time.perf_counter()
        self.editor.check(self.lm)
        with editing_mode():
            self.editor.prepare(self.lm)
        return time.perf_counter() - start

    def edit(self, edits: Sequence[Edit]) -> float:
        """Makes edits together; returns the seconds."""
        start = time.perf_counter()
        with editing_mode():
            handle = self.editor.edit(self.lm, edits)
        self.made.append((handle, list(edits)))
        return time.perf_counter() - start

    def undo(self) -> list[Edit]:
        """Removes the newest edits and returns them; raises UserError if there are none."""
        if not self.made:
            raise UserError("there is no edit to undo")
        handle, edits = self.made.pop()
        handle.remove()
        return edits

    def answers(self, cases: Sequence[EditCase]) -> list[Answer]:
        """The model's answers to the questions of cases."""
        questions = [
            (criterion, probe)
            for case in cases
            for criterion in CRITERIA
            for probe in case.probes.get(criterion, ())
        ]
        texts = self.lm.generate([probe.prompt for _, probe in questions], self.tokens)
        expected = [probe for criterion, probe in questions if criterion != "locality"]
        scores = self.lm.score([p.prompt for p in expected], [str(p.target) for p in expected])
        chances = iter(scores.logprob_BM.sum(1).exp().tolist())
        exact = iter(scores.exact_B.tolist())
        return [
            Answer(criterion, probe, text, None, False)
            if criterion == "locality"
            else Answer(criterion, probe, text, next(chances), next(exact))
            for (criterion, probe), text in zip(questions, texts, strict=True)
        ]

    def save(self, file: Path) -> None:
        """Writes all edits into one file; raises UserError if there are none or the method has no such file."""
        if not self.made:
            raise UserError("there is no edit to save")
        refuse_existing(file, "file")
        whole(self.lm.handles).save(file)
        if not file.exists():
            raise UserError(f"edits of {type(self.editor).__name__} cannot be saved")


def whole(handles: Sequence[EditHandle]) -> Any:  # noqa: ANN401
    """What has all edits of one method, and can be saved."""
    newest = handles[-1]
    if all(isinstance(handle, WeightPatch) for handle in handles):
        deltas = [handle.delta for handle in handles if isinstance(handle, WeightPatch)]
        return add_deltas(deltas) if len(deltas) > 1 else deltas[0]
    if isinstance(newest, MemoryPatch):
        every = copy(newest)
        every.edits = newest.memory.edits[: newest.end]
        return every
    if (
        isinstance(newest, ModulePatch) or len(handles) == 1
    ):  # whose newest memory extends the older ones
        return newest
    raise UserError("these edits cannot be saved in one file: make them together")


# ---------------------------------------------------------------------------- what is shown


def show(before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """Prints questions with their answers, and how many are as they should be."""
    for was, now in list(zip(before, after, strict=True))[:SHOWN]:
        write(f"\n{_shortened(now.probe.prompt, WIDTH - 20)}  ({CRITERIA[now.criterion]})")
        write(f"  before  {_shortened(was.text, WIDTH - 10)}")
        write(f"  after   {_shortened(now.text, WIDTH - 10)}")
        if now.probability is not None and was.probability is not None:
            write(
                f"  P({_shortened(str(now.probe.target), 40)})  {_share(was.probability)} -> "
                f"{_share(now.probability)}"
            )
    if len(after) > SHOWN:
        write(f"\nand {len(after) - SHOWN} more questions")
    write("")
    for criterion, name in CRITERIA.items():
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if b.criterion == criterion]
        if not pairs:
            continue
        if criterion == "locality":
            kept = sum(a.text == b.text for a, b in pairs)
            write(f"{name + ':':<17}{kept} of {len(pairs)} with the same answer as before")
        else:
            right = sum(b.is_exact for _, b in pairs)
            write(f"{name + ':':<17}{right} of {len(pairs)} with the expected answer")


def _share(probability: float) -> str:
    return f"{100 * probability:.3g} %"


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _shortened(text: str, width: int) -> str:
    """The text on one line of at most ``width`` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else f"{line[: width - 3]}..."


def write(text: str) -> None:
    sys.stdout.write(f"{printable(text, SHOWN_AS_THEY_ARE)}\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Says what takes a while."""
    write(f"{text} ...")
