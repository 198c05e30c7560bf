"""When edits are active, what a run writes, and how a stopped stream resumes."""

import json
from contextlib import suppress

import pytest
import torch
import wandb
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from corrigenda.datamodules.counterfact import CounterFact
from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editing.editor import Editor
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.alphaedit import AlphaEdit
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.training.tuning import FineTune
from corrigenda.pipeline.callbacks import EditCallback
from corrigenda.pipeline.checkpointing import LastCheckpoint
from corrigenda.pipeline.forgetting import Forgetting
from corrigenda.pipeline.guard import Guard
from corrigenda.pipeline.report.comparison import join
from corrigenda.pipeline.report.runs import read_run
from corrigenda.pipeline.run_writer import RunWriter
from tests.samples import summary

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


class Spy(Callback):
    """Records which edits are active while cases are evaluated; raises where a test wants that."""

    def __init__(self, fail_at=None):
        self.seen, self.edited, self.fail_at, self.steps = [], [], fail_at, 0

    def on_validation_batch_start(self, trainer, module, batch, *_):
        under = module.conditions
        deltas = under.case_deltas and [len(delta.updates) for delta in under.case_deltas]
        kept = [getattr(handle, "delta", handle) for handle in module.lm.handles]
        edits = [edit.metadata["edits"] for edit in kept]
        self.seen.append((len(batch), deltas, [len(made) for made in edits]))
        self.edited.append(len(under.edited))
        if self.fail_at == "validation":
            raise RuntimeError("on purpose")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("on purpose")
        self.steps += 1


class Outside(Editor):
    """An editor that is no WeightEditor: its cases are evaluated one after the other."""

    def edit(self, lm, edits):
        return ft().edit(lm, edits)


def ft():
    return FT([1], steps=4, lr=1e-2)


def rome(files):
    free = {"weight_decay": 0.0, "kl_weight": 0.0, "clamp_norm": 20.0}
    return ROME(0, steps=6, contexts=[(4, 2)], corpus=Corpus(files.text, 2000), **free)


def alphaedit(files):
    free = {"weight_decay": 0.0, "kl_weight": 0.0, "clamp_norm": 20.0, "contexts": [(4, 2)]}
    corpus = Corpus(files.text, 2000)
    return AlphaEdit([0], null_share=0.5, l2=0.01, corpus=corpus, steps=6, **free)


def grace(_files=None):
    return GRACE(1, epsilon=0.5, steps=4)


def weights(lm):
    return {name: p.detach().clone() for name, p in lm.net.named_parameters()}


def unchanged(lm, kept):
    return not lm.handles and all(torch.equal(p, kept[n]) for n, p in lm.net.named_parameters())


def rows(folder):
    """Lines of ``cases.jsonl``; of equal (case, phase, number of edits) the last, as in a report."""
    lines = map(json.loads, (folder / "cases.jsonl").read_text().splitlines())
    return list({(r["case_id"], r["phase"], r["num_edits"]): r for r in lines}.values())


@pytest.fixture
def data(data_files):
    """Five cases in batches of two."""
    return CounterFact(data_files.counterfact, batch_size=2)


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("gpt2")


@pytest.fixture
def run(lm, data, tmp_path, monkeypatch):
    """``run(editor, schedule)``: a whole run in ``tmp_path / name``; returns its spy and its trainer."""
    monkeypatch.setattr("corrigenda.pipeline.checkpointing.SAVE_EVERY", 0.0)

    def run(
        editor, schedule, verb="validate", name="run", fail_at=None, model=lm, module=None, **rest
    ):
        folder, spy = tmp_path / name, Spy(fail_at)
        settings = {
            "max_steps": -1,
            "val_check_interval": 2,
            "logger": CSVLogger(folder, "logs"),
        } | rest
        ckpt_path = settings.pop("ckpt_path", None)
        trainer = Trainer(
            accelerator="cpu", default_root_dir=folder,
            callbacks=[EditCallback(editor, schedule), spy, LastCheckpoint(folder)], inference_mode=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            log_every_n_steps=1, **settings,
        )  # fmt: skip
        trainer.callbacks.append(RunWriter(folder, verb))
        module = module or EditingModule(model)
        call = getattr(trainer, verb)
        verbose = {} if verb == "fit" else {"verbose": False}
        call(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True, **verbose)
        return spy, trainer

    return run


