"""MQuAKE: questions of several steps whose answer changes with the facts (Zhong et al. 2023, arXiv 2305.14795)."""

from __future__ import annotations

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.files import Row
from corrigenda.datamodules.records import EditCase, Probe


class MQuAKE(EditDataModule):
    """MQuAKE in its original fields: several edits per case and a question that needs all of them.

    The probes of a case: ``efficacy``, the edits as statements (edit-wise accuracy); ``multihop``, the question in
    its three wordings; ``hops``, the question of every step on the way to the new answer, edited or not
    (their ``all_*`` measures are the instance-wise accuracy). The last two have the published aliases,
    which count in free-running answers (``wild_*``).

    Questions have no examples before them. In the first release of the full set, edits of different cases may
    contradict each other: edit those cases one at a time, not all together.

    Args:
        known_only: evaluate only cases of which the model knows every fact to be edited.
    """

    source = "https://github.com/princeton-nlp/MQuAKE"

    def parse(self, row: Row) -> EditCase:
        edits = tuple(rewrite.rewrite() for rewrite in row.records("requested_rewrite"))
        if not edits:
            raise row.error("requested_rewrite", "a case needs at least one edit")
        new = row.text("new_answer").strip()
        rival = _rival(new, row.text("answer").strip())
        aliases = row.texts("new_answer_alias")
        questions = row.texts("questions")
        probes = {
            "efficacy": tuple(
                Probe(e.text, e.target_new, _rival(e.target_new, e.target_true)) for e in edits
            ),
            "multihop": tuple(Probe(question, new, rival, aliases) for question in questions),
            "hops": tuple(
                Probe(
                    hop.text("question"),
                    hop.text("answer").strip(),
                    None,
                    hop.texts("answer_alias"),
                )
                for hop in row.records("new_single_hops")
            ),
        }
        return EditCase(row.case_id, edits, {name: some for name, some in probes.items() if some})


def _rival(new: str, true: str | None) -> str | None:
    """The other answer, if there is one: some steps keep their answer."""
    return true if true != new else None
