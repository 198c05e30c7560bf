"""Sequences of tasks: how they are dealt, loaded, learned one by one, evaluated and resumed."""

import json
import math
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

from corrigenda.datamodules.facts import Facts
from corrigenda.datamodules.files import DataError
from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.datamodules.tasks import TaskLoader, Tasks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.evaluation import unedited
from corrigenda.modules.metrics import continual
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline import checkpointing
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report import sequences
from tests.samples import QUIET

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def case(number, relation="r", task=None):
    edit = Edit("{} is", f"subject {number}", "new", "true", relation)
    return EditCase(str(number), (edit,), {}, task=task)


def ids(cases):
    return [case.case_id for case in cases]


# ---------------------------------------------------------------------------- dealing


def test_chunks_share_no_case_and_their_order_depends_on_the_seed_alone():
    cases = [case(n) for n in range(20)]
    tasks, again, other = Tasks(3, 4), Tasks(3, 4), Tasks(3, 4, seed=1)
    dealt = tasks.deal(cases)
    assert ids(dealt) == ids(again.deal(cases)) != ids(other.deal(cases))
    assert [len(task) for task in tasks.cases] == [4, 4, 4]
    # The same cases whatever the seed, in another order.
    assert sorted(ids(dealt)) == sorted(ids(other.cases[0] + other.cases[1] + other.cases[2]))
    assert set(ids(dealt)) == set(ids(cases[:12]))


def test_a_task_of_one_relation_has_no_case_of_another():
    cases = [case(n, "abcd"[n % 4] if n < 16 else "rare") for n in range(18)]
    tasks = Tasks(4, 3, by="relation")
    tasks.deal(cases)
    assert sorted(tasks.names) == list("abcd")  # "rare" has too few
    for name, task in zip(tasks.names, tasks.cases, strict=True):
        assert {c.edits[0].relation for c in task} == {name} and len(task) == 3


def test_tasks_of_the_file_keep_its_order_and_may_differ_in_size():
    cases = [case(n, task=name) for n, name in enumerate("bbbaac")] + [case(9)]
    tasks = Tasks(3, by="file")
    tasks.deal(cases)
    assert tasks.names == ["b", "a", "c"] and [len(task) for task in tasks.cases] == [3, 2, 1]
    assert [tasks.learned(started) for started in range(4)] == [0, 3, 5, 6]


def test_the_name_of_a_task_is_no_part_of_what_is_evaluated():
    assert case(1, task="a").fingerprint == case(1).fingerprint


def test_unrelated_probes_are_of_subjects_that_no_task_edits():
    tasks, other = Tasks(2, 3, unrelated=4), Tasks(2, 3, unrelated=4, seed=1)
    dealt = tasks.deal([case(n) for n in range(14)])
    edited = {c.edits[0].text for c in dealt}
    probes = [p for c in dealt for p in c.probes["unrelated"]]
    assert len({p.prompt for p in probes}) == len(probes) == 8
    assert not edited & {p.prompt for p in probes} and all(p.target == "true" for p in probes)
    # Under another seed the same cases are evaluated in the same way, in another order.
    again = other.deal([case(n) for n in range(14)])
    assert {c.fingerprint for c in again} == {c.fingerprint for c in dealt} and again != dealt


def test_later_cases_take_the_place_of_those_about_the_tasks_own_subjects():
    """As in CounterFact, where subjects occur in several records."""
    cases = [case(n) for n in range(6)] + [case(0), case(1), *(case(n) for n in range(6, 12))]
    cases = [replace(c, case_id=str(n)) for n, c in enumerate(cases)]
    dealt = Tasks(2, 3, unrelated=2).deal(cases)
    probes = {p.prompt for c in dealt for p in c.probes["unrelated"]}
    assert probes == {f"subject {n} is" for n in range(6, 10)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 3, "size": 5}, "3 tasks by chunk with 5 cases each .* 10 cases, only 2"),
        ({"number": 2, "size": 2, "by": "file"}, "no case names its task"),
        ({"number": 2, "size": 3, "unrelated": 9}, "unrelated 9 needs 18 cases .* there are 4"),
    ],
)
def test_too_few_cases_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        Tasks(**settings).deal([case(n) for n in range(10)])


