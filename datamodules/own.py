"""The user's own facts, and files of EasyEdit and KnowEdit: one record per edit, with what is known about it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.counterfact import counterfact_case
from corrigenda.datamodules.files import Row
from corrigenda.datamodules.records import BLANKS, SLOT, Edit, EditCase, Probe, prompt_end
from corrigenda.datamodules.text_files import DataError
from corrigenda.datamodules.zsre import zsre_case

log = logging.getLogger(__name__)

# The fields, and what published files call them.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("text",),
    "subject": ("concept",),
    "target_new": ("labels",),
    "target_true": ("ground_truth",),
    "rephrase": (
        "rephrases",
        "rephrase_prompt",
        "rephrase_prompts",
        "ood_rephrase",
    ),
    "locality": (),
    "portability": (),
    "aliases": (),
    "relation": ("relation_id",),
    "task": (),
    "case_id": (),
}
FLAT = ("locality", "portability")  # also as two fields, locality_prompt and locality_ground_truth
QUESTION = ("prompt", "question", "New Question")
ANSWER = ("target", "ground_truth", "answer", "New Answer")
# Fields of zsRE and CounterFact, which have readers of their own.
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("src", "requested_rewrite"),
    "target_new": ("alt",),
    "target_true": ("answers",),
    "rephrase": ("paraphrase_prompts",),
    "locality": ("loc", "loc_ans", "neighborhood_prompts"),
    "portability": ("inverse question", "alter_subject_question"),
}
ALL_NAMES = {field: (*names, *OTHER_NAMES.get(field, ())) for field, names in FIELDS.items()}
NO_ANSWER = "<|endoftext|>"  # EasyEdit's placeholder for an unknown true answer


def known_field(name: str) -> str | None:
    """The field that a name in a file stands for; None for an unknown name."""
    flat = next(
        (field for field in FLAT if name in (f"{field}_prompt", f"{field}_ground_truth")), None
    )
    return flat or next(
        (field for field, others in ALL_NAMES.items() if name in (field, *others)), None
    )


class Edits(EditDataModule):
    """Facts to write: ``prompt``, ``subject``, ``target_new`` and, as far as they are known, the other fields.

    ======================  ==================================================================================
    field                   content
    ======================  ==================================================================================
    ``prompt``              a text that the answer continues, or a question; ``{}`` stands for the subject, which
                            is otherwise found in it, whatever its letter case
    ``subject``             what the fact is about
    ``target_new``          the answer to write: a text, a number, or a list whose first entry is written
    ``target_true``         the answer until now (enables ``known_only`` and preference)
    ``rephrase``            other wordings of the prompt (criterion generality)
    ``locality``            questions whose answers must stay, each a record of ``prompt`` and ``target``
    ``portability``         questions whose answers follow from the edit, in the same form
    ``aliases``             further spellings of the new answer that count in free-running answers
    ``relation``, ``task``  names that group edits; ``task`` for ``tasks.by: file``
    ======================  ==================================================================================

    Files of EasyEdit, KnowEdit, WISE, zsRE and CounterFact are read as they are published: their names of the
    fields are known. Other fields are ignored.

    Args:
        skip_bad: leave out records that cannot be used, and say how many, instead of refusing the file.
        **rest: further settings, of EditDataModule.
    """

    left_out = "no answer, or the new answer is the true one"

    def __init__(
        self,
        path: str | None = None,
        train_path: str | None = None,
        skip_bad: bool = False,
        **rest: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(path, train_path, **rest)
        self.skip_bad = skip_bad
        self.problems: list[str] = []
        """What is wrong with the records that were left out."""
        self.found: dict[str, str] = {}
        """How the subject of each case was found, by its id."""

    def report(self, error: DataError) -> None:
        if not self.skip_bad:
            raise error
        self.problems.append(str(error))

    def parse(self, row: Row) -> EditCase | None:
        if row.has("requested_rewrite"):
            case = counterfact_case(row)
        elif row.has("src"):
            case = zsre_case(row)
        else:
            case = own_case(row)
        if case is not None:
            self.found[case.case_id] = how_found(row, case.edits[0])
        return case

    def read(self, path: str) -> list[EditCase]:
        if path in self._files:
            return super().read(path)
        problems = len(self.problems)
        try:
            cases = super().read(path)
        except DataError as error:
            first = self.problems[problems:][:1]
            raise DataError("; the first problem: ".join([str(error), *first])) from None
        if skipped := self.problems[problems:]:
            log.warning("%s: %d skipped; the first: %s", path, len(skipped), skipped[0])
        for line in remarks(cases, self.found, self.places):
            log.warning("%s: %s", path, line)
        return cases


def remarks(
    cases: Iterable[EditCase], found: Mapping[str, str], places: Mapping[str, str]
) -> list[str]:
    """What a user should know of usable records, a line each: respelled subjects, contradicting edits."""
    cases = list(cases)
    counts = Counter(found[case.case_id] for case in cases)
    lines = [
        f"{counts[how]} subject{'s' * (counts[how] > 1)} {how}: {what}"
        for how, what in RESPELLED.items()
        if counts[how]
    ]
    targets: dict[str, tuple[str, str]] = {}
    against = []
    for case in cases:
        for edit in case.edits:
            here = places[case.case_id].rpartition(", ")[2]
            first, target = targets.setdefault(edit.text, (here, edit.target_new))
            if target != edit.target_new:
                against.append((edit.text, target, first, edit.target_new, here))
    if against:
        text, one, first, other, second = against[0]
        more = f" ({len(against)} such prompts)" if len(against) > 1 else ""
        lines.append(
            f"{text!r} is to be both {one!r} ({first}) and {other!r} ({second}){more}: made together, at most one "
            "can hold"
        )
    return lines


MARKED, WRITTEN, OTHER_CASE, OTHER_FORM = (
    "marked by {}",
    "found as written",
    "found in other letter case",
    "found in another Unicode form",
)
RESPELLED = {
    OTHER_CASE: "the prompt's spelling is used",
    OTHER_FORM: "both are brought to the same, NFC",
}


def how_found(row: Row, edit: Edit) -> str:
    """How the subject of an edit was found in its record's prompt."""
    if row.has("requested_rewrite"):
        return MARKED if SLOT in row.record("requested_rewrite").text("prompt") else WRITTEN
    fields = _named(row).fields
    prompt, subject = fields.get("prompt", fields.get("src")), str(fields["subject"]).strip()
    if SLOT in prompt:
        return MARKED
    if edit.text != prompt:
        return OTHER_FORM
    return WRITTEN if edit.subject == subject else OTHER_CASE


