"""PRUNE: restrains the largest singular values of all edits together (Ma et al., 2024, arXiv 2405.16821).

A long sequence of edits makes singular values of the accumulated update D = W_now - W_base grow beyond those of
the base weight, which harms everything else. With sigma the largest singular value of W_base,

    D = sum_i s_i u_i v_i'    ->    sum_i f(s_i) u_i v_i',
    f(s) = s  where s <= sigma,   log_a(s) - log_a(sigma) + sigma  above it

The model is evaluated with f(D), but f must not feed back into later edits: each is computed as if the earlier
ones had been written without restraint. So the active update is always f(D), and D itself is written temporarily
while the next edit is computed. f is strictly increasing and keeps singular vectors, so D is recovered from f(D):
no state is needed besides the active edits, and an interrupted stream resumes exactly. Only singular values above
sigma change; while there are none an edit is left as it is, and otherwise the change is of low rank.

D is the sum of all active updates: of a batch or of all cases together their one update, in a stream the sum over
steps. Under the schedule ``each`` every edit is its own D.

Departures from the authors' code: a is 1.2 if not given; their linear variant is left out. If sigma < 1 / ln a,
f(s) is larger than s just above sigma, so the rule strengthens updates there; a warning then suggests a larger a.
Biases are left as they are. If editors are nested PRUNE must be the outer one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.model.delta import Delta, LowRank, Update, add_deltas, svd
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import read_parameter

log = logging.getLogger(__name__)


class PRUNE(WeightEditor):
    """Restrains the singular values of the sum of another editor's updates.

    Args:
        editor: the method whose updates are restrained.
        base: base of the logarithm; the closer to 1, the weaker the restraint.
    """

    def __init__(self, editor: WeightEditor, base: float = 1.2) -> None:
        checks.number("above 1", lambda a: a > 1, base=base)
        self.editor, self.base = editor, base
        self._sigma: dict[tuple[str, str], float] = {}  # by model and parameter

    def check(self, lm: LanguageModel) -> None:
        self.editor.check(lm)

    def prepare(self, lm: LanguageModel) -> None:
        self.editor.prepare(lm)

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        return self._restrained(lm, lambda: [self.editor.propose(lm, edits)])[0]

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        return self._restrained(lm, lambda: self.editor.propose_each(lm, edits))

    def _restrained(self, lm: LanguageModel, propose: Callable[[], list[Delta]]) -> list[Delta]:
        """The update that each proposal adds to the active one so that their sum is restrained."""
        before = self._active(lm)
        given_back = self._change(lm, before, self._loosen)  # before + given_back is D
        with lm.edits.provisional():
            if given_back.updates:
                WeightPatch(lm, given_back)
            deltas = propose()
        return [self._with_restraint(lm, before, given_back, delta) for delta in deltas]

    def _with_restraint(
        self, lm: LanguageModel, before: Delta, given_back: Delta, delta: Delta
    ) -> Delta:
        total = add_deltas([before, given_back, delta])
        taken = self._change(lm, total, self._restrain)
        step = add_deltas([given_back, taken, delta])
        return Delta(step.updates, delta.metadata | {"restrained": self.base})

    def _active(self, lm: LanguageModel) -> Delta:
        """The sum of this method's active updates."""
        patches = [handle for handle in lm.handles if isinstance(handle, WeightPatch)]
        ours = [p.delta for p in patches if p.delta.metadata.get("restrained") == self.base]
        return add_deltas(ours)

    # ------------------------------------------------------------------ singular values

    def _change(
        self, lm: LanguageModel, delta: Delta, rule: Callable[[Tensor, float], Tensor]
    ) -> Delta:
        """The change of a delta by a rule for its singular values above sigma; empty if it has none."""
        updates: dict[str, Update] = {}
        for name, update in delta.updates.items():
            if not isinstance(update, LowRank) and update.dim() < 2:
                continue
            left_Or, values_r, right_rI = svd(update)
            sigma = self._largest(lm, name)
            above = int((values_r > sigma).sum())
            if above:
                values_a = values_r[:above]
                change_a = rule(values_a, sigma) - values_a
                updates[name] = LowRank(left_Or[:, :above] * change_a, right_rI[:above])
        return Delta(updates)

    def _restrain(self, values_r: Tensor, sigma: float) -> Tensor:
        return sigma + (values_r / sigma).log() / math.log(self.base)

    def _loosen(self, values_r: Tensor, sigma: float) -> Tensor:
        """The inverse of :meth:`_restrain`."""
        return sigma * ((values_r - sigma) * math.log(self.base)).exp()

    def _largest(self, lm: LanguageModel, name: str) -> float:
        """sigma: the largest singular value of the unedited weight."""
        key = lm.weights_hash, name
        if key not in self._sigma:
            with lm.pristine():
                weight_OI = read_parameter(lm.net, name).double()
            self._sigma[key] = torch.linalg.matrix_norm(weight_OI, 2).item()
            if self._sigma[key] * math.log(self.base) < 1:
                log.warning("%s: its largest singular value %.2f is below 1 / ln(base): updates just above "
                            "it are strengthened, not restrained; choose a base above %.2f", name,
                            self._sigma[key], math.exp(1 / self._sigma[key]))  # fmt: skip
        return self._sigma[key]
