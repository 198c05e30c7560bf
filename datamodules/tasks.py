"""A stream of tasks: the edits of a dataset, dealt to tasks that are learned one after the other.

Continual learning asks what becomes of earlier tasks while later ones are learned, so every task is evaluated
before the first and after each of them (:mod:`corrigenda.modules.metrics.continual`).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from corrigenda.datamodules.files import DataError
from corrigenda.datamodules.loader import CaseLoader
from corrigenda.datamodules.records import EditCase, Probe
from corrigenda.modules import checks

T = TypeVar("T")
By = Literal["chunk", "relation", "file"]


class Tasks:
    """How the cases of a dataset become tasks. One epoch of the Trainer is one task.

    Args:
        number: number of tasks.
        size: cases per task; with ``by: file`` at most so many, and all of them if not given.
        by: ``chunk`` deals out the first cases in a random order; ``relation`` makes each task of one relation
            that has enough cases; ``file`` takes the tasks that the records name.
        passes: how often a task's cases are gone through at most, each time in another order. A method that edits
            rather than trains needs 1.
        unrelated: further cases per task that are never edited: their prompts, with their true answers, are
            added to the task's cases as ``unrelated`` probes. 0 leaves the dataset's own.
        joint: learn all tasks at once in a single epoch, which is what learning them one by one is measured
            against.
        seed: random seed of the order of tasks, of the cases dealt to them and of the passes; at 0 the run's seed.
    """

    def __init__(
        self,
        number: int,
        size: int | None = None,
        by: By = "chunk",
        passes: int = 1,
        unrelated: int = 0,
        joint: bool = False,
        seed: int = 0,
    ) -> None:
        checks.whole(1, number=number, size=size, passes=passes)
        checks.whole(0, unrelated=unrelated)
        checks.seeds(seed=seed)
        if size is None and by != "file":
            raise ValueError(f"tasks by {by} need a size: the number of cases per task")
        self.number, self.size, self.by, self.passes = number, size, by, passes
        self.unrelated, self.joint, self.seed = unrelated, joint, seed
        self.names: list[str] = []
        self.cases: list[list[EditCase]] = []
        """The cases of each task, in order; empty before :meth:`deal`."""

    @property
    def enough(self) -> int | None:
        """Number of cases that suffice to deal from; None if only the cases themselves can tell."""
        if self.size is None or self.by != "chunk" or self.unrelated:
            return None
        return self.number * self.size

    def learned(self, started: int) -> int:
        """Number of cases in the tasks that ``started`` epochs have learned."""
        tasks = self.cases if self.joint and started else self.cases[:started]
        return sum(map(len, tasks))

    def deal(self, cases: Sequence[EditCase]) -> list[EditCase]:
        """Deals cases out to the tasks; returns those dealt, in the order of the tasks."""
        pool = list(cases)[: self.enough]
        shuffled = random.Random(f"tasks {self.seed}")
        groups = self._groups(list(pool), shuffled)
        if len(groups) < self.number:
            raise DataError(
                f"{self.number} tasks by {self.by} with {self.size or 'any number of'} cases each cannot be made "
                f"of {len(cases)} cases, only {len(groups)}: lower --data.tasks.number or --data.tasks.size, or "
                "give more cases"
            )
        self.names = list(groups)[: self.number]
        self.cases = [groups[name] for name in self.names]
        if self.unrelated:
            self._add_unrelated(pool)
        return [case for task in self.cases for case in task]

    def _groups(self, pool: list[EditCase], shuffled: random.Random) -> dict[str, list[EditCase]]:
        """Every task that the cases make, by its name."""
        least = self.size or 1
        if self.by == "chunk":
            pool = pool[: self.number * least]
            shuffled.shuffle(pool)
            starts = range(0, len(pool) - least + 1, least)
            return {str(n): pool[start : start + least] for n, start in enumerate(starts, start=1)}
        every = _grouped(pool, self.by)
        for group in every.values():
            shuffled.shuffle(group)
        names = [name for name in every if self.by == "file" or len(every[name]) >= least]
        if self.by == "relation":
            shuffled.shuffle(names)
        return {name: every[name][: self.size] for name in names}

    def _add_unrelated(self, pool: Sequence[EditCase]) -> None:
        """Adds the prompts of cases that are in no task, about subjects of no task, to the tasks' cases."""
        chosen = [case for task in self.cases for case in task]
        subjects = {edit.subject for case in chosen for edit in case.edits}
        ids = {case.case_id for case in chosen}
        others = [
            Probe(case.edits[0].text, case.edits[0].target_true)
            for case in pool
            if case.case_id not in ids and case.edits[0].subject not in subjects
            if case.edits[0].target_true is not None
        ]
        wanted = self.number * self.unrelated
        if len(others) < wanted:
            raise DataError(
                f"--data.tasks.unrelated {self.unrelated} needs {wanted} cases with a true answer about other "
                f"subjects than the tasks', and there are {len(others)}: lower it, or give more cases"
            )
        # Which probes a case gets depends on the data alone, so that runs under other seeds evaluate the same.
        place = {case.case_id: n for n, case in enumerate(c for c in pool if c.case_id in ids)}
        self.cases = [
            [
                self._with_unrelated(case, others[place[case.case_id] : wanted : len(ids)])
                for case in task
            ]
            for task in self.cases
        ]

    @staticmethod
    def _with_unrelated(case: EditCase, probes: Sequence[Probe]) -> EditCase:
        return replace(case, probes={**case.probes, "unrelated": tuple(probes)})


