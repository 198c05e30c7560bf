"""Editing in context: edits are stored as text and put into the prompt; no weight changes.

An editor's edits on one model form one memory. Every ``edit`` adds to it and returns a handle. The newest active
handle answers with all edits up to its own, and removing a handle removes its edits from the memory.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor

from corrigenda.datamodules.records import Edit, Separator, joined
from corrigenda.modules.editing.editor import Editor
from corrigenda.modules.editing.saved_memory import FORMAT, SavedMemory
from corrigenda.modules.editing.text_patch import TextPatch, set_aside
from corrigenda.modules.files import write_tensors
from corrigenda.modules.interrupts import Reversible, uninterrupted
from corrigenda.modules.model.delta import EditError
from corrigenda.modules.model.handle import EditHandle
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.retrieval.retriever import Encoder, Retriever, find_encoder
from corrigenda.modules.retrieval.vectors import as_tensor


def sentence(edit: Edit, separator: Separator = "auto") -> str:
    """The new fact as a sentence, without a full stop."""
    return joined(edit.text, edit.target_new, separator)


def fit(
    lm: LanguageModel, demonstrations: Sequence[str], question: str, reserve: int
) -> tuple[str, int]:
    """(text, number left out): as many of the last demonstrations as fit into the context, then the question.

    Args:
        lm: the model whose tokenizer and context length count.
        demonstrations: texts to concatenate; the first are left out first.
        question: never cut.
        reserve: tokens to leave free for the answer.

    Raises:
        EditError: the question alone does not fit.
    """
    lm.tokens.require_readable([question])
    limit = lm.max_length

    def text(dropped: int) -> str:
        return "".join(demonstrations[dropped:]) + question

    def fits(dropped: int) -> bool:
        return limit is None or len(lm.tokens.encode_prompts([text(dropped)])[0]) + reserve <= limit

    dropped = 0 if fits(0) else bisect_left(range(len(demonstrations) + 1), True, key=fits)
    if dropped > len(demonstrations):
        raise EditError(
            f"the prompt {question[-60:]!r} and its answer are longer than the context of {lm.name!r}, "
            f"{limit} tokens: shorten the prompt or choose a model with a longer context"
        )
    return text(dropped), dropped


class EditMemory:
    """Edits in the order they were made, looked up by the similarity of their keys.

    Keys are encoded at the first look-up. If a prompt was edited several times the newest edit counts, whichever
    of them is nearest; prompts that differ only in case and spaces are the same.

    Args:
        find: returns the encoder; called at the first look-up.
    """

    def __init__(self, find: Callable[[], Encoder]) -> None:
        self._find = find
        self.retriever: Retriever | None = None
        self.edits: list[Edit] = []
        self.keys: list[str] = []
        self._places: dict[str, list[int]] = {}  # indices of each prompt's edits, oldest first
        self.most_entries = self.most_bytes = 0  # the largest so far

    def __len__(self) -> int:
        return len(self.edits)

    def add(
        self, edits: Sequence[Edit], keys: Sequence[str], known: Mapping[str, Tensor] | None = None
    ) -> None:
        """Adds edits with their keys, and the tensors of those keys if they are already known."""
        if known is not None:
            retriever = self.encode()
            retriever.add(keys, known)
            self.most_bytes = max(self.most_bytes, retriever.nbytes)
        for place, edit in enumerate(edits, start=len(self)):
            self._places.setdefault(_same(edit), []).append(place)
        self.edits += edits
        self.keys += keys
        self.most_entries = max(self.most_entries, len(self))

    def drop(self, count: int) -> None:
        """Removes the newest ``count`` edits."""
        end = len(self) - count
        if self.retriever is not None:
            self.retriever.remove(range(end, len(self.retriever)))
        for edit in reversed(self.edits[end:]):
            self._places[_same(edit)].pop()
        del self.edits[end:], self.keys[end:]

    def newest(self, end: int) -> dict[str, Edit]:
        """The newest edit of each prompt, among the first ``end``."""
        return {edit.text: edit for edit in self.edits[:end]}

    def current(self, place: int, end: int) -> Edit:
        """The newest edit of the prompt of edit ``place``, among the first ``end``."""
        places = self._places[_same(self.edits[place])]
        return self.edits[places[bisect_left(places, end) - 1]]

    def encode(self) -> Retriever:
        """The retriever, with the keys of all edits."""
        if (
            self.retriever is None
        ):  # not "if not": an empty one is falsy but has counted its look-ups
            self.retriever = Retriever(self._find())
        retriever = self.retriever
        retriever.add(self.keys[len(retriever) :])
        self.most_bytes = max(self.most_bytes, retriever.nbytes)
        return retriever

    def search(self, queries: Sequence[str], k: int, end: int) -> tuple[Tensor, Tensor]:
        """(cosine_BK, place_BK) of the nearest keys among the first ``end``, nearest first."""
        return self.encode().search(queries, k, among=end)

    def nearest(self, queries: Sequence[str], end: int) -> list[tuple[Edit, float]]:
        """For each query the edit with the nearest key among the first ``end``, and the cosine."""
        scores_BK, index_BK = self.search(queries, 1, end)
        found = [self.current(place, end) for place in index_BK[:, 0].tolist()]
        return list(zip(found, scores_BK[:, 0].tolist(), strict=True))


def _same(edit: Edit) -> str:
    """Equal for edits of the same prompt."""
    return " ".join(edit.text.casefold().split())


class MemoryPatch(TextPatch):
    """Edits in an editor's memory, active together with the older ones there.

    Attributes:
        edits: those of this handle.
        end: number of edits of the memory that this handle uses: the older ones and its own.
    """

    def __init__(
        self,
        editor: MemoryEditor,
        lm: LanguageModel,
        edits: Sequence[Edit],
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not edits:
            raise EditError(f"{type(editor).__name__} was given no edit to remember")
        self.editor, self.edits, self.memory = editor, list(edits), editor.memory(lm)
        keys = [editor.key(edit) for edit in edits]
        if known is not None:
            self.memory.encode()  # the older keys, before signals are held back: it takes a while
        with uninterrupted():
            self.memory.add(edits, keys, known)
            self.end = len(self.memory)
            super().__init__(lm)

    def nearest(self, queries: Sequence[str]) -> list[tuple[Edit, float]]:
        """For each query the edit whose key is nearest, and the cosine."""
        return self.memory.nearest(queries, self.end)

    def shown(self, demonstrations: Sequence[str], question: str, reserve: int) -> str:
        """The question after the demonstrations that fit; counts those that are left out."""
        text, left_out = fit(self.lm, demonstrations, question, reserve)
        self.editor.counts["demonstrations_left_out"] += left_out
        return text

    @property
    def num_bytes(self) -> int:
        """Size of its facts as text and, after the first look-up, of the vectors of their keys."""
        words = sum(len(sentence(edit).encode()) for edit in self.edits)
        retriever = self.memory.retriever
        vectors = retriever.nbytes / len(retriever) if retriever else 0
        return words + round(vectors * len(self.edits))

    def set_aside(self) -> Reversible:
        """Inside, the model answers as if this memory were empty."""
        patches = [handle for handle in self.lm.handles if isinstance(handle, MemoryPatch)]
        return set_aside([patch for patch in patches if patch.memory is self.memory])

    def target_lengths(self, targets: Sequence[str]) -> list[int]:
        """The number of tokens of each target."""
        texts = [self.lm.tokens.join("", target) for target in targets]
        return [len(row) for row in self.lm.tokens.encode(texts)]

    def remove(self) -> None:
        with uninterrupted():
            super().remove()
            self.memory.drop(len(self.edits))

    def can_absorb(self, newer: EditHandle) -> bool:
        last = self.lm.handles[-2:] == [self, newer]
        return last and isinstance(newer, MemoryPatch) and newer.memory is self.memory

    def absorb(self, newer: MemoryPatch) -> None:
        """Merges a newer patch of the same memory into this one."""
        if not self.can_absorb(newer):
            raise EditError("only the newest edit can be absorbed, by the one before it")
        with uninterrupted():
            self.edits += newer.edits
            self.end = newer.end
            self.lm.handles.pop()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for :meth:`MemoryEditor.recall`.

        It includes the vectors: encoded again, in another batch, they would differ in the last bits.
        """
        state: dict[str, Any] = {"edits": [asdict(edit) for edit in self.edits]}
        retriever = self.memory.retriever
        if retriever is not None and len(retriever) >= self.end:
            known = retriever.tensors(self.end - len(self.edits), self.end)
            state["known"] = {name: tensor.clone() for name, tensor in known.items()}
        return state

    def save(self, path: Path) -> None:
        """Writes the edits of this handle and, if they were computed, the vectors of their keys."""
        state, header = self.state(), self.editor.origin(self.lm, ())
        known = state.get("known", {})
        if known:
            header |= {"encoder": self.memory.encode().encoder.hash}
        write_tensors(
            path,
            {"edits": as_tensor(state["edits"]), **known},
            {"format": FORMAT, "memory": json.dumps(header)},
        )


