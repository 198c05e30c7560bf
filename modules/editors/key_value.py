"""What locate-then-edit methods share: contexts, keys, optimised values, and the one ridge solver.

An MLP output projection is read as a memory that answers a key k (its input at the subject's last token) with
a value v (its output there). ROME and its kin choose a new value by gradient descent (methods after Meng et
al., 2022, arXiv 2202.05262) and write it in closed form.

Shapes: N edits, Q context templates per edit (the bare prompt first), R = N * Q rows, F key width, D value
width, V words.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from transformers import DynamicCache

from datamodules.records import Edit
from modules.adapters import ModulePatch
from modules.editing import Delta, EditError, read_tensors, write_tensors
from modules.hooks import capture, first, hooked, replace_first
from modules.lm import LanguageModel
from modules.optimize import IndependentAdam
from modules.rows import Rows
from modules.tail import Tail, can_be_cut, first_tokens, run_start

log = logging.getLogger(__name__)

VALUE_FORMAT = "corrigenda-value-1"
# Tokens of padding that are worth a pass of their own: fewer take less time than going through all weights again.
WORTH_A_PASS = 16
STARTS = ("The", "Therefore", "Because", "I", "You")


def sample_contexts(
    lm: LanguageModel, lengths: Sequence[Sequence[int]], seed: int = 0
) -> list[str]:
    """Texts to put before a prompt, sampled from the unedited model; the first is empty (the bare prompt).

    Args:
        lm: sampled with the five most likely tokens, from a handful of opening words: text sampled from an
            end-of-text token alone is mostly junk in small models.
        lengths: pairs of (tokens, how many).
        seed: the same seed gives the same texts.
    """
    contexts = [""]
    with lm.pristine(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tokens, count in lengths:
            prompts = [STARTS[i % len(STARTS)] for i in range(count)]
            for start, text in zip(prompts, lm.generate(prompts, tokens - 1, top_k=5), strict=True):
                clean = " ".join((start + text).replace("{", " ").replace("}", " ").split())
                contexts.append(clean.rstrip(". ") + ". ")
    return contexts


def searched_together(lm: LanguageModel, edits: Sequence[Edit], parallel: int) -> list[list[int]]:
    """Indices of the edits whose values are looked for side by side, the quickest first.

    At most ``parallel`` at once, and such as run about as many tokens in every step, those from the subject on:
    the others' would be padding.
    """
    tokens = [
        len(lm.encode([f"{edit.text} {edit.target_new}"])[0]) - lm.lookup(edit) for edit in edits
    ]
    parts: list[list[int]] = []
    for n in sorted(range(len(edits)), key=tokens.__getitem__):
        if not parts or len(parts[-1]) == parallel or tokens[n] > 1.25 * tokens[parts[-1][0]]:
            parts.append([])
        parts[-1].append(n)
    return parts


# ---------------------------------------------------------------------------- rows of some edits


@dataclass
class KeyRows:
    """Every edit's prompt in every context, with its target, cut at the subject's last token.

    Attributes:
        rows: R = N * Q answer rows, then N rows of the essence (``"<subject> is a"``) for the drift of the
            subject's meaning.
        lookup_R: the subject's last token in every row.
        num_edits: N.
        num_contexts: Q.
    """

    rows: Rows
    lookup_R: Tensor
    num_edits: int
    num_contexts: int

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        edits: Sequence[Edit],
        contexts: Sequence[str],
        essence: str = "{} is a",
    ) -> KeyRows:
        prompts = [context + edit.text for edit in edits for context in contexts]
        targets = [edit.target_new for edit in edits for _ in contexts]
        lookups = [lm.lookup(edit, context) for edit in edits for context in contexts]
        whole = [Edit(essence, edit.subject, edit.target_new) for edit in edits]
        lookups += [lm.lookup(edit) for edit in whole]
        rows = Rows.cat([lm.rows(prompts, targets), lm.rows([edit.text for edit in whole])])
        lookup_R = torch.tensor(lookups, device=lm.device)
        return cls(rows, lookup_R, len(edits), len(contexts))

    @property
    def owner_R(self) -> Tensor:
        """The edit of each row."""
        edits = torch.arange(self.num_edits, device=self.lookup_R.device)
        return torch.cat([edits.repeat_interleave(self.num_contexts), edits])

    def select(self, edits_n: Tensor) -> tuple[KeyRows, Tensor]:
        """The rows of some edits, and their indices among all rows."""
        keep = torch.isin(self.owner_R, edits_n).nonzero()[:, 0]
        width = int(self.rows.mask_BT[keep].sum(1).max())
        part = self.rows.select(keep)
        assert part.ids_BT.shape[1] == width
        return KeyRows(part, self.lookup_R[keep], len(edits_n), self.num_contexts), keep

    def tail(self, lm: LanguageModel, layer: int) -> Tail:
        """Everything below ``layer`` and before the subject's last token, computed once.

        Nothing reads the last token of an answer.
        """
        answers = self.num_edits * self.num_contexts
        return lm.tail(self.rows.answers_read(answers), layer, self.lookup_R)


def keys_and_values(
    lm: LanguageModel, key_rows: KeyRows, tail: Tail, layer: int
) -> tuple[Tensor, Tensor]:
    """(keys_NQF, values_NQD): input and output of block ``layer``'s output projection at the lookup tokens."""
    name = lm.structure.out_name(layer)
    with torch.no_grad(), capture({name: lm.net.get_submodule(name)}, stop=True) as seen:
        tail.run()
    batch = len(key_rows.lookup_R)
    row_R = torch.arange(batch, device=lm.device)
    at_R = key_rows.lookup_R - tail.offset_B
    picked = [t.view(batch, -1, t.shape[-1])[row_R, at_R] for t in seen[name]]
    count = key_rows.num_edits * key_rows.num_contexts
    keys, values = (t[:count].unflatten(0, (key_rows.num_edits, -1)) for t in picked)
    return keys.float(), values.float()


