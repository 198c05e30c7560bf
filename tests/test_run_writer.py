"""What a run writes and resumes from, with a trainer of plain values."""

import hashlib
import json
import math
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.pipeline import run_writer
from corrigenda.pipeline.cost import Cost
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.run_writer import RunWriter

NOT_VALIDATING = [TrainerFn.FITTING, TrainerFn.TESTING, TrainerFn.PREDICTING]
CASES = [SimpleNamespace(fingerprint=name) for name in "abc"]
MODULE = SimpleNamespace(
    lm=SimpleNamespace(weights_hash="hash of weights", tokens=SimpleNamespace(form="plain")),
    measured={},
)


class PlainTrainer(SimpleNamespace):
    """The part of a Trainer that the callback reads; ``costs`` are those that the edits' callback was given."""

    def __init__(self, fn=TrainerFn.VALIDATING, schedule="each", **values):
        self.costs = []
        self.edit = SimpleNamespace(
            schedule=schedule, num_edits=7, current=[], undone=[], add_cost=self.costs.append,
            total_cost=lambda: sum(self.costs, Cost(made=1)),
        )  # fmt: skip
        super().__init__(
            is_global_zero=True, sanity_checking=False, world_size=1, fast_dev_run=False, global_step=0,
            interrupted=False, ckpt_path=None, loggers=[], state=SimpleNamespace(fn=fn), costs=self.costs,
            edit=self.edit, strategy=SimpleNamespace(barrier=lambda name: None),
            datamodule=SimpleNamespace(evaluation_cases=lambda: CASES),
        )  # fmt: skip
        vars(self).update(values)


class Result:
    """A case's measurements."""

    def __init__(self, name, value=1.0):
        self.name, self.value = name, value

    def row(self):
        return {"fingerprint": self.name, "metrics": {"x": self.value}}


@pytest.fixture(autouse=True)
def plain_trainer_and_time(monkeypatch):
    MODULE.measured = {}
    monkeypatch.setattr(run_writer, "edit_callback", lambda trainer: trainer.edit)
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(run_writer.time, "perf_counter", lambda: now.seconds)
    return now


@pytest.fixture
def writer(tmp_path):
    """The writer of a validation in a folder that does not exist yet."""
    return RunWriter(tmp_path / "run", "validate", depends_on={"--a": "1"})


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "cases.jsonl"


def progress(tmp_path):
    return json.loads((tmp_path / "run" / "progress.json").read_text())


def line(name, value=1.0):
    return json.dumps({"fingerprint": name, "metrics": {"x": value}}) + "\n"


# ---------------------------------------------------------------------------- rows


def test_rows_are_written_as_they_are_measured(writer, tmp_path):
    trainer = PlainTrainer()
    writer.on_validation_batch_end(
        trainer, MODULE, {"results": [Result("a"), Result("b", math.inf)]}
    )
    first = (tmp_path / "run" / "cases.jsonl").read_text()
    assert [json.loads(row) for row in first.splitlines()] == [
        {"phase": "val", "num_edits": 7, "fingerprint": "a", "metrics": {"x": 1.0}},
        {"phase": "val", "num_edits": 7, "fingerprint": "b", "metrics": {"x": None}},
    ]
    assert progress(tmp_path)["cases"] == len(first)
    trainer.edit.current = [Result("ü")]
    writer.on_train_batch_start(trainer)
    whole = (tmp_path / "run" / "cases.jsonl").read_text("utf-8")
    assert whole.startswith(first) and whole.count("\n") == 3 and '"fingerprint": "ü"' in whole
    assert json.loads(whole.splitlines()[2])["phase"] == "current"