# ---------------------------------------------------------------------------- schedules


def test_contradictions_within_a_case_are_said_however_it_is_edited(run, data, caplog):
    cases = data.evaluation_cases()
    first = cases[0].edits[0]
    edits = (first, Edit(first.prompt, first.subject, "something else"))
    cases[:] = [EditCase("both", edits, cases[0].probes)]
    for schedule in ("each", "batch"):
        caplog.clear()
        with caplog.at_level("WARNING"):
            run(ft(), schedule, name=schedule)
        assert sum("is to be both" in message for message in caplog.messages) == 1


def test_a_block_beyond_the_model_is_refused_before_any_case_is_read(run, data, monkeypatch):
    monkeypatch.setattr(data, "evaluation_cases", lambda: pytest.fail("cases were read"))
    with pytest.raises(ValueError, match="layer 9 does not exist: the model has 2 blocks"):
        run(FT([9]), "each")


@pytest.mark.parametrize(
    ("editor", "schedule", "seen", "num_edits"),
    [
        (ft(), "each", [(2, [2, 2], []), (2, [2, 2], []), (1, [2], [])], [1, 1, 1, 1, 1]),
        (Outside(), "each", [(2, None, []), (2, None, []), (1, None, [])], [1, 1, 1, 1, 1]),
        (ft(), "batch", [(2, None, [2]), (2, None, [2]), (1, None, [1])], [2, 2, 2, 2, 1]),
        (ft(), "epoch", [(2, None, [5]), (2, None, [5]), (1, None, [5])], [5, 5, 5, 5, 5]),
        (grace(), "each", [(2, None, []), (2, None, []), (1, None, [])], [1, 1, 1, 1, 1]),
        (grace(), "batch", [(2, None, [2]), (2, None, [2]), (1, None, [1])], [2, 2, 2, 2, 1]),
        (grace(), "epoch", [(2, None, [5]), (2, None, [5]), (1, None, [5])], [5, 5, 5, 5, 5]),
        (None, "each", [(2, None, []), (2, None, []), (1, None, [])], [0, 0, 0, 0, 0]),
    ],
    ids=[
        *("each", "each-outside", "batch", "epoch"),
        *("memory-each", "memory-batch", "memory-epoch", "unedited"),
    ],
)
def test_when_edits_are_active(run, lm, tmp_path, editor, schedule, seen, num_edits):
    kept = weights(lm)
    spy, trainer = run(editor, schedule)
    assert spy.seen == seen
    # what is edited beside a case itself, where all prompts are different
    assert spy.edited == (num_edits[::2] if schedule in ("batch", "epoch") else [0, 0, 0])
    assert unchanged(lm, kept)
    assert [row["num_edits"] for row in rows(tmp_path / "run")] == num_edits
    module = trainer.lightning_module
    assert module.conditions.case_deltas is None and module.conditions.around_case is None


@pytest.mark.parametrize(
    "make",
    [lambda _: ft(), rome, lambda _: Outside(), grace],
    ids=["FT", "ROME", "other", "GRACE"],
)
def test_each_is_one_at_a_time(run, lm, data, data_files, tmp_path, make):
    run(make(data_files), "each")
    editor, module = make(data_files), EditingModule(lm)
    for row, case in zip(rows(tmp_path / "run"), data.evaluation_cases(), strict=True):
        handle = editor.edit(lm, case.edits)
        (result,) = module.evaluate([case])
        handle.remove()
        assert set(row["metrics"]) == set(result.metrics)
        for name, value in row["metrics"].items():
            assert value == pytest.approx(result.metrics[name], abs=1e-4), name
    for name, value in module.compute_means().items():
        assert summary(tmp_path / "run")["means"][name] == pytest.approx(value, abs=1e-4)