def own_case(row: Row) -> EditCase:
    """The case of a record with the fields of :class:`Edits`."""
    row = _named(row)
    new, *others = row.answers("target_new")
    known = [answer for answer in row.answers("target_true", optional=True) if answer != NO_ANSWER]
    true = known[0].strip() if known else None
    relation, task = (next(iter(row.answers(n, optional=True)), None) for n in ("relation", "task"))
    edit = row.edit("prompt", new, unique=True, target_true=true, relation=relation)
    rival = true if true != edit.target_new else None
    aliases = tuple(dict.fromkeys([*others, *row.answers("aliases", optional=True)]))

    def probe(prompt: str) -> Probe:
        return Probe(_filled(prompt, edit), edit.target_new, rival, aliases)

    rephrases = row.answers("rephrase", optional=True)
    probes = {
        "efficacy": (probe(edit.text),),
        "generality": tuple(map(probe, rephrases)),
        "locality": _questions(row, "locality", edit),
        "portability": _questions(row, "portability", edit),
    }
    kept = {criterion: some for criterion, some in probes.items() if some}
    return EditCase(row.case_id, (edit,), kept, task=task)


def _named(row: Row) -> Row:
    """The record with our names of the fields beside published ones, and no blanks around prompt and subject."""
    fields = dict(row.fields)
    for name, others in FIELDS.items():
        published = next((other for other in others if row.has(other)), None)
        if published and not row.has(name):
            fields[name] = fields[published]
    for name in FLAT:
        prompt, answer = f"{name}_prompt", f"{name}_ground_truth"
        if row.has(prompt) and not row.has(name):
            fields[name] = {"prompt": fields[prompt], "target": fields.get(answer)}
    for name in ("prompt", "subject"):
        if isinstance(text := fields.get(name), str):
            fields[name] = prompt_end(text.lstrip(BLANKS))
    return Row(row.where, row.index, fields, row.prefix)


def _filled(prompt: str, edit: Edit) -> str:
    return prompt_end(prompt.lstrip(BLANKS)).replace(SLOT, edit.subject)


def _questions(row: Row, name: str, edit: Edit) -> tuple[Probe, ...]:
    """The questions of a field: one, a list of them, or named groups; those without any answer are left out."""
    value = row.fields.get(name)
    if not value:
        return ()
    if isinstance(value, list):
        parts = {f"{name}[{i}]": part for i, part in enumerate(value)}
        listed = Row(row.where, row.index, parts, row.prefix)
        return tuple(probe for part in parts for probe in _questions(listed, part, edit))
    if not isinstance(value, dict):
        raise row.error(name, "expected a question with its answer, a record of prompt and target")
    inner = row.record(name)
    if not any(map(inner.has, QUESTION)):
        return tuple(probe for group in inner.fields for probe in _questions(inner, group, edit))
    question = next(filter(inner.has, QUESTION))
    answer = next((key for key in ANSWER if key in inner.fields), ANSWER[0])
    prompts = inner.answers(question)
    if len(prompts) > 1:
        return _paired(inner, question, answer, edit)
    if answer not in inner.fields:
        raise inner.error(answer, f"missing: the answer to {prompts[0]!r}")
    answers = inner.answers(answer, optional=True)
    if not answers:
        return ()
    return (Probe(_filled(prompts[0], edit), answers[0], None, answers[1:]),)


def _paired(row: Row, question: str, answer: str, edit: Edit) -> tuple[Probe, ...]:
    """The questions of two lists of equal length."""
    prompts, answers = (row.fields.get(key) for key in (question, answer))
    if not isinstance(answers, list) or len(answers) != len(prompts or ()):
        raise row.error(
            answer, f"expected as many answers as there are prompts, {len(prompts or ())}"
        )
    pairs = [{question: p, answer: a} for p, a in zip(prompts or (), answers, strict=True)]
    return _questions(Row(row.where, row.index, {"pairs": pairs}, row.prefix), "pairs", edit)
