"""Figures of streams of edits: what they draw, from files whose numbers are known."""

import json
import math

import matplotlib as mpl
import pytest

from corrigenda.modules.metrics import share_interval
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report import forgetting, report
from corrigenda.pipeline.report.abilities import read_abilities
from corrigenda.pipeline.report.comparison import join
from corrigenda.pipeline.report.figures import pictures
from corrigenda.pipeline.report.runs import read_runs
from corrigenda.pipeline.report.streams import kept, kept_error, read_stream
from corrigenda.pipeline.report.style import FAINT, palette
from tests.test_report import row, write_run

COUNTS = (1, 4, 8)


def record(retained=(1.0, 0.75, 0.25), **changes):
    """A forgetting.json of eight edits, measured at three counts."""
    return {
        "format": 1, "order": list("abcdefgh"), "operations": list(range(1, 9)), "counts": list(COUNTS),
        "retention": {"exact": list(retained), "preference": [1.0, None, 0.5]},
        "forgotten": [0.0, 0.25, 0.75], "by_age": [[1, None, None], [1, 0.5, None], [0, 0, 0.5]],
        "norms": {"low.weight": [1.0] * 8, "high.weight": [0.0, *([20.0] * 7)]},
        "detected": {"T_dist": 4, "T_down": None},
    } | changes  # fmt: skip


def asked(task, *scores, error=0.1):
    return [
        {"edits": n, "task": task, "score": score, "stderr": error, "invalid": 0.0}
        for n, score in scores
    ]


@pytest.fixture
def stream(tmp_path):
    """``stream(name, record, abilities, **summary)``: a run folder with these files."""

    def write(name, content=None, abilities=(), num_edits=8, **summary):
        rows = [row(n, num_edits=num_edits, efficacy_exact=1.0 if n else 0.5) for n in range(4)]
        folder = write_run(tmp_path / name, rows, **summary)
        if content is not None:
            (folder / "forgetting.json").write_text(json.dumps(content))
        if abilities:
            text = "".join(json.dumps(line) + "\n" for line in abilities)
            (folder / "abilities.jsonl").write_text(text)
        return folder

    return write


def compared(*folders):
    runs, _, notes = read_runs(folders)
    return join(runs, None, notes)


def colours(comparison):
    return palette(run.name for run in comparison.runs)


def points(axes):
    return [
        [(x, round(float(y), 6)) for x, y in zip(*line.get_data(), strict=True)]
        for line in axes.lines
    ]


def test_a_share_has_an_interval():
    assert share_interval(0.5, 4) == pytest.approx((0.15, 0.85), abs=5e-3)
    low, high = share_interval(1.0, 10)
    assert (low, high) == pytest.approx((0.722, 1.0), abs=1e-3)
    assert all(map(math.isnan, (*share_interval(0.5, 0), *share_interval(math.nan, 4))))


def test_retention_has_a_line_per_order(stream):
    folders = [
        stream("seed-1/rome", record(), seed=1),
        stream("seed-2/rome", record((1.0, 1.0, 1.0)), seed=2),
        stream("base"),
    ]
    comparison = compared(*folders)
    figure = forgetting.retention_by_count_figure(comparison, colours(comparison))
    exact, preferred, forgotten = figure.axes
    assert points(exact) == [
        [(1, 100.0), (4, 75.0), (8, 25.0)],
        [(1, 100.0), (4, 100.0), (8, 100.0)],
    ]
    assert points(forgotten)[0] == [(1, 0.0), (4, 25.0), (8, 75.0)]
    assert math.isnan(points(preferred)[0][1][1])  # not measured
    assert len({line.get_color() for line in exact.get_lines()}) == 1  # one run
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["rome"]
    assert len(exact.collections) == 2  # an interval around each


