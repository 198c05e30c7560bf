"""The cost of edits and queries."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from corrigenda.datamodules.records import Edit
from corrigenda.modules.model.lm import LanguageModel

QUERIES_TIMED = 8  # of the edits made together


@dataclass(frozen=True)
class Cost:
    """The cost of edits and queries. Costs of parts of a run can be added.

    Attributes:
        made: number of edits made.
        seconds: time that editing or training took, without preparation and evaluation.
        gradient_steps: forward and backward passes in that time, whatever their number of rows.
        tokens: tokens that the network was run on in that time, padding included.
        touched: number of parameters changed or added by the largest edit.
        bytes: total size of all edits.
        queries: number of queries that were timed.
        query_seconds: their time on the edited model.
        base_query_seconds: their time on the unedited model.
        prepare_seconds: time to compute statistics before the first edit.
        peak_gib: peak memory in GiB.
        counts: counters of the method.
    """

    made: int = 0
    seconds: float = 0.0
    gradient_steps: int = 0
    tokens: int = 0
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
            self.gradient_steps + other.gradient_steps,
            self.tokens + other.tokens,
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
        """Also reads checkpoints of version 0.1, which have fewer fields."""
        names = ("made", "seconds", "gradient_steps", "tokens", "touched", "bytes", "prepare_seconds", "peak_gib",
                 "counts")  # fmt: skip
        return cls(
            **{name: state[name] for name in names if name in state},
            queries=state["queries"][0],
            query_seconds=state["queries"][1],
            base_query_seconds=state["queries"][2],
        )

    def row(self) -> dict[str, float | None]:
        """For ``summary.json``: values per edit and per query; None if there are none."""
        made, queries = self.made, self.queries
        return {
            "num_edits": made or None,
            "seconds": self.seconds or None,
            "gradient_steps": self.gradient_steps or None,
            "tokens": self.tokens or None,
            "seconds_per_edit": self.seconds / made if made else None,
            "prepare_seconds": self.prepare_seconds or None,
            "peak_gib": self.peak_gib,
            "parameters_touched": self.touched or None,
            "bytes_per_edit": self.bytes / made if made else None,
            "seconds_per_query": self.query_seconds / queries if queries else None,
            "query_overhead": self.query_seconds / self.base_query_seconds if queries else None,
        }


class Stopwatch:
    """Time and work of a model from now until :meth:`stop`, or the end of a ``with`` block.

    Work is counted at the output of the last block, which every pass to the logits runs: the tokens in it, and
    whether gradients flow through it.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._tokens = self._gradient_steps = 0
        last = lm.net.get_submodule(lm.structure.block_name(lm.structure.num_layers - 1))
        self._hook = last.register_forward_hook(self._count)
        self._start = _now()
        self._seconds: float | None = None

    def _count(self, block: nn.Module, args: tuple, output: Any) -> None:  # noqa: ANN401
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        self._tokens += hidden.numel() // hidden.shape[-1]
        self._gradient_steps += hidden.requires_grad

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Cost:
        """What has been spent until now; a further call returns the same."""
        if self._seconds is None:
            self._hook.remove()
            self._seconds = _now() - self._start
        return Cost(0, self._seconds, self._gradient_steps, self._tokens)


def query_cost(lm: LanguageModel, edits: Sequence[Edit]) -> Cost:
    """The time to score a few of the edits that have just been made, with and without edits."""
    some = edits[:QUERIES_TIMED]
    prompts, targets = [edit.text for edit in some], [edit.target_new for edit in some]
    start = _now()
    lm.score(prompts, targets)
    middle = _now()
    with lm.pristine():
        lm.score(prompts, targets)
    return Cost(queries=len(some), query_seconds=middle - start, base_query_seconds=_now() - middle)


def _now() -> float:
    """Seconds, with what an accelerator still has to do finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    """Largest memory so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
