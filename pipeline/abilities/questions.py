"""The questions of one evaluation: tasks in a form, the rows of a profile, and plain text for perplexity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrigenda.datamodules.corpus import texts
from corrigenda.modules import checks
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline.abilities.answers import AnswerFiles
from corrigenda.pipeline.abilities.evaluating import evaluate
from corrigenda.pipeline.abilities.harness_tasks import (
    Form,
    Profile,
    definition,
    load_task,
    require_harness,
)
from corrigenda.pipeline.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

TEXT_TOKENS = 2048  # of the plain text whose perplexity stands beside the scores


def model_id(lm: LanguageModel, edits: Iterable[str] = ()) -> str:
    """Names a model by its weights and the digests of its edits."""
    return hashlib.sha256(" ".join([lm.weights_hash, *edits]).encode()).hexdigest()[:16]


class Questions:
    """The questions that a model is evaluated on, however it is edited.

    Raises UserError for a task that nobody knows, before anything is read.

    Args:
        tasks: names; ours, or the harness's.
        profile: ``fast`` 200 rows of each task, by a fixed list; ``quick`` 40, ``smoke`` 8 of them; ``full`` all.
        form: ``strict``, ``paper`` (arXiv 2401.04700), or ``harness`` for the harness's own definitions.
        data: a folder with a folder of JSON Lines files for each data set; by default the Hugging Face Hub.
        text: plain text whose perplexity stands beside the scores, as for a corpus.
        batch_size: texts that are continued together.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        profile: Profile = "fast",
        form: Form = "strict",
        data: str | None = None,
        text: str = "facts",
        batch_size: int = 32,
    ) -> None:
        checks.whole(1, batch_size=batch_size)
        require_harness()
        self.names, self.profile, self.form, self.text = list(tasks), profile, form, text
        self.data = None if data is None else Path(data)
        self.batch_size = batch_size
        if self.data is not None and not self.data.is_dir():
            raise UserError(f"the folder with data {data!r} does not exist")
        if twice := {name for name in tasks if self.names.count(name) > 1}:
            raise UserError(f"the task {min(twice)!r} is named twice")
        for name in tasks:
            definition(name, form)

    @cached_property
    def tasks(self) -> dict[str, ConfigurableTask]:
        """The tasks with their rows."""
        return {name: load_task(name, self.form, self.profile, self.data) for name in self.names}

    @property
    def _manner(self) -> dict[str, str]:
        return {"form": self.form, "profile": self.profile}

    def evaluate(
        self,
        lm: LanguageModel,
        files: AnswerFiles,
        edits: int,
        model: str,
        progress: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Evaluates what is not yet answered in these files; yields the rows of all tasks.

        Args:
            lm: the model, under its active edits.
            files: where answers are written.
            edits: how many edits are active.
            model: what names the model in the rows, beside the number of edits.
            progress: whether a bar shows how far it is.
        """
        perplexity: float | None = None
        for name, task in self.tasks.items():
            key = {"model": model, "edits": edits, "task": name, **self._manner}
            if (row := files.find(**key)) is None:
                if perplexity is None:
                    perplexity = lm.perplexity(texts(self.text), TEXT_TOKENS)
                answered = evaluate(lm, task, self.batch_size, progress)
                row = files.add(
                    {**key, **answered.row, "perplexity": perplexity}, answered.examples
                )
            yield row
