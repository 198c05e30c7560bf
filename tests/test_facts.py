"""The project's facts: the format of their files, and their cases."""

import json
import re
from collections import Counter
from itertools import combinations

import pytest

from corrigenda.datamodules.base import subjects
from corrigenda.datamodules.fact_tables import FOLDER, all_facts, statements
from corrigenda.datamodules.facts import NUM_SEEN, Facts

SPLITS = ("train", "val", "test")
FACTS = all_facts()
RELATIONS = list(dict.fromkeys(fact.relation for fact in FACTS))
CASES = {split: Facts().cases(split) for split in SPLITS}
EVERY_CASE = [case for cases in CASES.values() for case in cases]


def templates(relation):
    return (relation.statement, *relation.paraphrases, relation.question)


def test_there_are_many_facts():
    assert len(FACTS) >= 5000
    assert len(RELATIONS) >= 40
    assert min(Counter(fact.relation.id for fact in FACTS).values()) >= 40


def test_every_table_has_a_relation():
    tables = {path.stem for path in FOLDER.glob("*.tsv")}
    assert tables == {relation.id for relation in RELATIONS}


def test_the_readme_counts_right():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{len(FACTS):,} true facts in {len(RELATIONS)} relations" in text
    for relation in RELATIONS:
        facts = [fact for fact in FACTS if fact.relation == relation]
        objects = {fact.object for fact in facts}
        assert f"| {relation.id} | {len(facts)} | {len(objects)} |" in text


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.id)
def test_templates(relation):
    assert len(relation.paraphrases) == 2 * NUM_SEEN
    assert len(set(templates(relation))) == 2 * NUM_SEEN + 2
    for template in templates(relation):
        assert template.count("{}") == 1
        assert template == " ".join(template.split())
    assert relation.question.endswith("?")
    for template in (relation.statement, *relation.paraphrases):
        assert template[-1] not in " .?!:"


def test_facts_are_written_cleanly():
    for fact in FACTS:
        for text in (fact.subject, fact.object, *fact.also):
            assert text == " ".join(text.split()) and text, fact
            assert "{" not in text and "}" not in text, fact
        assert not re.search(r"\d", fact.object), fact
        assert fact.object[-1].isalnum() or fact.object[-1] in "'", fact
        assert len(fact.object.split()) <= 3, fact


def test_a_subject_stands_once_in_a_relation():
    twice = [
        key
        for key, n in Counter((fact.relation.id, fact.subject.casefold()) for fact in FACTS).items()
        if n > 1
    ]
    assert not twice


def test_also_true_objects_are_objects_of_the_relation():
    for relation in RELATIONS:
        facts = [fact for fact in FACTS if fact.relation == relation]
        objects = {fact.object for fact in facts}
        for fact in facts:
            assert set(fact.also) <= objects - {fact.object}, fact


def test_objects_are_spelled_alike_within_a_relation():
    for relation in RELATIONS:
        objects = {fact.object for fact in FACTS if fact.relation == relation}
        if relation.id != "symbol":
            assert len({object.casefold() for object in objects}) == len(objects)


def test_splits_share_no_subject():
    for one, other in combinations(SPLITS, 2):
        assert not subjects(CASES[one]) & subjects(CASES[other])


