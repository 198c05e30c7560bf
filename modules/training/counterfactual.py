"""SERAC's counterfactual model: answers a prompt given the edit (Mitchell et al., 2022, arXiv 2206.06520).

psi is a causal LM that reads ``<edit's prompt> <its answer>``, a line break, then the prompt.

Departures from the authors' code: psi is a learned low-rank update of a base model (with the same base, one
network in memory is enough) and is trained separately from the scope classifier; edit and prompt are joined by a
line break, after which a small model copies far more often than after a space.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from corrigenda.datamodules.records import Edit, EditCase, Probe, Separator, joined
from corrigenda.modules.evaluation.measures import LOCALITY_CRITERIA
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.handle import GenerationRequest
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.training.checkpoints import read_checkpoint
from corrigenda.modules.training.tuning import FineTune


def in_front(edit: Edit, prompt: str, separator: Separator = "auto") -> str:
    """The counterfactual model's input: the edit, a line break, the prompt."""
    return f"{joined(edit.text, edit.target_new, separator)}\n{prompt}"


class CounterfactualModel(FineTune):
    """psi: answers prompts that follow the edit's text. Train it with ``fit``.

    ``lm`` may be any small causal LM with the tokenizer of the model to be edited. An update of it is learned
    from training cases (:class:`~corrigenda.modules.training.tuning.FineTune`) and validated on held-out ones:
    ``efficacy`` and ``generality`` score an edit's prompt and its paraphrases, each after the edit. SERAC uses the
    checkpoint with the best ``val/generality/exact``.
    """

    trains_on = "train"

    @property
    def method_name(self) -> str:
        return type(self).__name__

    def training_step(self, batch: list[EditCase], batch_idx: int) -> Tensor:
        """Mean loss of the new answer to one phrasing of each edit, after the edit's text."""
        draw = random.Random(f"{self.current_epoch} {batch_idx}")
        probes = [draw.choice([p for p in case.phrasings if p.target]) for case in batch]
        prompts = [
            in_front(case.edits[0], probe.prompt, self.lm.tokens.separator)
            for case, probe in zip(batch, probes, strict=True)
        ]
        return self.loss(prompts, [str(probe.target) for probe in probes])

    def validation_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Evaluates probes within the edits' scope; psi never sees any others."""
        return super().validation_step(
            [self.within_scope(case, self.lm.tokens.separator) for case in batch], batch_idx
        )

    @staticmethod
    def within_scope(case: EditCase, separator: Separator = "auto") -> EditCase:
        """The case without its locality probes, with the edit's text before the other prompts."""
        probes = {}
        for criterion, some in case.probes.items():
            if criterion not in LOCALITY_CRITERIA:
                probes[criterion] = tuple(
                    Probe(
                        in_front(case.edits[0], p.prompt, separator), p.target, p.rival, p.aliases
                    )
                    for p in some
                )
        return EditCase(case.case_id, case.edits, probes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["counterfactual"] = self.own_delta().tensors()


@dataclass(frozen=True)
class Counterfactual:
    """A trained psi: the learned update and its base, which may be the model to be edited itself."""

    lm: LanguageModel
    delta: Delta

    @classmethod
    def load(cls, path: str, lm: LanguageModel) -> Counterfactual:
        """The model of a checkpoint, to answer in place of ``lm``; raises EditError if it is not one."""
        checkpoint = read_checkpoint(path, "counterfactual", of=CounterfactualModel.__name__)
        base = checkpoint["base_model"]
        own = lm
        if base["hash"] != lm.weights_hash:
            own = LanguageModel(
                base["name"],
                device=str(lm.device),
                separator=lm.tokens.separator,
                chat=lm.tokens.template is not None,
            )
            if own.weights_hash != base["hash"]:
                raise EditError(
                    f"{path} was trained for {base['name']!r} with weights {base['hash']}, and that name now "
                    f"stands for weights {own.weights_hash}: bring the model back, or train again"
                )
            _require_same_words(own, lm)
        tensors = {name: t.to(lm.device) for name, t in checkpoint["counterfactual"].items()}
        return cls(own, Delta.from_tensors(tensors, {}))

    def score(self, prompts: Sequence[str], targets: Sequence[str], full: bool) -> TargetScores:
        with self.lm.pristine(), self.lm.reuse.shared(0):  # no state of the base is reused
            return self.lm.score(prompts, targets, [self.delta], full=full)

    def generate(self, request: GenerationRequest) -> list[str]:
        """Continuations by psi alone; the request's own deltas are ignored."""
        with self.lm.pristine():
            return self.lm.generate_request(replace(request, deltas=[self.delta], owners=None))


def _require_same_words(one: LanguageModel, other: LanguageModel) -> None:
    rows = [lm.net.get_output_embeddings().weight.shape[0] for lm in (one, other)]
    if one.tokenizer.get_vocab() != other.tokenizer.get_vocab() or rows[0] != rows[1]:
        raise EditError(
            f"the counterfactual model {one.name!r} and the model to be edited, {other.name!r}, have different "
            "vocabularies, so that neither can answer for the other: train one with the tokenizer of "
            f"{other.name!r}"
        )
