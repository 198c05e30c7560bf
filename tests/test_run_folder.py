"""A run's folder by itself: what a run depends on, what is resumed, set aside, removed or refused."""

import hashlib
import json
import os
from argparse import Namespace

import pytest
import yaml

from corrigenda.modules.files import locked
from corrigenda.pipeline import run_folder
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.run_folder import CODE, RunFolder, dependencies, open_run, require_same

SETTINGS = {
    "model": {"class_path": "EditingModule", "init_args": {"lm": {"name": "lm"}}},
    "trainer": {"max_steps": 3},
    "wandb": {},
    "seed_everything": 0,
    "run_dir": "a",
    "ckpt_path": None,
}
TEXT = yaml.safe_dump(SETTINGS)


def config(**changes):
    given = {"run_dir": "a", "ckpt_path": None, "trainer": Namespace(fast_dev_run=False)}
    return Namespace(**(given | changes))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(run_folder.NAMED_RUN, "")  # set by runs that name themselves
    monkeypatch.delenv(run_folder.NAMED_RUN)


def put(folder, *names):
    """Files, and folders where a name ends in a slash."""
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)


def names(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".lock"
    )


def begin(verb="fit", text=TEXT, **changes):
    """The run that a folder opens with; the block ends immediately."""
    with open_run(config(**changes), verb, text) as run:
        return run


# ---------------------------------------------------------------------------- how a run starts


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_new_run_has_its_folder_locked(tmp_path, verb):
    with open_run(config(), verb, TEXT) as run:
        assert (run.path.resolve(), run.text, run.checkpoint) == (tmp_path / "a", TEXT, None)
        assert run.depends_on == dependencies(TEXT, verb)
        with pytest.raises(BlockingIOError, match="the run folder a is being written"):
            begin(verb)
    begin(verb)


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_finished_run_is_never_overwritten(tmp_path, verb):
    put(tmp_path / "a", "summary.json")
    with pytest.raises(UserError, match="a holds a finished run, and runs are never overwritten"):
        begin(verb)
    if verb == "fit":
        with pytest.raises(UserError, match="a holds a finished run, and runs are never"):
            begin(verb, ckpt_path="last")  # without a checkpoint


@pytest.mark.parametrize("name", ["cases.jsonl", "checkpoints/", "edits/"])
def test_an_unfinished_fit_is_resumed_or_refused(tmp_path, name, caplog):
    folder = tmp_path / "a"
    put(folder, name, "config.yaml", "config-resumed-1.yaml", "logs/version_0/metrics.csv", "mine")
    with pytest.raises(UserError, match="holds an unfinished run: resume it with --ckpt_path last"):
        begin()
    put(tmp_path / "a", "interrupted-2/")
    for number in (1, 3):
        put(folder, "cases.jsonl")
        assert begin(ckpt_path="last").checkpoint is None
        assert "a has no checkpoint to resume from" in caplog.text
        assert f"(earlier files are in a/interrupted-{number})" in caplog.text
    moved = {"cases.jsonl", name.rstrip("/"), "config.yaml", "config-resumed-1.yaml", "logs"}
    assert {path.name for path in (folder / "interrupted-1").iterdir()} == moved
    left = {path.name for path in folder.iterdir()} - {".lock"}
    assert left == {"interrupted-1", "interrupted-2", "interrupted-3", "mine"}


def test_without_anything_to_resume_a_run_starts_and_says_so(tmp_path, caplog):
    assert begin(ckpt_path="last").checkpoint is None
    assert "a has no checkpoint to resume from" in caplog.text and "earlier" not in caplog.text
    assert names(tmp_path / "a") == []


def test_a_fit_resumes_from_its_last_checkpoint(tmp_path):
    put(tmp_path / "a", "checkpoints/last.ckpt")
    run = begin(ckpt_path="last")
    assert run.checkpoint.resolve() == tmp_path / "a/checkpoints/last.ckpt"
    with pytest.raises(UserError, match="validate --ckpt_path needs a file"):
        begin("validate", ckpt_path="last")


def test_a_finished_fit_is_resumed_with_other_settings_only(tmp_path):
    folder = tmp_path / "a"
    put(folder, "checkpoints/last.ckpt", "summary.json", "config-resumed-2.yaml")
    (folder / "config.yaml").write_text(TEXT)
    for same in (SETTINGS, SETTINGS | {"ckpt_path": "last", "run_dir": "./a"}):
        with pytest.raises(UserError, match="these settings leave nothing to do"):
            begin(text=yaml.safe_dump(same), ckpt_path="last")
    longer = yaml.safe_dump(SETTINGS | {"trainer": {"max_steps": 4}})
    assert begin(text=longer, ckpt_path="last").checkpoint is not None
    (folder / "config-resumed-1.yaml").write_text(longer)
    with pytest.raises(UserError, match="these settings leave nothing to do"):
        begin(text=longer, ckpt_path="last")


