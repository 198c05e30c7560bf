"""Reports on hand-written run folders, with means computed by hand."""

import csv
import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report import report
from corrigenda.pipeline.report.comparison import Comparison, join
from corrigenda.pipeline.report.curves import (
    learning_figure,
    learning_picture,
    retention_figure,
    size_figure,
)
from corrigenda.pipeline.report.logs import curve, read_training
from corrigenda.pipeline.report.runs import read_runs
from corrigenda.pipeline.report.style import palette
from corrigenda.pipeline.report.tables import print_headline
from tests.samples import ROOT

PROTOCOLS = {
    "efficacy/exact": "tf_exact@each",
    "efficacy/preference": "cf_prob@each",
    "generality/exact": "tf_exact@each",
    "generality/preference": "cf_prob@each",
    "locality/agreement": "tf_tok@each",
    "locality/preference": "cf_prob@each",
}
VOID = {"meta", "link", "br", "img", "input", "hr"}


def row(case, fingerprint=None, phase="val", num_edits=1, probes=None, **metrics):
    """A line of cases.jsonl; metrics as ``efficacy_exact=1.0``."""
    prompt = f"Case {case} <i>is</i> found in"
    probe = {"criterion": "efficacy", "prompt": prompt, "target": "Norway", "rival": "Chad"}
    return {
        "case_id": str(case),
        "fingerprint": fingerprint or f"f{case}",
        "phase": phase,
        "num_edits": num_edits,
        "metrics": {name.replace("_", "/", 1): value for name, value in metrics.items()},
        "probes": probes or [{**probe, "prediction": "Norway & more", "exact": 1.0}],
    }


def write_run(folder, rows, protocols=None, **summary):
    folder.mkdir(parents=True)
    content = {
        "format": 1,
        "run": folder.name,
        "verb": "validate",
        "finished": True,
        "editor": folder.name.upper(),
        "model": "tiny",
        "model_hash": "ab12",
        "dataset": "Facts",
        "schedule": "each",
        "protocols": PROTOCOLS | (protocols or {}),
        "means": {},
        "budget": {
            "num_edits": 4,
            "seconds_per_edit": 1.25,
            "peak_gib": None,
            "parameters_touched": 884736,
            "training_seconds": 0.0,
        },
    }
    (folder / "summary.json").write_text(json.dumps(content | summary))
    (folder / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return folder


@pytest.fixture
def two_runs(tmp_path):
    """Four cases: efficacy .75 against .25, generality .625, locality .9, preferences .9 .6 .3."""
    edited = [(1.0, 1.0, 1.0), (1.0, 0.5, 0.9), (1.0, 1.0, 0.8), (0.0, 0.0, 0.9)]
    plain = [0.0, 1.0, 0.0, 0.0]
    preferences = {"efficacy_preference": 0.9, "generality_preference": 0.6}
    return [
        write_run(
            tmp_path / "in" / "rome",
            [
                row(
                    case,
                    efficacy_exact=efficacy,
                    generality_exact=generality,
                    locality_agreement=locality,
                    locality_preference=0.3,
                    **preferences,
                )
                for case, (efficacy, generality, locality) in enumerate(edited)
            ],
        ),
        write_run(
            tmp_path / "in" / "base",
            [row(case, efficacy_exact=value) for case, value in enumerate(plain)],
            editor=None,
        ),
    ]


def compared(folders, baseline=None) -> Comparison:
    runs, _, notes = read_runs(folders)
    return join(runs, baseline, notes)


def read_csv(out):
    return list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))


def refuses(folders, *words, baseline=None):
    with pytest.raises(UserError) as caught:
        compared(folders, baseline)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message


def test_means_by_hand(two_runs):
    comparison = compared(two_runs, "base")
    rome = comparison.estimates["rome"]
    assert rome["efficacy/exact"].mean == pytest.approx(0.75)
    assert rome["generality/exact"].mean == pytest.approx(0.625)
    assert rome["locality/agreement"].mean == pytest.approx(0.9)
    assert comparison.estimates["base"]["efficacy/exact"].mean == pytest.approx(0.25)
    assert rome["efficacy/exact"].n == 4
    assert rome["efficacy/exact"].low <= 0.75 <= rome["efficacy/exact"].high
    assert comparison.scores == {"rome": pytest.approx(3 / (1 / 0.9 + 1 / 0.6 + 1 / 0.3))}


def test_differences_are_paired(two_runs):
    difference = compared(two_runs, "base").differences
    # Case by case +1, 0, +1, 0; metrics the baseline lacks have no difference.
    assert list(difference) == ["rome"]
    assert list(difference["rome"]) == ["efficacy/exact"]
    assert difference["rome"]["efficacy/exact"].mean == pytest.approx(0.5)
    assert (
        0 <= difference["rome"]["efficacy/exact"].low <= difference["rome"]["efficacy/exact"].high
    )


def test_csv(two_runs, tmp_path, capsys):
    report(two_runs, tmp_path / "out", "base")
    text = (tmp_path / "out" / "report.csv").read_text()
    header = "run,editor,metric,protocol,n,mean,ci_low,ci_high,seeds,sd_over_seeds"
    assert text.splitlines()[0] == header
    rows = {(line["run"], line["metric"]): line for line in read_csv(tmp_path / "out")}
    assert len(rows) == 7
    assert rows["rome", "efficacy/exact"]["protocol"] == "tf_exact@each"
    assert rows["rome", "efficacy/exact"]["editor"] == "ROME"
    assert rows["base", "efficacy/exact"]["editor"] == ""
    assert float(rows["rome", "generality/exact"]["mean"]) == pytest.approx(0.625)
    printed = capsys.readouterr().out
    assert "75.0" in printed
    assert str(tmp_path / "out" / "report.html") in printed


def test_same_runs_same_report(two_runs, tmp_path):
    names = ("report.csv", "report.md", "report.html")
    report(two_runs, tmp_path / "out", "base")
    first = [(tmp_path / "out" / name).read_text() for name in names]
    report(two_runs, tmp_path / "out", "base")
    assert [(tmp_path / "out" / name).read_text() for name in names] == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


def test_markdown(two_runs, tmp_path):
    report(two_runs, tmp_path / "out", "base")
    text = (tmp_path / "out" / "report.md").read_text()
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["Headline", "Difference to base", "Budget", "Runs", "All metrics"]
    assert "| rome | 75.0 [" in text
    assert "| rome | +50.0 [" in text
    assert "| rome | – | 1.25 | – | – | – | 884,736 | – | – | – | 0 s |" in text
    assert "Retention" not in text
    assert all(line.count("|") > 2 for line in text.splitlines() if line.startswith("|"))


class Page(HTMLParser):
    """Checks that elements nest and collects tags with their attributes, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_one_escaped_page(two_runs, tmp_path):
    folder = write_run(
        tmp_path / "in" / "<b>$x$", [row(case, efficacy_exact=1.0) for case in "0123"]
    )
    report([*two_runs, folder], tmp_path / "out", "base")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "http:" not in text and "https:" not in text
    assert text.count("<script") == 2  # the data, and the page's own
    references = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("href", "src", "xlink:href")
    ]
    assert all(value.startswith("#") for value in references)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in references} <= set(ids)
    assert "<i>is</i>" not in text
    assert "Norway \\u0026 more" in text
    assert "<b>$x$" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # no curves
    assert "currentColor" in text


def test_cases_shown_are_limited(tmp_path):
    folder = write_run(tmp_path / "a", [row(case, efficacy_exact=1.0) for case in range(210)])
    report([folder], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Cases (200 of 210)" in text
    assert "Case 199 " in text
    assert "Case 200 " not in text


def test_a_folder_of_runs_is_expanded(two_runs, tmp_path):
    cut = tmp_path / "in" / "cut"
    cut.mkdir()
    (cut / "cases.jsonl").write_text('{"case_id": "1", "fing')
    (tmp_path / "in" / "notes").mkdir()
    comparison = compared([tmp_path / "in"])
    assert [run.name for run in comparison.runs] == ["base", "rome"]
    assert comparison.notes == ["cut is unfinished and was left out."]
    assert len(compared([tmp_path / "in", two_runs[0]]).runs) == 2


def test_a_study_says_what_is_reported_in_which_order(two_runs, tmp_path):
    write_run(tmp_path / "in" / "training", [row(9, efficacy_exact=0.0)])
    runs = {name: {"args": []} for name in ("rome", "base")} | {"training": {"report": False}}
    (tmp_path / "in" / "study.json").write_text(json.dumps({"format": 1, "runs": runs}))
    assert [run.name for run in compared([tmp_path / "in"]).runs] == ["rome", "base"]


def test_different_sets_of_cases_join_on_what_is_shared(tmp_path):
    a = write_run(tmp_path / "a", [row(case, efficacy_exact=1.0) for case in (1, 2, 3)])
    b = write_run(tmp_path / "b", [row(case, efficacy_exact=case == 3) for case in (3, 2, 4, 5)])
    comparison = compared([a, b])
    assert comparison.case_ids == ["2", "3"]
    assert comparison.estimates["b"]["efficacy/exact"].mean == pytest.approx(0.5)
    assert comparison.notes[:1] == [
        "The runs' cases differ (3 in a, 4 in b); compared on the 2 in common."
    ]
    c = write_run(tmp_path / "c", [row(7, efficacy_exact=1.0)])
    refuses([a, c], "have no case in common", "3 in a", "1 in c")


def test_metrics_may_be_absent_for_a_case(tmp_path):
    rows = [row(1, efficacy_exact=1.0), row(2, efficacy_exact=None), row(3), row(4)]
    rows[3]["metrics"] = {"efficacy/exact": float("nan")}
    estimate = compared([write_run(tmp_path / "a", rows)]).estimates["a"]["efficacy/exact"]
    assert (estimate.mean, estimate.n) == (1.0, 1)


def test_different_questions_are_refused(tmp_path):
    probe = {"criterion": "efficacy", "prompt": "Rome is in", "target": "Chad"}
    a = write_run(tmp_path / "a", [row(18, "x", efficacy_exact=1.0)])
    b = write_run(tmp_path / "b", [row(18, "y", efficacy_exact=1.0, probes=[probe])])
    words = ("case 18 differs between the runs a and b", '"Rome is in"')
    refuses([a, b], *words)
    c = write_run(tmp_path / "c", [row(18, "z", efficacy_exact=1.0)])
    refuses([a, c], "fingerprint x against z")


def test_mixed_protocols_are_refused(tmp_path):
    other = {"efficacy/exact": "tf_exact@stream"}
    rows = [row(1, efficacy_exact=1.0)]
    a, b = write_run(tmp_path / "a", rows), write_run(tmp_path / "b", rows, other)
    c = write_run(tmp_path / "c", rows)
    words = ("efficacy/exact", "tf_exact@each in a, c", "tf_exact@stream in b")
    refuses([a, b, c], *words)
    unused = {"locality/agreement": "other@each"}
    assert compared([a, write_run(tmp_path / "d", rows, unused)]).measured == ["efficacy/exact"]


def test_whole_run_values_have_no_interval(tmp_path):
    folder = write_run(
        tmp_path / "a",
        [row(1, efficacy_exact=1.0)],
        {"ability/sst2": "harness@each"},
        means={"efficacy/exact": 0.3, "ability/sst2": 0.81, "ability/rte": None},
    )
    report([folder], tmp_path / "out")
    rows = {line["metric"]: line for line in read_csv(tmp_path / "out")}
    assert set(rows) == {"efficacy/exact", "ability/sst2"}
    assert float(rows["efficacy/exact"]["mean"]) == 1.0
    assert rows["ability/sst2"] == {
        "run": "a",
        "editor": "A",
        "metric": "ability/sst2",
        "protocol": "harness@each",
        "n": "",
        "mean": "0.81",
        "ci_low": "",
        "ci_high": "",
        "seeds": "1",
        "sd_over_seeds": "",
    }


@pytest.fixture
def seeded_runs(tmp_path):
    """MEND under two seeds: efficacy of three cases 1 1 0 and 1 0 0, a perplexity of 8 and 10."""
    made = []
    for seed, values in ((3, (1.0, 1.0, 0.0)), (4, (1.0, 0.0, 0.0))):
        rows = [row(case, efficacy_exact=value) for case, value in enumerate(values)]
        means, folder = {"text/perplexity": 5.0 + seed}, tmp_path / f"seed-{seed}" / "mend"
        made.append(write_run(folder, rows, means=means, seed=seed))
    return made


def test_seeds_are_averaged_case_by_case(seeded_runs, tmp_path, capsys):
    comparison = compared(seeded_runs)
    (mend,) = comparison.runs
    assert [seed.name for seed in mend.seeds] == ["mend, seed 3", "mend, seed 4"]
    assert {case: row.metrics["efficacy/exact"] for case, row in mend.last.items()} == {
        "0": 1.0, "1": 0.5, "2": 0.0
    }  # fmt: skip
    efficacy = comparison.estimates["mend"]["efficacy/exact"]
    # 2/3 and 1/3: their mean, and their standard deviation as a sample's.
    assert efficacy.mean == pytest.approx(0.5) and efficacy.n == 3
    assert efficacy.sd == pytest.approx((1 / 3) / 2**0.5)
    perplexity = comparison.estimates["mend"]["text/perplexity"]
    assert (perplexity.mean, perplexity.sd) == (pytest.approx(8.5), pytest.approx(0.5**0.5))
    report(seeded_runs, tmp_path / "out")
    lines = {line["metric"]: line for line in read_csv(tmp_path / "out")}
    assert lines["efficacy/exact"]["seeds"] == "2"
    assert float(lines["text/perplexity"]["sd_over_seeds"]) == pytest.approx(0.5**0.5)
    assert "mend  50.0 ± 23.6" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| mend | 50.0 ± 23.6 [0.0, 100.0] |" in text and "| 3, 4 |" in text
    assert "±: standard deviation over seeds" in text


def test_one_seed_has_no_deviation(seeded_runs, tmp_path):
    report(seeded_runs[:1], tmp_path / "out")
    assert "±" not in (tmp_path / "out" / "report.md").read_text()


def test_a_case_counts_where_every_seed_has_it(seeded_runs, tmp_path):
    rows = [row(1, efficacy_exact=1.0), row(2), row(7, efficacy_exact=1.0)]
    more = write_run(tmp_path / "seed-9" / "mend", rows, seed=9)
    comparison = compared([*seeded_runs, more])
    assert comparison.case_ids == ["1", "2"]
    efficacy = comparison.estimates["mend"]["efficacy/exact"]
    assert (efficacy.mean, efficacy.n) == (pytest.approx(2 / 3), 1)
    assert "text/perplexity" not in comparison.estimates["mend"]


def test_runs_of_one_name_differ_in_their_seed_alone(seeded_runs, tmp_path):
    words = ("two runs are named 'mend'", "only differ in their seed")
    for number, changes in enumerate([{"seed": 3}, {}, {"seed": 9, "model_hash": "cd34"}]):
        folder = tmp_path / str(number) / "mend"
        refuses(
            [*seeded_runs, write_run(folder, [row(1, efficacy_exact=1.0)], **changes)],
            *words,
            folder,
        )
    other = write_run(tmp_path / "o" / "mend", [row(1, "z", efficacy_exact=1.0)], seed=9)
    refuses([*seeded_runs, other], "case 1 differs between", "mend, seed 9")


def test_a_folder_of_seeds_is_expanded(seeded_runs, tmp_path):
    (tmp_path / "seed-10" / "cut").mkdir(parents=True)
    (tmp_path / "seed-10" / "cut" / "config.yaml").write_text("{}")
    comparison = compared([tmp_path])
    assert [seed.seed for seed in comparison.runs[0].seeds] == [3, 4]
    assert comparison.notes[:1] == ["seed-10/cut is unfinished and was left out."]


def test_a_stream_shows_its_last_evaluation_and_curves(tmp_path):
    rows = [row(case, phase="current", num_edits=case, efficacy_exact=1.0) for case in (1, 2)]
    rows += [row(1, num_edits=1, efficacy_exact=1.0)]
    rows += [row(case, num_edits=2, efficacy_exact=0.0) for case in (1, 2)]
    rows += [row(2, num_edits=2, efficacy_exact=1.0)]  # a resumed run evaluates again
    folder = write_run(tmp_path / "grace", rows, schedule="stream")
    assert compared([folder]).estimates["grace"]["efficacy/exact"].mean == pytest.approx(0.5)
    report([folder], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| grace | 1 | 100.0 |" in text
    assert "| grace | 2 | 50.0 |" in text
    assert "trailing mean" in (tmp_path / "out" / "report.html").read_text()


def write_log(folder, rows, version=0):
    """logs/version_N/metrics.csv: a line per row, empty where a row lacks a metric."""
    path = folder / "logs" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def drawn(figure):
    """Title of each panel to the lines in it: their label, x and y."""
    return {
        axes.get_title("left") or axes.get_title(): [
            (
                line.get_label(),
                list(map(float, line.get_xdata())),
                list(map(float, line.get_ydata())),
            )
            for line in axes.get_lines()
        ]
        for axes in figure.axes
    }


@pytest.fixture
def training(tmp_path):
    """Four steps of training with a validation after every second, resumed after the third."""
    folder = tmp_path / "in" / "training"
    first = [{"step": i, "train/loss": 9.0, "train/kl": 2.0 * i} for i in range(4)]
    first.insert(2, {"step": 1, "val/efficacy/exact": 0.5, "edit/num_edits": 1})
    write_log(folder, first)
    again = [{"step": 3, "train/loss": 7.0, "train/kl": 1.0}]
    again += [{"step": step, "val/efficacy/exact": step / 10} for step in (1, 3)]
    write_log(folder, again, version=10)
    write_log(folder, [{"step": 3, "train/loss": 8.0}], version=9)
    return folder


def test_learning_curves(training):
    """Where a resumed run repeats a step, what it logged last counts; steps are counted as done."""
    found = read_training(training)
    assert found.name == "training" and found.best is None
    panels = drawn(learning_picture(found))
    assert list(panels) == ["train · loss", "train · kl", "val · efficacy · exact"]
    raw, smooth = panels["train · loss"]
    assert raw[1:] == ([1, 2, 3, 4], [9, 9, 9, 7])
    assert smooth == ("training", [1, 2, 3, 4], [9, 9, 9, 8.5])
    assert panels["val · efficacy · exact"] == [("training", [2, 4], [10, 30])]


def test_the_best_checkpoint_is_marked(training):
    """By the steps it had seen, which need not be a multiple of anything."""
    (training / "checkpoints").mkdir()
    best = training / "checkpoints" / "best.ckpt"
    base = {"name": "tiny", "hash": "0"}
    torch.save({"global_step": 3, "state_dict": {}, "base_model": base}, best)
    star = drawn(learning_picture(read_training(training)))["val · efficacy · exact"][1]
    assert star[1:] == ([2], [10])
    best.write_bytes(b"PK")
    assert read_training(training).best is None


def test_half_a_line_of_a_log_is_left_out(training):
    with (training / "logs" / "version_10" / "metrics.csv").open("a") as file:
        file.write("4,1e-")
    assert curve(read_training(training).log, "train/loss") == {0: 9, 1: 9, 2: 9, 3: 7}


def test_only_what_trained_has_learning_curves(two_runs, training, tmp_path):
    """Of a study also the runs that it keeps out of the tables."""
    write_log(two_runs[0], [{"step": 0, "val/efficacy/exact": 1.0}])
    assert read_training(two_runs[0]) is None and read_training(two_runs[1]) is None
    report(two_runs, tmp_path / "without")
    assert "train · loss" not in (tmp_path / "without" / "report.html").read_text()
    (training / "config.yaml").write_text("{}")
    runs = {"rome": {}, "base": {}, "training": {"report": False}}
    (tmp_path / "in" / "study.json").write_text(json.dumps({"format": 1, "runs": runs}))
    report([tmp_path / "in"], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "train · loss" in text and ">training</text>" in text
    assert "training" not in (tmp_path / "out" / "report.csv").read_text()
    page = Page()
    page.feed(text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


def test_a_line_per_seed(two_runs, training, tmp_path):
    report(two_runs, tmp_path / "out", training=[training, training])
    assert (tmp_path / "out" / "report.html").read_text().count(">training</text>") == 1
    comparison = join(read_runs(two_runs)[0], None, trainings=[read_training(training)] * 2)
    lines = drawn(learning_figure(comparison, {"training": "red"}))["train · kl"]
    assert [label for label, *_ in lines if not label.startswith("_")] == ["training"] * 2


@pytest.fixture
def sizes(tmp_path):
    """One editor with 1, 10 and 100 active edits, under three schedules, and no editor."""
    made = [write_run(tmp_path / "none", [row(c, num_edits=0, **{"efficacy_exact": 0.0}) for c in "ab"],
                      editor=None, means={"text/perplexity": 20.0})]  # fmt: skip
    for size, schedule in ((100, "epoch"), (1, "each"), (10, "batch")):
        rows = [row(c, num_edits=size, efficacy_exact=1 / size) for c in "ab"]
        protocols = {name: f"{how.partition('@')[0]}@{schedule}" for name, how in PROTOCOLS.items()}
        summary = {"schedule": schedule, "means": {"text/perplexity": 20.0 + size}}
        made.append(write_run(tmp_path / f"memit@{size}", rows, protocols, **summary))
    return made


def test_sizes_of_a_batch_make_a_line(sizes):
    comparison = compared(sizes)
    colours = palette([run.name for run in comparison.runs])
    assert len(set(colours.values())) == 2
    panels = drawn(size_figure(comparison, colours))
    assert list(panels) == ["efficacy · exact", "text · perplexity"]
    assert panels["efficacy · exact"][0] == ("memit", [1, 10, 100], pytest.approx([100, 10, 1]))
    memit, none = panels["text · perplexity"]
    assert memit == ("memit", [1, 10, 100], [21, 30, 120])
    assert (none[0], none[2]) == ("none", [20, 20])
    assert size_figure(compared(sizes[:2]), colours) is None


def test_sizes_stand_in_one_table_that_says_so(sizes, tmp_path):
    report(sizes, tmp_path / "out", "none")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| run | active edits | efficacy exact |" in text
    assert "| none | 0 | 0.0 [" in text and "| memit@100 | 100 | 1.0 [" in text
    protocols = {line["run"]: line["protocol"] for line in read_csv(tmp_path / "out")
                 if line["metric"] == "efficacy/exact"}  # fmt: skip
    assert protocols == {"none": "tf_exact@each", "memit@100": "tf_exact@epoch",
                         "memit@1": "tf_exact@each", "memit@10": "tf_exact@batch"}  # fmt: skip


def test_schedules_differ_only_among_sizes(sizes, tmp_path):
    """A run that does not say that it is one of several sizes, and a stream, stay apart."""
    plain = write_run(tmp_path / "rome", [row(c, efficacy_exact=1.0) for c in "ab"])
    assert len(compared([sizes[0], plain]).runs) == 2
    words = ("tf_exact@epoch in memit@100", "tf_exact@each in rome", "NAME@SIZE")
    refuses([sizes[1], plain], *words)
    stream = {"efficacy/exact": "tf_exact@stream"}
    rows = [row(c, num_edits=2, efficacy_exact=1.0) for c in "ab"]
    refuses([*sizes, write_run(tmp_path / "memit@2", rows, stream)], "tf_exact@stream in memit@2")


def test_a_stream_s_perplexity_is_drawn_over_its_edits(tmp_path):
    for seed in (1, 2):
        folder = tmp_path / f"seed-{seed}" / "grace"
        rows = [row(1, num_edits=size, efficacy_exact=1.0) for size in (1, 2)]
        write_run(folder, rows, schedule="stream", seed=seed)
        log = [{"step": 0, "edit/num_edits": 1, "current/efficacy/exact": 1.0}]
        log += [{"step": n, "edit/num_edits": n, "val/text/perplexity": n * seed} for n in (1, 2)]
        write_log(folder, log)
    panels = drawn(retention_figure(compared([tmp_path]), {"grace": "red"}))
    assert list(panels) == ["efficacy · exact", "text · perplexity"]
    assert panels["text · perplexity"] == [("grace", [1, 2], [1.5, 3.0])]


def test_a_last_batch_that_is_smaller_makes_no_curve(tmp_path):
    rows = [row(case, num_edits=2 if case < 3 else 1, efficacy_exact=1.0) for case in (1, 2, 3)]
    report([write_run(tmp_path / "memit", rows, schedule="batch")], tmp_path / "out")
    assert "Retention" not in (tmp_path / "out" / "report.md").read_text()


def test_the_terminal_decides_how_much_is_printed(two_runs):
    comparison = compared(two_runs)
    for width, expected in ((200, "75.0 [25.0, 100.0]"), (120, "75.0 [25, 100]"), (80, "75.0")):
        stream = io.StringIO()
        print_headline(comparison, stream, width)
        line = next(line for line in stream.getvalue().splitlines() if line.startswith("rome"))
        assert expected in line
        assert ("[" in line) == ("[" in expected)


def test_no_baseline_is_said(two_runs, tmp_path):
    report(two_runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "no baseline was given" in text
    assert "Difference" not in text


def test_mistakes_are_one_line(two_runs, tmp_path):
    rome, base = two_runs
    refuses([tmp_path / "nowhere"], "nowhere is not a folder")
    (tmp_path / "empty").mkdir()
    refuses([tmp_path / "empty"], "is not a run folder")
    refuses([rome, base], "'memit'", "rome, base", baseline="memit")
    twin = write_run(tmp_path / "other" / "rome", [row(1, efficacy_exact=1.0)])
    refuses([rome, twin], "two runs are named 'rome'", rome, twin)
    refuses([write_run(tmp_path / "old", [row(1)], format=0)], "format 0", "summary.json")
    current = write_run(tmp_path / "current", [row(1, phase="current", efficacy_exact=1.0)])
    refuses([current], "no evaluation", "cases.jsonl")


def test_an_unfinished_run_is_refused_before_its_cases_are_read(tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    (folder / "cases.jsonl").write_text('{"case_id": "1", "fing')
    refuses([folder], "unfinished", "summary.json")
    (folder / "summary.json").write_text(json.dumps({"format": 1, "finished": False}))
    refuses([folder], "unfinished")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"case_id": "1", "fing', "not JSON"),
        ('{"case_id": "1", "metrics": {}}', "has no 'fingerprint'"),
        ("[1]", "not a case row"),
        ('{"case_id": "1", "metrics": {"a/b": "high"}}', "not a case row"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, reason):
    folder = write_run(tmp_path / "a", [row(1, efficacy_exact=1.0)])
    with (folder / "cases.jsonl").open("a") as cases:
        cases.write(line + "\n")
    refuses([folder], folder / "cases.jsonl:2", reason)


def test_out_must_not_be_a_file(two_runs, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        report(two_runs, tmp_path / "out")


def test_it_starts_without_the_heavy_libraries():
    heavy = ["torch", "lightning", "transformers", "matplotlib"]
    code = (
        "import sys, corrigenda.pipeline.report, corrigenda.pipeline.compare; "
        f"print([*set({heavy}) & set(sys.modules)])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
