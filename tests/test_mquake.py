"""MQuAKE: its fields, and what makes a case right."""

import json
from pathlib import Path

import pytest
import torch

from corrigenda.datamodules.files import DataError
from corrigenda.datamodules.mquake import MQuAKE
from corrigenda.modules import metrics
from corrigenda.modules.evaluation.measures import PROTOCOLS
from corrigenda.modules.evaluation.module import EditingModule

SHARED = Path(__file__).parents[2] / "shared" / "data" / "mquake"
FILES = {"MQuAKE-CF-3k_subset354.jsonl": (354, {1, 2, 3}), "MQuAKE-hard.jsonl": (429, {4})}


def record(**changes):
    """One invented record in the published fields."""

    def rewrite(prompt, subject, new, true):
        return {"prompt": prompt, "relation_id": "P0", "subject": subject, "question": f"{subject}?",
                "target_new": {"str": new, "id": "Q1"}, "target_true": {"str": true, "id": "Q2"}}  # fmt: skip

    def hop(question, cloze, answer, *aliases):
        return {
            "question": question,
            "cloze": cloze,
            "answer": answer,
            "answer_alias": list(aliases),
        }

    return {
        "case_id": 7,
        "requested_rewrite": [
            rewrite("The owner of {} is", "the Tin Owl", "Iris Vane", "Mira Stone"),
            rewrite("{} was born in", "Iris Vane", "Zembla", "Lima"),
        ],
        "questions": ["Where was the owner of the Tin Owl born?", "The Tin Owl's owner is from where?",
                      "Whence is the owner of the Tin Owl?"],
        "answer": "Rome", "answer_alias": ["Roma"],
        "new_answer": "Zembla", "new_answer_alias": ["Nova Zembla", "the Isle"],
        "single_hops": [hop("Who owns the Tin Owl?", "The owner of the Tin Owl is", "Mira Stone"),
                        hop("Where was Mira Stone born?", "Mira Stone was born in", "Rome", "Roma")],
        "new_single_hops": [hop("Who owns the Tin Owl?", "The owner of the Tin Owl is", "Iris Vane", "Iris"),
                            hop("Where was Iris Vane born?", "Iris Vane was born in", "Zembla")],
        "orig": {},
    } | changes  # fmt: skip


def read(tmp_path, *records, **settings):
    path = tmp_path / "mquake.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return MQuAKE(str(path), **settings).cases("test")


def test_a_record_becomes_edits_questions_and_hops(tmp_path):
    (case,) = read(tmp_path, record())
    assert case.case_id == "7"
    assert [(e.text, e.target_new, e.target_true) for e in case.edits] == [
        ("The owner of the Tin Owl is", "Iris Vane", "Mira Stone"),
        ("Iris Vane was born in", "Zembla", "Lima"),
    ]
    assert {name: len(probes) for name, probes in case.probes.items()} == {
        "efficacy": 2, "multihop": 3, "hops": 2,
    }  # fmt: skip
    question, hop = case.probes["multihop"][1], case.probes["hops"][0]
    assert question.prompt == "The Tin Owl's owner is from where?"
    assert (question.target, question.rival) == ("Zembla", "Rome")
    assert question.aliases == ("Nova Zembla", "the Isle")
    assert (hop.prompt, hop.target, hop.rival, hop.aliases) == (
        "Who owns the Tin Owl?", "Iris Vane", None, ("Iris",),
    )  # fmt: skip
    assert [p.rival for p in case.probes["efficacy"]] == ["Mira Stone", "Lima"]


def test_an_answer_that_stays_has_no_rival(tmp_path):
    (case,) = read(tmp_path, record(answer="Zembla"))
    assert {probe.rival for probe in case.probes["multihop"]} == {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requested_rewrite": []}, "field 'requested_rewrite': a case needs at least one edit"),
        ({"requested_rewrite": ["x"]}, "expected a list of records, got text at 1"),
        (
            {"requested_rewrite": [{"prompt": "x"}]},
            r"field 'requested_rewrite\[0\].target_new': missing",
        ),
        ({"new_single_hops": [{"question": "?"}]}, r"field 'new_single_hops\[0\].answer': missing"),
        ({"new_answer": None}, "field 'new_answer': missing"),
    ],
)
def test_a_bad_record_is_named(tmp_path, changes, message):
    with pytest.raises(
        DataError, match="line 2, " + (message if message[0] == "f" else ".*" + message)
    ):
        read(tmp_path, record(case_id=1), record(**changes))


@pytest.mark.parametrize("name", FILES)
def test_the_published_files_are_read_whole(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not there: MQuAKE does not come with the project")
    count, num_edits = FILES[name]
    cases = MQuAKE(str(SHARED / name)).cases("test")
    assert len(cases) == count
    assert {len(case.edits) for case in cases} == num_edits
    assert {len(case.probes["multihop"]) for case in cases} == {3}
    assert {len(case.probes["hops"]) for case in cases} <= {2, 3, 4}
    assert all(
        case.probes["hops"][-1].target == case.probes["multihop"][0].target for case in cases
    )


# ---------------------------------------------------------------------------- verdicts

# Case 0: one of three right. Case 1: none. Case 2: both. Case 3 (of 5): half a point is not right.
VALUES = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5])
CASES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])


def test_any_and_all_of_a_cases_probes():
    any_C, all_C = (judge(VALUES, CASES, 5) for judge in (metrics.any_right, metrics.all_right))
    assert any_C[:4].tolist() == [1, 0, 1, 0] and all_C[:4].tolist() == [0, 0, 1, 0]
    assert any_C[4].isnan() and all_C[4].isnan()
    assert metrics.all_right(torch.tensor([torch.nan, 1.0]), torch.tensor([0, 0]), 1).item() == 0


def test_their_means_over_cases_are_taken_batch_by_batch():
    for metric, expected in ((metrics.MultiHopAccuracy(), 2 / 4), (metrics.HopAccuracy(), 1 / 4)):
        assert metric.compute().isnan() and metric.higher_is_better
        metric.update(VALUES[:5], CASES[:5])
        metric.update(VALUES[5:], CASES[5:])
        assert metric.compute().item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_verdicts_follow_from_the_probes(tiny_lm, tmp_path, kind):
    """Targets are what the model says of itself, for some probes; free answers count by their aliases."""
    lm = tiny_lm(kind)
    (case,) = read(tmp_path, record())
    said = [lm.generate([probe.prompt], 8)[0] for probe in case.probes["multihop"]]
    right = metrics.wild_answer(said[1]) or "nothing"
    (case,) = read(tmp_path, record(new_answer_alias=[right]))
    module = EditingModule(lm, generate_tokens=8)
    (result,) = module.evaluate([case])
    means = module.compute_means()
    expected = [metrics.wild_contains(metrics.wild_answer(t), ["Zembla", right]) for t in said]
    assert result.metrics["multihop/wild_contains"] == pytest.approx(sum(expected) / 3)
    assert (
        result.metrics["multihop/any_wild_contains"]
        == means["multihop/any_wild_contains"]
        == max(expected)
    )
    exact = [p["exact"] for p in result.probes if p["criterion"] == "hops"]
    assert result.metrics["hops/all_exact"] == float(all(exact))
    verdicts = {name for name in means if name.rpartition("/")[2].startswith(("any_", "all_"))}
    assert verdicts == {
        f"{criterion}_{measure}"
        for criterion in ("multihop/any", "hops/all")
        for measure in ("exact", "wild_exact", "wild_contains", "wild_prefix")
    }
    assert {PROTOCOLS[name.rpartition("/")[2]] for name in verdicts} == {"tf_exact", "wild"}
