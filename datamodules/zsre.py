"""zsRE: questions about a subject, rephrased, and an unrelated question from Natural Questions.

Levy et al. 2017; rephrases De Cao et al. 2021; split and fields Mitchell et al. 2022 (MEND). Three
conventions share the name, and their tables cannot be compared, see ``ZsRE.variant``.
"""

from __future__ import annotations

from typing import Any, Literal

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.files import Row
from corrigenda.datamodules.records import EditCase, Probe


class ZsRE(EditDataModule):
    """zsRE with the fields of MEND's release, in one of three conventions.

    The fields are ``subject``, ``src``, ``rephrase``, ``alt``, ``answers``, ``loc``, ``loc_ans``;
    EasyEdit adds ``portability``.

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
        variant: Literal["M", "E", "P"] = "E",
        **rest: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(path, train_path, **rest)
        if variant not in ("M", "E", "P"):
            raise ValueError(f"variant must be M, E or P, got {variant!r}")
        self.variant = variant

    def parse(self, row: Row) -> EditCase | None:
        answers = self._answers(row)
        writes_answer = self.variant == "M" and answers
        if not writes_answer and row.is_blank("alt"):
            return None  # the public training file has some
        target = answers[0] if writes_answer else row.text("alt").strip()
        true = answers[0] if answers and answers[0] != target else None
        edit = row.edit("src", target, target_true=true)

        aliases = answers[1:] if writes_answer else ()
        rephrased = Probe(row.text("rephrase"), target, aliases=aliases)
        efficacy = rephrased if self.variant == "P" else Probe(edit.text, target, aliases=aliases)
        probes: dict[str, tuple[Probe, ...]] = {"efficacy": (efficacy,), "generality": (rephrased,)}
        probes |= self._locality(row) | self._portability(row)
        return EditCase(row.case_id, (edit,), probes)

    def _answers(self, row: Row) -> tuple[str, ...]:
        if not row.has("answers"):
            return ()
        answers = tuple(answer.strip() for answer in row.texts("answers"))
        if not answers:
            raise row.error("answers", "expected at least one answer, got an empty list")
        return answers

    def _locality(self, row: Row) -> dict[str, tuple[Probe, ...]]:
        if not row.has("loc") and not row.has("loc_ans"):
            return {}
        prompt = row.text("loc")
        if self.variant == "M" and not prompt.endswith("?"):
            prompt += "?"
        return {"locality": (Probe(prompt, row.text("loc_ans").strip()),)}

    def _portability(self, row: Row) -> dict[str, tuple[Probe, ...]]:
        # The questions follow from alt, which variant M does not write.
        if self.variant == "M" or not row.fields.get("portability"):
            return {}
        hop = row.record("portability")
        if not hop.fields.get("New Question"):
            return {}
        return {"portability": (Probe(hop.text("New Question"), hop.text("New Answer").strip()),)}
