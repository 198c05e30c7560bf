"""IKE: in-context knowledge editing (Zheng et al., 2023, arXiv 2305.12740).

The new fact is stated in the prompt, after demonstrations of how new facts are used:

    New Fact: <fact>      New Fact: <fact>                  New Fact: <fact>
    Prompt: <the same>    Prompt: <the same, reworded>      Prompt: <about something else>
    (copy)                (update: the new answer)          (retain: the old answer stays)

in the ratio 1 : 3 : 4. They are made from the records of a pool whose facts are most similar to the new one, the
most similar last, followed by a copy demonstration of the new fact itself. No weight changes.

The authors know which fact a question is about. With one active edit that is so here, too; with several the fact
most similar to the question is looked up, and there is always one, even for questions about something else.

Departures from the authors' code: records of the pool about the edited subject are left out; a record that cannot
serve in each of the three roles is not used; the order of the roles is drawn for every edit, so that it does not
depend on earlier edits; if the context is too short the least similar demonstrations are left out. Efficacy says
little, since the answer is in the context: look at generality and locality.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

from corrigenda.datamodules.records import Edit, EditCase, Probe, Separator, joined
from corrigenda.modules import checks
from corrigenda.modules.editing.memory import MemoryEditor, MemoryPatch, sentence
from corrigenda.modules.model.delta import EditError
from corrigenda.modules.model.handle import GenerationRequest, ScoreRequest
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.retrieval.retriever import Encoder, Retriever

ROLES = {"copy": 1, "update": 3, "retain": 4}


class Pool(Protocol):
    """A source of demonstrations, such as any data module of edits."""

    def cases(self, split: Literal["train", "val", "test"]) -> list[EditCase]:
        """The cases of a split."""
        ...


class Demonstrated(MemoryPatch):
    """Puts demonstrations and the fact before every prompt."""

    editor: IKE

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        return self._rewrite(prompts, [0] * len(prompts))

    def score(self, request: ScoreRequest) -> TargetScores:
        texts = self._rewrite(request.prompts, self.target_lengths(request.targets))
        with self.lm.reuse.common_prefix():
            return self.lm.score_request(replace(request, prompts=texts))

    def generate(self, request: GenerationRequest) -> list[str]:
        texts = self._rewrite(request.prompts, [request.max_new_tokens] * len(request.prompts))
        with self.lm.reuse.common_prefix():
            return self.lm.generate_request(replace(request, prompts=texts))

    def _rewrite(self, prompts: Sequence[str], reserves: Sequence[int]) -> list[str]:
        newest = list(self.memory.newest(self.end).values())
        edits = newest * len(prompts)
        if len(newest) > 1:
            edits = [edit for edit, _ in self.nearest(prompts)]
        texts = []
        for edit, prompt, reserve in zip(edits, prompts, reserves, strict=True):
            demonstrations = self.editor.demonstrations(self.lm, edit)
            question = f"New Fact: {sentence(edit, self.lm.tokens.separator)}\nPrompt: {prompt}"
            texts.append(self.shown(demonstrations, question, reserve))
        self.editor.counts["questions"] += len(texts)
        return texts


class IKE(MemoryEditor):
    """Shows each new fact to the model in the prompt, after demonstrations.

    Args:
        pool: data module whose training cases become demonstrations; must hold no case that is evaluated.
        num_demonstrations: demonstrations before the copy of the new fact itself: an eighth copy, three eighths
            update, the rest retain. With 0 there is only that copy.
        encoder: finds the most similar records: ``minilm``, another sentence encoder's hub id or folder, or
            ``lm`` for the language model's own hidden states.
        seed: random seed of the choice among a record's paraphrases, and of the order of the roles.
    """

    patch = Demonstrated

    def __init__(
        self,
        pool: Pool,
        num_demonstrations: int = 32,
        encoder: str | Encoder = "minilm",
        seed: int = 0,
    ) -> None:
        super().__init__(encoder)
        checks.whole(0, num_demonstrations=num_demonstrations)
        checks.seeds(seed=seed)
        self.pool, self.num_demonstrations, self.seed = pool, num_demonstrations, seed
        self._cases: list[EditCase] = []
        self._indices: dict[str, Retriever] = {}  # of the pool's facts, by the encoder's hash
        self._chosen: dict[tuple[str, Separator, Edit], list[str]] = {}

    def key(self, edit: Edit) -> str:
        return sentence(edit)

    def prepare(self, lm: LanguageModel) -> None:
        """Encodes the pool, once per encoder; the vectors are kept in the cache folder."""
        super().prepare(lm)
        encoder = self.encoder(lm)
        if encoder.hash in self._indices or not self.num_demonstrations:
            return
        self._cases = self._cases or [c for c in self.pool.cases("train") if _has_all_roles(c)]
        facts = [sentence(case.edits[0]) for case in self._cases]
        self._indices[encoder.hash] = Retriever.cached(facts, encoder)

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> MemoryPatch:
        lm.tokens.require_readable([sentence(edit) for edit in edits])
        self.prepare(lm)
        for edit in edits:
            self.demonstrations(lm, edit)
        return super().edit(lm, edits)

    def demonstrations(self, lm: LanguageModel, edit: Edit) -> list[str]:
        """Demonstrations for questions about this edit: the most similar last, then the edit's own copy."""
        place = self.encoder(lm).hash, lm.tokens.separator, edit
        if place not in self._chosen:
            cases = self._similar(place[0], edit)
            roles = _roles(len(cases))
            random.Random(f"{self.seed} {edit.text}").shuffle(roles)
            between = lm.tokens.separator
            shown = [
                self._show(case, role, between) for case, role in zip(cases, roles, strict=True)
            ]
            self._chosen[place] = [
                *reversed(shown),
                _demonstration(edit, edit.text, edit.target_new, between),
            ]
        return self._chosen[place]

    def _similar(self, encoder: str, edit: Edit) -> list[EditCase]:
        """The most similar records about other subjects, nearest first."""
        if not self.num_demonstrations:
            return []
        index = self._indices[encoder]
        same = {n for n, c in enumerate(self._cases) if _subject(c.edits[0]) == _subject(edit)}
        wanted = self.num_demonstrations + len(same)
        if wanted > len(index):
            raise EditError(
                f"num_demonstrations is {self.num_demonstrations}, but the pool has only "
                f"{len(index) - len(same)} training cases with one edit, a paraphrase (generality) and a "
                "neighbour (locality) about other subjects: lower num_demonstrations or give a larger pool"
            )
        _, index_BK = index.search([sentence(edit)], wanted)
        found = [n for n in index_BK[0].tolist() if n not in same]
        return [self._cases[n] for n in found[: self.num_demonstrations]]

    def _show(self, case: EditCase, role: str, separator: Separator) -> str:
        (edit,) = case.edits
        rng = random.Random(f"{self.seed} {case.case_id}")
        if role == "copy":
            return _demonstration(edit, edit.text, edit.target_new, separator)
        probe = rng.choice(_part(case, "generality" if role == "update" else "locality"))
        return _demonstration(edit, probe.prompt, str(probe.target), separator)


def _roles(count: int) -> list[str]:
    """``count`` roles in the ratio 1 : 3 : 4; the remainder retains."""
    share = count / sum(ROLES.values())
    roles = [role for role in ("copy", "update") for _ in range(int(share * ROLES[role]))]
    return roles + ["retain"] * (count - len(roles))


def _demonstration(edit: Edit, prompt: str, answer: str, separator: Separator) -> str:
    fact, answered = sentence(edit, separator), joined(prompt, answer, separator)
    return f"New Fact: {fact}\nPrompt: {answered}\n\n"


def _part(case: EditCase, criterion: str) -> list[Probe]:
    return [probe for probe in case.probes.get(criterion, ()) if probe.target]


def _has_all_roles(case: EditCase) -> bool:
    return len(case.edits) == 1 and all(_part(case, name) for name in ("generality", "locality"))


def _subject(edit: Edit) -> str:
    return edit.subject.strip().casefold()
