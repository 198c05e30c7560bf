"""Which rows a profile takes: lists of ids that come with the project, and how they were made.

The lists hold hashes, so that they tell nothing of the rows, and a row is found whatever its place in a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "configs" / "tasks" / "ids"
FAST = 200  # questions at most


@dataclass(frozen=True)
class Listed:
    """The rows of a data set that all profiles but ``full`` take.

    Attributes:
        ids: :func:`row_id` of each, in the order in which they are taken.
        id: the field that names a row; the whole row if there is none.
        classes: the field by whose values the rows are balanced.
        questions: how many questions a row is.
    """

    ids: list[str] = field(default_factory=list)
    id: str | None = None
    classes: str | None = None
    questions: int = 1

    def places(self, rows: Any, questions: int) -> list[int]:  # noqa: ANN401  a Dataset
        """Indices, in their order in ``rows``, of the rows for so many questions.

        Rows on the list that the data lacks, or all without a list, are replaced by others, chosen by hash.
        """
        names = (
            rows[self.id] if self.id else [json.dumps(r, sort_keys=True, default=str) for r in rows]
        )
        place = {row_id(name): index for index, name in enumerate(names)}
        known = [row for row in self.ids if row in place]
        others = chosen(list(place.keys() - set(known)), [0] * (len(place) - len(known)))
        known += others[: (len(self.ids) or FAST) - len(known)]
        return sorted(place[row] for row in known[: questions // self.questions])


def listed(name: str, split: str) -> Listed:
    """The list for a task and the split that is evaluated; an empty one for tasks that are not ours."""
    file = FOLDER / f"{name}-{split}.yaml"
    return Listed(**yaml.safe_load(file.read_text("utf-8"))) if file.is_file() else Listed()


def row_id(value: object) -> str:
    """The id of the row with this value in the field that names rows."""
    return hashlib.sha256(str(value).encode()).hexdigest()[:10]


def chosen(ids: Sequence[str], classes: Sequence[object]) -> list[str]:
    """At most FAST ids in their order, from each class in turn until one is used up."""
    by_class: dict[object, list[str]] = {}
    for row, kind in sorted(zip(ids, classes, strict=True), key=lambda pair: pair[0]):
        by_class.setdefault(kind, []).append(row)
    groups = [by_class[kind] for kind in sorted(by_class, key=str)]
    return [row for turn in zip(*groups, strict=False) for row in turn][:FAST]