def test_abilities_have_a_panel_per_task_and_intervals(stream):
    scores = [*asked("sst2", (0, 0.9), (4, 0.8), (8, 0.2)), *asked("rte", (0, 0.5), (8, 0.5))]
    comparison = compared(stream("rome", record(), scores))
    sst2, rte = forgetting.abilities_figure(comparison, colours(comparison)).axes
    assert (sst2.get_title(), rte.get_title()) == ("sst2", "rte")
    assert points(sst2)[0] == [(0, 90.0), (4, 80.0), (8, 20.0)]
    (bars,) = sst2.containers
    low, high = bars[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((90 - 19.6, 90 + 19.6))


def test_runs_of_one_family_show_the_effect_of_the_batch_size(stream):
    folders = [
        stream(f"memit@{n}", None, asked("sst2", (0, 0.9), (n, 0.9 - n / 200)), num_edits=n)
        for n in (10, 100)
    ]
    comparison = compared(*folders)
    (axes,) = forgetting.abilities_figure(comparison, colours(comparison)).axes
    assert points(axes)[0] == [(0, 90.0), (10, 85.0), (100, 40.0)]
    assert axes.get_legend_handles_labels()[1] == ["memit"]


def test_efficacy_against_ability_kept(stream):
    scores = [*asked("sst2", (0, 0.8), (8, 0.4)), *asked("rte", (0, 0.5), (8, 0.5))]
    folders = [
        stream("rome", record(), scores),
        stream("ft", None, asked("rte", (0, 0.5), (8, 0.1))),
        stream("base"),
    ]
    comparison = compared(*folders)
    (axes,) = forgetting.kept_figure(comparison, colours(comparison)).axes
    assert axes.get_legend_handles_labels()[1] == ["rome", "ft"]
    marked = [line for line in axes.get_lines() if line.get_label() in ("rome", "ft")]
    assert [line.get_xdata()[0] for line in marked] == pytest.approx([75.0, 20.0])
    assert [line.get_ydata()[0] for line in marked] == pytest.approx([87.5, 87.5])
    stream_ = read_stream(folders[0], "rome")
    assert kept(stream_) == pytest.approx(0.75)
    assert kept_error(stream_) == pytest.approx(1.96 * math.hypot(0.1 / 0.8, 0.1 / 0.5) / 2)
    assert math.isnan(kept(read_stream(folders[2], "base")))


def test_ages_are_a_heat_map_that_is_empty_above_its_diagonal(stream):
    comparison = compared(stream("rome", record()), stream("base"))
    axes, bar = forgetting.age_figure(comparison, {}).axes
    assert axes.get_title() == "rome" and bar.get_ylabel() == "edits that hold, %"
    (image,) = axes.get_images()
    assert image.get_array().mask.sum() == 3 and image.get_array()[2].tolist() == [0, 0, 50]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "8"]
    assert image.get_cmap().name == "cividis"  # for the colour-blind


def test_norms_are_drawn_by_weight_and_a_jump_is_marked(stream):
    comparison = compared(stream("rome", record()))
    (axes,) = forgetting.norms_figure(comparison, {}).axes
    assert axes.get_yscale() == "log"
    largest, other, jump = axes.get_lines()
    assert (largest.get_label(), other.get_label()) == ("high.weight", "low.weight")
    assert jump.get_color() == FAINT and jump.get_xdata()[0] == 4


def test_runs_without_streams_have_none_of_these_figures(stream):
    comparison = compared(stream("base"))
    makers = (
        forgetting.abilities_figure, forgetting.retention_by_count_figure, forgetting.age_figure,
        forgetting.norms_figure, forgetting.kept_figure,
    )  # fmt: skip
    assert [make(comparison, colours(comparison)) for make in makers] == [None] * 5
    assert forgetting.stream_pictures(comparison.runs[0].path, "base") == {}


def test_memories_have_no_norms(stream):
    comparison = compared(stream("ike", record(norms=None)))
    assert forgetting.norms_figure(comparison, {}) is None
    assert forgetting.retention_by_count_figure(comparison, colours(comparison)) is not None


