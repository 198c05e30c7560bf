"""Which cases are edited, trained on and evaluated. A dataset is a subclass with one method, ``parse``."""

from __future__ import annotations

import hashlib
import logging
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.datamodules.files import DataError, Row, read_rows
from corrigenda.datamodules.loader import CaseLoader, Share
from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.datamodules.tasks import TaskLoader, Tasks
from corrigenda.modules import checks
from corrigenda.modules.lightning_internals import processed_batches

log = logging.getLogger(__name__)

KNOWN_BATCH = 64  # cases that known_only scores per call


class EditDataModule(LightningDataModule):
    """Cases of one dataset as lists of records, independent of tokenizer and model.

    Which cases a loader serves depends on the LightningModule's ``trains_on``. A learned editor
    ("train", the default) trains on the training cases and is validated, during fit, on held-out
    ones. A module that trains on the edits themselves ("edits": fine-tuning, streams of edits) gets
    the evaluation cases in order. Outside fit everything is evaluated on the evaluation cases.

    Args:
        path: cases to edit and evaluate: .json, .jsonl, .csv, .tsv, these also with .gz, .parquet, or a Hub
            dataset (owner/name:split).
        train_path: cases a learned editor is trained on; those about an evaluated subject are left
            out.
        batch_size: cases per batch.
        limit: evaluate only the first so many cases (counted after known_only).
        val_fraction: share of the training subjects held out to validate during fit.
        seed: random seed of the held-out share. The order of training cases depends on the run's seed.
        known_only: evaluate only cases that the unedited model answers correctly.
        val_limit: validate during fit on only the first so many held-out cases.
        tasks: how the evaluation cases become tasks that fit learns one after the other; by default they are
            one set.
        eval_batch_size: cases per batch when they are evaluated; by default batch_size.
        max_probes: evaluate only the first so many probes of each criterion of a case; by default all.
        order_seed: random seed of the order in which the evaluation cases are edited, 0 for that of the run; by
            default they keep the order of the dataset. The cases are the same for every seed.
    """

    source: ClassVar[str] = ""
    """Where the dataset is published."""
    left_out: ClassVar[str] = ""
    """Why ``parse`` returns None for a record, for the log."""

    def __init__(
        self,
        path: str | None = None,
        train_path: str | None = None,
        batch_size: int = 8,
        limit: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        known_only: bool = False,
        val_limit: int | None = None,
        tasks: Tasks | None = None,
        eval_batch_size: int | None = None,
        max_probes: int | None = None,
        order_seed: int | None = None,
    ) -> None:
        super().__init__()
        checks.whole(1, batch_size=batch_size, limit=limit, val_limit=val_limit)
        checks.whole(1, eval_batch_size=eval_batch_size, max_probes=max_probes)
        checks.number("at least 0 and below 1", lambda x: 0 <= x < 1, val_fraction=val_fraction)
        checks.seeds(seed=seed, order_seed=order_seed)
        if tasks is not None and order_seed is not None:
            raise ValueError(
                "the order of tasks depends on --data.tasks.seed: leave out --data.order_seed"
            )
        self.path = path
        self.train_path = train_path
        self.batch_size = batch_size
        self.limit = limit
        self.val_fraction = val_fraction
        self.seed = seed
        self.known_only = known_only
        self.val_limit = val_limit
        self.tasks = tasks
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_probes = max_probes
        self.order_seed = order_seed
        self.places: dict[str, str] = {}
        """Where each case was read, by its id."""
        self._files: dict[str, list[EditCase]] = {}
        self._parts: dict[str, list[EditCase]] = {}
        self._evaluated: list[EditCase] | None = None
        self._known_ids: list[str] | None = None

    # ------------------------------------------------------------------ cases

    def parse(self, row: Row) -> EditCase | None:
        """The case of one record, or None to leave it out (see ``left_out``)."""
        raise NotImplementedError(f"{type(self).__name__} does not read files")

    def report(self, error: DataError) -> None:
        """Raises the error of a record that cannot be used; a subclass may leave such records out."""
        raise error

    def read(self, path: str) -> list[EditCase]:
        """All cases of a file or Hub dataset, in its order; read once."""
        if path not in self._files:
            self._files[path] = self.parse_file(path)
        return self._files[path]

    def cases(self, split: Literal["train", "val", "test"]) -> list[EditCase]:
        """Cases of a split: "test" is ``path``; "train" and "val" are parts of ``train_path``."""
        if split == "test":
            if self.path is None:
                raise DataError(self._unset("cases to edit", "path"))
            return self.read(self.path)
        if not self._parts:
            self._parts = self._split_training_cases()
        return self._parts[split]

    def evaluation_cases(self) -> list[EditCase]:
        """Cases to edit and evaluate: the test split after ``known_only``, ``limit`` and ``tasks``."""
        if self._evaluated is None:
            cases = self.cases("test")
            if self.known_only:
                cases = self._known(cases)
                self._known_ids = [case.case_id for case in cases]
            cases = self._with_probes(cases[: self._limit])
            if self.order_seed is not None:
                cases = random.Random(f"order {self.order_seed}").sample(cases, len(cases))
            self._evaluated = self.tasks.deal(cases) if self.tasks else cases
        return self._evaluated

    @property
    def _limit(self) -> int | None:
        """Number of cases that are wanted before they are dealt to tasks."""
        return self.limit or (self.tasks.enough if self.tasks else None)

    def edits(self) -> list[Edit]:
        """All edits of the evaluation cases."""
        return [edit for case in self.evaluation_cases() for edit in case.edits]

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> CaseLoader:
        if self._trains_on == "edits":
            cases = self.evaluation_cases()
            if self.tasks:
                return TaskLoader(
                    self.tasks, self.batch_size, self.tasks.seed, processed=self._processed
                )
            return self._loader(cases, share="same")
        if self.tasks:
            raise DataError(
                "--data.tasks are learned one after the other, and this module trains on other cases: train it "
                "without them, and evaluate it with --model EditingModule and --edit.schedule stream"
            )
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader(self.cases("train"), shuffle=not overfit, share="even")

    def val_dataloader(self) -> CaseLoader:
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and self._trains_on == "train":
            return self._loader(self._with_probes(self.cases("val")[: self.val_limit]))
        return self._loader(self.evaluation_cases())

    def test_dataloader(self) -> CaseLoader:
        return self._loader(self.evaluation_cases())

    def transfer_batch_to_device(
        self, batch: list[EditCase], device: torch.device, dataloader_idx: int
    ) -> list[EditCase]:
        """The batch as it is: text is on no device."""
        return batch

    # Known cases are stored in the checkpoint, because its trained weights may answer differently.

    def state_dict(self) -> dict[str, Any]:
        if self._known_ids is None:
            return {}
        return {"path": self.path, "limit": self._limit, "known": self._known_ids}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (state_dict["path"], state_dict["limit"]) == (self.path, self._limit):
            self._known_ids = state_dict["known"]

    # ------------------------------------------------------------------ internals

    def _with_probes(self, cases: Sequence[EditCase]) -> list[EditCase]:
        """The cases with no more probes than ``max_probes``."""
        return [case.with_probes(self.max_probes) for case in cases]

    @property
    def _trains_on(self) -> str:
        return getattr(getattr(self.trainer, "lightning_module", None), "trains_on", "train")

    def _loader(
        self, cases: Sequence[EditCase], shuffle: bool = False, share: Share = "each_once"
    ) -> CaseLoader:
        # The Trainer, unlike torch.distributed, knows which processes hold parts of one model.
        world = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        seed = torch.initial_seed()  # the run's, which all processes share
        size = self.eval_batch_size if share == "each_once" else self.batch_size
        return CaseLoader(cases, size, shuffle, seed, share, processed=self._processed, **world)

    def _processed(self) -> int:
        """Training batches of this epoch whose step has finished."""
        assert self.trainer is not None
        return processed_batches(self.trainer)

    def _unset(self, what: str, argument: str) -> str:
        known = f" (public source: {self.source})" if self.source else ""
        return f"{type(self).__name__} has no {what}: give --data.{argument}{known}"

    def parse_file(self, path: str) -> list[EditCase]:
        """All cases of a file or Hub dataset; raises DataError if there are none."""
        places: dict[str, str] = {}
        cases = []
        num_rows = 0
        for index, (where, fields) in enumerate(read_rows(path, self.source, self.report)):
            num_rows += 1
            try:
                case = self.parse(Row(where, index, fields))
                if case is not None and case.case_id in places:
                    raise DataError(
                        f"{where}, field 'case_id': {case.case_id!r} was used at {places[case.case_id]}"
                    )
            except DataError as error:
                self.report(error)
                continue
            if case is not None:
                self.places[case.case_id] = places[case.case_id] = where
                cases.append(case)
        if not cases:
            there = f"no usable record among {num_rows}" if num_rows else "no records"
            raise DataError(f"{path}: {there}")
        if num_rows > len(cases):
            log.info("%s: left out %d: %s", path, num_rows - len(cases), self.left_out)
        counts = Counter(criterion for case in cases for criterion in case.probes)
        log.info("%s: %d cases; probes: %s", path, len(cases), dict(counts))
        return cases

    def _split_training_cases(self) -> dict[str, list[EditCase]]:
        if self.train_path is None:
            raise DataError(self._unset("training cases", "train_path"))
        every = self.read(self.train_path)
        cases = every
        if self.path is not None:
            cases = without_subjects(every, subjects(self.cases("test")))
            if removed := len(every) - len(cases):
                log.info(
                    "%s: left out %d cases whose subject is evaluated", self.train_path, removed
                )
        held_out = sample_subjects(subjects(cases), self.val_fraction, self.seed)
        val = [case for case in cases if subjects([case]) & held_out]
        train = without_subjects(cases, subjects(val))
        if not train:
            raise DataError(
                f"{self.train_path}: no training case left of {len(every)}: "
                f"{len(every) - len(cases)} are about a subject in {self.path}, "
                f"{len(val)} held out by --data.val_fraction"
            )
        return {"train": train, "val": val}

    def _known(self, cases: list[EditCase]) -> list[EditCase]:
        """Cases that the unedited model answers correctly, at most ``limit``."""
        if self._known_ids is not None:
            ids = set(self._known_ids)
            return [case for case in cases if case.case_id in ids]
        known = getattr(getattr(self.trainer, "lightning_module", None), "known", None)
        if known is None:
            raise DataError(
                "--data.known_only needs a Trainer whose LightningModule has a method known(cases): "
                "use an EditingModule, or leave the option out"
            )
        correct: list[EditCase] = []
        for start in range(0, len(cases), KNOWN_BATCH):
            if self._limit is not None and len(correct) >= self._limit:
                break
            chunk = cases[start : start + KNOWN_BATCH]
            correct += [case for case, yes in zip(chunk, known(chunk), strict=True) if yes]
        if not correct:
            raise DataError(
                f"{type(self).__name__}: the model answers none of the {len(cases)} cases "
                "correctly, so --data.known_only leaves nothing to edit"
            )
        return correct[: self._limit]


def subjects(cases: Iterable[EditCase]) -> set[str]:
    """Subjects of the cases' edits, normalised so that spellings compare equal."""
    names = (edit.subject for case in cases for edit in case.edits)
    return {unicodedata.normalize("NFKC", name).casefold().strip() for name in names}


def without_subjects(cases: Iterable[EditCase], names: set[str]) -> list[EditCase]:
    """The cases that share no subject with ``names``."""
    return [case for case in cases if not subjects([case]) & names]


def sample_subjects(names: set[str], fraction: float, seed: int) -> set[str]:
    """A fraction of ``names`` in hash order; at least one unless ``fraction`` is 0."""
    if fraction == 0 or not names:
        return set()
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return set(ranked[: max(1, round(fraction * len(ranked)))])
