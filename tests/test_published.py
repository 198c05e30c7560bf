"""Published numbers beside those of hand-written runs."""

import json

import pytest

from corrigenda.pipeline.report import report
from corrigenda.pipeline.report.comparison import join
from corrigenda.pipeline.report.published import Published, published_rows, published_table
from corrigenda.pipeline.report.runs import read_runs
from tests.test_report import row, write_run

PAPER = {"paper": "Someone, 2020", "model": "tiny", "dataset": "Facts", "schedule": "each"}
SETTINGS = "edit:\n  editor:\n    class_path: x.ROME\n    init_args: {key: both, layer: 3}\n"


@pytest.fixture
def verdicts(tmp_path):
    """``verdicts(published, ours)``: the lines about a run in which these cases are right."""

    def of(published, right, **summary):
        rows = [row(n, efficacy_exact=float(n < right)) for n in range(10)]
        folder = tmp_path / "rome"
        write_run(folder, rows, model="hub/tiny", dataset="Facts", schedule="each", **summary)
        (folder / "config.yaml").write_text(SETTINGS)
        comparison = join(read_runs([folder])[0], None)
        return published_table(comparison, published).rows

    return of


def test_a_number_within_three_points_of_the_interval_is_a_match(verdicts):
    rows = [Published(**PAPER, editor="ROME", values={"efficacy/exact": v}) for v in (97.1, 96.9)]
    found = verdicts(rows, right=10)
    assert [line[4:] for line in found] == [
        ["97.1", "100.0", "[100.0, 100.0]", "match"],
        ["96.9", "100.0", "[100.0, 100.0]", "miss"],
    ]


def test_a_different_experiment_is_not_compared_and_the_reason_is_given(verdicts):
    other = {**PAPER, "model": "huge", "dataset": "zsRE"}
    paper = Published(
        **other, editor="ROME", settings={"edit.editor.key": "mean", "edit.editor.layer": 3},
        values={"efficacy/exact": 50.0},
    )  # fmt: skip
    ((*_, verdict),) = verdicts([paper], right=5)
    assert verdict == "not comparable: model hub/tiny, dataset Facts, key both"


def test_a_number_that_was_not_measured_is_not_compared(verdicts):
    paper = Published(**PAPER, editor="ROME", values={"fluency/entropy": 50.0})
    ((*_, ours, interval, verdict),) = verdicts([paper], right=5)
    assert (ours, interval, verdict) == ("–", "–", "not comparable: not measured")


def test_other_editors_are_left_out(verdicts):
    assert verdicts([Published(**PAPER, editor="MEMIT", values={"efficacy/exact": 9.0})], 5) == []


def test_scores_of_tasks_are_found_by_their_number_of_edits(tmp_path):
    paper = Published(**PAPER, editor="ROME", tasks={"sst2": {10: 60.0, 20: 54.9}})
    rows = [row(0, efficacy_exact=1.0)]
    write_run(tmp_path / "rome", rows, model="tiny", dataset="Facts", schedule="each")
    score = {"task": "sst2", "edits": 20, "score": 0.5, "stderr": 0.01}
    (tmp_path / "rome" / "abilities.jsonl").write_text(json.dumps(score) + "\n")
    comparison = join(read_runs([tmp_path / "rome"])[0], None)
    assert [line[3:] for line in published_table(comparison, [paper]).rows] == [
        ["sst2 after 10 edits", "60.0", "–", "–", "not comparable: not measured"],
        ["sst2 after 20 edits", "54.9", "50.0", "[48.0, 52.0]", "match"],
    ]


def test_all_files_are_read_and_every_number_is_a_percentage():
    rows = published_rows()
    values = [value for row in rows for value in row.values.values()]
    values += [value for row in rows for task in row.tasks.values() for value in task.values()]
    assert len(values) > 150 and all(0 <= value <= 100 for value in values)
    assert {row.editor for row in rows} == {"ROME", "MEMIT", "MEND", "KN"}


def test_the_report_has_the_table_if_it_is_wanted(tmp_path):
    write_run(tmp_path / "rome", [row(0, efficacy_preference=1.0)], model="smollm2")
    report([tmp_path / "rome"], tmp_path / "plain")
    report([tmp_path / "rome"], tmp_path / "checked", check=True)
    assert "Published numbers" not in (tmp_path / "plain" / "report.md").read_text()
    for name in ("report.md", "report.html"):
        text = (tmp_path / "checked" / name).read_text()
        assert "Published numbers" in text and "not comparable: model smollm2" in text
