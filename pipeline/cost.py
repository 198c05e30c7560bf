"""What edits and queries cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What edits and queries have cost; costs of parts of a run add up.

    Attributes:
        made: edits made.
        seconds: time that took, preparation left out.
        touched: most parameters that one edit touches or adds.
        bytes: size of all edits made.
        queries: questions whose time was measured.
        query_seconds: their time on the edited model.
        base_query_seconds: their time on the unedited model.
        prepare_seconds: time for statistics and the like.
        peak_gib: largest memory.
        counts: what the method counts of itself.
    """

    made: int = 0
    seconds: float = 0.0
    touched: int = 0
    bytes: int = 0
    queries: int = 0
    query_seconds: float = 0.0
    base_query_seconds: float = 0.0
    prepare_seconds: float = 0.0
    peak_gib: float = 0.0
    counts: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.made + other.made,
            self.seconds + other.seconds,
            max(self.touched, other.touched),
            self.bytes + other.bytes,
            self.queries + other.queries,
            self.query_seconds + other.query_seconds,
            self.base_query_seconds + other.base_query_seconds,
            self.prepare_seconds + other.prepare_seconds,
            max(self.peak_gib, other.peak_gib),
            Counter(self.counts) + Counter(other.counts),
        )

    def state(self) -> dict[str, Any]:
        """For checkpoints and ``progress.json``; :meth:`from_state` reads it."""
        parts = asdict(self)
        seconds = parts.pop("query_seconds"), parts.pop("base_query_seconds")
        return parts | {"queries": [self.queries, *seconds], "counts": dict(self.counts)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Cost:
        """Also of checkpoints of version 0.1, which know fewer parts."""
        names = ("made", "seconds", "touched", "bytes", "prepare_seconds", "peak_gib", "counts")
        return cls(
            **{name: state[name] for name in names if name in state},
            queries=state["queries"][0],
            query_seconds=state["queries"][1],
            base_query_seconds=state["queries"][2],
        )

    def row(self) -> dict[str, float | None]:
        """For ``summary.json``: per edit and per query; None where there are none."""
        made, queries = self.made, self.queries
        return {
            "num_edits": made or None,
            "seconds_per_edit": self.seconds / made if made else None,
            "prepare_seconds": self.prepare_seconds or None,
            "peak_gib": self.peak_gib,
            "parameters_touched": self.touched or None,
            "bytes_per_edit": self.bytes / made if made else None,
            "seconds_per_query": self.query_seconds / queries if queries else None,
            "query_overhead": self.query_seconds / self.base_query_seconds if queries else None,
        }