def test_an_unfinished_validation_is_resumed_if_it_is_the_same(tmp_path):
    folder = tmp_path / "a"
    put(folder, "cases.jsonl")
    with pytest.raises(UserError, match="whose settings are unknown"):
        begin("validate")
    progress = {"depends_on": dependencies(TEXT, "validate")}
    (folder / "progress.json").write_text(json.dumps(progress))
    assert begin("validate").checkpoint is None
    other = yaml.safe_dump(SETTINGS | {"seed_everything": 1})
    with pytest.raises(UserError, match="--seed_everything has changed: 0, now 1;"):
        begin("validate", text=other)
    (folder / "cases.jsonl").unlink()
    begin("validate", text=other)  # nothing was evaluated


def test_a_rehearsal_has_a_folder_of_its_own(tmp_path):
    put(tmp_path / "a", "summary.json", "checkpoints/last.ckpt")
    rehearsal = Namespace(fast_dev_run=True)
    with open_run(config(trainer=rehearsal, ckpt_path="last"), "fit", TEXT) as run:
        assert run.path != tmp_path / "a" and run.path.is_dir() and run.depends_on == {}
        assert run.checkpoint.resolve() == tmp_path / "a/checkpoints/last.ckpt"
    assert not run.path.exists()
    with open_run(config(trainer=rehearsal), "fit", TEXT) as run:
        assert run.checkpoint is None


def test_further_processes_neither_lock_nor_check(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1, raising=False)
    put(tmp_path / "a", "summary.json")
    with locked(tmp_path / "a" / ".lock", "it"):
        assert begin(ckpt_path="last").checkpoint is not None
        assert begin().checkpoint is None
    with pytest.raises(UserError, match="processes that are started separately need the same"):
        begin(run_dir=None)
    monkeypatch.setenv(run_folder.NAMED_RUN, "runs/first")
    assert str(begin(run_dir=None).path) == "runs/first"


def test_runs_without_a_name_are_named_by_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    found = []
    for _ in range(3):
        with open_run(config(run_dir=None), "validate", TEXT) as run:
            put(run.path, "summary.json")
            found.append(str(run.path))
        assert os.environ[run_folder.NAMED_RUN] == found[-1]
    assert found == ["runs/now-validate", "runs/now-validate-2", "runs/now-validate-3"]


def test_every_start_has_its_configuration(tmp_path):
    RunFolder(tmp_path, "1").save_config()
    RunFolder(tmp_path, "2").save_config()  # of a resumed validation, which has the same
    assert (tmp_path / "config.yaml").read_text() == "2"
    for text in "34":
        RunFolder(tmp_path, text, checkpoint=tmp_path / "last.ckpt").save_config()
    assert (tmp_path / "config.yaml").read_text() == "2"
    assert [(tmp_path / f"config-resumed-{n}.yaml").read_text() for n in (1, 2)] == ["3", "4"]
    (tmp_path / "b").mkdir()
    RunFolder(tmp_path / "b", "5", checkpoint=tmp_path / "last.ckpt").save_config()
    assert names(tmp_path / "b") == ["config.yaml"]


# ---------------------------------------------------------------------------- starts that fail


def fails(*written, error=RuntimeError):
    with pytest.raises(error), open_run(config(run_dir="new/er/a"), "fit", TEXT) as run:
        put(run.path, *written)
        raise error


def test_a_start_that_fails_removes_what_it_has_made(tmp_path):
    fails("config.yaml", "logs/version_0/hparams.yaml", "empty/")
    fails("config.yaml", error=KeyboardInterrupt)
    assert names(tmp_path) == []
    put(tmp_path, "new/mine", "new/er/a/old/mine")
    os.symlink(tmp_path / "new" / "mine", tmp_path / "new" / "er" / "a" / "link")
    before = names(tmp_path)
    fails("config.yaml", "old/new", "logs/a")
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "result", ["cases.jsonl", "checkpoints/a", "edits/", "summary.json", "logs/metrics.csv"]
)
def test_a_start_that_has_results_removes_nothing(tmp_path, result):
    fails("config.yaml", result)
    assert (tmp_path / "new/er/a/config.yaml").exists()
    assert (tmp_path / "new/er/a" / result).exists()


def test_links_are_removed_and_not_followed(tmp_path):
    put(tmp_path, "elsewhere/kept")
    with pytest.raises(RuntimeError), open_run(config(), "fit", TEXT) as run:
        os.symlink(tmp_path / "elsewhere", run.path / "link")
        raise RuntimeError
    assert names(tmp_path) == ["elsewhere", "elsewhere/kept"]


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    put(tmp_path / "a", ".config.yaml.unfinished/config.yaml", "mine")
    begin()
    assert names(tmp_path / "a") == ["mine"]


