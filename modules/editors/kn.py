"""KN: knowledge neurons (Dai et al., 2022, arXiv 2104.08696).

A neuron is one entry of the input of an MLP output projection; its value is the column of the projection that
it multiplies. A neuron's contribution to an answer y is its integrated gradient. With w the layer's keys at the
positions that predict y, all of them scaled together,

    attribution_j = w_j * integral_0^1 dP(y | a w) / dw_j da,    sum_j attribution_j = P(1) - P(0)

and P the probability of the whole answer. The neurons of a fact are those whose attribution is at least a given
share of the largest one, over all layers, in enough of the fact's prompts. Their values are then changed:

    update    v - s |v| / |e_old| * erase * e_old + s |v| / |e_new| * write * e_new
    suppress  0
    enhance   2 v
    erase     0, for the neurons that all given facts share (those of a relation)

with s the sign of the neuron's activation, and e the rows of the answers in the output embedding. Setting a value
to zero or doubling it is equivalent to doing so with the neuron's activation, on all inputs.

Departures from the authors' code: the integral uses midpoints instead of left end points, so that its error falls
with the square of the number of points; as the model is causal, the prompts are the edit's own after sampled texts
instead of paraphrases with a mask; the activation is the projection's input, gate included, and since that can be
negative, the change of its value takes its sign (theirs is always added, which in a gated MLP can make the new
answer less likely); e is the row of the output embedding (the word embedding if they are tied), averaged over an
answer's tokens; neurons that other facts of the relation share are not filtered out, as an edit names no other
facts.

Shapes: R rows, N positions that predict answer tokens, L layers, F key width, D residual width, P points.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.editors.key_value import sample_contexts
from corrigenda.modules.model.delta import Delta, EditError, LowRank, Update
from corrigenda.modules.model.hooks import capture, hooked
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.structure import read_weight
from corrigenda.modules.model.tail import Tail

log = logging.getLogger(__name__)

Action = Literal["update", "suppress", "enhance", "erase"]
SHARE_STEP, SHARE_TRIALS = 0.05, 6  # the share of prompts adapts until enough neurons are found


class KN(WeightEditor):
    """Changes the values of the few neurons that contribute most to a fact's answer.

    Args:
        action: ``update`` replaces the old answer by the new one; ``suppress`` and ``enhance`` turn each fact's
            neurons off or double them; ``erase`` turns off the neurons that all given facts share.
        points: number of points of the integral.
        threshold: share of the largest attribution that a neuron must reach in a prompt.
        share: share of the prompts in which it must do so; adapted by 0.05 up to six times while fewer than
            ``fewest`` or more than ``most`` neurons are found.
        fewest: desired minimum number of neurons.
        most: desired maximum number of neurons.
        erase_scale: multiple of its norm by which a value moves away from the old answer (``update``).
        write_scale: multiple of its norm by which a value moves towards the new answer (``update``).
        contexts: pairs of (tokens, number of texts) of the sampled texts before the prompt.
        seed: random seed of the sampled contexts.
        batch_rows: rows of one forward pass, one per prompt and point.
    """

    def __init__(
        self,
        action: Action = "update",
        points: int = 20,
        threshold: float = 0.2,
        share: float = 0.7,
        fewest: int = 2,
        most: int = 5,
        erase_scale: float = 1.0,
        write_scale: float = 8.0,
        contexts: list[tuple[int, int]] = [(5, 5)],  # noqa: B006  never changed
        seed: int = 0,
        batch_rows: int = 128,
    ) -> None:
        checks.whole(1, points=points, batch_rows=batch_rows, fewest=fewest)
        checks.whole(fewest, most=most)
        checks.between(0, 1, threshold=threshold, share=share)
        checks.at_least(0, erase_scale=erase_scale, write_scale=write_scale)
        checks.contexts(contexts=contexts)
        checks.seeds(seed=seed)
        self.action, self.points, self.threshold, self.share = action, points, threshold, share
        self.fewest, self.most = fewest, most
        self.erase_scale, self.write_scale = erase_scale, write_scale
        self.lengths, self.seed, self.batch_rows = contexts, seed, batch_rows
        self._prepared: str | None = None

    def prepare(self, lm: LanguageModel) -> None:
        """Contexts, once per model, from its unedited weights."""
        if self._prepared == lm.weights_hash:
            return
        self._contexts = sample_contexts(lm, self.lengths, self.seed)
        self._prepared = lm.weights_hash

    def propose(self, lm: LanguageModel, edits: Sequence[Edit]) -> Delta:
        """One update for all edits; each fact's neurons are found as if the other edits did not exist."""
        self.prepare(lm)
        rows = [self._rows(lm, edit) for edit in edits]
        attributed = [attributions(lm, part, self.points, self.batch_rows) for part in rows]
        if not all(bool(attr_RLF.isfinite().all()) for attr_RLF in attributed):
            log.warning("attributions are not finite, as the model's own probabilities are not: the choice of "
                        "neurons is meaningless")  # fmt: skip
        if self.action == "erase":
            attributed = [torch.cat(attributed)]
        changes: dict[int, dict[int, Tensor]] = {}
        notes = []
        for attr_RLF, part, edit in zip(attributed, rows, edits, strict=False):
            neurons = self.select(attr_RLF)
            mean_LF = attr_RLF.mean(0)
            notes.append({"neurons": [[n, j, mean_LF[n, j].item()] for n, j in neurons]})
            towards_D = self._towards(lm, part, edit) if self.action == "update" else None
            keys_LF = _mean_keys(lm, part)
            for layer, j in neurons:
                value_D = _values(lm, layer)[:, j].double()
                of_layer = changes.setdefault(layer, {})
                if towards_D is not None:  # facts that share a neuron add up
                    sign = -1.0 if keys_LF[layer, j] < 0 else 1.0
                    change_D = sign * vector_norm(value_D) * towards_D
                    of_layer[j] = of_layer[j] + change_D if j in of_layer else change_D
                else:
                    of_layer[j] = value_D if self.action == "enhance" else -value_D
        updates: dict[str, Update] = {
            f"{lm.structure.out_name(layer)}.weight": _at_columns(changes[layer], lm)
            for layer in sorted(changes)
        }
        return Delta(updates, {"notes": notes})

    def select(self, attr_RLF: Tensor) -> list[tuple[int, int]]:
        """(layer, index) of the neurons that reach the threshold in enough of a fact's R prompts; at least one."""
        most_R = attr_RLF.flatten(1).amax(1)
        counts_RLF = attr_RLF >= self.threshold * most_R[:, None, None]
        share_LF = counts_RLF.double().mean(0)
        share = self.share
        for _ in range(SHARE_TRIALS):
            number = int((share_LF >= share).sum())
            if self.fewest <= number <= self.most:
                break
            share += SHARE_STEP if number > self.most else -SHARE_STEP
        found = ((share_LF >= share - 1e-9) & (share_LF > 0)).nonzero().tolist()
        if not found:
            log.warning("the prompts of a fact share no neuron: using the strongest one alone")
            strongest = int(attr_RLF.mean(0).argmax())
            found = [divmod(strongest, attr_RLF.shape[-1])]
        return [(layer, j) for layer, j in found]

    def _rows(self, lm: LanguageModel, edit: Edit) -> Rows:
        """The prompt in every context, followed by the old answer: the true one, or the most likely token."""
        prompts = [context + edit.text for context in self._contexts]
        if edit.target_true is not None:
            return lm.tokens.rows(prompts, [edit.target_true] * len(prompts))
        bare = lm.tokens.rows([edit.text])
        with torch.no_grad():
            logits_1V = lm.reuse.tail(bare, 0).logits(
                torch.zeros_like(bare.start_B), bare.length_B - 1
            )
        answer = int(logits_1V.argmax())
        ids = lm.tokens.rows(prompts).unpadded()
        return lm.tokens.pad([[*row, answer] for row in ids], [len(row) for row in ids])

    def _towards(self, lm: LanguageModel, rows: Rows, edit: Edit) -> Tensor:
        """The change of a value of norm one: away from the old answer, towards the new one."""
        new = lm.tokens.rows([edit.text], [edit.target_new])
        old_D, new_D = (_answer_direction(lm, part) for part in (rows, new))
        return self.write_scale * new_D - self.erase_scale * old_D