@dataclass
class SubjectRows:
    """Every edit's prompt in every context, cut after the subject's last token: all that keys depend on.

    Attributes:
        rows: R = N * Q rows.
        owner_R: the edit of each row.
        weight_R: what each row counts in its edit's mean.
        num_contexts: Q; an edit's rows stand together, one per context.
    """

    rows: Rows
    owner_R: Tensor
    weight_R: Tensor
    num_contexts: int

    @classmethod
    def of(
        cls, lm: LanguageModel, edits: Sequence[Edit], contexts: Sequence[str], weight_Q: Tensor
    ) -> SubjectRows:
        whole = lm.rows([context + edit.text for edit in edits for context in contexts])
        lookups = [lm.lookup(edit, context) for edit in edits for context in contexts]
        last_R = torch.tensor(lookups, device=lm.device)
        width = max(lookups) + 1
        mask_BT = torch.arange(width, device=lm.device) <= last_R[:, None]
        rows = Rows(whole.ids_BT[:, :width], mask_BT.long(), last_R)
        owner_R = torch.arange(len(edits), device=lm.device).repeat_interleave(len(contexts))
        return cls(rows, owner_R, weight_Q.to(lm.device).repeat(len(edits)), len(contexts))

    @torch.no_grad()
    def means(
        self, lm: LanguageModel, name: str, deltas: Sequence[Delta], group_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(inputs_NI, outputs_NO) of module ``name`` at the subjects' last tokens, means over contexts.

        Edit n is read in the model changed by ``deltas[group_N[n]]``. The pass ends at the module and goes
        over a bounded number of tokens at a time; where one model serves all edits, what their rows in a
        context begin with is run once. (The plain way, ``reuse_prefix: false``, goes on to the head, one edit at
        a time.)
        """
        count, reuse = len(group_N), lm.reuse_prefix
        run = lm.net.get_decoder() if reuse else lm.net
        module = lm.net.get_submodule(name)
        sums: list[Tensor] = []
        for row_b, begun in self._parts(lm, module, deltas) if reuse else self._per_edit(count):
            part, owner_b = self.rows.select(row_b), self.owner_R[row_b]
            start = begun.get_seq_length() if begun else 0
            branches = lm.side_by_side(deltas, group_N[owner_b.cpu()])
            with branches, capture({name: module}, stop=reuse) as seen:
                run(
                    input_ids=part.ids_BT[:, start:],
                    attention_mask=part.mask_BT,
                    past_key_values=first_tokens(begun, start, len(row_b)) if begun else None,
                    use_cache=begun is not None,
                )
            for i, found in enumerate(map(first, seen[name])):
                found_bTX = found.view(len(row_b), -1, found.shape[-1])
                at_b = part.length_B - 1 - start
                at_bX = found_bTX[torch.arange(len(row_b), device=lm.device), at_b]
                if len(sums) == i:
                    sums.append(at_bX.new_zeros(count, at_bX.shape[1], dtype=torch.float32))
                sums[i].index_add_(0, owner_b, self.weight_R[row_b, None] * at_bX.float())
        return sums[0], sums[1]

    def _parts(
        self, lm: LanguageModel, module: nn.Module, deltas: Sequence[Delta]
    ) -> Iterator[tuple[Tensor, DynamicCache | None]]:
        """Rows that run together, and the keys and values of what they begin with, where that is shared."""
        adapted = any(isinstance(handle, ModulePatch) for handle in lm.handles)
        if len(deltas) > 1 or adapted or len(self.rows.ids_BT) == self.num_contexts:
            yield from ((row_b, None) for row_b in lm._chunks(self.rows))
            return
        every_R = torch.arange(len(self.rows.ids_BT), device=lm.device)
        for row_n in every_R.view(-1, self.num_contexts).T:
            rows = self.rows.select(row_n)
            start, begun = rows.common_start(), None
            if start > 1:
                with lm.side_by_side(deltas, None):
                    begun = run_start(lm.net, rows.ids_BT[:1, :start], until=module)
                begun = begun if begun and can_be_cut(begun) else None
            yield from ((row_n[b], begun) for b in lm._chunks(rows, start if begun else 0))

    def _per_edit(self, count: int) -> list[tuple[Tensor, None]]:
        return [((self.owner_R == n).nonzero()[:, 0], None) for n in range(count)]


# ---------------------------------------------------------------------------- values


@dataclass(frozen=True)
class ValueSettings:
    """How a new value is looked for; the published constants are the methods' defaults.

    Attributes:
        steps: evaluations of the loss; at most ``steps - 1`` updates.
        lr: Adam's step size.
        weight_decay: weight of ``|delta| / |v0|**2``.
        kl_weight: weight of KL(edited || original) after ``"<subject> is a"``.
        clamp_norm: delta is kept within this multiple of ``|v0|``.
        precision: ``bfloat16`` runs the network faster and moves values by a few per cent; losses, moments
            and the value itself stay in float32.
        stop_loss: an edit whose loss is below this has finished.
    """

    steps: int
    lr: float
    weight_decay: float
    kl_weight: float
    clamp_norm: float
    precision: Literal["float32", "bfloat16"] = "float32"
    stop_loss: float = 5e-2


@dataclass
class Values:
    """Result of the search, one entry per edit: change of the value, loss and likelihood at its end."""

    delta_ND: Tensor
    iterations_N: Tensor
    loss_N: Tensor
    nll_N: Tensor


def optimise_values(
    lm: LanguageModel,
    key_rows: KeyRows,
    tail: Tail,
    site: str,
    v0_ND: Tensor,
    settings: ValueSettings,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Values:
    """The change delta of the output of module ``site`` at the lookup tokens that makes each target likely.

    loss(delta) = mean over contexts of the mean token NLL + kl_weight * KL + weight_decay * |delta| / |v0|^2.
    Edits are optimised together and do not influence each other: the loss is a sum, Adam's moments, the clamp
    and the stop are each edit's own, and an edit that has stopped leaves the batch.
    """
    num_edits = key_rows.num_edits
    delta_ND = torch.zeros_like(v0_ND, requires_grad=True)
    bound_N1 = settings.clamp_norm * vector_norm(v0_ND, dim=1, keepdim=True)
    adam = IndependentAdam([delta_ND], settings.lr)
    result = Values(delta_ND, *(torch.zeros(num_edits, device=lm.device) for _ in range(3)))
    active_N = torch.ones(num_edits, dtype=torch.bool, device=lm.device)
    problem = _Problem(lm, key_rows, tail, site, settings.precision)
    for step in range(settings.steps):
        nll_n, kl_n = problem.losses(delta_ND[active_N])
        size_n = vector_norm(delta_ND[active_N], dim=1)
        decay_n = settings.weight_decay * size_n / vector_norm(v0_ND[active_N], dim=1) ** 2
        loss_n = nll_n + settings.kl_weight * kl_n + decay_n
        result.loss_N[active_N], result.nll_N[active_N] = loss_n.detach(), nll_n.detach()
        result.iterations_N[active_N] = step + 1
        if on_step:
            on_step(step, result.loss_N)
        going_n = loss_n.detach() >= settings.stop_loss
        if step == settings.steps - 1 or not going_n.any():
            break
        (gradient_ND,) = torch.autograd.grad(loss_n[going_n].sum(), delta_ND)
        if not going_n.all():
            active_N[active_N.clone()] = going_n
            problem = problem.select(going_n.nonzero()[:, 0])
        adam.step([gradient_ND], active_N)
        with torch.no_grad():
            size_N1 = vector_norm(delta_ND, dim=1, keepdim=True)
            delta_ND.mul_((bound_N1 / size_N1).nan_to_num(1.0, posinf=1.0).clamp(max=1.0))
    result.delta_ND = delta_ND.detach()
    return result


class _Problem:
    """The loss of some edits as a function of their deltas; keeps what does not depend on them."""

    def __init__(
        self, lm: LanguageModel, key_rows: KeyRows, tail: Tail, site: str, precision: str
    ) -> None:
        self.lm, self.key_rows, self.tail, self.site = lm, key_rows, tail, site
        self.precision = precision
        rows = key_rows.rows
        self.answers = key_rows.num_edits * key_rows.num_contexts
        self.row_N, position_N = rows.answer_positions()
        self.target_N = rows.ids_BT[self.row_N, position_N + 1]
        every_R = torch.arange(len(rows.ids_BT), device=lm.device)
        answer_R, essence_R = every_R[: self.answers], every_R[self.answers :]
        last_N = rows.length_B[essence_R] - 1
        longer = int(tail.length_B[essence_R].max() - tail.length_B[answer_R].max())
        if self.answers * longer < WORTH_A_PASS:
            read = torch.cat([self.row_N, essence_R]), torch.cat([position_N, last_N])
            self.parts = [(tail.trimmed(), every_R, *read)]
        else:
            answers, essence = (tail.select(row_r).trimmed() for row_r in (answer_R, essence_R))
            self.parts = [
                (answers, answer_R, self.row_N, position_N),
                (essence, essence_R, essence_R - self.answers, last_N),
            ]
        self.base_NV: Tensor | None = None

    def losses(self, delta_nD: Tensor) -> tuple[Tensor, Tensor]:
        """(nll_n, kl_n) of each edit."""
        logprob_NV = torch.cat([self._logprobs(delta_nD, *part) for part in self.parts])
        count = len(self.target_N)
        nll_N = -logprob_NV[:count].gather(1, self.target_N[:, None])[:, 0]
        tokens_R = torch.bincount(self.row_N, minlength=self.answers)
        nll_R = nll_N.new_zeros(self.answers).index_add(0, self.row_N, nll_N) / tokens_R
        essence_NV = logprob_NV[count:]
        if self.base_NV is None:  # delta is zero in the first evaluation
            self.base_NV = essence_NV.detach()
        kl_n = (essence_NV.exp() * (essence_NV - self.base_NV)).sum(-1)
        return nll_R.unflatten(0, (self.key_rows.num_edits, -1)).mean(1), kl_n

    def _logprobs(
        self, delta_nD: Tensor, tail: Tail, row_r: Tensor, read_N: Tensor, position_N: Tensor
    ) -> Tensor:
        """logprob_NV of some of the rows, with their edits' deltas added at the lookup tokens."""
        at_r = self.key_rows.lookup_R[row_r] - tail.offset_B
        delta_rD = delta_nD[self.key_rows.owner_R[row_r]]
        index_r = torch.arange(len(row_r), device=self.lm.device)

        def add(_module: object, _args: tuple, output: Any) -> Any:  # noqa: ANN401
            hidden = first(output)
            out_rTD = hidden.view(len(row_r), -1, hidden.shape[-1])
            place = (index_r, at_r)
            change = torch.zeros_like(out_rTD).index_put(place, delta_rD.to(hidden.dtype))
            return replace_first(output, (out_rTD + change).view(hidden.shape))

        fast = torch.autocast(
            self.lm.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )
        with fast, hooked([(self.lm.net.get_submodule(self.site), add)]):
            return tail.logits(read_N, position_N).float().log_softmax(-1)

    def select(self, edits_n: Tensor) -> _Problem:
        key_rows, keep = self.key_rows.select(edits_n)
        part = _Problem(self.lm, key_rows, self.tail.select(keep), self.site, self.precision)
        part.base_NV = self.base_NV[edits_n] if self.base_NV is not None else None
        return part


class FoundValues:
    """Values that were found, a file per edit, so that a search of hours can be interrupted and shared.

    A value belongs to the weights it was found on and to everything the search depended on.

    Args:
        folder: where the files are.
        base: JSON values that name all of that: the hash of the weights, the site, contexts, settings.
    """

    def __init__(self, folder: str | Path, base: dict[str, Any]) -> None:
        self.folder, self.base = Path(folder), base

    def read(self, edit: Edit) -> tuple[Tensor, dict[str, Any]] | None:
        """(delta_D, note) of an edit, None where it was not found yet; a damaged file is made again."""
        path = self._path(edit)
        if not path.is_file():
            return None
        try:
            tensors, header = read_tensors(path, VALUE_FORMAT, "value")
            return tensors["delta"], json.loads(header["note"])
        except (EditError, KeyError, ValueError) as error:
            log.warning("%s is not usable (%s): looking for the value again", path, error)
            return None

    def write(self, edit: Edit, delta_D: Tensor, note: dict[str, Any]) -> None:
        header = {"format": VALUE_FORMAT, "note": json.dumps(note)}
        write_tensors(self._path(edit), {"delta": delta_D}, header)

    def _path(self, edit: Edit) -> Path:
        asked = {
            **self.base,
            "prompt": edit.prompt,
            "subject": edit.subject,
            "new": edit.target_new,
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{digest}.safetensors"


# ---------------------------------------------------------------------------- the solver


def solve_update(
    factor_FF: Tensor,
    keys_FN: Tensor,
    residual_DN: Tensor,
    ridge: float,
    earlier_FP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(left_DN, right_NF) of R (K' A^-1 K + ridge I)^-1 K' A^-1, all in float64; left is R itself.

    With A the second moment and ridge 0 this is the equality-constrained solution (ROME for one edit, EMMET
    for many); with ridge = lambda it is MEMIT's R K' (lambda A + K K')^-1. Earlier keys join K with residuals
    of zero, which is the same as adding P P' / lambda to A. Of the two forms the one with the smaller system
    is solved: as many equations as keys, or as they are wide.

    Args:
        factor_FF: lower Cholesky factor of A.
        keys_FN: one column per edit.
        residual_DN: what each key's value still lacks.
        ridge: weight of the stored memories against the new ones.
        earlier_FP: keys whose values are to stay as they are.
    """
    keys_FN, residual_DN = keys_FN.double(), residual_DN.double()
    every_FM = keys_FN if earlier_FP is None else torch.cat([earlier_FP.double(), keys_FN], 1)
    width, count = every_FM.shape
    if ridge > 0 and count > width:
        system_FF = ridge * factor_FF @ factor_FF.T + every_FM @ every_FM.T
        right_FN = torch.cholesky_solve(keys_FN, torch.linalg.cholesky(system_FF))
        return residual_DN, right_FN.T
    solved_FM = torch.cholesky_solve(every_FM, factor_FF)
    gram_MM = every_FM.T @ solved_FM
    gram_MM.diagonal().add_(ridge)
    new_MN = torch.eye(count, dtype=gram_MM.dtype, device=gram_MM.device)[:, -keys_FN.shape[1] :]
    return residual_DN, torch.linalg.solve(gram_MM, new_MN).T @ solved_FM.T
