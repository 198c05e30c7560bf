"""Writing many facts at once, spread over consecutive MLPs: what MEMIT, EMMET and AlphaEdit share.

After Meng et al., 2023 (arXiv 2210.07229). For every edit the output z = h + delta of the highest edited block
is looked for that makes its target likely, all on the model as it is. Then the blocks l_1 .. l_L are gone
through from the lowest to the highest. At block l_j

    K = mean keys over contexts,   H = outputs of block l_L,   R = (Z - H) / (L - j + 1) / c

are read again with the updates of the blocks below in place, and the subclass solves for the update that
answers K with W K + R; c is what a block multiplies its MLP's output with, 1 in most families. The last block
gets all of what is still lacking.

Departures from the authors' code: the target's likelihood is that of the model's own logits; the KL term is read
after ``"<subject> is a"`` (with ``essence: "{}"`` after the subject, as there); every search has its own
stop. Where a block normalises what its MLP writes before adding it, no value at the block's output can be
written: there one layer can be edited, and the value is that of the projection itself.

Shapes: N edits, M groups of edits, Q contexts, F key width, D value width, P earlier keys.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor
from torch.linalg import vector_norm

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.key_value import KeyRows, SubjectRows, sample_contexts
from corrigenda.modules.editors.value_search import (
    FoundValues,
    ValueSettings,
    optimise_values,
    searched_together,
)
from corrigenda.modules.model.delta import Delta, EditError, LowRank, Update
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.moments import Moments

log = logging.getLogger(__name__)


class SpreadEditor(WeightEditor):
    """Finds values at the highest of some blocks and lets a subclass write them into all of them.

    Args:
        layers: blocks whose projections are edited, from 0, the lowest first.
        steps: evaluations of the value's loss; at most one update fewer.
        lr: step size of the value's search.
        clamp_norm: the value may move by this multiple of its norm.
        weight_decay: weight of the value's own size in the loss.
        kl_weight: weight of the drift of what follows the essence.
        contexts: pairs of (tokens, how many) of the sampled texts before the prompt.
        essence: text after which the next word is to stay as it was.
        corpus: text of the second moments.
        seed: of the sampled contexts.
        parallel: edits whose values are looked for together.
        precision: ``bfloat16`` makes the search for values several times faster on hardware that has it.
        values: folder where values found on the unedited model are kept: an interrupted search goes on
            there, and editors and batches that ask for the same values share them. The seconds of an edit
            are then those of what had to be looked for.
    """

    keeps_keys = False  # whether later edits are to leave the keys of this one alone

    def __init__(
        self,
        layers: list[int],
        steps: int = 25,
        lr: float = 0.5,
        clamp_norm: float = 0.75,
        weight_decay: float = 0.5,
        kl_weight: float = 0.0625,
        contexts: list[tuple[int, int]] = [(10, 5)],  # noqa: B006  never changed
        essence: str = "{} is a",
        corpus: Corpus = Corpus(),  # noqa: B008  frozen
        seed: int = 0,
        parallel: int = 8,
        precision: Literal["float32", "bfloat16"] = "float32",
        values: str | None = None,
    ) -> None:
        checks.blocks(layers=layers)
        if sorted(layers) != list(layers):
            raise ValueError(f"layers must be in order, the lowest first, got {layers}")
        checks.contexts(contexts=contexts)
        checks.with_slot(essence=essence)
        checks.seeds(seed=seed)
        checks.whole(1, parallel=parallel)
        self.layers, self.lengths, self.essence = layers, contexts, essence
        self.corpus, self.seed, self.parallel = corpus, seed, parallel
        self.settings = ValueSettings(steps, lr, weight_decay, kl_weight, clamp_norm, precision)
        self.values = values
        self._prepared: str | None = None
        self._statistics: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ the subclass's own

    @abstractmethod
    def statistics(self, moments: Moments, layer: int) -> Tensor:
        """What :meth:`solve` needs to know of a layer's keys on ordinary text."""

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
            edits: what is written, for messages.
            keys_FN: one column per edit.
            residual_DN: what each key's value lacks.
            earlier_FP: keys of the edits in force, where the method keeps them; none otherwise.
        """

    # ------------------------------------------------------------------ the editor

    def prepare(self, lm: LanguageModel) -> None:
        """Contexts and second moments, once per model, from its unedited weights."""
        if self._prepared == lm.weights_hash:
            return
        self._site(lm)
        moments = Moments(lm, self.corpus)
        moments.gather(self.layers)  # all in one pass over the text
        self._statistics = {layer: self.statistics(moments, layer) for layer in self.layers}
        self._contexts = sample_contexts(lm, self.lengths, self.seed)
        self._prepared = lm.weights_hash

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        return self.propose_each(lm, [edits])[0]

    def propose_each(self, lm: LanguageModel, edits: Sequence[Sequence[Edit]]) -> list[Delta]:
        """One update per group; values are looked for together, each group is read and solved alone."""
        self.prepare(lm)
        single = [edit for group in edits for edit in group]
        group_N = torch.tensor([m for m, group in enumerate(edits) for _ in group])
        own = [(group_N == m).nonzero()[:, 0].to(lm.device) for m in range(len(edits))]
        deltas = [Delta({}, {"notes": []}) for _ in edits]
        bare = SubjectRows.of(lm, single, [""], torch.ones(1))
        rows = SubjectRows.of(lm, single, self._contexts, self._context_weights())
        site, scale = self._site(lm)

        def outputs() -> Tensor:
            return bare.means(lm, site, deltas, group_N)[1]

        def keys(layer: int) -> Tensor:
            return rows.means(lm, lm.structure.out_name(layer), deltas, group_N)[0]

        v0_ND = outputs()
        delta_ND, notes = self._search(lm, single, site, v0_ND)
        target_ND = v0_ND + delta_ND
        for done, layer in enumerate(self.layers):
            name = f"{lm.structure.out_name(layer)}.weight"
            keys_NF, earlier_FP = keys(layer), self._earlier(lm, name)
            residual_ND = (target_ND - outputs()) / (len(self.layers) - done) / scale
            for group, delta, n in zip(edits, deltas, own, strict=True):
                factors = self.solve(layer, group, keys_NF[n].T, residual_ND[n].T, earlier_FP)
                delta.updates[name] = _smaller(*factors)
        wanted_N = vector_norm(delta_ND, dim=1).clamp(min=1e-6)
        lacking_N = vector_norm(target_ND - outputs(), dim=1) / wanted_N
        for note, m, lacking in zip(notes, group_N.tolist(), lacking_N.tolist(), strict=True):
            deltas[m].metadata["notes"].append(note | {"lacking": lacking})
        for layer in self.layers if self.keeps_keys else ():
            keys_NF = keys(layer)
            for delta, n in zip(deltas, own, strict=True):
                delta.keys[f"{lm.structure.out_name(layer)}.weight"] = keys_NF[n]
        return deltas

    # ------------------------------------------------------------------ parts

    def _site(self, lm: LanguageModel) -> tuple[str, float]:
        """Where values are looked for, and what reaches it of what a projection writes."""
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
        """Where values are kept; none where edits are in force, as those change what is looked for."""
        if self.values is None or lm.handles:
            return None
        base = {
            "weights": lm.weights_hash,
            "site": site,
            "contexts": self._contexts,
            "essence": self.essence,
            **asdict(self.settings),
        }
        return FoundValues(self.values, base)

    def _earlier(self, lm: LanguageModel, name: str) -> Tensor:
        """Keys of the edits in force that are to keep their answers, [F, P]; none unless this method does so."""
        found = [torch.zeros(0, lm.structure.inner_width, device=lm.device)]
        if self.keeps_keys:
            patches = [handle for handle in lm.handles if isinstance(handle, WeightPatch)]
            found += [patch.delta.keys[name] for patch in patches if name in patch.delta.keys]
        return torch.cat([keys.to(lm.device) for keys in found]).T


def _smaller(left_DN: Tensor, right_NF: Tensor) -> Update:
    """The factors, or their product where that takes less room."""
    if left_DN.numel() + right_NF.numel() < left_DN.shape[0] * right_NF.shape[1]:
        return LowRank(left_DN, right_NF)
    return left_DN @ right_NF
