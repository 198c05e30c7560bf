"""Writing many facts at once, spread over consecutive MLPs: what MEMIT, EMMET and AlphaEdit share.

After Meng et al., 2023 (arXiv 2210.07229). For every edit the search finds the output z = h + delta of the highest
edited block that makes its target likely, on the model as it is. Then the blocks l_1 .. l_L are updated from the
lowest to the highest. At block l_j

    K = mean keys over contexts,   H = outputs of block l_L,   R = (Z - H) / (L - j + 1) / c

are computed again with the lower blocks already updated, and the subclass solves for the update that maps K to
W K + R; c is the factor by which a block multiplies its MLP's output, 1 in most families. The last block gets the
whole remaining residual.

Departures from the authors' code: the target's likelihood is that of the model's own logits; the KL term is read
after ``"<subject> is a"`` (with ``essence: "{}"`` after the subject, as there); every search has its own stopping
rule. In models that normalise an MLP's output before adding it, no value at the block's output can be written:
there only one layer can be edited, and the value is that of the projection itself.

Shapes: N edits, M groups of edits, Q contexts, F key width, D value width, P earlier keys.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.linalg import vector_norm

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.key_value import KeyRows, SubjectRows
from corrigenda.modules.editors.value_search import (
    FoundValues,
    ValueEditor,
    optimise_values,
    searched_together,
    warn_of_unread,
)
from corrigenda.modules.model.delta import Delta, EditError, LowRank, Update
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.moments import Moments

log = logging.getLogger(__name__)


class SpreadEditor(ValueEditor):
    """Finds values at the highest of some blocks; a subclass writes them into all of these blocks.

    Args:
        layers: blocks whose projections are edited, from 0, the lowest first.
        values: folder for values found on the unedited model: an interrupted search continues from there, and
            editors and batches that need the same values share them. The time of an edit then includes only the
            searches that were still needed.
        **search: settings of the value search, of ValueEditor.
    """

    keeps_keys = False  # whether later edits must preserve the outputs for this edit's keys

    def __init__(self, layers: list[int], values: str | None = None, **search: Any) -> None:  # noqa: ANN401
        super().__init__(**search)
        checks.blocks(layers=layers)
        if sorted(layers) != list(layers):
            raise ValueError(f"layers must be in order, the lowest first, got {layers}")
        self.layers, self.values = layers, values
        self._statistics: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ the method's part

    @abstractmethod
    def statistics(self, moments: Moments, layer: int) -> Tensor:
        """The statistics of a layer's keys on ordinary text that :meth:`solve` uses."""

    @abstractmethod
    def solve(
        self,
        layer: int,
        edits: Sequence[Edit],
        keys_FN: Tensor,
        residual_DN: Tensor,
        earlier_FP: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(left_DN, right_NF) of the update of one layer, float64.

        Args:
            layer: the block.
            edits: the edits, for messages.
            keys_FN: one column per edit.
            residual_DN: the change of the output that each key needs.
            earlier_FP: keys of the active edits if the method preserves them; none otherwise.
        """

    # ------------------------------------------------------------------ the editor

    def read_statistics(self, lm: LanguageModel) -> None:
        self._site(lm)
        moments = Moments(lm, self.corpus)
        moments.gather(self.layers)  # all in one pass over the text
        self._statistics = {layer: self.statistics(moments, layer) for layer in self.layers}

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        return self.propose_each(lm, [edits])[0]

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        """One update per group; values are optimised together, but keys are read and solved group by group."""
        self.prepare(lm)
        single = [edit for group in edits for edit in group]
        group_N = torch.tensor([m for m, group in enumerate(edits) for _ in group])
        own = [(group_N == m).nonzero()[:, 0].to(lm.device) for m in range(len(edits))]
        deltas = [Delta({}, {"notes": []}) for _ in edits]
        warn_of_unread(lm, single, self.layers[-1])
        site, scale = self._site(lm)
        edited = _EditedModel(
            lm,
            deltas,
            group_N,
            SubjectRows.of(lm, single, [""], torch.ones(1)),
            SubjectRows.of(lm, single, self._contexts, self._context_weights()),
        )
        v0_ND = edited.outputs(site)
        delta_ND, notes = self._search(lm, single, site, v0_ND)
        target_ND = v0_ND + delta_ND
        for done, layer in enumerate(self.layers):
            name = f"{lm.structure.out_name(layer)}.weight"
            keys_NF, earlier_FP = edited.keys(layer), self._earlier(lm, name)
            residual_ND = (target_ND - edited.outputs(site)) / (len(self.layers) - done) / scale
            for group, delta, n in zip(edits, deltas, own, strict=True):
                factors = self.solve(layer, group, keys_NF[n].T, residual_ND[n].T, earlier_FP)
                delta.updates[name] = _smaller(*factors)
        wanted_N = vector_norm(delta_ND, dim=1).clamp(min=1e-6)
        lacking_N = vector_norm(target_ND - edited.outputs(site), dim=1) / wanted_N
        for note, m, lacking in zip(notes, group_N.tolist(), lacking_N.tolist(), strict=True):
            deltas[m].metadata["notes"].append(note | {"lacking": lacking})
        for layer in self.layers if self.keeps_keys else ():
            keys_NF = edited.keys(layer)
            for delta, n in zip(deltas, own, strict=True):
                delta.keys[f"{lm.structure.out_name(layer)}.weight"] = keys_NF[n]
        return deltas

    # ------------------------------------------------------------------ parts

    def _site(self, lm: LanguageModel) -> tuple[str, float]:
        """(module, scale): where values are optimised, and the factor of a projection's output there."""
        for layer in self.layers:
            lm.structure.block_name(layer)
        if lm.structure.residual_scale is not None:
            return lm.structure.block_name(self.layers[-1]), lm.structure.residual_scale
        if len(self.layers) > 1:
            raise EditError(
                f"{lm.name!r} normalises what its MLPs write before adding it, so edits cannot be spread over "
                f"layers {self.layers}: give one layer"
            )
        return lm.structure.out_name(self.layers[-1]), 1.0

    def _context_weights(self) -> Tensor:
        """A mean over kinds of contexts (the bare prompt is one) of the means within each kind."""
        counts = [1, *(count for _, count in self.lengths)]
        return torch.cat([torch.full((n,), 1 / n / len(counts)) for n in counts])

    def _search(
        self, lm: LanguageModel, edits: Sequence[Edit], site: str, v0_ND: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """(delta_ND, a note per edit): the changes at ``site`` that make the targets likely."""
        delta_ND = torch.zeros_like(v0_ND)
        notes: list[dict[str, Any]] = [{} for _ in edits]
        found = self._found_values(lm, site)
        missing = []
        for n, edit in enumerate(edits):
            if found and (stored := found.read(edit)):
                delta_ND[n], notes[n] = stored[0].to(delta_ND), stored[1]
            else:
                missing.append(n)
        self.counts["values_taken_over"] += len(edits) - len(missing)
        with Progress(disable=len(missing) <= self.parallel, transient=True) as bar:
            task = bar.add_task("values", total=len(missing))
            for places in searched_together(lm, [edits[n] for n in missing], self.parallel):
                part = [missing[i] for i in places]
                key_rows = KeyRows.of(lm, [edits[n] for n in part], self._contexts, self.essence)
                tail = key_rows.tail(lm, self.layers[-1])
                values = optimise_values(lm, key_rows, tail, site, v0_ND[part], self.settings)
                delta_ND[part] = values.delta_ND
                for i, n in enumerate(part):
                    notes[n] = {
                        "loss": values.loss_N[i].item(),
                        "nll": values.nll_N[i].item(),
                        "iterations": int(values.iterations_N[i]),
                    }
                    if found:
                        found.write(edits[n], delta_ND[n], notes[n])
                bar.update(task, advance=len(part))
        failed = [
            f"{edit.text!r} -> {edit.target_new!r}"
            for edit, note in zip(edits, notes, strict=True)
            if not note["nll"] <= 1
        ]
        if failed:
            log.warning("%d of %d value searches ended at an NLL above 1, those edits will likely fail: %s",
                        len(failed), len(edits), "; ".join(failed[:3]))  # fmt: skip
        return delta_ND, notes

    def _found_values(self, lm: LanguageModel, site: str) -> FoundValues | None:
        """The values' files; None while edits are active, because values then depend on those."""
        if self.values is None or lm.handles:
            return None
        base = {
            "weights": lm.weights_hash,
            "site": site,
            "contexts": self._contexts,
            "essence": self.essence,
            **asdict(self.settings),
            **lm.chat_note,
        }
        return FoundValues(self.values, base)

    def _earlier(self, lm: LanguageModel, name: str) -> Tensor:
        """Keys of the active edits whose outputs must be preserved, [F, P]; none unless the method does that."""
        found = [torch.zeros(0, lm.structure.inner_width, device=lm.device)]
        if self.keeps_keys:
            patches = [handle for handle in lm.handles if isinstance(handle, WeightPatch)]
            found += [patch.delta.keys[name] for patch in patches if name in patch.delta.keys]
        return torch.cat([keys.to(lm.device) for keys in found]).T


@dataclass(frozen=True)
class _EditedModel:
    """Keys and outputs at the subjects' last tokens, each edit's read under its group's updates so far.

    Attributes:
        lm: the language model.
        deltas: the M groups' updates, which grow layer by layer.
        group_N: the group of each edit.
        bare: the edits' own prompts.
        in_contexts: their prompts in every context.
    """

    lm: LanguageModel
    deltas: list[Delta]
    group_N: Tensor
    bare: SubjectRows
    in_contexts: SubjectRows

    def keys(self, layer: int) -> Tensor:
        """keys_NF: the mean inputs of the layer's output projection over contexts."""
        name = self.lm.structure.out_name(layer)
        return self.in_contexts.means(self.lm, name, self.deltas, self.group_N)[0]

    def outputs(self, site: str) -> Tensor:
        """outputs_ND of module ``site`` for the edits' own prompts."""
        return self.bare.means(self.lm, site, self.deltas, self.group_N)[1]


def _smaller(left_DN: Tensor, right_NF: Tensor) -> Update:
    """The factors, or their product if that is smaller."""
    if left_DN.numel() + right_NF.numel() < left_DN.shape[0] * right_NF.shape[1]:
        return LowRank(left_DN, right_NF)
    return left_DN @ right_NF