def test_a_batch_without_results_writes_nothing(writer, tmp_path):
    writer.on_train_batch_start(PlainTrainer())
    trainer = PlainTrainer(sanity_checking=True)
    writer.on_validation_batch_end(trainer, MODULE, {"results": [Result("a")]})
    writer.on_validation_epoch_end(PlainTrainer(), MODULE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fn", NOT_VALIDATING)
def test_only_a_validation_writes_its_progress(writer, tmp_path, fn):
    trainer = PlainTrainer(fn)
    writer.on_validation_start(trainer, MODULE)
    assert not (tmp_path / "run").exists()
    writer.on_validation_batch_end(trainer, MODULE, {"results": [Result("a")]})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cases.jsonl"]


def test_only_the_first_process_writes(writer, file):
    trainer = PlainTrainer(is_global_zero=False)
    writer.on_validation_batch_end(trainer, MODULE, {"results": [Result("a")]})
    writer.on_validation_start(trainer, MODULE)
    assert not list(file.parent.iterdir())


def test_rows_of_several_processes_are_written_in_turn(writer, file, monkeypatch):
    trainer = PlainTrainer(world_size=2)
    for name in "ac":
        writer.on_validation_batch_end(trainer, MODULE, {"results": [Result(name)]})
    assert not file.exists()
    monkeypatch.setattr(
        run_writer.processes, "gather", lambda mine: [mine, [[{"fingerprint": "b"}]]]
    )
    trainer.sanity_checking = True
    writer.on_validation_epoch_end(trainer, MODULE)
    assert not file.exists()
    trainer.sanity_checking = False
    writer.on_validation_epoch_end(trainer, MODULE)
    assert [json.loads(row)["fingerprint"] for row in file.read_text().splitlines()] == [*"abc"]
    assert writer._pending == []
    trainer.edit.current = [Result("d")]
    writer.on_train_batch_start(trainer)  # an edit that all have made
    assert file.read_text().count("\n") == 4


def test_numbers_that_are_not_finite_become_null():
    value = {"a": [math.inf, (-math.inf, 1)], "b": math.nan, "c": "ü", "d": True, "e": 2.5}
    assert run_writer.as_json(value) == (
        '{"a": [null, [null, 1]], "b": null, "c": "ü", "d": true, "e": 2.5}'
    )


# ---------------------------------------------------------------------------- an interrupted validation


def test_a_validation_keeps_what_it_depends_on_and_costs(writer, tmp_path, plain_trainer_and_time):
    plain_trainer_and_time.seconds += 3.0
    (tmp_path / "run").mkdir()
    writer.on_validation_start(PlainTrainer(), MODULE)
    kept = progress(tmp_path)
    assert kept["depends_on"] == {
        "--a": "1",
        "the model's weights": "hash of weights",
        "the form of prompts": "plain",
        "the set of cases": hashlib.sha256(b"abc").hexdigest()[:16],
    }
    assert kept["budget"] == Cost(made=1).state() | {"run_seconds": 3.0} and kept["cases"] == 0


@pytest.mark.parametrize(
    ("schedule", "is_first", "is_added"),
    [("each", True, True), ("stream", True, True), ("epoch", True, False), ("each", False, False)],
)
def test_a_resumed_validation_goes_on_after_its_rows(
    tmp_path, file, caplog, schedule, is_first, is_added, plain_trainer_and_time
):
    first = RunWriter(tmp_path / "run", "validate")
    trainer = PlainTrainer()
    first.on_validation_start(trainer, MODULE)
    plain_trainer_and_time.seconds += 3.0
    first.on_validation_batch_end(trainer, MODULE, {"results": [Result("a"), Result("b")]})
    rows = file.read_text()
    file.write_text(rows + line("c"))  # killed before progress.json was replaced
    second = RunWriter(tmp_path / "run", "validate")
    plain_trainer_and_time.seconds += 2.0
    trainer = PlainTrainer(schedule=schedule, is_global_zero=is_first)
    if not is_first:
        file.write_text(rows)  # as the first process has left it
    second.on_validation_start(trainer, MODULE)
    assert file.read_text() == rows
    assert MODULE.measured == {"a": {"x": 1.0}, "b": {"x": 1.0}}
    assert "2 cases in" in caplog.text and "not evaluated again" in caplog.text
    assert trainer.costs == [Cost(made=1)] * is_added
    assert second.state_dict()["run_seconds"] == 5.0
    if is_first:
        budget = progress(tmp_path)["budget"]
        assert budget["run_seconds"] == 5.0 and budget["made"] == 1 + is_added


def test_another_validation_is_not_resumed(tmp_path, writer, file):
    writer.on_validation_start(PlainTrainer(), MODULE)
    file.write_text(line("a"))
    other = SimpleNamespace(
        lm=SimpleNamespace(weights_hash="another hash", tokens=SimpleNamespace(form="plain"))
    )
    with pytest.raises(UserError, match="the model's weights has changed"):
        RunWriter(tmp_path / "run", "validate", depends_on={"--a": "1"}).on_validation_start(
            PlainTrainer(), other
        )


@pytest.mark.parametrize(
    ("values", "kept"), [({}, "a\n"), ({"is_global_zero": False}, "a\nb")], ids=["first", "other"]
)
def test_half_a_row_is_dropped_at_the_start(writer, file, values, kept):
    writer.setup(PlainTrainer(**values), MODULE, "validate")  # there is no file yet
    file.write_text("a\nb")
    writer.setup(PlainTrainer(**values), MODULE, "validate")
    assert file.read_text() == kept


@pytest.mark.parametrize(
    ("content", "kept"),
    [("", ""), ("one\n", "one\n"), ("one\ntw", "one\n"), ("one\ntwo\n", "one\ntwo\n"), ("o", "")],
)
def test_half_a_line_is_dropped(writer, file, content, kept):
    file.write_text(content)
    writer._cases.drop_partial_line()
    assert file.read_text() == kept


def test_rows_after_the_checkpoint_are_dropped(writer, file):
    file.write_text("one\ntwo\n")
    assert writer.state_dict()["cases"] == 8
    writer._cases.truncate(8)
    assert file.read_text() == "one\ntwo\n"
    writer._cases.truncate(4)
    assert file.read_text() == "one\n"
    with pytest.raises(UserError, match=r"cases\.jsonl is missing rows that it had"):
        writer._cases.truncate(5)
    file.unlink()
    assert writer.state_dict()["cases"] == 0


def test_cases_are_read_as_they_stand(writer, file):
    rows = [{"fingerprint": "a", "metrics": {"x": 1, "y": None}}, {"fingerprint": 2, "metrics": {}}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = writer._measured()
    assert measured == {"a": {"x": 1.0, "y": None}, "2": {}}
    assert isinstance(measured["a"]["x"], float)
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(UserError, match=r"cases\.jsonl:3: this version cannot read the row"):
        writer._measured()


def test_time_adds_up(writer, plain_trainer_and_time):
    assert writer.state_dict()["run_seconds"] == 0.0
    plain_trainer_and_time.seconds += 3.0
    assert writer.state_dict()["run_seconds"] == 3.0
    writer._seconds_before = 4.0
    assert writer.state_dict()["run_seconds"] == 7.0


# ---------------------------------------------------------------------------- a resumed fit


def fit(tmp_path, **values):
    path = tmp_path / "run" / "checkpoints" / ".." / "checkpoints" / "last.ckpt"
    return PlainTrainer(TrainerFn.FITTING, **({"ckpt_path": str(path)} | values))


def test_a_resumed_fit_repeats_the_rows_after_its_checkpoint(writer, tmp_path, file, caplog):
    file.write_text(line("a") + line("b"))
    saved = {"cases": len(line("a")), "run_seconds": 4.0, "depends_on": {"--a": "1"}}
    for values in (
        {"ckpt_path": None},
        {"ckpt_path": "a/last.ckpt"},
        {"ckpt_path": "/z/last.ckpt"},
    ):
        writer.load_state_dict(saved)
        writer.on_fit_start(fit(tmp_path, **values), MODULE)  # training starts from that file, anew
        assert writer.state_dict()["run_seconds"] == 0.0
    writer.on_fit_start(fit(tmp_path), MODULE)  # the state counts once
    assert file.read_text() == line("a") + line("b")
    writer.load_state_dict(saved)
    writer.on_fit_start(fit(tmp_path, is_global_zero=False), MODULE)
    assert file.read_text() == line("a") + line("b")
    writer.load_state_dict(saved)
    writer.on_fit_start(fit(tmp_path), MODULE)
    assert file.read_text() == line("a") and writer.state_dict()["run_seconds"] == 4.0


def test_another_fit_is_not_resumed(writer, tmp_path, file, caplog):
    saved = {"cases": 0, "run_seconds": 4.0, "depends_on": {"--a": "2"}}
    writer.load_state_dict(saved)
    with pytest.raises(UserError, match="--a has changed: 2, now 1"):
        writer.on_fit_start(fit(tmp_path), MODULE)
    writer = RunWriter(tmp_path / "run", "fit", depends_on={"the version of torch": "1"})
    writer.load_state_dict(saved | {"depends_on": {"the version of torch": "2"}})
    writer.on_fit_start(fit(tmp_path), MODULE)
    assert "another value of the version of torch" in caplog.text


@pytest.mark.parametrize(
    ("was_finished", "first_step", "is_refused"),
    [
        (False, 5, False),
        (False, None, False),
        (True, 3, False),
        (True, 5, True),
        (True, None, True),
    ],
)
def test_a_finished_fit_that_makes_no_step_is_refused(
    tmp_path, file, monkeypatch, was_finished, first_step, is_refused
):
    finished = []
    monkeypatch.setattr(RunWriter, "_finish", lambda *_: finished.append("summary"))
    if was_finished:
        (file.parent / "summary.json").write_text("{}")
    writer = RunWriter(tmp_path / "run", "fit")
    writer.setup(fit(tmp_path), MODULE, "fit")
    if first_step is not None:
        writer.on_train_start(fit(tmp_path, global_step=first_step), MODULE)
    if is_refused:
        with pytest.raises(UserError, match="holds a finished run of 5 steps, so there is nothing"):
            writer.on_fit_end(fit(tmp_path, global_step=5), MODULE)
    else:
        writer.on_fit_end(fit(tmp_path, global_step=5, interrupted=True), MODULE)
        assert not finished
        writer.on_fit_end(fit(tmp_path, global_step=5), MODULE)
    assert finished == ["summary"] * (not is_refused)


@pytest.mark.parametrize(
    ("values", "is_written"),
    [({}, True), ({"is_global_zero": False}, False), ({"fast_dev_run": True}, False)],
)
def test_a_summary_is_written_at_the_end_of_a_validation(
    writer, file, monkeypatch, values, is_written
):
    monkeypatch.setattr(RunWriter, "_summary", lambda *_: {"means": {"x": math.nan}})
    for fn in NOT_VALIDATING:
        writer.on_validation_end(PlainTrainer(fn), MODULE)
    assert not list(file.parent.iterdir())
    writer.on_validation_end(PlainTrainer(**values), MODULE)
    text = '{\n "means": {\n  "x": null\n }\n}'
    assert [path.read_text().strip() for path in file.parent.iterdir()] == [text] * is_written


# ---------------------------------------------------------------------------- what a run says of itself


@pytest.mark.parametrize(
    ("schedule", "first", "kept"),
    [
        ("stream", True, True),
        ("stream", False, False),
        ("each", True, False),
        ("batch", True, False),
    ],
)
def test_the_order_of_a_stream_is_kept(writer, tmp_path, schedule, first, kept):
    trainer = PlainTrainer(TrainerFn.FITTING, schedule, is_global_zero=first)
    trainer.datamodule.evaluation_cases = lambda: [SimpleNamespace(case_id=name) for name in "bca"]
    writer.on_train_start(trainer, MODULE)
    file = tmp_path / "run" / "order.json"
    assert file.exists() == kept and (not kept or file.read_text() == '["b", "c", "a"]\n')


@pytest.mark.parametrize(("base", "chat"), [({}, ""), ({"chat": "x"}, "+chat")])
def test_a_protocol_says_how_prompts_were_read(base, chat):
    """Perplexity is of plain text, which no template changes."""
    means = {"efficacy/exact": 1.0, "val/locality/agreement": 1.0, "perplexity": 9.0}
    module = SimpleNamespace(means=means, base_model=base)
    found = run_writer._protocols(module, "each")
    exact, agreement, perplexity = (
        run_writer.PROTOCOLS[name] for name in ("exact", "agreement", "perplexity")
    )
    assert found == {
        "efficacy/exact": f"{exact}{chat}@each",
        "val/locality/agreement": f"{agreement}{chat}@each",
        "perplexity": f"{perplexity}@each",
    }