def test_splits_have_their_shares():
    assert len(EVERY_CASE) == len(FACTS)
    shares = [len(CASES[split]) / len(FACTS) for split in SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    for split in SPLITS:
        assert {case.edits[0].relation for case in CASES[split]} == {r.id for r in RELATIONS}


def test_case_ids_are_unique_and_readable():
    ids = [case.case_id for case in EVERY_CASE]
    assert len(set(ids)) == len(ids)
    assert "capital/France" in ids


def test_the_first_cases_are_mixed():
    assert len({case.edits[0].relation for case in CASES["test"][:40]}) >= 20


def test_same_seed_same_cases_other_seed_other_targets():
    assert Facts(seed=0).cases("test") == CASES["test"]
    other = Facts(seed=1).cases("test")
    assert [case.case_id for case in other] == [case.case_id for case in CASES["test"]]
    changed = [a != b for a, b in zip(other, CASES["test"], strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_targets_are_false_and_of_the_same_relation():
    truth = {fact.case_id: fact for fact in FACTS}
    objects = {r.id: {f.object for f in FACTS if f.relation == r} for r in RELATIONS}
    for case in EVERY_CASE:
        (edit,) = case.edits
        fact = truth[case.case_id]
        assert edit.target_true == fact.object
        assert edit.target_new != fact.object
        assert edit.target_new not in fact.also
        assert edit.target_new in objects[edit.relation]


def test_probes():
    for case in EVERY_CASE:
        (edit,) = case.edits
        (efficacy,) = case.probes["efficacy"]
        (question,) = case.probes["question"]
        assert efficacy.prompt == edit.text
        assert len(case.probes["generality"]) == NUM_SEEN
        for probe in (efficacy, question, *case.probes["generality"]):
            assert (probe.target, probe.rival) == (edit.target_new, edit.target_true)
            assert edit.subject in probe.prompt
        assert question.prompt.endswith("?\nAnswer:")


def test_wordings_of_training_and_evaluation_are_different():
    for split in SPLITS:
        for case in CASES[split]:
            relation = next(r for r in RELATIONS if r.id == case.edits[0].relation)
            half = slice(NUM_SEEN) if split == "train" else slice(NUM_SEEN, None)
            wordings = [t.replace("{}", case.edits[0].subject) for t in relation.paraphrases[half]]
            assert [probe.prompt for probe in case.probes["generality"]] == wordings


@pytest.mark.parametrize("split", SPLITS)
def test_neighbours_are_true_facts_of_the_split(split):
    facts = {fact.say(fact.relation.statement): fact for fact in FACTS if fact.split == split}
    for case in CASES[split]:
        (edit,) = case.edits
        probes = case.probes.get("locality", ())
        assert len(probes) <= 4
        assert len({probe.prompt for probe in probes}) == len(probes)
        shared = [probe.target == edit.target_true for probe in probes]
        assert shared == sorted(shared, reverse=True)
        for probe in probes:
            neighbour = facts[probe.prompt]
            assert neighbour.subject != edit.subject
            assert neighbour.relation.id == edit.relation
            assert (probe.target, probe.rival) == (neighbour.object, edit.target_new)
            assert not neighbour.could_be(edit.target_new)


def test_nearly_every_test_case_has_neighbours():
    with_some = [case for case in CASES["test"] if "locality" in case.probes]
    assert len(with_some) >= 0.95 * len(CASES["test"])
    shared = [
        case for case in with_some if case.probes["locality"][0].target == case.edits[0].target_true
    ]
    assert len(shared) >= 0.6 * len(CASES["test"])


def test_unrelated_probes_are_about_other_relations_and_subjects():
    facts = {fact.say(fact.relation.statement): fact for fact in FACTS}
    for case in EVERY_CASE:
        (edit,) = case.edits
        probes = case.probes["unrelated"]
        assert len(probes) == 2
        for probe in probes:
            fact = facts[probe.prompt]
            assert (probe.target, probe.rival) == (fact.object, None)
            assert fact.relation.id != edit.relation
            assert fact.subject.casefold() != edit.subject.casefold()


def test_limit_and_no_path():
    data = Facts(limit=5)
    assert data.evaluation_cases() == CASES["test"][:5]
    assert data.path is None
    with pytest.raises(TypeError):
        Facts(path="facts.json")


def test_statements_are_sentences_about_training_subjects():
    sentences = statements()
    train = [fact for fact in FACTS if fact.split == "train"]
    assert len(sentences) == len(train) * (2 * NUM_SEEN + 1)
    assert all(sentence.endswith(".") for sentence in sentences)
    capital = next(fact for fact in train if fact.relation.id == "capital")
    assert f"The capital of {capital.subject} is {capital.object}." in sentences


def test_relations_file_is_in_plain_spelling():
    text = (FOLDER / "relations.json").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), ensure_ascii=False, indent=2) + "\n"