def test_wrong_settings_are_refused():
    for settings in (
        {"number": 0, "size": 1},
        {"number": 1},
        {"number": 1, "size": 1, "passes": 0},
    ):
        with pytest.raises(ValueError, match=r"number|size|passes"):
            Tasks(**settings)


def test_the_order_of_every_dataset_is_its_own_task_order():
    data = Facts(tasks=Tasks(4, 5))
    assert ids(data.evaluation_cases()) == [i for task in data.tasks.cases for i in ids(task)]
    assert len(data.evaluation_cases()) == 20


def test_cases_may_be_evaluated_in_larger_batches_than_they_are_learned():
    data = Facts(limit=7, batch_size=1, eval_batch_size=4)
    assert [len(batch) for batch in data.val_dataloader()] == [4, 3]
    assert [len(batch) for batch in Facts(limit=3, batch_size=2).val_dataloader()] == [2, 1]


def test_of_every_criterion_only_the_first_probes_are_evaluated():
    every = Facts(limit=3).evaluation_cases()
    few = Facts(limit=3, max_probes=2).evaluation_cases()
    assert ids(few) == ids(every)
    for one, other in zip(few, every, strict=True):
        assert one.probes == {name: probes[:2] for name, probes in other.probes.items()}
        assert len(other.probes["locality"]) > 2


# ---------------------------------------------------------------------------- loading


def loader(sizes, batch_size=2, passes=1, joint=False):
    tasks = Tasks(len(sizes), by="file", passes=passes, joint=joint)
    tasks.deal([case(f"{t}.{n}", task=str(t)) for t, size in enumerate(sizes) for n in range(size)])
    return TaskLoader(tasks, batch_size)


def epochs(loader, number):
    found = []
    for epoch in range(number):
        loader.set_epoch(epoch)
        found.append([ids(batch) for batch in loader])
    return found


def test_an_epoch_is_one_task_and_every_pass_is_all_of_it_in_another_order():
    found = epochs(loader([5, 5], passes=3), 2)
    for number, batches in enumerate(found):
        assert [len(batch) for batch in batches] == [2, 2, 1] * 3
        passes = [sum(batches[start : start + 3], []) for start in (0, 3, 6)]
        assert all(sorted(one) == [f"{number}.{n}" for n in range(5)] for one in passes)
        assert len({tuple(one) for one in passes}) == 3


def test_a_smaller_task_ends_in_empty_batches():
    one = loader([4, 1], passes=2)
    assert len(one) == 4 and one.batches_per_pass == 2
    assert [len(batch) for batch in epochs(one, 2)[1]] == [1, 0, 1, 0]


def test_joint_training_sees_all_tasks_in_one_epoch():
    (batches,) = epochs(loader([2, 3], batch_size=10, joint=True), 1)
    assert [len(batch) for batch in batches] == [5]


def test_a_task_that_is_ended_has_no_further_cases_but_the_next_one_has():
    one = loader([4, 4], batch_size=1)
    one.set_epoch(0)
    seen = []
    for batch in one:
        seen += ids(batch)
        if len(seen) == 2:
            one.end_task()
    assert len(seen) == 2
    assert len(sum(epochs(one, 2)[1], [])) == 4


def test_a_loader_resumes_in_the_middle_of_a_task():
    whole, stopped, resumed = (loader([3, 5], passes=2) for _ in range(3))
    expected = epochs(whole, 2)[1]
    stopped.set_epoch(1)
    first = [ids(batch) for _, batch in zip(range(4), stopped, strict=False)]
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(1)
    assert first + [ids(batch) for batch in resumed] == expected
    stopped.end_task()
    ended = loader([3, 5], passes=2)
    ended.load_state_dict(stopped.state_dict())
    assert not any(batch for batch in ended)


# ---------------------------------------------------------------------------- measures


WORKED = [[0.8, 0.1, 0.0], [0.6, 0.9, 0.2], [0.5, 0.7, 0.95]]
BETTER_LATER = [[0.5, 0.0, 0.0], [0.9, 0.4, 0.0], [0.6, 0.6, 0.7]]


