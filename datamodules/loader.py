"""Batches of cases, in an order that a resumed run can restore."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from corrigenda.datamodules.files import DataError
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.processes import rank_and_number

T = TypeVar("T")
Share = Literal["even", "each_once", "same"]


class CaseLoader:
    """Batches of cases as lists, in an order that depends on seed and epoch alone.

    Lightning saves ``state_dict`` with a checkpoint and restores it, so a run that was stopped in the
    middle of an epoch resumes with the next batch. It is not a ``DataLoader`` because there is nothing
    to collate, and because Lightning would wrap that in a sampler that pads.

    This holds for checkpoints written during an epoch. Lightning counts an epoch that max_steps or
    max_time cuts short as finished: a checkpoint written after it resumes with the next epoch.

    Args:
        cases: the cases.
        batch_size: cases per batch and process; the last batch may be shorter.
        shuffle: a new order in every epoch.
        seed: random seed of the shuffling.
        share: how cases are split between processes. "even": single cases in turn, the same number for
            each, for training, where processes step together (an epoch may leave out up to one case per
            process); "each_once": whole batches in turn, none left out or repeated, for evaluation;
            "same": all cases, for edits that every process makes.
        num_replicas: number of processes; by default all of torch.distributed, if it is running.
        rank: index of this process among them.
        processed: returns the number of batches of this epoch whose step has finished; a batch that was
            loaded but not finished when the checkpoint was written is then repeated. If not given, all
            loaded batches count.
    """

    def __init__(
        self,
        cases: Sequence[EditCase],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        share: Share = "each_once",
        num_replicas: int | None = None,
        rank: int | None = None,
        processed: Callable[[], int] | None = None,
    ) -> None:
        self.cases = cases
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.share = share
        self._replicas = num_replicas
        self._rank = rank
        self._processed = processed
        self.epoch = 0
        self.position = 0  # batches of this epoch that have been loaded
        self._start = 0  # where the next pass begins; not 0 only after load_state_dict

    @property
    def sampler(self) -> CaseLoader:
        """Itself: Lightning sets the epoch through ``loader.sampler.set_epoch``."""
        return self

    @property
    def batch_sampler(self) -> CaseLoader:
        """Itself: Lightning expects it of every loader with a ``sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self._batches(range(len(self.cases))))

    def __iter__(self) -> Iterator[list[EditCase]]:
        # Lightning creates iterators before it sets the epoch, and some that it never uses. A generator
        # does nothing until the first batch is requested.
        batches = self._batches(self._order())
        start, self._start = self._start, 0
        for position in range(start, len(batches)):
            self.position = position + 1
            yield list(batches[position])

    def state_dict(self) -> dict[str, Any]:
        position = self.position
        if self._processed is not None:
            position = min(position, self._processed())
        return {"epoch": self.epoch, "position": position, "seen": self._seen(position)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.position = self._start = state["position"]
        if self._seen(self.position) != state["seen"]:
            raise DataError(
                "cannot resume in the middle of an epoch: the checkpoint was written with other cases, "
                "batch_size, seed or number of devices; set them as they were, or start a new run"
            )

    def _order(self) -> list[EditCase]:
        order = list(self.cases)
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return order

    def _world(self) -> tuple[int, int]:
        """Number of processes that share the cases, and the index of this one."""
        if self._replicas is not None and self._rank is not None:
            return self._replicas, self._rank
        rank, number = rank_and_number()
        return number, rank

    def _batches(self, items: Sequence[T]) -> list[Sequence[T]]:
        """This process's share of ``items``, in batches."""
        replicas, rank = self._world()
        mine = items
        if self.share == "even":
            mine = items[: len(items) - len(items) % replicas][rank::replicas]
        starts = range(0, len(mine), self.batch_size)
        batches = [mine[start : start + self.batch_size] for start in starts]
        if self.share == "each_once":
            too_few = len(batches) < replicas
            batches = batches[rank::replicas]
        else:
            too_few = not batches
        if items and too_few:  # raised in every process, or those with a batch would wait forever
            raise DataError(
                f"{len(items)} cases in batches of {self.batch_size} are too few for {replicas} "
                "processes: lower --data.batch_size or use fewer devices"
            )
        return batches

    def _seen(self, position: int) -> str:
        """Hash of the cases that all processes together have loaded by ``position``."""
        replicas = 1 if self.share == "same" else self._world()[0]
        ids = [case.case_id for case in self._order()[: position * self.batch_size * replicas]]
        text = json.dumps([self.batch_size, replicas, ids])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
