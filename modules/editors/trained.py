"""A learned editor from its checkpoint, to be used like an editor that needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.training.learned import LearnedEditor


class Trained(WeightEditor):
    """MEND, KE or MALMEN as ``fit`` has trained it, with the settings of its training.

    For streams of edits, in which the trained editor is not what learns. A single evaluation needs no more than
    ``validate`` with the editor's own configuration and ``--ckpt_path``.

    Args:
        checkpoint: a checkpoint that the ``fit`` of a learned editor has written.
    """

    def __init__(self, checkpoint: str) -> None:
        if not Path(checkpoint).is_file():
            raise EditError(
                f"there is no checkpoint {checkpoint}: train an editor with fit and give its checkpoint"
            )
        self.checkpoint = checkpoint
        self._editor: LearnedEditor | None = None

    def prepare(self, lm: LanguageModel) -> None:
        if self._editor is None or self._editor.lm is not lm:
            self._editor = LearnedEditor.load_from_checkpoint(self.checkpoint, lm)

    def editor(self, lm: LanguageModel) -> LearnedEditor:
        """The editor in the checkpoint."""
        self.prepare(lm)
        assert self._editor is not None
        return self._editor

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        return self.editor(lm).propose(lm, edits)

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        return self.editor(lm).propose_each(lm, edits)

    def origin(self, lm: LanguageModel, edits: Sequence[Edit]) -> dict[str, Any]:
        return self.editor(lm).origin(lm, edits)
