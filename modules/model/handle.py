"""The contract between a language model and the edits that are active on it.

A handle says for itself what it changes, from which block on, whether rows must run whole, and whether it
scores and generates in the model's place. Model code imports this file and no concrete kind of edit; those
are in ``modules/editing``.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from corrigenda.modules import files
from corrigenda.modules.interrupts import uninterrupted
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.rows import TargetScores


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts, and updates that apply besides the active edits.

    Attributes:
        prompts: B texts.
        deltas: further updates, side by side; row b uses ``deltas[owners[b]]``. A single one is for all rows.
        owners: for each row the index of its delta.
    """

    prompts: Sequence[str]
    deltas: Sequence[Delta] | None = None
    owners: Sequence[int] | None = None

    @property
    def owner_B(self) -> Tensor:
        """The delta of each row; raises ValueError if there are several deltas and no owners."""
        if self.owners is None and self.deltas and len(self.deltas) > 1:
            raise ValueError("several deltas need owners, the delta of each row")
        return torch.tensor(self.owners if self.owners is not None else [0] * len(self.prompts))

    def select(self, rows: Sequence[int]) -> Self:
        """The request for some of the prompts."""
        owners = None if self.owners is None else [self.owners[row] for row in rows]
        return replace(self, prompts=[self.prompts[row] for row in rows], owners=owners)


@dataclass(frozen=True, kw_only=True)
class ScoreRequest(Request):
    """What to score.

    Attributes:
        targets: B continuations.
        full: also return log-probabilities of the whole vocabulary.
    """

    targets: Sequence[str]
    full: bool = False

    def select(self, rows: Sequence[int]) -> Self:
        return replace(super().select(rows), targets=[self.targets[row] for row in rows])


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(Request):
    """What to continue, and how.

    Attributes:
        max_new_tokens: most tokens of a continuation.
        top_k: sample from this many of the most likely tokens; None decodes greedily.
        batch_size: prompts that run together.
        stop: a continuation ends before the first of these texts.
        num_beams: width of a beam search; 1 is greedy.
        on_text: is called with the new text of a single prompt while its continuation grows.
    """

    max_new_tokens: int
    top_k: int | None = None
    batch_size: int = 32
    stop: Sequence[str] = ()
    num_beams: int = 1
    on_text: Callable[[str], None] | None = None


@dataclass
class PromptBatch:
    """The running batch: which of its tokens are prompt, and what adapters decided from them.

    Teacher-forced targets are not part of a prompt, and a decision holds for every token that is
    generated after the prompt.

    Attributes:
        prompt_BT: True on prompt tokens, in the columns of the batch's first pass. Later passes
            hold only generated tokens (with a cache) or all tokens again (without one).
        decided: each adapter's decision, made in the first pass.
    """

    prompt_BT: Tensor
    decided: dict[nn.Module, Any] = field(default_factory=dict)

    @property
    def last_B(self) -> Tensor:
        """Column of each row's last prompt token."""
        column_T = torch.arange(self.prompt_BT.shape[1], device=self.prompt_BT.device)
        return (self.prompt_BT * column_T).argmax(1)


class Answering(Protocol):
    """An active edit that scores and generates in the model's place."""

    def set_aside(self) -> AbstractContextManager:
        """Inside, the model behaves as if this edit were not there."""

    def score(self, request: ScoreRequest) -> TargetScores: ...

    def generate(self, request: GenerationRequest) -> list[str]: ...


class Editable(Protocol):
    """What a handle needs from the language model: the list of active edits, oldest first."""

    @property
    def handles(self) -> list[EditHandle]: ...


class EditHandle(ABC):
    """An active edit on a language model. Edits are removed in reverse order."""

    lowest_layer: int = 0  # nothing below this block is changed
    changes_network: ClassVar[bool] = True  # if False, only prompts or outputs
    needs_whole_rows: ClassVar[bool] = False  # decides by prompt: rows are neither cut nor merged

    def __init__(self, lm: Editable) -> None:
        """Activates the edit. A subclass calls this last, when :meth:`swap` has all it needs."""
        self._active_on = lm.handles
        with uninterrupted():
            self.swap()
            self._active_on.append(self)

    @property
    def answering(self) -> Answering | None:
        """The edit itself, if it scores and generates in the model's place right now."""
        return None

    @property
    def num_parameters(self) -> int:
        """Number of parameters that the edit changes in the network or adds to it."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Memory that the edit takes while it is active."""
        return 0

    @abstractmethod
    def swap(self) -> None:
        """Exchanges edited and original state; doing it twice is a no-op."""

    def save(self, path: Path) -> None:  # noqa: B027  optional
        """Writes the edit into one safetensors file; by default writes nothing."""

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values from which a resumed run restores the edit; empty if it cannot."""
        return {}

    def digest(self) -> str:
        """Hash of what the edit is; processes that have made the same edit agree on it."""
        parts = self.state()
        tensors = {
            f"{part} {name}": tensor.cpu()
            for part, value in parts.items()
            if isinstance(value, dict)
            for name, tensor in value.items()
        }
        others = {part: value for part, value in parts.items() if not isinstance(value, dict)}
        text = json.dumps(others, sort_keys=True) + files.digest(tensors)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def can_absorb(self, newer: EditHandle) -> bool:
        """Whether :meth:`absorb` accepts this newer edit."""
        return False

    def absorb(self, newer: Self) -> None:
        """Merges the newest edit into this one, so that one removal undoes both."""
        raise EditError(f"{type(self).__name__} holds one edit")

    def remove(self) -> None:
        """Removes the edit, bit-exactly; raises EditError while later edits depend on it."""
        if self not in self._active_on:
            raise EditError("this edit has already been removed")
        later = len(self._active_on) - 1 - self._active_on.index(self)
        if later:
            raise EditError(
                f"{later} later edit(s) depend on this one: remove them first, newest first"
            )
        with uninterrupted():
            self.swap()
            self._active_on.pop()