def test_figures_are_in_the_page_and_in_files(stream, tmp_path):
    folder = stream("rome", record(), asked("sst2", (0, 0.9), (8, 0.2)))
    report([folder], tmp_path / "out", figures=True)
    page = (tmp_path / "out" / "report.html").read_text()
    captions = [caption for caption, _ in pictures(compared(folder))]
    assert all(caption in page for caption in captions) and any("T_dist" in c for c in captions)
    names = {"abilities", "retention_by_count", "age", "norms", "kept"}
    files = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {f"{name}.{kind}" for name in names for kind in ("svg", "png")} <= files
    png = (tmp_path / "out" / "figures" / "age.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert (tmp_path / "out" / "figures" / "age.svg").read_text().startswith("<?xml")
    assert mpl.rcParams["savefig.transparent"] is False  # settings of others are as they were
    report([folder], tmp_path / "plain")
    assert not (tmp_path / "plain" / "figures").exists()


def test_the_pictures_of_one_run(stream):
    folder = stream("rome", record(), asked("sst2", (0, 0.9), (8, 0.2)))
    found = forgetting.stream_pictures(folder, "rome")
    assert list(found) == ["abilities", "retention", "retention by age", "norms of changes"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        (json.dumps(record(format=2)), "format 2, this version reads 1"),
        (json.dumps({"format": 1}), "'counts'"),
        (json.dumps(record(forgotten=["much"])), "could not convert"),
    ],
)
def test_a_damaged_record_is_refused(stream, content, message):
    folder = stream("rome")
    (folder / "forgetting.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_stream(folder, "rome")
    assert str(folder / "forgetting.json") in str(caught.value)


def test_of_repeated_scores_the_last_counts_and_half_a_line_is_left_out(tmp_path):
    lines = [*asked("sst2", (8, 0.1), (0, 0.9), (8, 0.2)), {"task": "rte"}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"edits": 9, "task": "ss'
    (tmp_path / "abilities.jsonl").write_text(text)
    scores = read_abilities(tmp_path)
    assert list(scores) == ["sst2"] and list(scores["sst2"]) == [0, 8]
    assert scores["sst2"][8].value == 0.2
    assert read_abilities(tmp_path / "nowhere") == {}


def test_the_table_of_collapse(stream, tmp_path):
    """A row per order, and the medians over those in which a detector has fired."""
    folders = [
        stream("seed-1/rome", record(), seed=1, accepted=0.8),
        stream("seed-2/rome", record(detected={"T_dist": 8, "T_edit": 7}), seed=2),
        stream("base"),
    ]
    report(folders, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    table = text[text.index("Forgetting and collapse") :]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| rome")][:3]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["rome, seed 1", "8", "25.0", "75.0", "80.0", "–", "–", "–", "4", "–"],
        ["rome, seed 2", "8", "25.0", "75.0", "–", "7", "–", "–", "8", "–"],
        ["rome, median", "", "", "", "", "7 (1 of 2)", "–", "–", "6 (2 of 2)", "–"],
    ]
    report([folders[2]], tmp_path / "other")
    assert "Forgetting" not in (tmp_path / "other" / "report.md").read_text()


def test_runs_differ_by_their_markers_too(stream):
    comparison = compared(stream("rome", record()), stream("ft", record()))
    figure = forgetting.retention_by_count_figure(comparison, colours(comparison))
    lines = figure.axes[0].get_lines()
    assert (
        len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 2
    )


def test_orders_that_undo_other_edits_are_pooled(stream):
    """Streams that end with other numbers of edits have the last evaluation of each case in common."""
    folders = [
        stream("seed-1/rome", record(), num_edits=8, seed=1),
        stream("seed-2/rome", record(), num_edits=7, seed=2),
    ]
    (run,) = compared(*folders).runs
    assert len(run.last) == 4
