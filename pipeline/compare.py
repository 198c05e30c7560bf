"""``corrigenda compare``: executes the runs of a study file, each in its own process and folder, and reports.

A study file is a list of named ``corrigenda`` command lines:

    out: runs/demo               # default: runs/<name of the file>
    baseline: unedited           # differences are reported relative to this run
    common: --data.limit 30      # for every run; --common and a run's own arguments override it
    runs:
      - {name: unedited, args: validate -c configs/base/smollm2.yaml -c configs/data/facts.yaml}
      - {name: mend-train, args: fit -c configs/mend/smollm2.yaml, report: false}

``{out}`` in an argument stands for the output folder. Runs are executed in the order of the file. Finished runs
are skipped, interrupted ones are resumed or restarted, and nothing is ever deleted.

With ``--seeds 0 1 2`` the whole study is repeated for each seed, in ``out/seed-0`` and so on, which ``{out}``
then stands for. The report in ``out`` covers all of them.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report import is_finished, report
from corrigenda.pipeline.report.records import LONGEST_NAME, is_folder_name, read_study_record
from corrigenda.pipeline.signals import run_child, status_of
from corrigenda.pipeline.trust import read_yaml, take_plugins

STUDY_KEYS = ("out", "baseline", "common", "runs")
RUN_KEYS = ("name", "args", "report")
COMMANDS = ("fit", "validate")  # the commands that write a run folder
SECONDS_TO_CLOSE = 30.0
LOCK = "study.lock"


@dataclass(frozen=True)
class StudyRun:
    """One command line of a study, in which ``{out}`` has not been replaced yet."""

    name: str
    args: tuple[str, ...]
    is_reported: bool


@dataclass(frozen=True)
class Study:
    """A checked study file and the folder for its runs."""

    file: Path
    out: Path
    baseline: str | None
    runs: tuple[StudyRun, ...]


def compare(
    file: Path,
    out: Path | None = None,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
    common: str = "",
    plugins: Sequence[str] = (),
) -> None:
    """Executes the runs of a study file one after another and reports on them; repeat the command to resume.

    Finished runs are skipped if their arguments have not changed (contents of configuration files are not
    compared). Interrupted runs are resumed: a fit from its last checkpoint, a validate from its last case. What
    cannot be resumed is renamed to NAME.interrupted-1 and restarted.

    Args:
        file: the study file (YAML): out, baseline, common, runs.
        out: folder for the runs and the report; overrides the study file.
        only: names of the runs to execute; the report covers these and the ones finished before.
        seeds: repeat every run with each of these as its --seed_everything, in OUT/seed-N.
        common: further arguments for every run, such as '--data.limit 10'; override the study's common ones.
        plugins: modules whose classes the runs may use; a study file cannot name any.
    """
    from corrigenda.modules.checks import seeds as check_seeds
    from corrigenda.modules.files import locked  # imports torch

    study = read_study(file, out, _words(common, "--common"))
    for seed in seeds or ():
        check_seeds(**{"each of --seeds": seed})
    studies = [_with_seed(study, seed) for seed in dict.fromkeys(seeds or ())] or [study]
    chosen = [(part, run) for part in studies for run in _choose(part, only)]
    try:
        for part in (study, *studies):
            part.out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"the output folder {part.out} is a file; name another with --out"
        ) from None
    with ExitStack() as locks:
        for folder in dict.fromkeys(part.out for part in (study, *studies)):
            locks.enter_context(locked(folder / LOCK, f"the study's folder {folder}"))
        known = {part.out: read_study_record(part.out) for part in studies}
        for part, run in chosen:
            _require_unchanged(part, run, known[part.out])
        try:
            for index, (part, run) in enumerate(chosen, start=1):
                path = (part.out / run.name).relative_to(study.out)
                _execute(part, run, f"[{index}/{len(chosen)}] {path}", plugins)
            _report(study, studies)
        except KeyboardInterrupt as stop:
            _stop("stopped; repeat the command to resume", status_of(stop))


# The study file


def read_study(file: Path, out: Path | None = None, common: Sequence[str] = ()) -> Study:
    """The study in ``file``, every run with the arguments ``common`` as well.

    Raises:
        UserError: one line that names the file and the run.
    """
    content = read_yaml(file)
    _require_keys(content, STUDY_KEYS, f"{file}")
    common = (*_words(content.get("common", ()), f"{file}: common"), *common)
    entries = content.get("runs")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: runs must be a list of runs, got {entries!r}")
    runs = tuple(
        _read_run(entry, common, f"{file}: run {index}")
        for index, entry in enumerate(entries, start=1)
    )
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{file}: two runs are named {name!r}; rename one")
    baseline = content.get("baseline")
    if baseline is not None and baseline not in [run.name for run in runs if run.is_reported]:
        reported = ", ".join(run.name for run in runs if run.is_reported)
        raise UserError(f"{file}: baseline {baseline!r} is not a reported run ({reported})")
    given = content.get("out")
    if given is not None and not isinstance(given, str):
        raise UserError(f"{file}: out must be the name of a folder, got {given!r}")
    return Study(file, out or Path(given or Path("runs") / file.stem), baseline, runs)


def _read_run(entry: Any, common: tuple[str, ...], where: str) -> StudyRun:  # noqa: ANN401
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        where = f"{where} ({entry['name']})"
    _require_keys(entry, RUN_KEYS, where)
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where} needs a name (text), got {name!r}")
    if not is_folder_name(name):
        raise UserError(
            f"{where}: the name must be a valid folder name: at most {LONGEST_NAME} characters, no slashes, "
            "and not starting with a dot or a dash"
        )
    if not entry.get("args"):
        raise UserError(f"{where} has no args; give the command line, such as 'validate -c FILE'")
    verb, *own = _words(entry["args"], f"{where}: args")
    if verb not in COMMANDS:
        raise UserError(f"{where}: args must start with {' or '.join(COMMANDS)}, not {verb!r}")
    args = (verb, *common, *own)
    if take_plugins(args)[0]:
        raise UserError(
            f"{where}: a study file cannot name a plugin; give --plugin to the compare command"
        )
    if any(word.split("=")[0] == "--run_dir" for word in args):
        raise UserError(f"{where}: remove --run_dir; the folder of a run is out/name")
    is_reported = entry.get("report", True)
    if not isinstance(is_reported, bool):
        raise UserError(f"{where}: report must be true or false, got {is_reported!r}")
    return StudyRun(name, args, is_reported)


def _require_keys(content: object, keys: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping with the keys {', '.join(keys)}")
    unknown = [str(key) for key in content if key not in keys]
    if unknown:
        raise UserError(
            f"{where}: unknown key {', '.join(unknown)}; the keys are {', '.join(keys)}"
        )


def _words(value: object, where: str) -> tuple[str, ...]:
    """Arguments given as a command line, or as a list of words and numbers."""
    if isinstance(value, str):
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            raise UserError(f"{where}: {error} in {value!r}") from None
    if isinstance(value, list | tuple) and all(
        isinstance(word, str | int | float) for word in value
    ):
        return tuple(word if isinstance(word, str) else json.dumps(word) for word in value)
    raise UserError(f"{where}: expected a string or a list of words, got {value!r}")


def _choose(study: Study, only: Sequence[str] | None) -> list[StudyRun]:
    names = [run.name for run in study.runs]
    for name in only or ():
        if name not in names:
            raise UserError(f"{study.file} has no run {name!r}; its runs are {', '.join(names)}")
    return [run for run in study.runs if not only or run.name in only]


def _with_seed(study: Study, seed: int) -> Study:
    """The same study with one seed, in a folder of its own."""
    given = ("--seed_everything", str(seed))
    runs = tuple(replace(run, args=(*run.args, *given)) for run in study.runs)
    return replace(study, out=study.out / f"seed-{seed}", runs=runs)


# study.json, which records the arguments of every run


def _write_record(study: Study, run: StudyRun, args: Sequence[str] | None) -> None:
    """Records a run's arguments; None if they are unknown, because the run was not started by ``compare``."""
    from corrigenda.modules.files import write_text

    runs = read_study_record(study.out)
    runs[run.name] = {"args": args and list(args), "report": run.is_reported}
    in_order = [known.name for known in study.runs if known.name in runs]
    in_order += [name for name in runs if name not in in_order]
    content = {"format": 1, "runs": {name: runs[name] for name in in_order}}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_text(study.out / "study.json", text)


def _require_unchanged(study: Study, run: StudyRun, known: Mapping[str, Any]) -> None:
    """Raises UserError if a finished or resumable run was started with other arguments."""
    folder = study.out / run.name
    before = known.get(run.name, {}).get("args")
    is_reused = is_finished(folder) or _can_resume(folder, run, before)
    if is_reused and before is not None and before != list(run.args):
        raise UserError(
            f"run {run.name} in {study.out} was started with other arguments ({shlex.join(before)}); restore "
            f"them, rename or remove {folder} to run it again, or choose another --out"
        )


# Running


def run_command(args: Sequence[str], run_dir: Path) -> list[str]:
    """The command line that starts one run in a process of its own."""
    return [sys.executable, "-m", "corrigenda", *args, "--run_dir", str(run_dir)]


def _execute(study: Study, run: StudyRun, title: str, plugins: Sequence[str]) -> None:
    """Skips, resumes or starts one run; exits if the run fails."""
    console = Console(highlight=False)
    folder = study.out / run.name
    before = read_study_record(study.out).get(run.name, {}).get("args")
    if is_finished(folder):
        console.print(f"{title}: already finished, skipped", markup=False)
        _write_record(study, run, before)
        return
    console.rule(Text(title), align="left")
    args = [word.replace("{out}", str(study.out)) for word in run.args]
    if _can_resume(folder, run, before):
        console.print("interrupted before, resumes", markup=False)
        args += ["--ckpt_path", "last"] if run.args[0] == "fit" else []
    elif folder.exists():
        renamed = _set_aside(folder)
        console.print(f"interrupted before, renamed to {renamed} and restarted", markup=False)
    args += [f"--plugin={name}" for name in plugins]
    _write_record(study, run, run.args)
    sys.stdout.flush()
    environment = _environment(study)
    _finish(run, folder, run_child(run_command(args, folder), environment, SECONDS_TO_CLOSE))


