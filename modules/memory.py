"""Edits that are remembered, not written: what editing in the context has in common.

An editor's edits on one model form one memory. Every ``edit`` adds to it and returns a handle; the newest
handle in force answers with all that came before it, and taking it out takes its own edits out again.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from datamodules.records import Edit
from modules.editing import EditError, Editor, TextPatch
from modules.lm import LanguageModel
from modules.retrieval import Encoder, Retriever, find_encoder


def sentence(edit: Edit) -> str:
    """The new fact in words, without a full stop."""
    return f"{edit.text} {edit.target_new}"


def fit(
    lm: LanguageModel, demonstrations: Sequence[str], question: str, reserve: int
) -> tuple[str, int]:
    """As many of the last demonstrations as the model's context holds, then the question; how many were left out.

    Args:
        lm: whose context and tokens count.
        demonstrations: texts put directly before one another; the first are left out first.
        question: never cut.
        reserve: tokens to leave free for the answer.

    Raises:
        EditError: the question alone does not fit.
    """
    limit = lm.max_length

    def text(dropped: int) -> str:
        return "".join(demonstrations[dropped:]) + question

    def fits(dropped: int) -> bool:
        return limit is None or len(lm.encode([text(dropped)])[0]) + reserve <= limit

    dropped = 0 if fits(0) else bisect_left(range(len(demonstrations) + 1), True, key=fits)
    if dropped > len(demonstrations):
        raise EditError(
            f"the prompt {question[-60:]!r} and its answer are longer than the {limit} tokens that "
            f"{lm.name!r} reads at once: shorten the prompt or choose a model with a longer context"
        )
    return text(dropped), dropped


class EditMemory:
    """Edits in the order they were made, found by the likeness of their keys.

    Keys are encoded when something is first looked up. Where one prompt was edited several times the newest
    edit counts, whichever of them is nearest.

    Args:
        find: gives the encoder; called when something is first looked up.
    """

    def __init__(self, find: Callable[[], Encoder]) -> None:
        self._find = find
        self.retriever: Retriever | None = None
        self.edits: list[Edit] = []
        self.keys: list[str] = []
        self.largest = 0  # bytes of the retriever, at most so far

    def __len__(self) -> int:
        return len(self.edits)

    def add(self, edits: Sequence[Edit], keys: Sequence[str]) -> None:
        """Further edits, with what each is found by."""
        self.edits += edits
        self.keys += keys

    def drop(self, count: int) -> None:
        """Forgets the newest ``count`` edits."""
        end = len(self) - count
        if self.retriever is not None:
            self.retriever.remove(range(end, len(self.retriever)))
        del self.edits[end:], self.keys[end:]

    def newest(self, end: int) -> dict[str, Edit]:
        """The edit that counts for each prompt, among the first ``end``."""
        return {edit.text: edit for edit in self.edits[:end]}

    def nearest(self, queries: Sequence[str], end: int) -> list[tuple[Edit, float]]:
        """For each query the edit with the nearest key among the first ``end``, and the cosine."""
        self.retriever = retriever = self.retriever or Retriever(self._find())
        retriever.add(self.keys[len(retriever) :])
        self.largest = max(self.largest, retriever.nbytes)
        scores_BK, index_BK = retriever.search(queries, 1, among=end)
        newest = self.newest(end)
        found = [newest[self.edits[i].text] for i in index_BK[:, 0].tolist()]
        return list(zip(found, scores_BK[:, 0].tolist(), strict=True))


class MemoryPatch(TextPatch):
    """Some edits in an editor's memory, in force together with the older ones there.

    Attributes:
        edits: those of this handle.
        end: how many of the memory's edits this handle answers with.
    """

    def __init__(self, editor: MemoryEditor, lm: LanguageModel, edits: Sequence[Edit]) -> None:
        if not edits:
            raise EditError(f"{type(editor).__name__} was given no edit to remember")
        super().__init__(lm)
        self.editor, self.edits, self.memory = editor, list(edits), editor.memory(lm)
        self.memory.add(edits, [editor.key(edit) for edit in edits])
        self.end = len(self.memory)

    def nearest(self, queries: Sequence[str]) -> list[tuple[Edit, float]]:
        """For each query the edit whose key is nearest, and the cosine."""
        return self.memory.nearest(queries, self.end)

    @property
    def num_bytes(self) -> int:
        """Its facts in words, and the vectors that they are found by once something was looked up."""
        words = sum(len(sentence(edit).encode()) for edit in self.edits)
        found_by = self.memory.retriever
        vectors = found_by.nbytes / len(found_by) if found_by else 0
        return words + round(vectors * len(self.edits))

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, the model answers as if nothing of this memory were there."""
        with ExitStack() as stack:
            for handle in self.lm.handles:
                if isinstance(handle, MemoryPatch) and handle.memory is self.memory:
                    stack.enter_context(TextPatch.set_aside(handle))
            yield

    def remove(self) -> None:
        super().remove()
        self.memory.drop(len(self.edits))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: the editor remembers the same edits again."""
        return self.record()

    def record(self) -> dict[str, Any]:
        """The edits of this handle alone."""
        return {
            "editor": type(self.editor).__name__,
            "model": self.lm.name,
            "edits": [asdict(edit) for edit in self.edits],
        }


class MemoryEditor(Editor):
    """An editor that keeps its edits in a memory and changes no weight.

    Args:
        encoder: finds edits by likeness: ``minilm``, another sentence encoder's hub id or folder, or ``lm``
            for the language model's own hidden states.
    """

    patch: ClassVar[type[MemoryPatch]]

    def __init__(self, encoder: str | Encoder = "minilm") -> None:
        self._encoder = encoder
        self._encoders: WeakKeyDictionary[LanguageModel, Encoder] = WeakKeyDictionary()
        self._memories: WeakKeyDictionary[LanguageModel, EditMemory] = WeakKeyDictionary()
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def key(self, edit: Edit) -> str:
        """What an edit is found by."""

    def encoder(self, lm: LanguageModel) -> Encoder:
        """The encoder for edits of this model, loaded once."""
        if lm not in self._encoders:
            self._encoders[lm] = find_encoder(self._encoder, lm)
        return self._encoders[lm]

    def memory(self, lm: LanguageModel) -> EditMemory:
        """What this editor's handles on the model share."""
        if lm not in self._memories:
            self._memories[lm] = EditMemory(partial(self.encoder, lm))
        return self._memories[lm]

    def prepare(self, lm: LanguageModel) -> None:
        self.encoder(lm)

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> MemoryPatch:
        self.prepare(lm)
        return self.patch(self, lm, edits)

    def numbers(self) -> dict[str, float]:
        """What was counted, the memory's size and the time of one look-up."""
        used = [m for m in self._memories.values() if m.retriever is not None]
        return {
            **self.counts,
            "memory_bytes": max((memory.largest for memory in used), default=0),
            "seconds_per_lookup": max(
                (m.retriever.seconds for m in used if m.retriever), default=0.0
            ),
        }
