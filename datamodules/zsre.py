"""zsRE: questions about a subject, rephrased, and an unrelated question from Natural Questions.

Levy et al. 2017; rephrases De Cao et al. 2021; split and fields Mitchell et al. 2022 (MEND). Three
conventions share the name, and their tables cannot be compared, see ``ZsRE.variant``.
"""

from __future__ import annotations

from typing import Any, Literal

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.files import Row
from corrigenda.datamodules.records import Edit, EditCase, Probe

Variant = Literal["M", "E", "P"]


class ZsRE(EditDataModule):
    """zsRE with the fields of MEND's release, in one of three conventions.

    The fields are ``subject``, ``src``, ``rephrase``, ``alt``, ``answers``, ``loc``, ``loc_ans``;
    EasyEdit adds ``portability`` and, in two files of their own, ``inverse question`` and
    ``alter_subject_question``.

    The locality probe is reported in two ways: ``accuracy`` is whether the model knows the answer
    (M; about .24 before any edit), ``agreement`` whether its answer is unchanged by editing (E, P).

    A record without ``answers`` is edited towards ``alt`` in every variant: releases that lack the
    field have put the first answer there. Without ``loc`` a case has no locality probe.

    Args:
        variant: whose convention. M (ROME, MEMIT): write the first of 'answers', a true one; the
            locality question ends in a question mark. E (EasyEdit): write 'alt', a wrong answer.
            P (the code of MEND and SERAC): as E, but efficacy is measured on the rephrase, as their
            edit accuracy is.
        **rest: further settings, of EditDataModule.
    """

    source = (
        "https://rome.baulab.info/data/dsets/zsre_mend_eval.json; training cases: "
        "zsre_mend_train.json, distributed with MEND and EasyEdit"
    )
    left_out = "'alt' is empty"

    def __init__(
        self,
        path: str | None = None,
        train_path: str | None = None,
        variant: Variant = "E",
        **rest: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(path, train_path, **rest)
        if variant not in ("M", "E", "P"):
            raise ValueError(f"variant must be M, E or P, got {variant!r}")
        self.variant = variant

    def parse(self, row: Row) -> EditCase | None:
        return zsre_case(row, self.variant)


def zsre_case(row: Row, variant: Variant = "E") -> EditCase | None:
    """The case of a record in one of the conventions, see :class:`ZsRE`; None if there is no answer to write."""
    answers = _answers(row)
    writes_answer = variant == "M" and answers
    if not writes_answer and row.is_blank("alt"):
        return None  # the public training file has some
    target = answers[0] if writes_answer else row.text("alt").strip()
    true = answers[0] if answers and answers[0] != target else None
    edit = row.edit("src", target, target_true=true)

    aliases = answers[1:] if writes_answer else ()
    rephrased = Probe(row.text("rephrase"), target, aliases=aliases)
    efficacy = rephrased if variant == "P" else Probe(edit.text, target, aliases=aliases)
    probes: dict[str, tuple[Probe, ...]] = {"efficacy": (efficacy,), "generality": (rephrased,)}
    probes |= _locality(row, variant)
    if variant != "M":  # the questions follow from alt
        probes |= _portability(row, edit)
    return EditCase(row.case_id, (edit,), probes)


def _answers(row: Row) -> tuple[str, ...]:
    if not row.has("answers"):
        return ()
    answers = tuple(answer.strip() for answer in row.texts("answers"))
    if not answers:
        raise row.error("answers", "expected at least one answer, got an empty list")
    return answers


def _locality(row: Row, variant: Variant) -> dict[str, tuple[Probe, ...]]:
    if not row.has("loc") and not row.has("loc_ans"):
        return {}
    prompt = row.text("loc")
    if variant == "M" and not prompt.endswith("?"):
        prompt += "?"
    return {"locality": (Probe(prompt, row.text("loc_ans").strip()),)}


def _portability(row: Row, edit: Edit) -> dict[str, tuple[Probe, ...]]:
    """EasyEdit's questions: what follows from the answer, the inverse relation, another name of the subject."""
    probes = []
    if row.fields.get("portability"):
        hop = row.record("portability")
        if hop.fields.get("New Question"):
            probes.append(Probe(hop.text("New Question"), hop.text("New Answer").strip()))
    if row.has("inverse question"):
        probes.append(Probe(row.text("inverse question"), edit.subject))
    if row.has("alter_subject_question"):
        probes.append(Probe(row.text("alter_subject_question"), edit.target_new))
    return {"portability": tuple(probes)} if probes else {}