def _can_resume(folder: Path, run: StudyRun, before: Sequence[str] | None) -> bool:
    """Whether ``folder`` holds an interrupted run that can be resumed: a fit's checkpoint, a validation's cases.

    A validation whose arguments differ from ``before`` is restarted.
    """
    if (folder / "summary.json").exists():
        return False
    if run.args[0] == "fit":
        return (folder / "checkpoints" / "last.ckpt").exists()
    return (folder / "cases.jsonl").exists() and before == list(run.args)


def _set_aside(folder: Path) -> Path:
    number = 1
    while (renamed := folder.with_name(f"{folder.name}.interrupted-{number}")).exists():
        number += 1
    return folder.rename(renamed)


def _environment(study: Study) -> dict[str, str]:
    """The environment of a run, which can import this project but nothing from the current folder.

    Weights & Biases groups the runs of a study by its name, unless the user has named a group.
    """
    root = str(Path(__file__).parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if root not in (*paths, sysconfig.get_path("purelib")):
        paths.append(root)
    safe = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {"WANDB_RUN_GROUP": study.file.stem, **os.environ, **safe}


def _finish(run: StudyRun, folder: Path, status: int) -> None:
    if status:
        # A process killed by signal N has status -N; shells report 128 + N.
        status = status if status > 0 else 128 - status
        _stop(
            f"run {run.name} failed (exit status {status}), later runs were not started; "
            "repeat the command to resume",
            status,
        )
    if not is_finished(folder):
        _stop(f"run {run.name} has ended but is not finished: {folder} has no summary.json", 1)


def _stop(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"corrigenda compare: {message}\n")
    raise SystemExit(status)


def _report(study: Study, studies: Sequence[Study]) -> None:
    """Reports on the finished runs; with ``only`` they may be fewer than the study has."""
    reported = [part.out / run.name for part in studies for run in part.runs if run.is_reported]
    done = [folder for folder in reported if is_finished(folder)]
    if not done:
        sys.stdout.write("no reported run is finished yet, so there is no report\n")
        return
    if len(done) < len(reported):
        missing = ", ".join(str(f.relative_to(study.out)) for f in reported if f not in done)
        sys.stdout.write(f"left out of the report because not finished: {missing}\n")
    baseline = study.baseline if study.baseline in [folder.name for folder in done] else None
    others = [part.out / run.name for part in studies for run in part.runs if not run.is_reported]
    report(done, study.out, baseline, training=others)
