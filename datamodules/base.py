"""From files of records to batches of edit cases.

Three things, from the bottom up: ``read_rows`` and ``Row`` read raw records and say where a bad one
stands; ``CaseLoader`` hands out lists of cases and can stop and go on in the middle of an epoch;
``EditDataModule`` decides which cases are edited, trained on and evaluated. A dataset is a subclass
with one method, ``parse``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import random
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.records import Edit, EditCase

log = logging.getLogger(__name__)

T = TypeVar("T")
ASKED_TOGETHER = 64  # cases the model is asked about at once, before any edit
RECORD_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>.+))?", re.ASCII
)


class DataError(ValueError):
    """Data that cannot be used; the message is one line: where, which field, what is wrong."""


def read_rows(path: str, source: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of ``path`` with the place it stands at, for error messages.

    Args:
        path: a .json list or a .jsonl file, either also as .gz; otherwise a Hub dataset, written
            ``owner/name``, ``owner/name:split`` or ``owner/name/config:split``.
        source: where the public can get the dataset, named when there is no such file.
    """
    if path.endswith(RECORD_FILES):
        require_file(path, source)
        lines = path.removesuffix(".gz").endswith(".jsonl")
        return _rows_of_lines(path) if lines else _rows_of_list(path)
    if Path(path).expanduser().exists():
        raise DataError(f"{path}: expected a file ending in {', '.join(RECORD_FILES)}")
    if hub_id := HUB_ID.fullmatch(path):
        return _rows_of_hub(path, *hub_id.group("name", "config", "split"))
    raise _no_file(path, source)


def require_file(path: str, source: str = "") -> None:
    """Raise unless ``path`` is a file."""
    if not Path(path).expanduser().is_file():
        raise _no_file(path, source)


def _no_file(path: str, source: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path}: no such file" + (f"; public source: {source}" if source else "")
    )


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """A UTF-8 text file, unpacked if its name ends in .gz; broken bytes are a DataError."""
    opener = gzip.open if path.endswith(".gz") else open
    # Only "\n" ends a line: JSON text may hold the other characters Python takes for line ends.
    file = opener(Path(path).expanduser(), "rt", encoding="utf-8-sig", newline="\n")
    with file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason})") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: not a complete gzip file ({error})") from None


def _rows_of_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{where}: not JSON ({error.msg}, column {error.colno})"
                    ) from None
                yield where, _record(where, row)


