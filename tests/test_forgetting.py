"""What a stream of edits forgets, and the guard that undoes an edit after which the model has collapsed."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from corrigenda.datamodules.counterfact import CounterFact
from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.weight_patch import edited_weights
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.memprompt import MemPrompt
from corrigenda.modules.editors.wise import WISE
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.evaluation.retention import retained
from corrigenda.modules.metrics import word_entropy
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.pipeline import forgetting
from corrigenda.pipeline.callbacks import EditCallback
from corrigenda.pipeline.checkpointing import LastCheckpoint
from corrigenda.pipeline.forgetting import Forgetting
from corrigenda.pipeline.guard import Guard
from corrigenda.pipeline.run_writer import RunWriter
from corrigenda.pipeline.screen import Screen
from tests.conftest import SUBJECTS
from tests.samples import QUIET, summary

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

BREAKS = ("Old Fenwick", "The Glass Isles")  # the second and the fourth case
WEIGHT = "transformer.h.1.mlp.c_proj.weight"
NORM = "transformer.ln_f.weight"


class Breaking(FT):
    """FT whose edits of some subjects raise all logits, or make them NaN."""

    def __init__(self, added=100.0, subjects=BREAKS):
        super().__init__([1], steps=4, lr=1e-3)
        self.added, self.subjects = added, subjects

    def propose(self, lm, edits):
        delta = super().propose(lm, edits)
        if edits[0].subject not in self.subjects:
            return delta
        return Delta(delta.updates | {NORM: torch.full((32,), self.added)})


class Hashes(Callback):
    """Hash of the weights after every step, and an exception where a test wants one."""

    def __init__(self, fail_at):
        self.seen, self.fail_at = [], fail_at

    def on_train_batch_end(self, trainer, module, *_):
        self.seen.append(hash_weights(module.lm.net))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("on purpose")


@pytest.fixture
def data(data_files):
    """Five cases, one at a time."""
    return CounterFact(data_files.counterfact, batch_size=1)


@pytest.fixture
def run(tiny_lm, data, data_files, tmp_path, monkeypatch):
    """``run(editor, ...)``: a stream in ``tmp_path / name``; returns its model, hashes and trainer."""
    monkeypatch.setattr("corrigenda.pipeline.checkpointing.SAVE_EVERY", 0.0)
    text = Corpus(data_files.text, 60)

    def run(editor, at=None, action=None, name="run", fail_at=None, resume=False, **rest):
        folder, hashes, lm = tmp_path / name, Hashes(fail_at), tiny_lm("gpt2")
        callbacks = [EditCallback(editor, "stream"), hashes, Guard(action, text),
                     Forgetting(at, text), LastCheckpoint(folder)]  # fmt: skip
        settings = {
            "max_steps": -1,
            "val_check_interval": 5,
            "logger": CSVLogger(folder, "logs"),
        } | rest
        trainer = Trainer(
            accelerator="cpu", default_root_dir=folder, callbacks=callbacks, inference_mode=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings,
        )  # fmt: skip
        trainer.callbacks.append(RunWriter(folder, "fit"))
        checkpoint = folder / "checkpoints" / "last.ckpt" if resume else None
        trainer.fit(EditingModule(lm), datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return lm, hashes, trainer

    return run


def ft():
    return FT([1], steps=4, lr=1e-2)


def found(folder):
    return json.loads((folder / "forgetting.json").read_text())


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------------------- forgetting


def test_a_stream_is_measured_at_chosen_counts_and_at_its_end(run, data, tmp_path):
    lm, _, _ = run(ft(), at=[1, 3])
    record, ids = found(tmp_path / "run"), [case.case_id for case in data.evaluation_cases()]
    assert record["counts"] == [1, 3, 5] and record["order"] == ids
    assert json.loads((tmp_path / "run" / "order.json").read_text()) == ids
    assert [len(held) for held in record["held"]] == [1, 3, 5]
    # The same numbers as those of the evaluation at the end.
    rows = [row for row in lines(tmp_path / "run" / "cases.jsonl") if row["phase"] == "val"]
    assert record["held"][-1] == [row["metrics"]["efficacy/exact"] for row in rows]
    assert record["preferred"][-1] == [row["metrics"]["efficacy/preference"] for row in rows]
    assert record["weights"][-1].keys() == {WEIGHT, WEIGHT.replace("weight", "bias")}
    name = WEIGHT
    before, now = edited_weights(lm)[name]
    assert record["weights"][-1][name]["frobenius"] == pytest.approx((now - before).norm().item())
    assert record["norms"][name][-1] == record["weights"][-1][name]["frobenius"]
    assert len(record["norms"][name]) == 5 and record["norms"][name][0] > 0
    assert list(record["drift"][-1]) == ["1"] and record["drift"][-1]["1"] > 0
    current = [row for row in lines(tmp_path / "run" / "cases.jsonl") if row["phase"] == "current"]
    exact = [row["metrics"]["efficacy/exact"] for row in current]
    assert record["current"]["efficacy/exact"] == exact
    assert record["trailing"]["5"]["efficacy/exact"][-1] == pytest.approx(sum(exact) / 5)
    assert set(record["detected"]) == {"T_dist", "T_down", "T_forget", "T_edit", "inflection"}
    assert record["by_age"][1][2] is None and record["by_age"][2][2] is not None
    (log,) = (tmp_path / "run" / "logs").rglob("metrics.csv")
    assert "forgetting/retention" in log.read_text().splitlines()[0]


def test_drift_is_that_of_the_states_of_every_edited_block_and_the_last(run, tmp_path):
    run(FT([0], steps=4, lr=1e-2), at=[1], max_steps=1)
    assert list(found(tmp_path / "run")["drift"][0]) == ["0", "1"]


def test_a_batch_that_passes_a_count_is_measured_after_it(run, data, tmp_path):
    data.batch_size = 2
    run(ft(), at=[1, 2, 3], val_check_interval=3)
    assert found(tmp_path / "run")["counts"] == [2, 4, 5]
    assert found(tmp_path / "run")["operations"] == [2, 4, 5]


def test_a_resumed_stream_measures_no_count_twice(run, tmp_path, monkeypatch):
    run(ft(), at=[1, 3], name="whole")
    calls = []
    monkeypatch.setattr(
        forgetting, "retained", lambda lm, cases: calls.append(len(cases)) or retained(lm, cases)
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        run(ft(), at=[1, 3], name="cut", fail_at=3)
    assert calls == [1, 3]
    run(ft(), at=[1, 3], name="cut", resume=True)
    assert calls == [1, 3, 5]
    assert found(tmp_path / "cut") == found(tmp_path / "whole")


@pytest.mark.parametrize("editor", [MemPrompt("lm"), GRACE(1, epsilon=0.5, steps=2)])
def test_methods_without_weights_have_no_distances(run, tmp_path, editor):
    run(editor, at=[5])
    record = found(tmp_path / "run")
    assert record["norms"] is None and record["weights"] == [None]
    assert (record["drift"] == [None]) == isinstance(editor, MemPrompt)
    assert len(record["held"][0]) == 5 and record["detected"]["T_dist"] is None


def test_scores_of_tasks_that_were_written_beside_it_count(run, tmp_path):
    (tmp_path / "run").mkdir()
    scores = [(0, 0.9), (3, 0.1), (5, 0.1)]
    rows = [{"edits": n, "task": "sst2", "score": s} for n, s in scores]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"edits": 5, "ta'
    (tmp_path / "run" / "abilities.jsonl").write_text(text)
    run(ft(), at=[5])
    assert found(tmp_path / "run")["detected"]["T_down"] == 3


def test_retention_is_the_evaluations(tiny_lm, data):
    lm = tiny_lm("gpt2")
    cases = [*data.evaluation_cases(), replace(data.evaluation_cases()[0], probes={})]
    ft().edit(lm, [edit for case in cases[:2] for edit in case.edits])
    exact, preferred = retained(lm, cases)
    results = EditingModule(lm).evaluate(cases)[:-1]
    assert exact == [*(r.metrics["efficacy/exact"] for r in results), None]
    assert preferred == [*(r.metrics["efficacy/preference"] for r in results), None]
    assert retained(lm, []) == ([], []) and retained(lm, cases[-1:]) == ([None], [None])


# ---------------------------------------------------------------------------- guard


@pytest.mark.parametrize("added", [100.0, float("nan")])
def test_a_rolled_back_edit_leaves_nothing_behind(run, tiny_lm, data, tmp_path, added):
    """Not in the weights, the results, the saved edits or the numbers."""
    ids = [case.case_id for case in data.evaluation_cases()]
    lm, hashes, _ = run(Breaking(added), at=[1, 2, 5], action="roll_back")
    kept = [0, 2, 4]
    assert hashes.seen[0] == hashes.seen[1] != hashes.seen[2] == hashes.seen[3] != hashes.seen[4]
    (handle,) = lm.handles
    assert [edit[1] for edit in handle.delta.metadata["edits"]] == [
        data.evaluation_cases()[n].edits[0].subject for n in kept
    ]
    fresh = tiny_lm("gpt2")
    for number in kept:  # as if the others had never been edited
        Breaking(added).edit(fresh, list(data.evaluation_cases()[number].edits))
    assert hash_weights(fresh.net) == hash_weights(lm.net)

    folder = tmp_path / "run"
    rows = [(r["phase"], r["num_edits"], r["case_id"]) for r in lines(folder / "cases.jsonl")]
    assert rows == [
        ("current", 1, ids[0]), ("rolled_back", 1, ids[1]), ("current", 2, ids[2]),
        ("rolled_back", 2, ids[3]), ("current", 3, ids[4]), *(("val", 3, ids[n]) for n in kept),
    ]  # fmt: skip
    decisions = lines(folder / "guard.jsonl")
    assert [row["decision"] for row in decisions] == [
        "kept", "rolled_back", "kept", "rolled_back", "kept"]  # fmt: skip
    assert [row["num_edits"] for row in decisions] == [1, 1, 2, 2, 3]
    bad = decisions[1]
    assert bad["collapse"] == "catastrophic" and bad["cases"] == [ids[1]]
    assert bad["where"] == NORM
    assert decisions[2]["increase"] < 0.1
    assert summary(folder)["accepted"] == pytest.approx(3 / 5)
    record = found(folder)
    assert record["order"] == [ids[n] for n in kept] and record["counts"] == [1, 2, 3]
    assert sorted(path.stem for path in (folder / "edits").iterdir()) == [
        "step-000000", "step-000002", "step-000004"]  # fmt: skip
    while lm.handles:
        lm.handles[-1].remove()
    assert hash_weights(lm.net) == hash_weights(tiny_lm("gpt2").net)


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_a_resumed_guard_decides_as_it_did(run, tmp_path, fail_at):
    whole, *_ = run(Breaking(), at=[1, 3], action="roll_back", name="whole")
    with pytest.raises(RuntimeError, match="on purpose"):
        run(Breaking(), at=[1, 3], action="roll_back", name="cut", fail_at=fail_at)
    cut, hashes, _ = run(Breaking(), at=[1, 3], action="roll_back", name="cut", resume=True)
    assert len(hashes.seen) == 5 - fail_at
    for name in ("guard.jsonl", "cases.jsonl", "forgetting.json"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("whole", "cut")]
        assert texts[0] == texts[1], name
    assert hash_weights(cut.net) == hash_weights(whole.net)
    assert summary(tmp_path / "cut")["accepted"] == summary(tmp_path / "whole")["accepted"]


def test_a_stream_in_which_every_edit_is_undone_ends_well(run, tmp_path):
    lm, _, _ = run(Breaking(subjects=[*SUBJECTS, "Count Sable"]), at=[1], action="roll_back")
    assert not lm.handles and summary(tmp_path / "run")["accepted"] == 0
    assert not (tmp_path / "run" / "forgetting.json").exists()


def test_a_stream_is_stopped_where_it_collapses(run, tmp_path):
    _, hashes, trainer = run(Breaking(), at=[5], action="stop")
    assert len(hashes.seen) == trainer.global_step == 2
    decisions = lines(tmp_path / "run" / "guard.jsonl")
    assert [row["decision"] for row in decisions] == ["kept", "stopped"]
    assert found(tmp_path / "run")["counts"] == [2]  # measured where it ends
    assert summary(tmp_path / "run")["accepted"] == 1


def test_collapse_is_recorded_where_the_stream_goes_on(run, tmp_path):
    _, hashes, _ = run(Breaking(), action="go_on")
    decisions = lines(tmp_path / "run" / "guard.jsonl")
    assert len(hashes.seen) == 5 and {row["decision"] for row in decisions} == {"kept"}
    assert decisions[0]["collapse"] is None and decisions[1]["collapse"] == "catastrophic"
    # After the jump it is no new one: the perplexity stays high.
    assert {row["collapse"] for row in decisions[2:]} <= {"gradual", "catastrophic"}


@pytest.mark.parametrize(
    "make",
    [
        lambda _: GRACE(1, epsilon=0.5, steps=2),
        lambda _: MemPrompt("lm"),
        lambda files: WISE(1, corpus=Corpus(files.text, 200), steps=2),
    ],
    ids=["GRACE", "MemPrompt", "WISE"],
)
def test_memories_are_rolled_back_whole(run, data, data_files, tmp_path, monkeypatch, make):
    """Where an edit replaces or extends an active memory, the one before is active again."""
    monkeypatch.setattr(Guard, "_look", refuse_second)
    lm, _, trainer = run(make(data_files), action="roll_back", at=[2])
    (guard,) = [one for one in trainer.callbacks if isinstance(one, Guard)]
    assert guard.seen[0] == guard.seen[2]
    assert summary(tmp_path / "run")["accepted"] == pytest.approx(4 / 5)
    (handle,) = lm.handles
    edits = getattr(handle, "edits", None) or [Edit(*edit) for edit in handle.metadata["edits"]]
    cases = data.evaluation_cases()
    assert [edit.subject for edit in edits] == [cases[n].edits[0].subject for n in (0, 2, 3, 4)]
    handle.remove()
    assert not lm.handles


def refuse_second(guard, lm):
    """In place of a look at the model: refuses the second edit, and notes what the edits before it are."""
    guard.seen = getattr(guard, "seen", [])
    older = lm.handles[0] if guard.seen else lm.handles[-1]
    guard.seen.append(older.digest())
    seen = {"perplexity": 1.0, "increase": 0.0, "finite": True, "norms": {}, "jumped": []}
    return {**seen, "collapse": "gradual" if len(guard.seen) == 2 else None, "where": None}


def test_nothing_is_watched_by_default(run, tmp_path):
    run(ft())
    assert not any((tmp_path / "run" / n).exists() for n in ("guard.jsonl", "forgetting.json"))
    assert summary(tmp_path / "run")["accepted"] == 1


# ---------------------------------------------------------------------------- single edits


@pytest.fixture
def screened(tiny_lm, data, tmp_path):
    """``screened(editor)``: the screen of five single edits, in batches of two."""

    def run(editor, schedule="each"):
        data.batch_size = data.eval_batch_size = 2
        trainer = Trainer(
            accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            callbacks=[EditCallback(editor, schedule), Screen(tokens=6, calibration=3)],
            inference_mode=False,
        )  # fmt: skip
        trainer.callbacks.append(RunWriter(tmp_path, "validate"))
        trainer.validate(EditingModule(tiny_lm("gpt2")), datamodule=data, verbose=False)
        return json.loads((tmp_path / "screen.json").read_text())

    return run


class Large(FT):
    """FT whose last edit is a hundred times as large."""

    def propose_each(self, lm, edits):
        return [
            delta.scaled(100) if group[0].subject == "Count Sable" else delta
            for delta, group in zip(super().propose_each(lm, edits), edits, strict=True)
        ]


def test_single_edits_with_large_updates_are_found(screened, data, tiny_lm):
    found = screened(Large([1], steps=2, lr=1e-3))
    assert "112" in found["disabling"]
    assert [row["case_id"] for row in found["cases"]] == ["108", "109", "110", "111", "112"]
    case, lm = data.evaluation_cases()[0], tiny_lm("gpt2")
    handle = FT([1], steps=2, lr=1e-3).edit(lm, list(case.edits))
    norms = [
        handle.delta.dense(n).norm() / handle.delta.dense(n).numel() for n in handle.delta.updates
    ]
    assert found["cases"][0]["norm"] == pytest.approx(float(max(norms)))
    prompts = [case.edits[0].text, *(probe.prompt for probe in case.probes["generality"])]
    assert found["cases"][0]["entropy"] == pytest.approx(word_entropy(lm.generate(prompts, 6)))
    weak = [row["case_id"] for row in found["cases"] if row["entropy"] < 0.7]
    assert set(found["disabling"]) == {"112", *weak}


def test_an_interrupted_screen_goes_on(screened, tmp_path, monkeypatch):
    whole = screened(ft())
    for name in ("screen.json", "screen.jsonl", "cases.jsonl", "progress.json", "summary.json"):
        (tmp_path / name).unlink()
    calls, evaluate = [], EditingModule.evaluate

    def stop(self, cases):
        calls.append(len(cases))
        if len(calls) == 2:
            raise RuntimeError("on purpose")
        return evaluate(self, cases)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        patch.setattr(EditingModule, "evaluate", stop)
        screened(ft())
    assert screened(ft()) == whole


@pytest.mark.parametrize(
    ("editor", "schedule", "message"),
    [(ft(), "batch", "--edit.schedule each"), (MemPrompt("lm"), "each", "updates of weights")],
)
def test_a_screen_needs_single_updates(screened, editor, schedule, message):
    with pytest.raises(ValueError, match=message):
        screened(editor, schedule)


# ---------------------------------------------------------------------------- options


def test_orders_of_one_study_differ_by_seed_alone(corrigenda, tiny_folder, data_files, tmp_path):
    """A seed of the order that is 0 is the run's, so that --seeds of compare gives other orders."""
    args = ["fit", "--model", "EditingModule", "--model.lm.name", tiny_folder("gpt2"), "--data", "CounterFact",
            "--data.path", data_files.counterfact, "--data.batch_size", "1", "--data.order_seed", "0",
            "--edit.editor", "FT", "--edit.editor.layers", "[1]", "--edit.editor.steps", "1",
            "--edit.schedule", "stream", "--forgetting.at", "[1,3]", "--guard.action", "go_on",
            "--guard.text.tokens", "40", *QUIET]  # fmt: skip
    orders = []
    for number, seed in enumerate((1, 2, 1)):
        folder = tmp_path / f"run-{number}"
        assert corrigenda(*args, "--seed_everything", seed, "--run_dir", folder) == 0
        orders.append(json.loads((folder / "order.json").read_text()))
        assert found(folder)["order"] == orders[-1]
        assert len(lines(folder / "guard.jsonl")) == 5
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_the_order_keeps_the_cases(data_files):
    plain, mixed = (CounterFact(data_files.counterfact, limit=4, order_seed=s) for s in (None, 3))
    ids = [[case.case_id for case in data.evaluation_cases()] for data in (plain, mixed)]
    assert ids[0] == ["108", "109", "110", "111"] and ids[1] != ids[0] and sorted(ids[1]) == ids[0]


@pytest.mark.parametrize("callback", [Forgetting([1]), Guard("stop")])
def test_only_streams_are_watched(tiny_lm, data, callback, tmp_path):
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        callbacks=[EditCallback(ft(), "each"), callback], inference_mode=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"set --edit.schedule stream, or leave out --(for|guard)"):
        trainer.validate(EditingModule(tiny_lm("gpt2")), datamodule=data, verbose=False)


def test_weights_before_all_edits_and_before_the_newest_one(tiny_lm, data):
    lm = tiny_lm("gpt2")
    base = lm.net.get_parameter(WEIGHT).detach().clone()
    first, second = (ft().edit(lm, list(case.edits)) for case in data.evaluation_cases()[:2])
    before, now = edited_weights(lm)[WEIGHT]
    assert torch.equal(before, base) and torch.equal(now, lm.net.get_parameter(WEIGHT))
    middle, now = edited_weights(lm, newest=1)[WEIGHT]
    second.remove()
    assert torch.equal(middle, lm.net.get_parameter(WEIGHT)) and not torch.equal(middle, now)
    first.remove()
    assert edited_weights(lm) == {}