def attributions(lm: LanguageModel, rows: Rows, points: int, batch_rows: int = 128) -> Tensor:
    """attr_RLF: each neuron's integrated gradient of the probability of each row's target.

    The sum over a layer's neurons is P(1) - P(0), the target's probability with the layer's keys minus that with
    zeros in their place, up to the integral's error.

    Args:
        lm: the language model, with its active edits.
        rows: prompts with their targets.
        points: number of midpoints of the integral.
        batch_rows: rows of one forward pass; the result does not depend on it.
    """
    structure = lm.structure
    count = len(rows.ids_BT)
    attr_RLF = torch.zeros(count, structure.num_layers, structure.inner_width, device=lm.device)
    row_C = torch.arange(count, device=lm.device).repeat_interleave(points)
    alpha_C = ((torch.arange(points, device=lm.device) + 0.5) / points).repeat(count)
    tail = lm.reuse.tail(rows, 0, rows.start_B - 1)
    for layer in range(structure.num_layers):
        tail = lm.reuse.higher(tail, layer)
        for row_c, alpha_c in zip(row_C.split(batch_rows), alpha_C.split(batch_rows), strict=True):
            part_cF = _part(lm, tail.select(row_c), rows.select(row_c), layer, alpha_c)
            attr_RLF[:, layer].index_add_(0, row_c, part_cF / points)
    return attr_RLF