@pytest.mark.parametrize(
    ("measure", "worked", "better_later"),
    [
        (continual.final_accuracy, (0.5 + 0.7 + 0.95) / 3, 1.9 / 3),
        (continual.backward_transfer, (-0.3 - 0.2) / 2, (0.1 + 0.2) / 2),
        (continual.forgetting, (0.3 + 0.2) / 2, (0.3 - 0.2) / 2),
        (continual.incremental_accuracy, (0.8 + 0.75 + 2.15 / 3) / 3, (0.5 + 0.65 + 1.9 / 3) / 3),
        (lambda m: continual.forward_transfer(m, torch.tensor([0.05, 0.05, 0.1])), 0.075, -0.075),
    ],
)
def test_hand_worked_matrices(measure, worked, better_later):
    both = measure(torch.tensor([WORKED, BETTER_LATER]))
    assert both.tolist() == pytest.approx([worked, better_later])
    assert measure(torch.tensor(WORKED)).item() == pytest.approx(worked)


def test_one_task_cannot_be_forgotten():
    one = torch.tensor([[0.5]])
    assert continual.final_accuracy(one) == continual.incremental_accuracy(one) == 0.5
    for measure in (continual.backward_transfer, continual.forgetting):
        assert math.isnan(measure(one))


# ---------------------------------------------------------------------------- running

FT = ["FT", "--edit.editor.layers", "[1]", "--edit.editor.steps", "2"]


@pytest.fixture
def tasks(tiny_folder):
    return ["--model.lm.name", tiny_folder("gpt2"), "--data", "Facts", "--data.batch_size", "2", *QUIET,
            "--data.tasks.number", "3", "--data.tasks.size", "3"]  # fmt: skip


@pytest.fixture
def stream(tasks):
    return [
        "fit",
        "--model",
        "EditingModule",
        *tasks,
        "--edit.editor",
        *FT,
        "--edit.schedule",
        "stream",
    ]


@pytest.fixture
def tuning(tasks):
    method = ["--model.method", "FT", "--model.method.layers", "[1]", "--model.method.lr", "0.05"]
    return ["fit", "--model", "FineTune", *tasks, *method, "--data.tasks.passes", "4"]


def read(folder):
    return json.loads((folder / "tasks.json").read_text())


