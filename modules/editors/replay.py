"""Experience replay: edits of earlier tasks are learned again beside the new ones.

After Chaudhry et al., 2019 (arXiv 1902.10486):

    L(theta) = L(batch) + mu * L(edits drawn from the buffer)

The buffer is a uniform sample of all edits of earlier tasks (reservoir sampling, Vitter, 1985): of n edits seen
each is in it with probability M / n. Edits enter it when their task ends, so that no batch is replayed to itself.
Of the evaluation's prompts only the edits' own are replayed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import checks
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.target_rows import TargetRows
from corrigenda.modules.training.tuning import FineTune


class Replay(FineTune):
    """Fine-tunes on every batch together with edits drawn from a buffer of earlier ones.

    Args:
        lm: the language model.
        method: the parameters to learn and their loss.
        size: M, the most edits in the buffer.
        rows: edits drawn in each step; all that there are if there are fewer.
        strength: mu.
        seed: random seed of what the buffer keeps and what is drawn.
        **rest: further settings, of FineTune.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: GradientEditor,
        size: int = 100,
        rows: int = 8,
        strength: float = 1.0,
        seed: int = 0,
        **rest: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(lm, method, **rest)
        checks.whole(1, size=size, rows=rows)
        checks.at_least(0, strength=strength)
        checks.seeds(seed=seed)
        self.size, self.rows, self.strength, self.seed = size, rows, strength, seed
        self.buffer: list[tuple[str, str]] = []  # prompts and their targets
        self.num_seen = self.num_drawn = 0

    def penalty(self, rows: TargetRows, logits_KV: Tensor) -> Tensor | None:
        """The loss of the edits that this step draws, times the strength."""
        if not self.buffer:
            return None
        draw = random.Random(f"draw {self.seed} {self.num_drawn}")
        drawn = draw.sample(self.buffer, min(self.rows, len(self.buffer)))
        self.num_drawn += 1
        again = self.target_rows([prompt for prompt, _ in drawn], [target for _, target in drawn])
        return self.strength * again.losses(self.lm, [self.update()]).mean()

    def end_task(self, cases: Sequence[EditCase]) -> None:
        for case in cases:
            for edit in case.edits:
                self._offer(edit.text, edit.target_new)

    def _offer(self, prompt: str, target: str) -> None:
        """Keeps the edit in an empty place, or instead of another with probability M / n."""
        place = random.Random(f"keep {self.seed} {self.num_seen}").randrange(self.num_seen + 1)
        self.num_seen += 1
        if len(self.buffer) < self.size:
            self.buffer.append((prompt, target))
        elif place < self.size:
            self.buffer[place] = prompt, target

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["replay"] = {
            "buffer": [list(edit) for edit in self.buffer],
            "seen": self.num_seen,
            "drawn": self.num_drawn,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("replay", {"buffer": [], "seen": 0, "drawn": 0})
        self.buffer = [(prompt, target) for prompt, target in kept["buffer"]]
        self.num_seen, self.num_drawn = kept["seen"], kept["drawn"]