def _part(lm: LanguageModel, tail: Tail, rows: Rows, layer: int, alpha_B: Tensor) -> Tensor:
    """w * dP/dw at alpha w, of each row, with w the keys at all positions that predict its target."""
    row_N, position_N = rows.answer_positions()
    target_N = rows.ids_BT[row_N, position_N + 1]
    at_N = position_N - tail.offset_B[row_N]
    batch = len(rows.ids_BT)
    seen: list[Tensor] = []

    def scale(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        key_NF = args[0].detach().reshape(batch, -1, args[0].shape[-1])[row_N, at_N]
        scaled_NF = (alpha_B[row_N, None].to(key_NF.dtype) * key_NF).requires_grad_()
        seen.extend([key_NF, scaled_NF])
        out_BTD = output.reshape(batch, -1, output.shape[-1])
        value_ND = module.forward(scaled_NF).to(
            output
        )  # the module without its hooks, whatever its storage
        return out_BTD.index_put((row_N, at_N), value_ND).view(output.shape)

    module = lm.net.get_submodule(lm.structure.out_name(layer))
    with torch.enable_grad(), hooked([(module, scale)]):
        logprob_NV = tail.logits(row_N, position_N).float().log_softmax(-1)
        logprob_N = logprob_NV.gather(1, target_N[:, None])[:, 0]
        probability_B = logprob_N.new_zeros(batch).index_add(0, row_N, logprob_N).exp()
        (gradient_NF,) = torch.autograd.grad(probability_B.sum(), seen[1])
    part_NF = seen[0].float() * gradient_NF.float()
    return part_NF.new_zeros(batch, part_NF.shape[-1]).index_add(0, row_N, part_NF)


@torch.no_grad()
def _mean_keys(lm: LanguageModel, rows: Rows) -> Tensor:
    """Activations of all neurons, [L, F], averaged over the positions that predict the targets."""
    row_N, position_N = rows.answer_positions()
    names = [lm.structure.out_name(layer) for layer in range(lm.structure.num_layers)]
    with capture({name: lm.net.get_submodule(name) for name in names}, stop=True) as seen:
        lm.reuse.tail(rows, 0).run()
    keys = [seen[name][0].reshape(len(rows.ids_BT), -1, lm.structure.inner_width) for name in names]
    return torch.stack([keys_BTF[row_N, position_N].float().mean(0) for keys_BTF in keys])


def _values(lm: LanguageModel, layer: int) -> Tensor:
    """The values of a block's neurons, [D, F]: the columns of its output projection."""
    module = lm.net.get_submodule(lm.structure.out_name(layer))
    return read_weight(module).detach().to(lm.device)


def _answer_direction(lm: LanguageModel, rows: Rows) -> Tensor:
    """Unit vector of the first row's target: the mean of its tokens' rows in the output embedding; float64."""
    ids = rows.ids_BT[0, int(rows.start_B[0]) : int(rows.length_B[0])]
    weight_VD = read_weight(lm.net.get_output_embeddings()).to(lm.device)
    if weight_VD.shape[1] != lm.structure.width:
        raise EditError(
            f"the output embedding of {lm.name!r} has width {weight_VD.shape[1]}, its blocks "
            f"{lm.structure.width}: an answer cannot be added to a value; use action suppress or erase"
        )
    mean_D = weight_VD[ids].detach().double().mean(0)
    return mean_D / vector_norm(mean_D)


def _at_columns(changes: dict[int, Tensor], lm: LanguageModel) -> LowRank:
    """Changes of single columns as low-rank factors: the changes, and one-hot rows that select the columns."""
    columns = sorted(changes)
    left_Dr = torch.stack([changes[j] for j in columns], 1)
    right_rF = left_Dr.new_zeros(len(columns), lm.structure.inner_width)
    right_rF[torch.arange(len(columns)), columns] = 1
    return LowRank(left_Dr, right_rF)