class MemoryEditor(Editor):
    """An editor that keeps its edits in a memory and changes no weight.

    Args:
        encoder: encodes the keys by which edits are found: ``minilm``, another sentence encoder's hub id or
            folder, or ``lm`` for the language model's own hidden states.
    """

    patch: ClassVar[type[MemoryPatch]]

    def __init__(self, encoder: str | Encoder = "minilm") -> None:
        self._encoder = encoder
        self._encoders: WeakKeyDictionary[LanguageModel, Encoder] = WeakKeyDictionary()
        self._memories: WeakKeyDictionary[LanguageModel, EditMemory] = WeakKeyDictionary()

    @abstractmethod
    def key(self, edit: Edit) -> str:
        """The text by which an edit is found."""

    def encoder(self, lm: LanguageModel) -> Encoder:
        """The encoder for edits of this model, loaded once."""
        if lm not in self._encoders:
            self._encoders[lm] = find_encoder(self._encoder, lm)
        return self._encoders[lm]

    def memory(self, lm: LanguageModel) -> EditMemory:
        """The memory that this editor's handles on the model share."""
        if lm not in self._memories:
            self._memories[lm] = EditMemory(partial(self.encoder, lm))
        return self._memories[lm]

    def prepare(self, lm: LanguageModel) -> None:
        self.encoder(lm)

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> MemoryPatch:
        self.check_edits(edits)
        lm.tokens.require_readable([sentence(edit) for edit in edits])
        self.prepare(lm)
        return self.patch(self, lm, edits)

    def restore(self, lm: LanguageModel, path: str | Path) -> MemoryPatch:
        """Activates edits that :meth:`MemoryPatch.save` wrote; another encoder's vectors are computed again."""
        self.prepare(lm)
        saved = SavedMemory.load(path)
        fits = saved.metadata.get("encoder") == self.encoder(lm).hash
        return self.patch(self, lm, saved.edits, saved.known if fits else None)

    def recall(self, lm: LanguageModel, state: Mapping[str, Any]) -> MemoryPatch:
        """Activates edits from a checkpoint, as :meth:`MemoryPatch.state` described them."""
        self.prepare(lm)
        edits = [Edit(**fields) for fields in state["edits"]]
        return self.patch(self, lm, edits, state.get("known"))

    def numbers(self) -> dict[str, float]:
        """Counters, the largest size of the memory, and the mean time of a look-up with its encoding."""
        memories = list(self._memories.values())
        seconds = [m.retriever.seconds for m in memories if m.retriever is not None]
        return {
            **super().numbers(),
            "memory_entries": max((memory.most_entries for memory in memories), default=0),
            "memory_bytes": max((memory.most_bytes for memory in memories), default=0),
            "lookup_milliseconds": 1000 * max(seconds, default=0.0),
        }
