"""Tasks in lm-evaluation-harness's own format: ours, the harness's, and where their rows come from."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from corrigenda.datamodules.files import read_rows
from corrigenda.pipeline.abilities.ids import FAST, listed
from corrigenda.pipeline.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

TASKS = Path(__file__).parents[2] / "configs" / "tasks"
OURS = ("gsm8k", "rte", "nq_open", "boolq", "mutual", "samsum", "conll2003", "sst2", "cola", "mrpc")
QUESTIONS = {"smoke": 8, "quick": 40, "fast": FAST, "full": None}  # of each profile
OTHER_NAMES = {"validation": "dev"}  # of a split's file

Form = Literal["strict", "paper", "harness"]
Profile = Literal["smoke", "quick", "fast", "full"]


def require_harness() -> None:
    """Raises UserError unless lm-evaluation-harness is installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"general abilities need lm-evaluation-harness: pip install 'corrigenda[abilities]' ({error})"
        ) from None


def load_task(
    name: str, form: Form, profile: Profile, data: Path | None = None
) -> ConfigurableTask:
    """A task with the rows of a profile.

    Args:
        name: one of ours, in that form, or else any task that the harness knows.
        form: ``harness`` takes the harness's definition also where there is one of ours.
        profile: how many rows.
        data: a folder with a folder for each data set, see :func:`local_rows`; by default rows are downloaded.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    file = definition(name, form)
    config = load_yaml(file)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    if "class" in config:
        raise UserError(f"the task {name!r} is a Python class of the harness; give one in YAML")
    if data is not None:
        config = _with_local_rows(config, data)
    task = _built(config, f"the rows of the task {name!r} cannot be used")
    _select(task, profile, name)
    return task


def _built(config: dict[str, Any], problem: str) -> ConfigurableTask:
    """The task with all its rows; raises UserError if there are none, or if the first lacks a field."""
    from jinja2 import TemplateError
    from lm_eval.api.task import ConfigurableTask

    try:
        with quiet():
            task = ConfigurableTask(config=config)
            row = next(iter(task.eval_docs))
            if task.OUTPUT_TYPE == "multiple_choice":
                task.process_results(row, [(-1.0, False)] * len(task.doc_to_choice(row)))
            elif task.OUTPUT_TYPE == "generate_until":
                task.process_results(row, [""])
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, TemplateError) as error:
        raise UserError(f"{problem}: {type(error).__name__}: {error}") from error
    return task


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the harness draws no progress bars and reports nothing but errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def definition(name: str, form: Form) -> Path:
    """The YAML file of a task; raises UserError for a name that nobody knows."""
    if form != "harness" and name in OURS:
        file = TASKS / f"{name}_{form}.yaml"
        if not file.is_file():
            raise UserError(f"the task {name!r} has no form {form!r}: use the form 'strict'")
        return file
    entry = _harness().task_index.get(name)
    if entry is None or entry.yaml_path is None:
        kind = "is a group of tasks: name them one by one" if entry else "is not known"
        raise UserError(
            f"the task {name!r} {kind}; ours are {', '.join(OURS)}, others are those of lm-evaluation-harness"
        )
    return Path(entry.yaml_path)


@cache
def _harness() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


# ---------------------------------------------------------------------------- rows


def local_rows(folder: Path) -> DatasetDict:
    """The rows of a folder with a JSON Lines file for each split."""
    from datasets import Dataset, DatasetDict

    return DatasetDict(
        {
            file.stem: Dataset.from_list([fields for _, fields in read_rows(str(file))])
            for file in sorted(folder.glob("*.jsonl"))
        }
    )


def _with_local_rows(config: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """The configuration of a task that reads its rows from a folder of ``data``."""
    path, name = str(config.get("dataset_path", "")), config.get("dataset_name")
    names = [str(name)] * (name is not None) + [path.rpartition("/")[2]]
    found = [data / each for each in names if (data / each).is_dir()]
    if not found:
        raise UserError(
            f"{data} has no folder {' or '.join(names)} for the task {config['task']!r}"
        )
    rows = local_rows(found[0])
    for split, other in OTHER_NAMES.items():
        if split not in rows and other in rows:
            rows[split] = rows[other]
    evaluated = config.get("test_split") or config.get("validation_split")
    if evaluated not in rows:
        raise UserError(f"{found[0]} has no file {evaluated}.jsonl for the task {config['task']!r}")
    changed = dict(config) | {"custom_dataset": lambda **_: rows}
    for key in ("training_split", "validation_split", "fewshot_split"):
        if changed.get(key) not in (None, *rows):
            changed.pop(key)
    if changed.get("num_fewshot") and not {"fewshot_split", "training_split"} & changed.keys():
        raise UserError(f"{found[0]} has no rows for the examples that {config['task']!r} shows")
    return changed


def _select(task: ConfigurableTask, profile: Profile, name: str) -> None:
    """Leaves only the rows of a profile."""
    split = task.config.test_split or task.config.validation_split
    if (count := QUESTIONS[profile]) is not None:
        rows, known = task.dataset[split], listed(name, split)
        places = known.places(rows, count)
        task.dataset[split] = rows.select(places)
        if (found := len(places) * known.questions) < count:
            log.warning(
                "the task %r has %d questions in the profile %r, not %d",
                name,
                found,
                profile,
                count,
            )