def test_a_requantised_edit_is_evaluated_as_written(run, lm):
    lm.requantize = True
    spy, _ = run(ft(), "each")
    assert spy.seen == [(2, None, []), (2, None, []), (1, None, [])]


def test_together_is_together(run, lm, data, tmp_path):
    run(ft(), "batch", name="batch")
    run(ft(), "epoch", name="epoch")
    cases = data.evaluation_cases()
    for name, groups in {"batch": [cases[:2], cases[2:4], cases[4:]], "epoch": [cases]}.items():
        wanted = []
        for group in groups:
            handle = ft().edit(lm, [edit for case in group for edit in case.edits])
            wanted += [result.metrics for result in EditingModule(lm).evaluate(group)]
            handle.remove()
        for row, metrics in zip(rows(tmp_path / name), wanted, strict=True):
            assert row["metrics"] == pytest.approx(metrics, abs=1e-4)


def test_the_module_itself_is_the_editor_where_none_is_given(run, lm, tmp_path):
    spy, trainer = run(None, "each", module=MEND(lm, layers=[1], rank=2))
    assert [deltas for _, deltas, _ in spy.seen] == [[2, 2], [2, 2], [2]]
    assert summary(tmp_path / "run")["editor"] == "MEND"


def test_an_epoch_within_fit_edits_the_cases_it_asks(run, lm, data, data_files, tmp_path):
    """A learned editor is validated on held-out training cases, not on those to be evaluated."""
    data.train_path, data.path = data.path, None
    data.val_fraction = 0.5
    run(
        None, "epoch", "fit", module=MEND(lm, layers=[1], rank=2), max_steps=1, val_check_interval=1
    )
    held_out = [case.case_id for case in data.cases("val")]
    done = rows(tmp_path / "run")
    assert [row["case_id"] for row in done] == held_out
    assert all(row["num_edits"] == len(held_out) for row in done)


@pytest.mark.parametrize("schedule", ["each", "batch", "epoch"])
def test_a_failure_leaves_the_model_clean(run, lm, tmp_path, schedule):
    kept = weights(lm)
    for editor in (ft(), Outside()):
        with pytest.raises(RuntimeError, match="on purpose"):
            run(editor, schedule, fail_at="validation")
        assert unchanged(lm, kept)
    assert not (tmp_path / "run" / "summary.json").exists()
    spy, _ = run(ft(), schedule)
    assert summary(tmp_path / "run")["finished"]


