"""Teacher-forced scores and perplexity of a language model.

Shapes: B rows, T tokens, M tokens of the longest target, V words of the vocabulary; K target tokens of all rows, N
positions whose logits are needed, C rows of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from corrigenda.modules.model.active_edits import ActiveEdits
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.handle import ScoreRequest
from corrigenda.modules.model.merging import Merged
from corrigenda.modules.model.reuse import Prefix, Reuse
from corrigenda.modules.model.rows import Rows, TargetScores, batches
from corrigenda.modules.model.tokens import Tokens

TEXT_TOKENS = 512  # at which plain texts are cut for perplexity


class _ScoreTable:
    """The scores of all target tokens, filled batch by batch.

    Args:
        rows: prompts with their targets.
        merged: the rows that run instead.
        full: whether log-probabilities of the whole vocabulary are wanted.
    """

    def __init__(self, rows: Rows, merged: Merged, full: bool) -> None:
        self.full = full
        self.target_BM, self.mask_BM = rows.targets()
        row_K, column_K = self.mask_BM.nonzero(as_tuple=True)
        self.at_K = row_K, column_K
        predicting_K = rows.start_B[row_K] + column_K - 1
        self.row_N, self.column_N, self.which_K = merged.places(row_K, predicting_K)
        self.logprob_BM = torch.zeros(self.target_BM.shape, device=self.target_BM.device)
        self.greedy_BM = torch.zeros_like(self.target_BM)
        self.full_BMV: Tensor | None = None

    def places(self, rows_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(here_N, row, column): which logits are needed from these rows, and where they are in the batch."""
        here_N, order_C = torch.isin(self.row_N, rows_C), rows_C.argsort()
        row = order_C[torch.searchsorted(rows_C[order_C], self.row_N[here_N])]
        return here_N, row, self.column_N[here_N]

    def scatter(self, here_N: Tensor, logits_NV: Tensor) -> None:
        """Writes the scores that follow from these logits."""
        logprob_NV = logits_NV.float().log_softmax(-1)
        here_K = here_N[self.which_K]
        found_K = (here_N.cumsum(0) - 1)[self.which_K[here_K]]  # row of logprob_NV
        at_K = self.at_K[0][here_K], self.at_K[1][here_K]
        self.logprob_BM[at_K] = logprob_NV[found_K, self.target_BM[at_K]]
        self.greedy_BM[at_K] = logprob_NV.argmax(-1)[found_K]
        if self.full:
            if self.full_BMV is None:
                shape = *self.target_BM.shape, logprob_NV.shape[-1]
                self.full_BMV = logprob_NV.new_zeros(shape)
            self.full_BMV[at_K] = logprob_NV[found_K]

    def scores(self) -> TargetScores:
        return TargetScores(
            self.logprob_BM, self.greedy_BM, self.target_BM, self.mask_BM, self.full_BMV
        )


class Scorer:
    """Scores targets, and plain text, with one model.

    Args:
        tokens: the model's tokenizer.
        edits: its network and active edits.
        reuse: what is computed once.
        refuse_not_finite: raises the error for an unedited model whose scores are NaN.
    """

    def __init__(
        self,
        tokens: Tokens,
        edits: ActiveEdits,
        reuse: Reuse,
        refuse_not_finite: Callable[[], NoReturn],
    ) -> None:
        self.tokens, self.edits, self.reuse = tokens, edits, reuse
        self.refuse_not_finite = refuse_not_finite

    def score(self, request: ScoreRequest) -> TargetScores:
        """See :meth:`LanguageModel.score`: encode, merge, run, scatter."""
        rows = self.tokens.rows(request.prompts, request.targets)
        prefix = self.reuse.prefix_of_rows(rows, beside_deltas=bool(request.deltas))
        merged = self.reuse.merge(rows.without_last(), request.owner_B, prefix)
        table = _ScoreTable(rows, merged, request.full)
        for rows_C in batches(merged.rows, prefix.length if prefix else 0):
            here_N, *place = table.places(rows_C)
            table.scatter(here_N, self._logits(request, merged, prefix, rows_C, place))
        unedited = not (request.deltas or self.edits.any_active)
        if unedited and table.logprob_BM.isnan().any():
            self.refuse_not_finite()
        return table.scores()

    def _logits(
        self,
        request: ScoreRequest,
        merged: Merged,
        prefix: Prefix | None,
        rows_C: Tensor,
        place: list[Tensor],
    ) -> Tensor:
        """logits_NV of one batch at the given (row, column) places."""
        part = merged.rows.select(rows_C)
        tail = self.reuse.tail_of(part, prefix)
        branch = self.edits.side_by_side(request.deltas, merged.owner_U[rows_C.cpu()])
        with branch, self.edits.announce(part.prompt_BT):
            return tail.logits(*place)

    def perplexity(self, texts: Iterable[str], max_tokens: int, delta: Delta | None) -> float:
        """See :meth:`LanguageModel.perplexity`."""
        ids = read_ids(self.tokens, texts, max_tokens)
        if not ids:
            raise ValueError("perplexity needs text of at least two tokens, and there is none")
        rows = self.tokens.pad(ids, [1] * len(ids))
        total, count = 0.0, 0
        for rows_C in batches(rows, share=4):  # all logits of all tokens
            part = rows.select(rows_C)
            row_N, position_N = part.answer_positions()
            branch = self.edits.side_by_side([delta] if delta else None, None)
            with branch, self.edits.announce(part.mask_BT.bool()):
                logits_NV = self.reuse.tail_of(part, None).logits(row_N, position_N)
            target_N = part.ids_BT[row_N, position_N + 1]
            total += float(cross_entropy(logits_NV.float(), target_N, reduction="sum"))
            count += len(target_N)
        mean = total / count
        return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf


def read_ids(tokens: Tokens, texts: Iterable[str], max_tokens: int) -> list[list[int]]:
    """Token ids of texts, each cut at 512 and at the model's limit, until there are ``max_tokens`` of them."""
    limit = min(TEXT_TOKENS, tokens.max_length or TEXT_TOKENS)
    ids: list[list[int]] = []
    left = max_tokens
    for text in texts:
        row = tokens.encode([text])[0][: min(limit, left)]
        if len(row) > 1:
            ids.append(row)
            left -= len(row)
        if left < 2:
            break
    return ids
