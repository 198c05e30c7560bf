"""LwF: learning without forgetting (Li and Hoiem, 2016, arXiv 1606.09282), for a language model.

    L(theta) = L_task(theta) + lambda * KL(p_old || p_theta),   p = softmax(logits / T)

The old model is the one that the task began with. It is evaluated on the task's own texts, so that nothing of
earlier tasks is needed. KL is a mean over tokens of the next token's distribution: where the prompt's tokens are
predicted, and with ``answers`` also where the target's are.

Departures from the paper: KL instead of the cross-entropy, which differs by a constant; as there, it is not
multiplied by T^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import checks
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.training.drift import drift
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.kept import Kept
from corrigenda.modules.training.target_rows import TargetRows
from corrigenda.modules.training.tuning import FineTune


class LwF(FineTune):
    """Fine-tunes with a penalty on answering the task's own prompts otherwise than before the task.

    Args:
        lm: the language model.
        method: the parameters to learn and their loss.
        strength: lambda.
        temperature: T; above 1 unlikely words count for more.
        answers: whether KL is also taken where the target is predicted, against the new answer.
        **rest: further settings, of FineTune.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: GradientEditor,
        strength: float = 1.0,
        temperature: float = 2.0,
        answers: bool = False,
        **rest: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(lm, method, **rest)
        checks.at_least(0, strength=strength)
        checks.positive(temperature=temperature)
        self.strength, self.temperature, self.answers = strength, temperature, answers
        self.old = Kept()

    def begin_task(self, cases: Sequence[EditCase]) -> None:
        self.old.put(self.leaves)

    def also_read(self, rows: TargetRows) -> tuple[Tensor, Tensor]:
        """The positions that predict a prompt's tokens, and with ``answers`` those of the target's."""
        row_K, position_K = rows.prompt_RT[:, 1:].nonzero(as_tuple=True)
        if not self.answers:
            return row_K, position_K
        return torch.cat([row_K, rows.row_N]), torch.cat([position_K, rows.position_N])

    def penalty(self, rows: TargetRows, logits_KV: Tensor) -> Tensor | None:
        old = self.old.tensors
        if not old or not len(logits_KV):
            return None
        with torch.no_grad():
            deltas = self.method.deltas(self.lm, old)
            old_KV = rows.logits(self.lm, deltas, *self.also_read(rows))
        kl_K = drift(old_KV / self.temperature, logits_KV / self.temperature)
        return self.strength * kl_K.mean()
