"""Editing methods: :class:`Editor` and :class:`WeightEditor`.

An active edit is one of three kinds of handle: :class:`WeightPatch` changes parameters, :class:`ModulePatch` the
outputs of modules (through an adapter), and :class:`TextPatch` prompts and answers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.handle import EditHandle
from corrigenda.modules.model.lm import LanguageModel

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Editor(ABC):
    """An editing method. ``edit`` makes all the given edits together and returns the handle that removes them."""

    def check(self, lm: LanguageModel) -> None:
        """Raises ValueError if ``layer`` or ``layers`` name a block that the model does not have."""
        own = getattr(self, "layer", None)
        for layer in [*(getattr(self, "layers", None) or ()), *([] if own is None else [own])]:
            lm.structure.block_name(layer)

    def check_edits(self, edits: Sequence[Edit]) -> None:
        """Raises EditError if there are none; warns once if some contradict each other."""
        self._require_edits([edits])
        targets: dict[str, str] = {}
        against = [
            (edit.text, other, edit.target_new)
            for edit in edits
            if (other := targets.setdefault(edit.text, edit.target_new)) != edit.target_new
        ]
        if against:
            log.warning("%r is to be both %r and %r (%d such prompts): edited together, at most one can hold",
                        *against[0], len({text for text, *_ in against}))  # fmt: skip

    def _require_edits(self, groups: Sequence[Sequence[Edit]]) -> None:
        if min(map(len, groups), default=0) == 0:
            raise EditError(f"{type(self).__name__} was given no edit: give at least one")

    def prepare(self, lm: LanguageModel) -> None:  # noqa: B027  optional
        """Computes what the first edit needs (statistics, prompts), once per model; idempotent."""

    @abstractmethod
    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> EditHandle:
        """Makes and activates the edits."""

    @cached_property
    def counts(self) -> Counter[str]:
        """The method's own counters; a resumed run adds to those of the interrupted one."""
        return Counter()

    def numbers(self) -> dict[str, float]:
        """The method's own counters and figures, for the run's summary."""
        return dict(self.counts)

    def origin(self, lm: LanguageModel, edits: Sequence[Edit]) -> dict[str, Any]:
        """Where an edit comes from, for its metadata: base weights, editor, edits."""
        return {
            "base": lm.weights_hash,
            "model": lm.name,
            "editor": type(self).__name__,
            "edits": [[e.prompt, e.subject, e.target_new] for e in edits],
            **lm.chat_note,
        }


def _with_edits(
    propose: Callable[[Any, LanguageModel, T], R], groups: Callable[[T], Sequence[Sequence[Edit]]]
) -> Callable[[Any, LanguageModel, T], R]:
    """The method ``propose``, which first raises EditError if a group of edits is empty."""

    @wraps(propose)
    def checked(self: Editor, lm: LanguageModel, edits: T) -> R:
        self._require_edits(groups(edits))
        return propose(self, lm, edits)

    return checked


class WeightEditor(Editor):
    """A method that updates weights: ``propose`` computes the update, ``edit`` writes it.

    Whatever a method's ``propose`` and ``propose_each`` do, they raise EditError where there is no edit.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**kwargs)
        for name, groups in (("propose", lambda edits: [edits]), ("propose_each", list)):
            if name in cls.__dict__:
                setattr(cls, name, _with_edits(cls.__dict__[name], groups))

    @abstractmethod
    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        """One update for all these edits; the model is unchanged afterwards."""

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        """One update per group of edits, each computed as if the others did not exist.

        Methods that can compute them side by side, with equal results, override this.
        """
        self._require_edits(edits)
        return [self.propose(lm, group) for group in edits]

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> WeightPatch:
        self.check(lm)
        self.check_edits(edits)
        with editing_mode():
            self.prepare(lm)
            return WeightPatch(lm, self.stamp(lm, self.propose(lm, edits), edits))

    def stamp(self, lm: LanguageModel, delta: Delta, edits: Sequence[Edit]) -> Delta:
        """The delta with :meth:`origin` in its metadata; warns if it is not finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in delta.tensors().values()):
            log.warning("%s: the update for %r is not finite: the edited model's answers will be NaN",
                        type(self).__name__, "; ".join(edit.text for edit in edits[:3]))  # fmt: skip
        return replace(delta.detach(), metadata=delta.metadata | self.origin(lm, edits))


@contextmanager
def editing_mode() -> Iterator[None]:
    """Inside, gradients are on and autocast is off, also within a validation loop: every method needs that."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        if torch.cuda.is_available():
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield
