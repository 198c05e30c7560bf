"""zsRE: questions about a subject, rephrased, and an unrelated question from Natural Questions.

Levy et al. 2017; rephrases De Cao et al. 2021; split and fields Mitchell et al. 2022 (MEND). Three
conventions share the name, and their tables cannot be compared, see ``ZsRE.variant``.
"""

from __future__ import annotations

from typing import Literal

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.files import Row
from corrigenda.datamodules.records import EditCase, Probe
from corrigenda.datamodules.tasks import Tasks


class ZsRE(EditDataModule):
    """zsRE with the fields of MEND's release, in one of three conventions.

    The fields are ``subject``, ``src``, ``rephrase``, ``alt``, ``answers``, ``loc``, ``loc_ans``;
    EasyEdit adds ``portability``.

    The locality probe is reported in two ways: ``accuracy`` is whether the model knows the answer
    (M; about .24 before any edit), ``agreement`` whether its answer is unchanged by editing (E, P).

    A record without ``answers`` is edited towards ``alt`` in every variant: releases that lack the
    field have put the first answer there. Without ``loc`` a case has no locality probe.

    Args:
        path: cases to edit and evaluate: .json, .jsonl, either with .gz, or a Hub dataset
            (owner/name:split).
        train_path: cases a learned editor is trained on; those about an evaluated subject are left
            out.
        batch_size: cases per batch.
        limit: evaluate only the first so many cases (counted after known_only).
        val_fraction: share of the training subjects held out to validate during fit.
        seed: random seed of the held-out share.
        known_only: evaluate only cases the model answers correctly before it is edited.
        val_limit: validate during fit on only the first so many held-out cases.
        tasks: how the evaluation cases become tasks that fit learns one after the other; by default they are
            one set.
        eval_batch_size: cases per batch when they are evaluated; by default batch_size.
        variant: whose convention. M (ROME, MEMIT): write the first of 'answers', a true one; the
            locality question ends in a question mark. E (EasyEdit): write 'alt', a wrong answer.
            P (the code of MEND and SERAC): as E, but efficacy is measured on the rephrase, as their
            edit accuracy is.
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
        batch_size: int = 8,
        limit: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        known_only: bool = False,
        val_limit: int | None = None,
        tasks: Tasks | None = None,
        eval_batch_size: int | None = None,
        variant: Literal["M", "E", "P"] = "E",
    ) -> None:
        super().__init__(
            path,
            train_path,
            batch_size,
            limit,
            val_fraction,
            seed,
            known_only,
            val_limit,
            tasks,
            eval_batch_size,
        )
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