def _rows_of_list(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            place = f"{path}, line {error.lineno}"
            raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of records, got {_kind(rows)}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, record {number}"
        yield where, _record(where, row)


def _rows_of_hub(
    path: str, name: str, config: str | None, split: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset  # slow to import, and most runs read files

    try:
        data = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: no such file, and not loaded from the Hub: {reason}") from error
    if isinstance(data, dict):
        if len(data) != 1:
            raise DataError(f"{path}: add the split, one of :{', :'.join(data)}")
        data = next(iter(data.values()))
    for number, row in enumerate(data, start=1):
        yield f"{path}, record {number}", row


def _record(where: str, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a record with named fields, got {_kind(row)}")
    return row


def _kind(value: object) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "a record",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number" if isinstance(value, int | float) else repr(value))


@dataclass(frozen=True)
class Row:
    """One raw record. Its accessors check what they return and name the place when it is wrong.

    Args:
        where: file and line, for messages.
        index: position in its file, from 0.
        fields: the record itself.
        prefix: for a nested record, the names that lead to it ("requested_rewrite.").
    """

    where: str
    index: int
    fields: Mapping[str, Any]
    prefix: str = ""

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.where}, field '{self.prefix}{name}': {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there; Hub datasets write null for absent."""
        return self.fields.get(name) is not None

    def _get(self, name: str, kind: type[T], wanted: str) -> T:
        if not self.has(name):
            raise self.error(name, f"missing (the record has {', '.join(self.fields)})")
        value = self.fields[name]
        if not isinstance(value, kind):
            raise self.error(name, f"expected {wanted}, got {_kind(value)}")
        return value

    def text(self, name: str) -> str:
        value = self._get(name, str, "text")
        if not value.strip():
            raise self.error(name, "empty")
        return value

    def is_blank(self, name: str) -> bool:
        """Whether the field is there and holds nothing but spaces."""
        value = self.fields.get(name)
        return isinstance(value, str) and not value.strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, possibly of none."""
        values = self._get(name, list, "a list of texts")
        for number, value in enumerate(values, start=1):
            if not isinstance(value, str) or not value.strip():
                found = "an empty one" if isinstance(value, str) else _kind(value)
                raise self.error(name, f"expected a list of texts, got {found} at {number}")
        return tuple(values)

    def record(self, name: str) -> Row:
        fields = self._get(name, dict, "a record")
        return Row(self.where, self.index, fields, f"{self.prefix}{name}.")

    def records(self, name: str) -> list[Row]:
        """A list of nested records, possibly of none."""
        values = self._get(name, list, "a list of records")
        for number, value in enumerate(values, start=1):
            if not isinstance(value, dict):
                raise self.error(
                    name, f"expected a list of records, got {_kind(value)} at {number}"
                )
        prefixes = [f"{self.prefix}{name}[{i}]." for i in range(len(values))]
        return [Row(self.where, self.index, v, p) for v, p in zip(values, prefixes, strict=True)]

    def rewrite(self) -> Edit:
        """The edit of a record in the form of CounterFact's ``requested_rewrite``."""
        new, true = (self.record(n).text("str").strip() for n in ("target_new", "target_true"))
        relation = self.text("relation_id") if self.has("relation_id") else None
        prompt, subject = self.text("prompt"), self.text("subject").strip()
        try:
            return Edit(prompt, subject, new, true, relation)
        except ValueError as error:
            raise self.error("prompt", str(error)) from None

    @property
    def case_id(self) -> str:
        """The record's own ``case_id``, else its index."""
        value = self.fields.get("case_id")
        if value is None:
            return str(self.index)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.error("case_id", f"expected a number or text, got {_kind(value)}")
        return str(value)

    def edit(self, name: str, target_new: str, **rest: str | None) -> Edit:
        """The edit whose prompt is field ``name``, which holds the subject.

        A few published records spell the subject in other letter case than their prompt does; the
        prompt's spelling is what the model reads, so it becomes the subject.
        """
        text, subject = self.text(name), self.text("subject").strip()
        if subject not in text:
            found = re.search(re.escape(subject), text, re.IGNORECASE)
            if found is None:
                raise self.error(name, f"the subject {subject!r} does not occur in {text!r}")
            subject = found.group()
        try:
            return Edit.from_text(text, subject, target_new, **rest)
        except ValueError as error:
            raise self.error(name, str(error)) from None


Share = Literal["even", "each_once", "same"]


class CaseLoader:
    """Batches of cases as lists, in an order that depends on seed and epoch alone.

    Lightning stores ``state_dict`` with a checkpoint and hands it back on resuming, so a run
    stopped in the middle of an epoch goes on with the batch it would have seen next. It is no
    ``DataLoader`` because there is nothing to collate, and so that Lightning puts no padding
    sampler around it.

    That holds for checkpoints written during an epoch. An epoch that max_steps or max_time cuts
    short counts as finished for Lightning: a checkpoint written after it leads to the next epoch.

    Args:
        cases: what to hand out.
        batch_size: cases per batch and process; the last batch may be shorter.
        shuffle: a new order in every epoch.
        seed: of the shuffling.
        share: what each of several processes gets. "even": cases in turn, all the same number, for
            training, where processes step together (up to one case per process sits out an epoch);
            "each_once": whole batches in turn, none left out or repeated, for evaluation; "same":
            everything, for edits that must be made alike everywhere.
        num_replicas, rank: processes among which cases are shared and the place of this one; by
            default all processes of torch.distributed, if it is running.
        processed: number of batches of this epoch whose step has finished, where the caller knows;
            a batch handed out but not finished when the checkpoint was written is then repeated.
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
        self.position = 0  # batches of this epoch handed out
        self._start = 0  # where the next pass begins; not 0 only after load_state_dict

    @property
    def sampler(self) -> CaseLoader:
        """Itself: Lightning announces an epoch by ``loader.sampler.set_epoch``."""
        return self

    @property
    def batch_sampler(self) -> CaseLoader:
        """Itself: Lightning takes whatever has a ``sampler`` to have this too."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def __len__(self) -> int:
        """Batches in an epoch, wherever in it this loader stands."""
        return len(self._batches(range(len(self.cases))))

    def __iter__(self) -> Iterator[list[EditCase]]:
        # Lightning takes the iterator before it announces the epoch, and takes some it never uses.
        # So nothing may happen before the first batch is asked for, as is true of a generator.
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
                "cannot go on in the middle of an epoch: the checkpoint was made with other cases, "
                "batch_size, seed or number of devices; set them as they were, or start anew"
            )

    def _order(self) -> list[EditCase]:
        order = list(self.cases)
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return order

    def _world(self) -> tuple[int, int]:
        """Number of processes that share the cases, and which of them this is."""
        if self._replicas is not None and self._rank is not None:
            return self._replicas, self._rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

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
        if items and too_few:  # on every process, or those with a batch would wait for the others
            raise DataError(
                f"{len(items)} cases in batches of {self.batch_size} are too few for {replicas} "
                "processes: lower --data.batch_size or use fewer devices"
            )
        return batches

    def _seen(self, position: int) -> str:
        """Hash of what all processes together have been handed by ``position``."""
        replicas = 1 if self.share == "same" else self._world()[0]
        ids = [case.case_id for case in self._order()[: position * self.batch_size * replicas]]
        text = json.dumps([self.batch_size, replicas, ids])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class EditDataModule(LightningDataModule):
    """Cases of one dataset as lists of records; knows no tokenizer and no model.

    Which cases a loader serves depends on the LightningModule's ``trains_on``. A learned editor
    ("train", the default) trains on the training cases and is validated, during fit, on held-out
    ones. A module that trains on the edits themselves ("edits": fine-tuning, editing streams) gets
    the evaluation cases in order. Outside fit everything is measured on the evaluation cases.

    Args:
        path: cases to edit and evaluate: .json, .jsonl, either with .gz, or a Hub dataset
            (owner/name:split).
        train_path: cases a learned editor is trained on; those about an evaluated subject are left
            out.
        batch_size: cases per batch.
        limit: evaluate only the first so many cases (counted after known_only).
        val_fraction: share of the training subjects held out to validate during fit.
        seed: of the held-out share. The order of training cases goes by the run's seed.
        known_only: evaluate only cases the model answers correctly before it is edited.
        val_limit: validate during fit on only the first so many held-out cases.
    """

    source: ClassVar[str] = ""
    """Where the public can get the dataset."""
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
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("limit", limit), ("val_limit", val_limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
        self.path = path
        self.train_path = train_path
        self.batch_size = batch_size
        self.limit = limit
        self.val_fraction = val_fraction
        self.seed = seed
        self.known_only = known_only
        self.val_limit = val_limit
        self._files: dict[str, list[EditCase]] = {}
        self._parts: dict[str, list[EditCase]] = {}
        self._evaluated: list[EditCase] | None = None
        self._known_ids: list[str] | None = None

    # Cases

    def parse(self, row: Row) -> EditCase | None:
        """The case of one record, or None to leave it out (see ``left_out``)."""
        raise NotImplementedError(f"{type(self).__name__} does not read files")

    def read(self, path: str) -> list[EditCase]:
        """All cases of a file or Hub dataset, in its order; read once."""
        if path not in self._files:
            self._files[path] = self._parse_all(path)
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
        """Cases to edit and evaluate: the test split after ``known_only`` and ``limit``."""
        if self._evaluated is None:
            cases = self.cases("test")
            if self.known_only:
                cases = self._known(cases)
                self._known_ids = [case.case_id for case in cases]
            self._evaluated = cases[: self.limit]
        return self._evaluated

    def edits(self) -> list[Edit]:
        """All edits of the evaluation cases."""
        return [edit for case in self.evaluation_cases() for edit in case.edits]

    # Loaders

    def train_dataloader(self) -> CaseLoader:
        if self._trains_on == "edits":
            return self._loader(self.evaluation_cases(), share="same")
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader(self.cases("train"), shuffle=not overfit, share="even")

    def val_dataloader(self) -> CaseLoader:
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and self._trains_on == "train":
            return self._loader(self.cases("val")[: self.val_limit])
        return self._loader(self.evaluation_cases())

    def test_dataloader(self) -> CaseLoader:
        return self._loader(self.evaluation_cases())

    def transfer_batch_to_device(
        self, batch: list[EditCase], device: torch.device, dataloader_idx: int
    ) -> list[EditCase]:
        """The batch as it is: text belongs to no device."""
        return batch

    # The known cases belong to the run: a checkpoint's weights may already answer differently.

    def state_dict(self) -> dict[str, Any]:
        if self._known_ids is None:
            return {}
        return {"path": self.path, "limit": self.limit, "known": self._known_ids}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (state_dict["path"], state_dict["limit"]) == (self.path, self.limit):
            self._known_ids = state_dict["known"]

    # Inside

    @property
    def _trains_on(self) -> str:
        return getattr(getattr(self.trainer, "lightning_module", None), "trains_on", "train")

    def _loader(
        self, cases: Sequence[EditCase], shuffle: bool = False, share: Share = "each_once"
    ) -> CaseLoader:
        # The Trainer knows better than torch.distributed which processes hold parts of one model.
        world = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        seed = torch.initial_seed()  # the run's, which all processes share
        return CaseLoader(
            cases, self.batch_size, shuffle, seed, share, processed=self._processed, **world
        )

    def _processed(self) -> int:
        assert self.trainer is not None
        """Training batches of this epoch whose step has finished."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.processed

    def _unset(self, what: str, argument: str) -> str:
        known = f" (public source: {self.source})" if self.source else ""
        return f"{type(self).__name__} has no {what}: give --data.{argument}{known}"

    def _parse_all(self, path: str) -> list[EditCase]:
        places: dict[str, str] = {}
        cases = []
        num_rows = 0
        for index, (where, fields) in enumerate(read_rows(path, self.source)):
            num_rows += 1
            case = self.parse(Row(where, index, fields))
            if case is None:
                continue
            if case.case_id in places:
                first = places[case.case_id]
                raise DataError(f"{where}, field 'case_id': {case.case_id!r} was used at {first}")
            places[case.case_id] = where
            cases.append(case)
        if not cases:
            raise DataError(f"{path}: no usable record among {num_rows}")
        if num_rows > len(cases):
            log.info("%s: left out %d: %s", path, num_rows - len(cases), self.left_out)
        asked = Counter(criterion for case in cases for criterion in case.probes)
        log.info("%s: %d cases; probes: %s", path, len(cases), dict(asked))
        return cases

    def _split_training_cases(self) -> dict[str, list[EditCase]]:
        if self.train_path is None:
            raise DataError(self._unset("training cases", "train_path"))
        every = self.read(self.train_path)
        cases = every
        if self.path is not None:
            cases = without_subjects(every, subjects(self.cases("test")))
            if removed := len(every) - len(cases):
                log.info("%s: left out %d: subject evaluated", self.train_path, removed)
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
        """Those the unedited model answers correctly, no more than ``limit``."""
        if self._known_ids is not None:
            ids = set(self._known_ids)
            return [case for case in cases if case.case_id in ids]
        known = getattr(getattr(self.trainer, "lightning_module", None), "known", None)
        if known is None:
            raise DataError(
                "--data.known_only asks the model which cases it knows: run it under a Trainer "
                "with a LightningModule that has known(cases), or leave it off"
            )
        kept: list[EditCase] = []
        for start in range(0, len(cases), ASKED_TOGETHER):
            if self.limit is not None and len(kept) >= self.limit:
                break
            chunk = cases[start : start + ASKED_TOGETHER]
            kept += [case for case, yes in zip(chunk, known(chunk), strict=True) if yes]
        if not kept:
            raise DataError(
                f"{type(self).__name__}: the model answers none of the {len(cases)} cases "
                "correctly, so --data.known_only leaves nothing to edit"
            )
        return kept[: self.limit]


def subjects(cases: Iterable[EditCase]) -> set[str]:
    """What the cases' edits are about, made comparable across spellings."""
    names = (edit.subject for case in cases for edit in case.edits)
    return {unicodedata.normalize("NFKC", name).casefold().strip() for name in names}


def without_subjects(cases: Iterable[EditCase], names: set[str]) -> list[EditCase]:
    """The cases that share no subject with ``names``."""
    return [case for case in cases if not subjects([case]) & names]


def sample_subjects(names: set[str], fraction: float, seed: int) -> set[str]:
    """A share of ``names`` in hash order; at least one unless ``fraction`` is 0."""
    if fraction == 0 or not names:
        return set()
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return set(ranked[: max(1, round(fraction * len(ranked)))])
