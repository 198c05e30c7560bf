"""General abilities: the bridge to lm-evaluation-harness, the callback, and the command."""

import json
import random
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.ike import IKE
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.editors.wise import WISE
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.pipeline import checkpointing
from corrigenda.pipeline.abilities import callback, questions
from corrigenda.pipeline.abilities.answers import AnswerFiles
from corrigenda.pipeline.abilities.ids import FOLDER, Listed, chosen, listed, row_id
from tests.samples import QUIET, ROOT
from tests.test_resume import stop_at

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import evaluate as evaluate_by_harness  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from corrigenda.pipeline.abilities.bridge import EditedModel  # noqa: E402
from corrigenda.pipeline.abilities.evaluating import evaluate  # noqa: E402
from corrigenda.pipeline.abilities.harness_tasks import OURS, TASKS, load_task, local_rows, quiet  # noqa: E402

REAL = ROOT.parent / "shared" / "data" / "tasks"
CHOICES = ("rte", "boolq", "sst2", "mutual", "cola", "mrpc")
TEXTS = [("Ada is in the town.", "The town is old."), ("He was late.", "He was there, you know."),
         ("The ice is thin.", "It's warm."), ("São Paulo said no. ", "Iris Vane  writes")]  # fmt: skip


def pytest_generate_tests(metafunc):
    if "form" in metafunc.fixturenames:
        files = sorted(file.stem.rsplit("_", 1) for file in TASKS.glob("*.yaml"))
        metafunc.parametrize(("name", "form"), files)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A folder with made-up rows of every data set, as short as the small models' context."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(file, make):
        (folder / file).parent.mkdir(exist_ok=True)
        lines = [json.dumps(make(i, *TEXTS[i % 4])) + "\n" for i in range(12)]
        (folder / file).write_text("".join(lines), encoding="utf-8")

    for split in ("train", "validation"):
        write(
            f"rte/{split}.jsonl",
            lambda i, a, b: {"sentence1": a, "sentence2": b, "label": i % 2, "idx": i},
        )
    write(
        "mrpc/validation.jsonl",
        lambda i, a, b: {"sentence1": a, "sentence2": b, "label": i % 2, "idx": i},
    )
    for name in ("sst2", "cola"):
        write(f"{name}/validation.jsonl", lambda i, a, b: {"sentence": a, "label": i % 2, "idx": i})
    write(
        "boolq/validation.jsonl",
        lambda i, a, b: {"question": b, "passage": a, "label": i % 2 == 0, "idx": i},
    )
    write("nq_open/validation.jsonl", lambda i, a, b: {"question": f"{a} {i}", "answer": [b]})
    write("gsm8k/test.jsonl", lambda i, a, b: {"question": f"{a} {i}?", "answer": f"{b}\n#### {i}"})
    for split in ("test", "validation"):
        write(f"samsum/{split}.jsonl", lambda i, a, b: {"id": str(i), "dialogue": a, "summary": b})
    write("mutual/dev.jsonl", lambda i, a, b: {"id": f"dev_{i}", "article": f"f : {a} ,", "answers": "ABCD"[i % 4],
                                               "options": [a, b, "I do n't know .", f"m : {b}"]})  # fmt: skip
    write("conll2003/test.jsonl", lambda i, a, b: {"id": str(i), "tokens": ["Ada", "in", f"York{i}"],
                                                   "ner_tags": ["B-PER", "O", "B-LOC"]})  # fmt: skip
    return folder


@pytest.fixture
def short_answers(monkeypatch):
    """Answers of 4 tokens, which leaves room in the context of a small model."""

    def shorten(task):
        task.config.generation_kwargs["max_gen_toks"] = 4
        return task

    real = load_task
    monkeypatch.setattr(questions, "load_task", lambda *args: shorten(real(*args)))
    return shorten