@pytest.mark.parametrize("kind", ["stream", "tuning"])
def test_all_tasks_are_evaluated_before_the_first_and_after_each(
    kind, request, corrigenda, tmp_path
):
    assert corrigenda(*request.getfixturevalue(kind), "--run_dir", tmp_path / "run") == 0
    found = read(tmp_path / "run")
    assert found["learned"] == [0, 1, 2, 3]
    order = [case_id for task in found["tasks"] for case_id in task["cases"]]
    assert len(set(order)) == 9
    lines = (tmp_path / "run/cases.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["phase"] == "val"]
    assert Counter(row["num_edits"] for row in rows) == {0: 9, 3: 9, 6: 9, 9: 9}
    for row in rows:  # what tasks.json holds is what the cases were evaluated to
        values = found["metrics"]["efficacy/exact"][row["num_edits"] // 3]
        assert values[order.index(row["case_id"])] == row["metrics"]["efficacy/exact"]
    # Before anything is edited the model agrees with itself, afterwards it has changed.
    assert set(found["metrics"]["locality/agreement"][0]) <= {1.0, None}
    kl = [[v for v in values if v is not None] for values in found["metrics"]["locality/kl"]]
    assert max(kl[0]) < 1e-6 < min(map(max, kl[1:]))


def test_the_probes_of_a_matrix_are_the_same_in_every_row(stream, corrigenda, tmp_path):
    """A locality probe that a later task edits counts neither before nor after."""
    assert corrigenda(*stream, "--run_dir", tmp_path / "run") == 0
    probes = {}
    for line in (tmp_path / "run/cases.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["phase"] == "val":
            scored = [(p["criterion"], p["prompt"]) for p in row["probes"]]
            assert probes.setdefault(row["case_id"], scored) == scored


def test_the_unedited_model_scores_the_same_probes_once(stream, corrigenda, tmp_path, monkeypatch):
    """Only the first evaluation of a batch of probes runs the unedited model."""
    scored = []
    score = LanguageModel.score

    def counts(lm, prompts, *args, full=False, **more):
        if full and not lm.edits.any_active and not args[1:]:
            scored.append(tuple(prompts))
        return score(lm, prompts, *args, full=full, **more)

    def run(name):
        scored.clear()
        assert corrigenda(*stream, "--run_dir", tmp_path / name) == 0
        return list(scored), read(tmp_path / name)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "score", counts)
        once, stored = run("stored")
        patch.setattr(unedited.UneditedScores.__init__, "__defaults__", (0,))
        every, computed = run("computed")
    assert stored == computed and len(once) < len(every)


@pytest.mark.parametrize("kind", ["stream", "tuning"])
def test_a_killed_run_resumes_in_its_task(kind, request, corrigenda, tmp_path, monkeypatch):
    """Every edit is made once, every evaluation once, and the matrices are those of an uninterrupted run."""
    monkeypatch.setattr(checkpointing, "SAVE_EVERY", 0.0)
    words = request.getfixturevalue(kind)
    assert corrigenda(*words, "--run_dir", tmp_path / "whole") == 0

    edits = []
    propose = WeightEditor.edit
    monkeypatch.setattr(
        WeightEditor, "edit", lambda *args: (edits.append(len(args[2])), propose(*args))[1]
    )
    from corrigenda.pipeline.tasks import TaskMatrices

    evaluations, end = [], TaskMatrices.on_validation_epoch_end

    def ends(self, trainer, module):
        end(self, trainer, module)
        evaluations.append(trainer.global_step)

    monkeypatch.setattr(TaskMatrices, "on_validation_epoch_end", ends)
    start = checkpointing.LastCheckpoint.on_train_batch_end
    stop_at = 3 if kind == "stream" else 12

    def stops(self, trainer, *args):
        if trainer.global_step == stop_at:
            signal.raise_signal(signal.SIGINT)
        start(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.LastCheckpoint, "on_train_batch_end", stops)
        assert corrigenda(*words, "--run_dir", tmp_path / "run") == 130
    assert len(evaluations) >= 2 and not (tmp_path / "run/summary.json").exists()
    assert corrigenda(*words, "--run_dir", tmp_path / "run", "--ckpt_path", "last") == 0
    assert len(evaluations) == len(set(evaluations)) == 4
    assert sum(edits) == (9 if kind == "stream" else 0)
    assert read(tmp_path / "run") == read(tmp_path / "whole")


def test_tasks_are_refused_where_nothing_learns_them(tasks, stream, corrigenda, capsys, tmp_path):
    validate = ["validate", "--model", "EditingModule", *tasks, "--edit.editor", *FT]
    mend = ["fit", "--model", "MEND", "--model.layers", "[1]", *tasks]
    for words, message in (
        (validate, "--data.tasks are learned one after the other: run fit"),
        (mend, "this module trains on other cases"),
        ([*stream, "--data.tasks.passes", "2"], "leave out --data.tasks.passes"),
        ([*stream, "--data.tasks.number", "400"], "lower --data.tasks.number"),
    ):
        assert corrigenda(*words, "--run_dir", tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1], error
        assert not (tmp_path / "run/cases.jsonl").exists()


@pytest.mark.parametrize(("kind", "limit", "steps"), [("stream", 4, 4), ("tuning", 9, 9)])
def test_a_budget_of_steps_is_shared_by_the_tasks(
    kind, limit, steps, request, corrigenda, tmp_path
):
    """FT takes two steps for an edit; what one task leaves goes to the next."""
    words = [*request.getfixturevalue(kind), "--run_dir", tmp_path / "run"]
    assert corrigenda(*words, "--budget.steps", limit) == 0
    assert read(tmp_path / "run")["learned"] == [0, 1, 2, 3]
    budget = json.loads((tmp_path / "run/summary.json").read_text())["budget"]
    # Every task is learned at least a step long, and the step that uses the budget up is completed.
    assert steps <= budget["gradient_steps"] <= steps + 2 * 3
    assert budget["tokens"] > 0 and budget["seconds"] > 0 and budget["bytes_kept"] > 0
    assert budget["parameters_touched"] == 32 * 128 + 32


def test_a_budget_of_seconds_ends_a_run_early(stream, corrigenda, tmp_path, capsys):
    assert corrigenda(*stream, "--run_dir", tmp_path / "run", "--budget.seconds", "1e-9") == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["budget"]["num_edits"] == 6
    words = ["validate", *stream[1 : stream.index("--data.tasks.number")], "--data.limit", "2"]
    assert corrigenda(*words, "--run_dir", tmp_path / "other", "--budget.seconds", "1") == 2
    assert "leave --budget out" in capsys.readouterr().err


# ---------------------------------------------------------------------------- reporting


def task_run(values, sizes=(2, 2), **more):
    values = {"efficacy/exact": torch.tensor(values, dtype=torch.float64)}
    return sequences.TaskRun(sizes, range(len(sizes) + 1), values | more)


FORGETS = task_run([[0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1]])
KEEPS = task_run([[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]])


def test_statistics_of_a_hand_worked_run():
    assert FORGETS.matrix("efficacy/exact")[0].tolist() == [[0, 0], [1, 0.5], [0.5, 1]]
    found = sequences.statistics([FORGETS])
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(
        {
            "efficacy exact": 0.75,
            "incremental": (1 + 0.75) / 2,
            "backward transfer": -0.5,
            "forgetting": 0.5,
            "forward transfer": 0.5,
        }
    )
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())
    # One of two cases was forgotten: a resample may hold neither of it, or it twice.
    assert found["forgetting"][1:] == (0.0, 1.0)


def test_a_mean_over_seeds_has_a_narrower_interval_than_one_of_them():
    one, two = (
        sequences.statistics(parts)["forgetting"] for parts in ([FORGETS], [FORGETS, KEEPS])
    )
    assert two.value == 0.25 and two.high - two.low < one.high - one.low


def test_differences_are_paired_case_by_case():
    found = sequences.differences([KEEPS], [FORGETS])
    assert found["forgetting"].value == -0.5 and found["incremental"].value == pytest.approx(0.125)
    same = sequences.differences([FORGETS], [FORGETS])
    assert all(interval == (0, 0, 0) for interval in same.values())
    other = task_run([[0, 0, 0], [1, 1, 1]], sizes=(3,))
    assert sequences.differences([KEEPS], [other]) == {}


def test_cases_without_a_value_do_not_count():
    some = torch.tensor([[1, torch.nan, 1, 0], [1, torch.nan, 0, 0], [0, torch.nan, 1, 1]])
    run = task_run([[0] * 4] * 3, **{"locality/agreement": some.double()})
    assert run.matrix("locality/agreement")[0].tolist() == [[1, 0.5], [1, 0], [0, 1]]
    assert sequences.statistics([run])["locality agreement"].value == 0.5


def test_joint_training_has_a_final_accuracy_and_no_forgetting():
    values = {"efficacy/exact": torch.tensor([[0, 0, 0], [1, 1, 0]]).double()}
    found = sequences.statistics([sequences.TaskRun((2, 1), [0, 2], values)])
    assert found.keys() == {"efficacy exact"} and found["efficacy exact"].value == 0.5


@pytest.mark.parametrize(
    "text", ["", "[]", '{"tasks": 1}', '{"tasks": [], "learned": [0], "metrics": {"a": 1}}']
)
def test_a_damaged_file_of_tasks_is_refused(text, tmp_path):
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(UserError, match=r"tasks\.json is damaged"):
        sequences.read_tasks(tmp_path)


def test_a_study_compares_editing_with_fine_tuning(stream, tuning, corrigenda, tmp_path):
    runs = [{"name": "ft", "args": [str(word) for word in tuning]},
            {"name": "edits", "args": [str(word) for word in stream]}]  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps({"baseline": "ft", "runs": runs}))
    assert corrigenda("compare", "study.yaml") == 0
    text = (tmp_path / "runs/study/report.md").read_text()
    assert (
        "## Tasks\n" in text and "## Tasks: difference to ft" in text and "| forgetting |" in text
    )
    page = (tmp_path / "runs/study/report.html").read_text()
    assert "Below the diagonal" in page and "src=" not in page
