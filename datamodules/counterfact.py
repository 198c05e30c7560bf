"""CounterFact (Meng et al. 2022): a false object replaces a true one; its neighbours must not change."""

from __future__ import annotations

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.files import Row
from corrigenda.datamodules.records import Edit, EditCase, Probe


class CounterFact(EditDataModule):
    """CounterFact in its original form or in EasyEdit's.

    A record is recognised by its fields. The original has ``requested_rewrite``,
    ``paraphrase_prompts``, ``neighborhood_prompts`` and ``generation_prompts``;
    ``attribute_prompts`` are not used. EasyEdit's, which the training files have, is flat, with one
    ``rephrase_prompt`` and one ``locality_prompt``; most of its rephrases are no paraphrases of the
    edit, so report generality from the original form.

    Every probe has two answers. On the edit and its paraphrases the new answer should win; on
    neighbours, for which the true answer still holds, the true one should.
    """

    source = (
        "https://rome.baulab.info/data/dsets/counterfact.json; training cases: "
        "counterfact-train.json, distributed with EasyEdit"
    )
    left_out = "the new target is the true one"

    def parse(self, row: Row) -> EditCase | None:
        return counterfact_case(row)


def counterfact_case(row: Row) -> EditCase | None:
    """The case of a record in either form; None if the new target is the true one."""
    full = row.has("requested_rewrite")
    edit = row.record("requested_rewrite").rewrite() if full else _flat_edit(row)
    if edit.target_new == edit.target_true:
        return None
    return _original(row, edit) if full else _flat(row, edit)


def _original(row: Row, edit: Edit) -> EditCase:
    new, true = edit.target_new, edit.target_true
    paraphrases = row.texts("paraphrase_prompts")
    neighbours = row.texts("neighborhood_prompts")
    return EditCase(
        row.case_id,
        (edit,),
        _probes(
            efficacy=(Probe(edit.text, new, true),),
            generality=tuple(Probe(prompt, new, true) for prompt in paraphrases),
            locality=tuple(Probe(prompt, true, new) for prompt in neighbours),
        ),
        row.texts("generation_prompts") if row.has("generation_prompts") else (),
    )


def _flat_edit(row: Row) -> Edit:
    true = row.text("ground_truth").strip()
    return row.edit("prompt", row.text("target_new").strip(), target_true=true)


def _flat(row: Row, edit: Edit) -> EditCase:
    new, true = edit.target_new, edit.target_true
    neighbour = row.text("locality_ground_truth").strip()
    rival = new if new != neighbour else None
    return EditCase(
        row.case_id,
        (edit,),
        _probes(
            efficacy=(Probe(edit.text, new, true),),
            generality=(Probe(row.text("rephrase_prompt"), new, true),),
            locality=(Probe(row.text("locality_prompt"), neighbour, rival),),
        ),
    )


def _probes(**probes: tuple[Probe, ...]) -> dict[str, tuple[Probe, ...]]:
    """The criteria for which the record has prompts."""
    return {criterion: some for criterion, some in probes.items() if some}
