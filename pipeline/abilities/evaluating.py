"""Evaluates a model on one task: scores, their standard errors, and every answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline.abilities.harness_tasks import quiet
from corrigenda.pipeline.abilities.ids import row_id

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

ERRORS = "_stderr"  # ends the name of a standard error
GROUPS = 200
NOT_FOUND = "[invalid]"  # what the harness's filters make of an answer in which they find nothing


@dataclass(frozen=True)
class Answered:
    """What a model has answered to a task.

    Attributes:
        metric: the name of the task's main measure.
        scores: every measure, and its standard error under the same name with ``_stderr``.
        examples: for each question its id, what was right, the answers, and the measures.
        seconds: time for the task.
        truncated: questions whose beginning did not fit into the model's context.
    """

    metric: str
    scores: dict[str, float]
    examples: list[dict[str, Any]]
    seconds: float
    truncated: int

    @property
    def row(self) -> dict[str, Any]:
        """A line of ``abilities.jsonl``, without what was evaluated on which model."""
        return {
            "metric": self.metric,
            "score": self.scores[self.metric],
            "stderr": self.scores[self.metric + ERRORS],
            "invalid": self.scores["invalid"],
            "n": len(self.examples),
            "seconds": round(self.seconds, 3),
            "truncated": self.truncated,
            "scores": self.scores,
        }


def evaluate(
    lm: LanguageModel, task: ConfigurableTask, batch_size: int = 32, progress: bool = False
) -> Answered:
    """Evaluates a model, under its active edits, on a whole task. Global random states stay as they are."""
    from lm_eval.evaluator import evaluate

    from corrigenda.pipeline.abilities.bridge import EditedModel

    start, name = time.perf_counter(), task.config.task
    model = EditedModel(lm, batch_size, progress)
    task.set_fewshot_seed(seed=1234)  # the task's own generator
    with quiet():
        found = evaluate(model, {"tasks": {name: task}}, bootstrap_iters=0, log_samples=True)
    examples = found["samples"][name]
    first = [example for example in examples if example["filter"] == examples[0]["filter"]]
    for example in first:
        example.setdefault("invalid", _invalid(task, example["filtered_resps"]))
    metrics = list(dict.fromkeys([*first[0]["metrics"], "invalid"]))
    scores: dict[str, float] = {}
    for metric in metrics:
        combine = task.aggregation().get(metric, _mean)
        values = [example[metric] for example in first]
        scores[metric] = float(combine(values))
        scores[metric + ERRORS] = jackknife(combine, values)
    plain = [_plain(task, example, metrics) for example in first]
    main = next(iter(task.aggregation()))
    return Answered(main, scores, plain, time.perf_counter() - start, model.num_truncated)


def _invalid(task: ConfigurableTask, answers: Sequence[Any]) -> float:
    """Whether the answer to a question of one of the harness's own tasks is none."""
    if task.OUTPUT_TYPE == "generate_until":
        return float(all(not str(text).strip() or text == NOT_FOUND for text in answers))
    scores = [answer[0] if isinstance(answer, tuple | list) else answer for answer in answers]
    return float(not all(math.isfinite(score) for score in scores))


def _plain(
    task: ConfigurableTask, example: dict[str, Any], metrics: Sequence[str]
) -> dict[str, Any]:
    """What is kept of an example: its id, what was right, and the answers."""
    return {
        "id": row_id(repr(sorted(example["doc"].items()))),
        "target": example["target"],
        "answers": [response[0] for response in example["resps"]],
        **{metric: example[metric] for metric in metrics},
    }


def jackknife(combine: Callable[[Sequence[Any]], float], values: Sequence[Any]) -> float:
    """Standard error of a measure of independent examples, by leaving out each in turn (of a mean: s / root n).

    Of more than GROUPS examples, one group after the other is left out.
    """
    count = len(values)
    if count < 2:
        return math.nan
    if combine is _mean or getattr(combine, "__name__", "") == "mean":
        centre = sum(values) / count
        return math.sqrt(sum((value - centre) ** 2 for value in values) / (count - 1) / count)
    groups = min(count, GROUPS)
    without = [
        float(combine([value for place, value in enumerate(values) if place % groups != group]))
        for group in range(groups)
    ]
    centre = sum(without) / groups
    return math.sqrt((groups - 1) / groups * sum((value - centre) ** 2 for value in without))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