def _grouped(cases: Sequence[EditCase], by: By) -> dict[str, list[EditCase]]:
    """The cases by relation or by the task that their record names, in the order of the data."""
    groups: dict[str, list[EditCase]] = defaultdict(list)
    for case in cases:
        name = case.task if by == "file" else case.edits[0].relation
        if name is not None:
            groups[name].append(case)
    if not groups:
        raise DataError(
            f"no case names its {'task' if by == 'file' else 'relation'}, so there are no tasks by {by}: "
            "set --data.tasks.by chunk"
        )
    return groups


class TaskLoader(CaseLoader):
    """Batches of one task per epoch, every process all of them.

    An epoch has ``passes * batches_per_pass`` batches, for a smaller task as for the largest one. A batch for
    which a task has no case left is an empty list; :meth:`end_task` makes the rest of a task such batches.

    Args:
        tasks: the tasks.
        batch_size: cases per batch; a batch never reaches into the next pass.
        seed: random seed of the passes' orders.
        processed: see :class:`CaseLoader`.
    """

    def __init__(self, tasks: Tasks, batch_size: int, seed: int = 0, **rest: Any) -> None:  # noqa: ANN401
        every = [case for task in tasks.cases for case in task]
        super().__init__(every, batch_size, seed=seed, share="same", **rest)
        self.tasks = [every] if tasks.joint else tasks.cases
        self.passes = tasks.passes
        self._ended = False

    @property
    def batches_per_pass(self) -> int:
        return -(-max(map(len, self.tasks)) // self.batch_size)

    def __len__(self) -> int:
        return self.passes * self.batches_per_pass

    def end_task(self) -> None:
        """Leaves out the rest of the present task: the batches that follow in this epoch are empty."""
        self._ended = True

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._ended = False
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[list[EditCase]]:
        for batch in super().__iter__():
            yield [] if self._ended else batch

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ended": self._ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._ended = bool(state["ended"])

    def _order(self) -> list[EditCase]:
        task = self.tasks[min(self.epoch, len(self.tasks) - 1)]
        order: list[EditCase] = []
        for number in range(self.passes):
            again = list(task)
            if self.passes > 1:
                random.Random(f"{self.seed} {self.epoch} {number}").shuffle(again)
            order += again
        return order

    def _batches(self, items: Sequence[T]) -> list[Sequence[T]]:
        size = len(items) // self.passes
        batches: list[Sequence[T]] = []
        for start in range(0, len(items), size):
            one = items[start : start + size]
            batches += [
                one[place : place + self.batch_size]
                for place in range(0, self.batches_per_pass * self.batch_size, self.batch_size)
            ]
        return batches
