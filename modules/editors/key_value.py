"""What locate-then-edit methods share: contexts, keys, and the ridge solver.

An MLP output projection is seen as a memory that maps a key k (its input at the subject's last token) to a value
v (its output there). ROME and related methods choose a new value (:mod:`corrigenda.modules.editors.value_search`)
and write it in closed form.

Shapes: N edits, Q context templates per edit (the bare prompt first), R = N * Q rows, F key width, D value
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from corrigenda.datamodules.records import Edit
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.hooks import capture, first
from corrigenda.modules.model.kv_cache import can_be_cut, first_tokens, run_start
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows, batches
from corrigenda.modules.model.tail import Tail

STARTS = ("The", "Therefore", "Because", "I", "You")


def sample_contexts(
    lm: LanguageModel, lengths: Sequence[Sequence[int]], seed: int = 0
) -> list[str]:
    """Texts to put before a prompt, sampled from the unedited model; the first is empty (the bare prompt).

    Args:
        lm: the model to sample from, top-5 and from a few common opening words: small models that start from the
            end-of-text token mostly write junk.
        lengths: pairs of (tokens, number of texts).
        seed: the same seed gives the same texts.
    """
    contexts = [""]
    with lm.pristine(), lm.tokens.as_written(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tokens, count in lengths:
            prompts = [STARTS[i % len(STARTS)] for i in range(count)]
            texts = lm.generate(prompts, tokens - 1, top_k=5)
            for start, text in zip(prompts, texts, strict=True):
                clean = " ".join((start + text).replace("{", " ").replace("}", " ").split())
                contexts.append(clean.rstrip(". ") + ". ")
    return contexts


# ---------------------------------------------------------------------------- rows of some edits


@dataclass
class KeyRows:
    """Every edit's prompt in every context, with its target, cut at the subject's last token.

    Attributes:
        rows: R = N * Q answer rows, then N rows of the essence (``"<subject> is a"``) for the drift of the
            subject's meaning.
        lookup_R: position of the subject's last token in every row.
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
        lookups = [lm.tokens.subject_end(edit, context) for edit in edits for context in contexts]
        whole = [Edit(essence, edit.subject, edit.target_new) for edit in edits]
        lookups += [lm.tokens.subject_end(edit) for edit in whole]
        rows = Rows.cat(
            [lm.tokens.rows(prompts, targets), lm.tokens.rows([edit.text for edit in whole])]
        )
        lookup_R = torch.tensor(lookups, device=lm.device)
        return cls(rows, lookup_R, len(edits), len(contexts))

    @property
    def owner_R(self) -> Tensor:
        """The edit of each row."""
        edits = torch.arange(self.num_edits, device=self.lookup_R.device)
        return torch.cat([edits.repeat_interleave(self.num_contexts), edits])

    def select(self, edits_n: Tensor) -> tuple[KeyRows, Tensor]:
        """(rows of some edits, their indices among all rows)."""
        keep = torch.isin(self.owner_R, edits_n).nonzero()[:, 0]
        width = int(self.rows.mask_BT[keep].sum(1).max())
        part = self.rows.select(keep)
        assert part.ids_BT.shape[1] == width
        return KeyRows(part, self.lookup_R[keep], len(edits_n), self.num_contexts), keep

    def tail(self, lm: LanguageModel, layer: int) -> Tail:
        """The rows with everything below ``layer`` and before the subject's last token already computed.

        The last token of an answer is never read.
        """
        answers = self.num_edits * self.num_contexts
        return lm.reuse.tail(self.rows.without_last(answers), layer, self.lookup_R)


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
    """Every edit's prompt in every context, cut after the subject's last token, since keys depend on no more.

    Attributes:
        rows: R = N * Q rows.
        owner_R: the edit of each row.
        weight_R: the row's weight in its edit's mean.
        num_contexts: Q; an edit's rows are consecutive, one per context.
    """

    rows: Rows
    owner_R: Tensor
    weight_R: Tensor
    num_contexts: int

    @classmethod
    def of(
        cls, lm: LanguageModel, edits: Sequence[Edit], contexts: Sequence[str], weight_Q: Tensor
    ) -> SubjectRows:
        whole = lm.tokens.rows([context + edit.text for edit in edits for context in contexts])
        lookups = [lm.tokens.subject_end(edit, context) for edit in edits for context in contexts]
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

        Edit n is read in the model changed by ``deltas[group_N[n]]``. The pass ends at the module and covers a
        bounded number of tokens at a time; with one model for all edits, the common prefix of their rows in a
        context is run once. (The reference path, ``reuse_prefix: false``, runs the whole model, one edit at a
        time.)
        """
        count, reuse = len(group_N), lm.reuse.enabled
        run = lm.net.get_decoder() if reuse else lm.net
        module = lm.net.get_submodule(name)
        sums: list[Tensor] = []
        for row_b, prefix in self._parts(lm, module, deltas) if reuse else self._per_edit(count):
            part, owner_b = self.rows.select(row_b), self.owner_R[row_b]
            start = prefix.get_seq_length() if prefix else 0
            branches = lm.edits.side_by_side(deltas, group_N[owner_b.cpu()])
            with branches, capture({name: module}, stop=reuse) as seen:
                run(
                    input_ids=part.ids_BT[:, start:],
                    attention_mask=part.mask_BT,
                    past_key_values=first_tokens(prefix, start, len(row_b)) if prefix else None,
                    use_cache=prefix is not None,
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
        """Rows that run together, and the keys and values of their common prefix if that is run once."""
        if (
            len(deltas) > 1
            or lm.edits.need_whole_rows
            or len(self.rows.ids_BT) == self.num_contexts
        ):
            yield from ((row_b, None) for row_b in batches(self.rows))
            return
        every_R = torch.arange(len(self.rows.ids_BT), device=lm.device)
        for row_n in every_R.view(-1, self.num_contexts).T:
            rows = self.rows.select(row_n)
            start, prefix = rows.common_start(), None
            if start > 1:
                with lm.edits.side_by_side(deltas, None):
                    prefix = run_start(lm.net, rows.ids_BT[:1, :start], until=module)
                prefix = prefix if prefix and can_be_cut(prefix) else None
            yield from ((row_n[b], prefix) for b in batches(rows, start if prefix else 0))

    def _per_edit(self, count: int) -> list[tuple[Tensor, None]]:
        return [((self.owner_R == n).nonzero()[:, 0], None) for n in range(count)]


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
    for many); with ridge = lambda it is MEMIT's R K' (lambda A + K K')^-1. Earlier keys are added to K with
    residuals of zero, which equals adding P P' / lambda to A. Of the two equivalent systems the smaller one is
    solved: one equation per key, or one per key dimension.

    Args:
        factor_FF: lower Cholesky factor of A.
        keys_FN: one column per edit.
        residual_DN: the change of the output that each key needs.
        ridge: weight of ordinary text against the new keys.
        earlier_FP: keys whose outputs must not change.
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