def answers(model, task):
    """Answers and measures of each question, as the harness logs them."""
    with quiet():
        found = evaluate_by_harness(
            model, {"tasks": {"task": task}}, bootstrap_iters=0, log_samples=True
        )
    return [(s["resps"], [s[name] for name in s["metrics"]]) for s in found["samples"]["task"]]


def require_agreement(lm, task):
    """The bridge's answers are those of the harness's own HFLM, on the same weights, question by question."""
    theirs = HFLM(pretrained=lm.net, tokenizer=lm.tokenizer, batch_size=4)
    pairs = list(zip(answers(EditedModel(lm), task), answers(theirs, task), strict=True))
    assert pairs
    for ours, expected in pairs:
        assert ours[1] == expected[1]
        for (a,), (b,) in zip(ours[0], expected[0], strict=True):
            assert a == b if isinstance(a, str) else (pytest.approx(b[0], abs=2e-3), b[1]) == a


# ---------------------------------------------------------------------------- agreement with HFLM


@pytest.mark.parametrize("name", [*CHOICES, "gsm8k", "nq_open"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_answers_are_those_of_the_harness_with_an_edit_in_the_weights(
    tiny_lm, rows, short_answers, data_files, kind, name
):
    lm = tiny_lm(kind)
    task = load_task(name, "strict", "smoke", rows)
    if name in ("gsm8k", "nq_open"):
        short_answers(task)
    require_agreement(lm, task)
    editor = ROME(0, corpus=Corpus(data_files.text, 2000), steps=2)
    editor.edit(lm, [Edit("The capital of {} is", "Ada", "in")])
    before = answers(EditedModel(lm), task)
    require_agreement(lm, task)
    lm.handles[-1].remove()
    if name in CHOICES:
        assert before != answers(EditedModel(lm), task)  # the edit did something


@pytest.mark.parametrize("name", ["rte", "sst2", "mutual"])
def test_answers_are_those_of_the_harness_on_real_rows(smollm2, name):
    if not REAL.is_dir():
        pytest.skip("the folder ../shared with real rows is not there")
    task = load_task(name, "harness", "smoke", REAL)
    split = task.config.validation_split
    task.dataset[split] = task.dataset[split].select(range(1 if name == "mutual" else 3))
    require_agreement(smollm2, task)


PAIRS = [
    ("", "Ada is"), ("Ada is ", "in"), ("Ada is", "in"), ("Ada is\n", "in\n"), ("Ada\n\n", "  in the  "),
    ("São", " Paulo"), ("the capi", "tal of"), ("Ada is", " in"), ("Ada is", " in the town"), (" ", "x"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_contexts_and_continuations_meet_as_in_the_harness(tiny_lm, kind):
    lm = tiny_lm(kind)
    evaluated = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS[:-1])]
    theirs = HFLM(pretrained=lm.net, tokenizer=lm.tokenizer, batch_size=4)
    expected = theirs.loglikelihood(evaluated, disable_tqdm=True)
    found = EditedModel(lm).loglikelihood(evaluated)
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_plain_texts_are_scored_as_in_the_harness(tiny_lm):
    lm = tiny_lm("gpt2")
    texts = ["Ada is in the town. ", "x", "The sea was made in 1984. " * 3]
    evaluated = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    theirs = HFLM(pretrained=lm.net, tokenizer=lm.tokenizer, batch_size=4)
    expected = theirs.loglikelihood_rolling(evaluated, disable_tqdm=True)
    assert EditedModel(lm).loglikelihood_rolling(evaluated) == pytest.approx(expected, abs=1e-2)


def test_a_text_longer_than_the_context_is_scored_in_windows(tiny_lm):
    model = EditedModel(tiny_lm("gpt2"))
    text = "The sea was made in 1984. " * 40
    windows = list(model._windows(text))
    assert "".join(inside for _, inside in windows) == text and len(windows) > 1
    (score,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert np.isfinite(score) and score < 0


def test_a_context_that_is_too_long_loses_its_beginning(tiny_lm):
    lm = tiny_lm("gpt2")
    model, long = EditedModel(lm), "The sea was made. " * 60 + "Ada is"
    (whole,) = model.loglikelihood([Instance("loglikelihood", {}, (long, " in"), 0)])
    assert model.num_truncated == 1 and np.isfinite(whole[0])
    context, _ = model._fitting(long, " in")
    assert long.endswith(context) and len(lm.tokens.encode([context + " in"])[0]) <= 128
    (text,) = model.generate_until([Instance("generate_until", {}, (long, {"max_gen_toks": 4}), 0)])
    assert isinstance(text, str) and model.num_truncated == 3


def test_outside_the_bridge_texts_are_joined_as_before(tiny_lm):
    lm = tiny_lm("gpt2")
    with lm.tokens.as_written():
        assert lm.tokens.join("a ", "b ") == "a b "
    assert lm.tokens.join("a ", "b ") == "a b"


def test_a_task_that_samples_its_answers_is_refused(tiny_lm):
    evaluated = [
        Instance("generate_until", {}, ("Ada", {"do_sample": True, "temperature": 1.0}), 0)
    ]
    with pytest.raises(ValueError, match="do_sample"):
        EditedModel(tiny_lm("gpt2")).generate_until(evaluated)


def on_a_model(task, name, rows):
    """The command that evaluates a model without edits on a task."""
    return ["abilities", "--tasks", task, "--lm.name", name, "--data", rows, "--out", "out"]


def test_answers_longer_than_the_context_are_refused(corrigenda, tiny_folder, rows, capsys):
    assert corrigenda(*on_a_model("gsm8k", tiny_folder("gpt2"), rows)) == 2
    assert "answers of up to 256 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------------------- edits of all kinds, and nothing else


def question(rows, name="sst2"):
    """The first question of a task, and the prompt that a model reads."""
    task = load_task(name, "strict", "smoke", rows)
    task.dataset["validation"] = task.dataset["validation"].select([0])
    return task, task.doc_to_text(task.dataset["validation"][0])


def chosen_word(lm, task):
    scores = [score for score, _ in evaluate(lm, task).examples[0]["answers"]]
    return scores.index(max(scores))


@pytest.mark.parametrize(
    "memory",
    [
        partial(GRACE, 1, num_prompts=32, steps=40),
        partial(WISE, 1, num_prompts=8, steps=40, lr=0.3, contexts=[(3, 2)], act_ratio=1.0),
    ],
    ids=["GRACE", "WISE"],
)
def test_an_edit_in_a_memory_changes_the_answer_to_a_question(tiny_lm, rows, data_files, memory):
    lm = tiny_lm("gpt2")
    task, prompt = question(rows)
    before = chosen_word(lm, task)
    other = ["negative", "positive"][1 - before]
    edit = Edit(prompt.replace("Ada", "{}"), "Ada", other)
    handle = memory(corpus=Corpus(data_files.text)).edit(lm, [edit])
    assert chosen_word(lm, task) == 1 - before
    handle.remove()
    assert chosen_word(lm, task) == before


def test_an_edit_in_the_context_changes_the_answer_to_a_question(smollm2, tmp_path, short_answers):
    (tmp_path / "nq_open").mkdir()
    row = {"question": "what is the capital of Ruritania", "answer": ["Strelsau"]}
    (tmp_path / "nq_open" / "validation.jsonl").write_text(json.dumps(row))
    task = short_answers(load_task("nq_open", "strict", "full", tmp_path))
    before = evaluate(smollm2, task)
    prompt = task.doc_to_text(task.dataset["validation"][0])
    edit = Edit(prompt.replace("Ruritania", "{}"), "Ruritania", "Strelsau")
    handle = IKE(None, num_demonstrations=0, encoder="lm").edit(smollm2, [edit])
    after = evaluate(smollm2, task)
    handle.remove()
    assert (before.scores["prefix"], after.scores["prefix"]) == (0.0, 1.0), after.examples
    assert evaluate(smollm2, task).examples == before.examples


def test_evaluation_leaves_random_states_as_they_are(tiny_lm, rows):
    lm = tiny_lm("gpt2")

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())

    before = states()
    evaluate(lm, load_task("rte", "strict", "smoke", rows))
    assert states() == before
    random.random()
    assert states() != before


def test_a_model_whose_logits_are_not_finite_answers_nothing(tiny_lm, rows):
    lm = tiny_lm("gpt2")
    edited = Edit("The capital of {} is", "Ada", "in")
    handle = IKE(None, num_demonstrations=0, encoder="lm").edit(
        lm, [edited]
    )  # so that NaN is not refused
    lm.net.transformer.ln_f.weight.data.fill_(float("nan"))
    for name in CHOICES:
        found = evaluate(lm, load_task(name, "strict", "smoke", rows)).row
        assert found["invalid"] == 1.0 and found["score"] <= 0.0, name
    handle.remove()


# ---------------------------------------------------------------------------- tasks and their rows


def test_every_task_can_be_evaluated(tiny_lm, rows, short_answers, name, form):
    lm = tiny_lm("gpt2", max_position_embeddings=512)
    task = load_task(name, form, "smoke", rows)
    if task.OUTPUT_TYPE == "generate_until":
        short_answers(task)
    found = evaluate(lm, task)
    assert found.row["n"] == 8 and found.metric in found.scores and not found.truncated
    assert 0 <= found.row["invalid"] <= 1 and found.row["stderr"] >= 0
    assert len({example["id"] for example in found.examples}) == 8
    for word in ("Ada", "thin", "warm"):  # rows of data are not written
        assert word not in json.dumps([example["id"] for example in found.examples])


def test_all_tasks_of_the_study_are_there_in_both_forms():
    assert [name for name in OURS if not (TASKS / f"{name}_strict.yaml").is_file()] == []
    paper = [name for name in OURS if (TASKS / f"{name}_paper.yaml").is_file()]
    assert paper == [name for name in OURS if name not in ("cola", "mrpc")]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_lists_of_rows_are_balanced_samples_of_the_real_data(file):
    if not REAL.is_dir():
        pytest.skip("the folder ../shared with real rows is not there")
    name, split = file.stem.split("-")
    found, files = listed(name, split), local_rows(REAL / name)
    real = files[split if split in files else "dev"]
    names = [row_id(value) for value in real[found.id]]
    classes = real[found.classes] if found.classes else [0] * len(names)
    assert found.ids == chosen(names, classes)[: 200 // found.questions]
    kinds = [classes[names.index(row)] for row in found.ids]
    counts = [kinds.count(kind) for kind in set(kinds)]
    assert max(counts) == min(counts)


def test_rows_of_ones_own_are_chosen_by_hash_whatever_their_order(rows):
    data = local_rows(rows / "sst2")["validation"]
    some = Listed([f"none {i}" for i in range(9)], id="idx").places(data, 5)
    backwards = Listed(id="idx").places(data.select(range(11, -1, -1)), 5)
    assert len(some) == 5 and some == sorted(11 - place for place in backwards)


# ---------------------------------------------------------------------------- streams, evaluations, the command


@pytest.fixture(autouse=True)
def every_step_is_kept(monkeypatch):
    monkeypatch.setattr(checkpointing, "SAVE_EVERY", 0.0)


@pytest.fixture
def stream(tiny_folder, data_files, rows):
    """Five edits of a small model, one per step; two tasks at 0, 2 and 4 of them, and after the last."""
    return [
        "fit", "--model", "EditingModule", "--model.lm.name", tiny_folder("gpt2"), "--data", "ZsRE",
        "--data.path", data_files.zsre, "--data.batch_size", "1", *QUIET, "--edit.editor", "FT",
        "--edit.editor.layers", "[1]", "--edit.editor.steps", "2", "--edit.schedule", "stream",
        "--abilities.tasks", "[rte,sst2]", "--abilities.at", "[0,2,4]", "--abilities.profile", "smoke",
        "--abilities.data", rows, "--trainer.log_every_n_steps", "1",
    ]  # fmt: skip


@pytest.fixture
def evaluated(monkeypatch):
    """The tasks that were evaluated, one entry each time."""
    made, real = [], questions.evaluate

    def counted(lm, task, *args):
        made.append(task.config.task)
        return real(lm, task, *args)

    monkeypatch.setattr(questions, "evaluate", counted)
    return made


def table(folder):
    """{(edits, task): score} of a run, and nothing else in its rows that changes."""
    rows = [json.loads(line) for line in (folder / "abilities.jsonl").read_text().splitlines()]
    assert all(row["seconds"] > 0 and row["n"] == 8 and row["perplexity"] > 1 for row in rows)
    return {
        (row["edits"], row["task"]): (row["score"], row["stderr"], row["perplexity"])
        for row in rows
    }


STEPS = [(count, task) for count in (0, 2, 4, 5) for task in ("rte", "sst2")]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def test_a_stream_is_evaluated_at_the_chosen_numbers_of_edits(
    corrigenda, stream, evaluated, tmp_path
):
    assert corrigenda(*stream, "--run_dir", "run") == 0
    found = table(tmp_path / "run")
    assert list(found) == STEPS and len(evaluated) == 8
    assert len({score[2] for score in found.values()}) == 4  # the edits change the perplexity
    log = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"abilities/rte/score", "abilities/sst2/invalid", "abilities/perplexity"} <= set(
        log[0].split(",")
    )
    (file,) = (tmp_path / "run" / "abilities").glob("4-sst2-strict-smoke-*.jsonl")
    lines = file.read_text().splitlines()
    assert len(lines) == 8 and len(json.loads(lines[0])["answers"]) == 2


def test_the_end_is_evaluated_although_the_last_edit_was_rolled_back(monkeypatch):
    abilities, evaluated = callback.Abilities(), []
    abilities.questions, abilities._passed = mock.Mock(), 3
    monkeypatch.setattr(abilities, "_evaluate", lambda *args: evaluated.append(args[2]))
    monkeypatch.setattr(callback, "edit_callback", lambda trainer: mock.Mock(num_edits=3))
    abilities.on_train_batch_end(mock.Mock(should_stop=False), mock.Mock())
    assert evaluated == []
    abilities.on_train_batch_end(mock.Mock(should_stop=True), mock.Mock())
    assert evaluated == [3]


def test_a_resumed_stream_does_not_evaluate_again(
    corrigenda, stream, evaluated, monkeypatch, tmp_path
):
    assert corrigenda(*stream, "--run_dir", "whole") == 0
    evaluated.clear()
    stop_at(monkeypatch, AnswerFiles, "add", 3)  # with 2 edits, after rte, while sst2 is evaluated
    assert corrigenda(*stream, "--run_dir", "cut") == 130
    assert list(table(tmp_path / "cut")) == STEPS[:3] and len(evaluated) == 4
    assert corrigenda(*stream, "--run_dir", "cut", "--ckpt_path", "last") == 0
    assert len(evaluated) == 9 and evaluated[4:5] == [
        "sst2_strict"
    ]  # only the one that was cut off again
    assert table(tmp_path / "cut") == table(tmp_path / "whole")


def test_a_stream_that_was_killed_before_its_first_edit_does_not_evaluate_again(
    corrigenda, stream, evaluated, monkeypatch, tmp_path
):
    stop_at(monkeypatch, AnswerFiles, "add", 1)
    assert corrigenda(*stream, "--run_dir", "cut") == 130
    assert list(table(tmp_path / "cut")) == STEPS[:1]
    assert corrigenda(*stream, "--run_dir", "cut", "--ckpt_path", "last") == 0
    assert list(table(tmp_path / "cut")) == STEPS and len(evaluated) == 9
    words = [
        "4" if word == "2" and stream[n - 1] == "--edit.editor.steps" else word
        for n, word in enumerate(stream)
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "cut" / "abilities.jsonl").rename(tmp_path / "other" / "abilities.jsonl")
    assert corrigenda(*words, "--run_dir", "other") == 0
    assert len(evaluated) == 9 + 6  # other edits, but the same unedited model


def test_a_validation_is_evaluated_while_its_edits_are_active(
    corrigenda, stream, evaluated, tmp_path
):
    words = [
        "validate" if word == "fit" else "epoch" if word == "stream" else word for word in stream
    ]
    assert corrigenda(*words, "--run_dir", "run") == 0
    found = table(tmp_path / "run")
    assert list(found) == [(count, task) for count in (0, 5) for task in ("rte", "sst2")]
    assert found[0, "rte"][2] != found[5, "rte"][2]


@pytest.mark.parametrize("schedule", ["each", "batch"])
def test_edits_that_do_not_stay_active_are_refused(corrigenda, stream, schedule, capsys):
    words = [
        "validate" if word == "fit" else schedule if word == "stream" else word for word in stream
    ]
    assert corrigenda(*words) == 2
    assert "--edit.schedule epoch" in capsys.readouterr().err


def test_saved_edits_are_evaluated_once(corrigenda, stream, evaluated, rows, tmp_path, capsys):
    assert corrigenda(*stream, "--run_dir", "run") == 0
    evaluated.clear()
    edits = sorted((tmp_path / "run" / "edits").glob("*.safetensors"))
    command = [
        "abilities",
        "--tasks",
        "rte",
        "sst2",
        "--profile",
        "smoke",
        "--data",
        rows,
        "--out",
        "out",
    ]
    assert corrigenda(*command, "--edits", *edits) == 0
    assert len(edits) == 5 and len(evaluated) == 4
    of_stream, of_files = table(tmp_path / "run"), table(tmp_path / "out")
    assert {key: of_stream[key][0] for key in of_files} == {k: v[0] for k, v in of_files.items()}
    assert "5 edits, perplexity" in capsys.readouterr().out
    assert corrigenda(*command, "--edits", *edits) == 0
    assert len(evaluated) == 4
    assert corrigenda(*command, "--edits", *edits[:2]) == 0
    assert len(evaluated) == 6


def test_a_saved_memory_is_evaluated_with_its_editor(
    corrigenda, tiny_folder, tiny_lm, rows, tmp_path, capsys
):
    lm = tiny_lm("gpt2")
    editor = IKE(None, num_demonstrations=0, encoder="lm")
    file = tmp_path / "facts.safetensors"
    editor.edit(lm, [Edit("The capital of {} is", "Ada", "in")]).save(file)
    command = [
        "abilities",
        "--tasks",
        "rte",
        "--profile",
        "smoke",
        "--data",
        rows,
        "--out",
        "out",
        "--edits",
        file,
    ]
    assert corrigenda(*command) == 2
    assert "text memory of IKE" in capsys.readouterr().err
    options = {
        "class_path": "IKE",
        "init_args": {
            "pool": {"class_path": "corrigenda.datamodules.facts.Facts"},
            "num_demonstrations": 0,
            "encoder": "lm",
        },
    }
    assert corrigenda(*command, "--editor", json.dumps(options)) == 0, capsys.readouterr().err
    assert list(table(tmp_path / "out")) == [(0, "rte"), (1, "rte")]


def test_a_damaged_file_of_rows_is_named(corrigenda, tiny_folder, rows, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "abilities.jsonl").write_text(yaml.safe_dump({"edits": 3}))
    assert corrigenda(*on_a_model("rte", tiny_folder("gpt2"), rows)) == 2
    assert "abilities.jsonl: damaged" in capsys.readouterr().err