# ---------------------------------------------------------------------------- what results depend on


def test_settings_go_by_the_names_of_their_options():
    found = dependencies(TEXT, "validate")
    options = {name: value for name, value in found.items() if name.startswith("--")}
    assert options == {
        "--model.class_path": '"EditingModule"', "--model.lm.name": '"lm"', "--trainer.max_steps": "3",
        "--wandb": "{}", "--seed_everything": "0", "--ckpt_path": "null",
    }  # fmt: skip
    others = {CODE, "the version of torch", "the version of transformers"}
    assert found.keys() - options.keys() == others
    fit = dependencies(TEXT, "fit")
    assert fit.keys() - others == {"--model.class_path", "--model.lm.name", "--seed_everything"}
    assert len(found[CODE]) == 16 and found[CODE] == fit[CODE]
    assert found["the version of torch"][0].isdigit()
    one, other = (
        dependencies(f"data: {{a: [{{{pair}}}]}}", "fit") for pair in ("b: 1, c: 2", "c: 2, b: 1")
    )
    assert one == other and one["--data.a"] == '[{"b": 1, "c": 2}]'
    with pytest.raises(ValueError, match="not settings"):
        dependencies("- a list", "fit")


def test_files_that_settings_name_count_with_their_content(tmp_path):
    put(tmp_path, "one", "two", "model/config.json", "model/b.bin", "model/sub/c", "folder/x")
    values = {
        "a": "one",
        "b": ["two", {"c": "model"}],
        "d": "folder",
        "e": "",
        "f": "x" * 5000,
        "g": 1,
    }
    found = dependencies(yaml.safe_dump({"data": values}), "fit")
    files = {name: value for name, value in found.items() if name.startswith("the content")}
    hashes = {
        f"the content of {name}": hashlib.sha256(name.encode()).hexdigest()[:16]
        for name in ("one", "two", "model/b.bin", "model/config.json")
    }
    assert files == hashes and list(files) == list(hashes)


def test_large_files_are_told_apart_by_size_and_time(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("four")
    monkeypatch.setattr(run_folder, "LARGE", 4)
    assert run_folder._hash(tmp_path / "a") == hashlib.sha256(b"four").hexdigest()[:16]
    monkeypatch.setattr(run_folder, "LARGE", 3)
    time = (tmp_path / "a").stat().st_mtime_ns
    assert run_folder._hash(tmp_path / "a") == f"4 bytes, changed at {time}"


BEFORE = {CODE: "1", "the version of torch": "2", "--a": "1", "--b": "2", "the content of x": "3"}


def without(name):
    return {key: value for key, value in BEFORE.items() if key != name}


@pytest.mark.parametrize(
    ("now", "code"),
    [
        (BEFORE, True),
        (without("the content of x"), True),
        (BEFORE | {"the content of y": "1", "the set of cases": "2"}, True),
        (without("--a") | {CODE: "2", "--new": "1"}, False),  # the options of other code
        (without("--a") | {CODE: "0", "--new": "1"}, False),
    ],
)
def test_the_same_run_is_resumed(tmp_path, now, code):
    require_same(tmp_path, BEFORE, now, code)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (BEFORE | {"--a": "5"}, "--a has changed: 1, now 5; restore"),
        (without("--a"), "--a has changed: 1, now null; restore"),
        (BEFORE | {"--c": "5"}, "--c has changed: null, now 5; restore"),
        (BEFORE | {"the content of x": "5"}, "the content of x has changed; restore"),
        (BEFORE | {"--b": "5", CODE: "2"}, f"{CODE} has changed; restore"),
        (BEFORE | {"the version of torch": "5"}, "the version of torch has changed; restore"),
    ],
)
def test_another_run_is_refused_and_what_has_changed_is_named(tmp_path, now, words):
    with pytest.raises(UserError) as caught:
        require_same(tmp_path, BEFORE, now)
    assert words in str(caught.value) and str(caught.value).startswith(f"{tmp_path} holds a run")


def test_where_versions_may_change_they_are_named(tmp_path, caplog):
    now = BEFORE | {CODE: "2", "the version of torch": "3"}
    require_same(tmp_path, BEFORE, now, code=False)
    (message,) = caplog.messages
    assert message == f"{tmp_path} was started with another value of {CODE}, the version of torch"
    with pytest.raises(UserError, match="--a has changed: 1, now 5"):
        require_same(tmp_path, BEFORE, now | {"--a": "5"}, code=False)
    caplog.clear()
    require_same(tmp_path, BEFORE, BEFORE, code=False)
    assert not caplog.messages