@pytest.mark.parametrize(
    ("verb", "editor", "module", "message"),
    [
        ("validate", ft(), EditingModule, "step by step: run fit"),
        ("fit", None, EditingModule, "set --edit.editor"),
        ("fit", None, lambda lm: MEND(lm, rank=2), "does not train"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(run, lm, verb, editor, module, message):
    with pytest.raises(ValueError, match=message):
        run(editor, "stream", verb, module=module(lm))


# ---------------------------------------------------------------------------- streams


def test_a_stream_piles_edits_up(run, lm, data, tmp_path):
    base = weights(lm)
    spy, trainer = run(ft(), "stream", "fit")
    done = [(row["phase"], row["num_edits"], row["case_id"]) for row in rows(tmp_path / "run")]
    ids = [case.case_id for case in data.evaluation_cases()]
    # Three steps, an evaluation after every second one and after the last; only edited cases are evaluated.
    assert done == [
        *(("current", 2, i) for i in ids[:2]), *(("current", 4, i) for i in ids[2:4]),
        *(("val", 4, i) for i in ids[:4]), ("current", 5, ids[4]), *(("val", 5, i) for i in ids),
    ]  # fmt: skip
    assert spy.steps == trainer.global_step == 3 and trainer.current_epoch == 1
    (handle,) = lm.handles  # one undo for everything
    assert len(handle.delta.metadata["edits"]) == 5
    after = weights(lm)
    handle.remove()
    assert unchanged(lm, base)

    cases, module = data.evaluation_cases(), EditingModule(lm)
    for group in (cases[:2], cases[2:4], cases[4:]):
        ft().edit(lm, [edit for case in group for edit in case.edits])
    assert all(torch.equal(value, after[name]) for name, value in weights(lm).items())
    for row, result in zip(rows(tmp_path / "run")[-5:], module.evaluate(cases), strict=True):
        assert row["metrics"] == pytest.approx(result.metrics, abs=1e-5)
    assert summary(tmp_path / "run")["means"] == pytest.approx(module.compute_means(), abs=1e-5)


def test_a_stream_is_logged_by_its_number_of_edits(run, tmp_path):
    run(ft(), "stream", "fit")
    (file,) = (tmp_path / "run" / "logs").rglob("metrics.csv")
    header, *lines = [line.split(",") for line in file.read_text().splitlines()]
    table = [dict(zip(header, line, strict=True)) for line in lines]
    current = [row["edit/num_edits"] for row in table if row["current/efficacy/exact"]]
    retained = [row["edit/num_edits"] for row in table if row["val/efficacy/exact"]]
    assert current == ["2.0", "4.0", "5.0"] and retained == ["4.0", "5.0"]
    assert all(row["val/efficacy/forgotten"] for row in table if row["val/efficacy/exact"])


def test_max_steps_counts_edits_of_a_stream(run, lm, tmp_path):
    spy, _ = run(ft(), "stream", "fit", max_steps=1, val_check_interval=3)
    assert spy.steps == 1
    assert [(r["phase"], r["num_edits"]) for r in rows(tmp_path / "run")] == [
        ("current", 2), ("current", 2), ("val", 2), ("val", 2)]  # fmt: skip


@pytest.mark.parametrize(
    ("batch_size", "fail_at", "left"),
    [(1, 3, 2), (1, 4, 1), (2, 2, 1), (1, "validation", 4), (2, "validation", 2)],
)
@pytest.mark.parametrize(
    "make", [lambda _: ft(), rome, alphaedit, grace], ids=["FT", "ROME", "AlphaEdit", "GRACE"]
)
def test_a_resumed_stream_is_bit_exact(
    run, lm, tiny_lm, data, data_files, tmp_path, make, batch_size, fail_at, left
):
    """Steps that are left are made, a step whose evaluation was stopped again; the model is a new one."""
    data.batch_size = batch_size
    _, trainer = run(make(data_files), "stream", "fit", "whole")
    with pytest.raises(RuntimeError, match="on purpose"):
        run(make(data_files), "stream", "fit", "cut", fail_at=fail_at, model=tiny_lm("gpt2"))
    assert not (tmp_path / "cut" / "summary.json").exists()
    fresh = tiny_lm("gpt2")
    checkpoint = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    spy, resumed = run(make(data_files), "stream", "fit", "cut", model=fresh, ckpt_path=checkpoint)
    assert spy.steps == left
    assert all(torch.equal(p, lm.net.get_parameter(n)) for n, p in fresh.net.named_parameters())
    whole, cut = (rows(tmp_path / name) for name in ("whole", "cut"))
    assert sorted(map(str, whole)) == sorted(map(str, cut))
    means = [summary(tmp_path / name)["means"] for name in ("whole", "cut")]
    assert means[0] == means[1]
    forgotten = [t.logged_metrics["val/efficacy/forgotten"] for t in (trainer, resumed)]
    torch.testing.assert_close(*forgotten, equal_nan=True)
    assert summary(tmp_path / "cut")["budget"]["num_edits"] == 5
    if isinstance(fresh.handles[0], ModulePatch):
        memories = [model.handles[0].adapter.state_dict() for model in (lm, fresh)]
        assert all(torch.equal(memories[0][name], memories[1][name]) for name in memories[0])
        assert fresh.handles[0].metadata == lm.handles[0].metadata
    assert len(fresh.handles) == 1
    fresh.handles[0].remove()  # the undo has been kept, too
    assert unchanged(fresh, weights(tiny_lm("gpt2")))


@pytest.mark.parametrize("stopped", ["evaluation", "summary"])
def test_a_run_stopped_at_its_very_end_has_its_results(
    run, tiny_lm, data, tmp_path, monkeypatch, stopped
):
    def fail(*_):
        raise RuntimeError("on purpose")

    data.batch_size = 1
    run(ft(), "stream", "fit", "whole", val_check_interval=5)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        if stopped == "summary":
            patch.setattr(RunWriter, "_finish", fail)
        fail_at = "validation" if stopped == "evaluation" else None
        run(
            ft(), "stream", "fit", "cut",
            fail_at=fail_at, model=tiny_lm("gpt2"), val_check_interval=5,
        )  # fmt: skip
    checkpoint = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    spy, _ = run(
        ft(), "stream", "fit", "cut",
        model=tiny_lm("gpt2"), ckpt_path=checkpoint, val_check_interval=5,
    )  # fmt: skip
    assert spy.steps == (stopped == "evaluation")
    means = [summary(tmp_path / name)["means"] for name in ("whole", "cut")]
    assert means[0] == means[1] and means[0]["efficacy/exact"] >= 0


def test_a_partial_line_is_removed_before_a_run_resumes(run, tmp_path):
    run(ft(), "stream", "fit")
    file = tmp_path / "run" / "cases.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"phase": "val", "num_ed')
    with suppress(RuntimeError):
        run(ft(), "stream", "fit", fail_at=0)
    assert file.read_text().startswith(whole)
    assert all(json.loads(line) for line in file.read_text().splitlines())


# ---------------------------------------------------------------------------- what is left behind


@pytest.mark.parametrize(
    ("schedule", "verb", "names"),
    [
        ("each", "validate", ["108", "109", "110", "111", "112"]),
        ("batch", "validate", ["batch-000000", "batch-000001", "batch-000002"]),
        ("epoch", "validate", ["all"]),
        ("stream", "fit", ["step-000000", "step-000001", "step-000002"]),
    ],
)
def test_edits_are_saved_and_can_be_applied_again(
    run, lm, tiny_lm, data, tmp_path, schedule, verb, names
):
    run(ft(), schedule, verb)
    files = sorted((tmp_path / "run" / "edits").iterdir())
    assert [file.stem for file in files] == names
    deltas = [Delta.load(file) for file in files]
    made = [tuple(edit) for delta in deltas for edit in delta.metadata["edits"]]
    assert made == [(e.prompt, e.subject, e.target_new) for e in data.edits()]
    fresh = tiny_lm("gpt2")
    if schedule == "stream":
        for delta in deltas:
            WeightPatch(fresh, delta)
        assert all(torch.equal(p, lm.net.get_parameter(n)) for n, p in fresh.net.named_parameters())
    if schedule == "each":
        WeightPatch(fresh, deltas[0])
        (result,) = EditingModule(fresh).evaluate(data.evaluation_cases()[:1])
        assert rows(tmp_path / "run")[0]["metrics"] == pytest.approx(result.metrics, abs=1e-4)


@pytest.mark.parametrize(
    ("schedule", "verb", "sizes"),
    [
        ("each", "validate", [1, 1, 1, 1, 1]),
        ("batch", "validate", [2, 2, 1]),
        ("epoch", "validate", [5]),
        ("stream", "fit", [2, 4, 5]),
    ],
)
def test_memories_are_saved_and_can_be_activated_again(
    run, lm, tiny_lm, data, tmp_path, schedule, verb, sizes
):
    run(grace(), schedule, verb)
    files = sorted((tmp_path / "run" / "edits").iterdir())
    fresh = tiny_lm("gpt2")
    patches = [ModulePatch.load(fresh, file) for file in files]
    assert [len(patch.metadata["edits"]) for patch in patches] == sizes
    budget = summary(tmp_path / "run")["budget"]
    assert budget["parameters_touched"] > 0 and budget["query_overhead"] > 0
    whole = patches[-1:] if schedule == "stream" else patches  # the last file holds all of it
    assert budget["bytes_per_edit"] == sum(p.adapter.num_bytes for p in whole) / 5
    if schedule == "stream":
        base = [
            result.metrics
            for result in EditingModule(tiny_lm("gpt2")).evaluate(data.evaluation_cases())
        ]
        results = EditingModule(fresh).evaluate(data.evaluation_cases())
        for row, result, before in zip(rows(tmp_path / "run")[-5:], results, base, strict=True):
            assert row["metrics"] == pytest.approx(result.metrics, abs=1e-4)
            assert row["metrics"]["efficacy/margin"] > before["efficacy/margin"]
        (handle,) = lm.handles
        handle.remove()
        assert not lm.handles


def test_edits_are_not_saved_without_save_edits(lm, data, tmp_path):
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[EditCallback(ft(), save_edits=False)],
        default_root_dir=tmp_path, enable_progress_bar=False, inference_mode=False,
    )  # fmt: skip
    trainer.validate(EditingModule(lm), data, verbose=False)
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("schedule", ["each", "batch", "epoch"])
def test_the_summary_says_how_it_was_measured(run, lm, tmp_path, schedule):
    run(ft(), schedule)
    found = summary(tmp_path / "run")
    names = ["format", "run", "verb", "finished", "seed", "editor", "model", "model_hash", "dataset",
             "schedule", "protocols", "means", "budget", "numbers"]  # fmt: skip
    assert list(found) == names
    assert [found[name] for name in names[:6]] == [1, "run", "validate", True, None, "FT"]
    assert [found[n] for n in names[6:10]] == [lm.name, lm.weights_hash, "CounterFact", schedule]
    assert set(found["protocols"]) == set(found["means"])
    assert found["protocols"]["efficacy/exact"] == f"tf_exact@{schedule}"
    assert found["protocols"]["all/score"] == f"cf_prob@{schedule}"
    budget = found["budget"]
    assert budget["num_edits"] == 5 and budget["seconds_per_edit"] > 0 and budget["peak_gib"] > 0
    projection = lm.net.get_submodule(lm.structure.out_name(1))
    assert budget["parameters_touched"] == projection.weight.numel() + projection.bias.numel()
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_report_reads_what_a_run_wrote(run, tmp_path):
    run(None, "each", name="unedited")
    run(ft(), "each", name="ft")
    run(ft(), "stream", "fit", name="stream")
    unedited, edited, stream = (read_run(tmp_path / n) for n in ("unedited", "ft", "stream"))
    assert summary(tmp_path / "unedited")["editor"] is None
    assert summary(tmp_path / "unedited")["budget"]["num_edits"] is None
    assert len(join([unedited, edited], "unedited").case_ids) == len(rows(tmp_path / "ft"))
    streamed = join([stream], None)
    assert list(streamed.curve(stream, "efficacy/exact", "val")) == [4, 5]
    assert list(streamed.curve(stream, "efficacy/exact", "current")) == [2, 4, 5]


def test_more_edits_may_be_active_than_are_evaluated(run, tmp_path):
    """All cases are edited, the first batches evaluated."""
    run(ft(), "epoch", limit_val_batches=1)
    assert [(row["case_id"], row["num_edits"]) for row in rows(tmp_path / "run")] == [
        ("108", 5),
        ("109", 5),
    ]


@pytest.fixture
def board(tmp_path):
    """A logger to W&B whose run notes what it is given."""

    class Run:
        def __init__(self):
            self.axes, self.logged = {}, []

        def define_metric(self, name, step_metric=None):
            assert name not in self.axes
            self.axes[name] = step_metric

        def log(self, metrics):
            self.logged.append(metrics)

    class Logger(WandbLogger):
        experiment = Run()

    return Logger(save_dir=tmp_path, offline=True)


def test_wandb_draws_a_stream_over_its_edits(run, board):
    run(ft(), "stream", "fit", logger=board)
    axes = board.experiment.axes
    assert axes["val/efficacy/exact"] == axes["current/efficacy/exact"] == "edit/num_edits"
    assert axes["edit/seconds"] == "trainer/global_step"
    logged = {name for metrics in board.experiment.logged for name in metrics}
    assert logged - {"epoch", "trainer/global_step"} == set(axes)


def test_wandb_gets_what_a_stream_forgets(board, lm, data, tmp_path):
    text = Corpus(tokens=40)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=board, inference_mode=False,
        callbacks=[EditCallback(ft(), "stream"), Guard("go_on", text), Forgetting([2], text)],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.callbacks.append(RunWriter(tmp_path, "fit"))
    trainer.fit(EditingModule(lm), datamodule=data)
    logged, axes = board.experiment.logged, board.experiment.axes
    assert axes["guard/perplexity"] == axes["forgetting/retention"] == "edit/num_edits"
    assert [row["edit/num_edits"] for row in logged if "guard/collapsed" in row] == [2, 4, 5]
    assert [row["edit/num_edits"] for row in logged if "forgetting/forgotten" in row] == [2, 5]
    pictures = {name for row in logged for name in row} & {"retention", "norms of changes"}
    assert len(pictures) == 2


def test_wandb_gets_the_learning_curves(run, lm, board, tmp_path):
    """Over the trainer's steps, and at the end the picture of a report."""
    csv = CSVLogger(tmp_path / "run", "logs")
    module = FineTune(lm, ft())
    run(None, "epoch", "fit", module=module, logger=[csv, board], max_epochs=1)
    axes = board.experiment.axes
    assert axes["train/loss"] == axes["val/efficacy/exact"] == "trainer/global_step"
    assert [type(image) for image in board.experiment.logged[-1]["learning curves"]] == [
        wandb.Image
    ]
    # Every edit that it was trained on counts as active during the evaluation.
    assert {row["num_edits"] for row in rows(tmp_path / "run")} == {5}


@pytest.mark.parametrize(("schedule", "verb"), [("epoch", "validate"), ("stream", "fit")])
def test_perplexity_is_taken_under_the_edits(run, lm, data, data_files, tmp_path, schedule, verb):
    text = Corpus(data_files.text, 300)
    base = lm.perplexity(text.texts(lm), 300)
    _, trainer = run(ft(), schedule, verb, module=EditingModule(lm, perplexity=text))
    edits = [edit for case in data.cases("test") for edit in case.edits]
    means = summary(tmp_path / "run")["means"]
    if schedule == "epoch":
        handle = ft().edit(lm, edits)
    edited = lm.perplexity(text.texts(lm), 300)  # a stream's edits are still active
    if schedule == "epoch":
        handle.remove()
    assert means["text/perplexity"] == pytest.approx(edited, rel=1e-5)
    assert means["text/perplexity_increase"] == pytest.approx(edited / base - 1, rel=1e-4)
    assert abs(edited / base - 1) > 1e-3
    protocol = summary(tmp_path / "run")["protocols"]["text/perplexity"]
    assert protocol == f"nll@{schedule}"
    if schedule == "stream":  # and at every evaluation, which a report draws over the edits
        logged = read_run(tmp_path / "run").logged("val/text/perplexity", over="edit/num_edits")
        assert list(logged) == [4, 5] and logged[5] == pytest.approx(edited, rel=1e-5)


def test_perplexity_of_the_unedited_model(run, lm, data_files, tmp_path):
    text = Corpus(data_files.text, 300)
    run(None, "each", module=EditingModule(lm, perplexity=text))
    means = summary(tmp_path / "run")["means"]
    assert means["text/perplexity"] == pytest.approx(lm.perplexity(text.texts(lm), 300))
    assert means["text/perplexity_increase"] == 0


@pytest.mark.parametrize("schedule", ["each", "batch"])
def test_perplexity_needs_edits_that_stay(run, lm, data_files, schedule):
    module = EditingModule(lm, perplexity=Corpus(data_files.text, 300))
    with pytest.raises(ValueError, match="epoch or stream, or leave out --model.perplexity"):
        run(ft(), schedule, module=module)
