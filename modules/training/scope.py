"""Which prompts an edit is about: SERAC's scope classifier (Mitchell et al., 2022, arXiv 2206.06520).

phi(e, x) says how likely prompt x is within the scope of edit e. It has two forms, with E a sentence encoder:

    distance   phi = exp(-scale * |E(e) - E(x)|^2), on unit vectors
    cross      phi = sigmoid(w' h(e, x)), h the state of the first token of the pair, read together;
               asked only of the edits whose vectors (of the encoder as it came) are nearest

and is trained on pairs, within scope and without, by balanced cross-entropy.

Departures from the authors' code: phi reads the edit's prompt without its target, so an edit's scope does not
depend on what it says; the scale is learned; all prompts of a step are drawn once, and every edit of the step
is compared with all of them, which costs nothing in the distance form; the threshold is not 1/2 but the one
that routes held-out prompts best with all held-out edits in one memory (:func:`best_threshold`).

Shapes: B pairs or prompts, E edits, K candidates per prompt, D width of the encoder.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torchmetrics.classification import BinaryAUROC

from corrigenda.datamodules.records import EditCase
from corrigenda.modules import checks
from corrigenda.modules.evaluation.module import require_own_dtype, warn_untrained
from corrigenda.modules.model.delta import EditError
from corrigenda.modules.retrieval.encoder import TextEncoder
from corrigenda.modules.retrieval.search import nearest
from corrigenda.modules.training.checkpoints import read_checkpoint
from corrigenda.modules.training.pairs import Kin, Pairs, kin_of, unmoved

EPSILON = 1e-6  # 1 - phi is not taken to be smaller
READ_TOGETHER = 64  # pairs
OTHERS = 20.0


# ---------------------------------------------------------------------------- two forms


class Scorer(Protocol):
    """A form of phi."""

    num_candidates: int

    @property
    def finder(self) -> TextEncoder:
        """Makes the unit vectors by which candidates are found."""

    def log_scores(self, entries: Sequence[str], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(log phi, log(1 - phi)) of B pairs, differentiable."""

    def judge(
        self, queries: Sequence[str], entries: Sequence[Sequence[str]], cosine_BK: Tensor
    ) -> Tensor:
        """phi_BK of each query and its candidates, whose vectors have these inner products; on the CPU."""


class Distance(nn.Module):
    """phi = exp(-scale * squared distance of unit vectors)."""

    num_candidates = 1

    def __init__(self, encoder: str) -> None:
        super().__init__()
        self.encoder = TextEncoder(encoder)
        self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))

    @property
    def finder(self) -> TextEncoder:
        return self.encoder

    def log_scores(self, entries: Sequence[str], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        texts = list(dict.fromkeys([*entries, *queries]))
        place = {text: i for i, text in enumerate(texts)}
        vectors = self.encoder(texts)
        left, right = (vectors[[place[t] for t in part]] for part in (entries, queries))
        exponent_B = -self.log_scale.exp() * (left - right).square().sum(1)
        return exponent_B, (-torch.expm1(exponent_B)).clamp(min=EPSILON).log()

    def judge(
        self, queries: Sequence[str], entries: Sequence[Sequence[str]], cosine_BK: Tensor
    ) -> Tensor:
        return torch.exp(-self.log_scale.exp().item() * (2 - 2 * cosine_BK).clamp(min=0))


class CrossEncoder(nn.Module):
    """phi from edit and prompt read together; candidates are found with the encoder as it came."""

    num_candidates = 4

    def __init__(self, encoder: str) -> None:
        super().__init__()
        self.selector = TextEncoder(encoder).requires_grad_(False)
        self.encoder = TextEncoder(encoder)
        self.head = nn.Linear(self.encoder.width, 1)

    @property
    def finder(self) -> TextEncoder:
        return self.selector

    def log_scores(self, entries: Sequence[str], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        logit_B = self.head(self.encoder.pairs(entries, queries))[:, 0]
        return logsigmoid(logit_B), logsigmoid(-logit_B)

    @torch.no_grad()
    def judge(
        self, queries: Sequence[str], entries: Sequence[Sequence[str]], cosine_BK: Tensor
    ) -> Tensor:
        pairs = [(e, q) for q, some in zip(queries, entries, strict=True) for e in some]
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        phi_B = torch.empty(len(pairs))
        for begin in range(0, len(order), READ_TOGETHER):
            part = order[begin : begin + READ_TOGETHER]
            log_phi_B, _ = self.log_scores(*zip(*(pairs[i] for i in part), strict=True))
            phi_B[part] = log_phi_B.exp().cpu()
        return phi_B.view(cosine_BK.shape)


FORMS: dict[str, type[Distance] | type[CrossEncoder]] = {
    "distance": Distance,
    "cross": CrossEncoder,
}


# ---------------------------------------------------------------------------- training


def best_threshold(score_B: Tensor, own_B: Tensor, inside_B: Tensor) -> tuple[float, float]:
    """(threshold, balance): where prompts within scope find their own edit and others find none.

    Balance is the mean of the two shares. For the threshold the second counts OTHERS times as much as the
    first, as little of what a model is asked is about an edit; of equally good ones the middle one is taken.

    Args:
        score_B: phi of the most likely edit.
        own_B: whether that is the one the prompt was made for.
        inside_B: whether it was made for any.
    """
    levels_L = torch.cat([score_B.new_zeros(1), score_B.unique(), score_B.new_ones(1)])
    middles_L = (levels_L[1:] + levels_L[:-1]) / 2
    above_LB = score_B > middles_L[:, None]
    found_L = (above_LB & own_B & inside_B).sum(1) / inside_B.sum().clamp(min=1)
    left_L = (~above_LB & ~inside_B).sum(1) / (~inside_B).sum().clamp(min=1)
    worth_L = found_L + OTHERS * left_L
    best = (worth_L == worth_L.max()).nonzero()[:, 0]
    middle = best[len(best) // 2]
    return middles_L[middle].item(), (found_L + left_L)[middle].item() / 2


class ScopeClassifier(LightningModule):
    """phi: whether a prompt is within the scope of an edit. Train it with ``fit``; it needs no language model.

    Validation reports ``scope/auc`` over pairs, and ``scope/routed``, the balance of what is found and what is
    left alone with all validation cases in one memory, at the threshold of :func:`best_threshold`, which is kept.
    Its checkpoint with the best ``val/scope/routed`` is what SERAC takes.

    Args:
        encoder: a BERT-like model: a hub id, a local folder, or ``minilm``.
        form: ``distance`` compares vectors, one look-up however many edits there are; ``cross`` reads edit and
            prompt together, for the nearest few edits.
        lr: Adam's step size for the encoder.
        lr_head: Adam's step size for the scale or the classifying layer.
        num_negatives: hard and, as many again, easy negatives per case and step, at most.
    """

    trains_on = "train"
    threshold: Tensor

    def __init__(
        self,
        encoder: str = "minilm",
        form: Literal["distance", "cross"] = "distance",
        lr: float = 5e-5,
        lr_head: float = 1e-2,
        num_negatives: int = 4,
    ) -> None:
        super().__init__()
        checks.positive(lr=lr)
        checks.at_least(0, lr_head=lr_head)
        checks.whole(0, num_negatives=num_negatives)
        self.strict_loading = False  # checkpoints leave the frozen encoder out
        self.form, self.num_negatives = form, num_negatives
        self.lr, self.lr_head = lr, lr_head
        self.scorer = FORMS[form](encoder)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.base_model = {"name": encoder, "hash": self.scorer.encoder.weights_hash()}
        self.auc = BinaryAUROC()
        self.means: dict[str, float] = {}  # of the last finished validation
        self.method_name = type(self).__name__
        self.trained = False
        self._kin: Kin = {}
        self._held_out: list[EditCase] = []  # of the validation that is running

    def setup(self, stage: str) -> None:
        require_own_dtype(self.trainer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        encoder = list(self.scorer.encoder.parameters())
        inside = {id(p) for p in encoder}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in inside]
        return torch.optim.Adam(
            [{"params": encoder, "lr": self.lr}, {"params": others, "lr": self.lr_head}]
        )

    def on_train_start(self) -> None:
        """Looks through all training cases: few batches hold two that are about one subject."""
        self.trained = True
        self._kin = kin_of(self.trainer.datamodule.cases("train"))  # type: ignore[attr-defined]

    def training_step(self, batch: list[EditCase], batch_idx: int) -> Tensor:
        """Balanced cross-entropy: the mean over pairs within scope plus the mean over pairs without."""
        draw = random.Random(f"{self.current_epoch} {batch_idx}")
        pairs = Pairs.to_train(batch, draw, self.num_negatives, self._kin)
        log_phi_B, log_rest_B = self.scorer.log_scores(pairs.entries, pairs.queries)
        inside_B = torch.tensor(pairs.inside, device=log_phi_B.device)
        loss = -log_phi_B[inside_B].mean()
        if not inside_B.all():
            loss = loss - log_rest_B[~inside_B].mean()
        self.log("train/loss", loss, batch_size=len(batch), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        if not self.trained and not self.trainer.sanity_checking:
            warn_untrained(self)

    def validation_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Keeps the cases for the epoch's end; none is edited, so there are no results of cases."""
        self._held_out += batch
        return {"results": []}

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        cases, self._held_out = self._held_out, []
        pairs = Pairs.to_validate(cases)
        texts = list(dict.fromkeys([*pairs.entries, *pairs.queries]))
        vectors_TD = self.scorer.finder.encode(texts).cpu()
        vectors = dict(zip(texts, vectors_TD, strict=True))
        threshold, routed = best_threshold(*self._routes(cases, vectors))
        self.threshold.fill_(threshold)
        self.auc.update(self._pair_scores(pairs, vectors), torch.tensor(pairs.inside))
        self.means = {"scope/auc": float(self.auc.compute()), "scope/routed": routed}
        self.auc.reset()
        for name, value in {**self.means, "scope/threshold": threshold}.items():
            self.log(f"val/{name}", value, prog_bar=True, sync_dist=False)

    def _pair_scores(self, pairs: Pairs, vectors: Mapping[str, Tensor]) -> Tensor:
        """phi_B of pairs."""
        left_BD, right_BD = (_rows(part, vectors) for part in (pairs.entries, pairs.queries))
        cosine_B1 = (left_BD * right_BD).sum(1, keepdim=True)
        return self.scorer.judge(pairs.queries, [[e] for e in pairs.entries], cosine_B1)[:, 0]

    def _routes(
        self, cases: Sequence[EditCase], vectors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(score_B, own_B, inside_B) of all that is asked about the cases, with all of them remembered.

        What must not move is left out where it is a case's own prompt.
        """
        entries = list(dict.fromkeys(case.edits[0].text for case in cases))
        known = set(entries)
        asked = [(p.prompt, case.edits[0].text) for case in cases for p in case.phrasings]
        asked += [(prompt, "") for c in cases for prompt in unmoved(c) if prompt not in known]
        queries = [prompt for prompt, _ in asked]
        near = nearest(_rows(queries, vectors), _rows(entries, vectors), self.scorer.num_candidates)
        score_B, index_B = self.best(queries, entries, *near)
        own_B = [entries[i] == own for i, (_, own) in zip(index_B.tolist(), asked, strict=True)]
        return score_B, torch.tensor(own_B), torch.tensor([own != "" for _, own in asked])

    @torch.no_grad()
    def best(
        self, queries: Sequence[str], entries: Sequence[str], cosine_BK: Tensor, index_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(score_B, index_B): phi and number of the most likely of each query's nearest entries."""
        candidates = [[entries[i] for i in row] for row in index_BK.tolist()]
        best = self.scorer.judge(queries, candidates, cosine_BK).max(1)
        return best.values, index_BK.gather(1, best.indices[:, None])[:, 0]

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was trained, and which encoder it began with."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if ".selector." not in k}
        checkpoint["scope"] = {"form": self.form}
        checkpoint["base_model"], checkpoint["means"] = self.base_model, self.means

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        was = checkpoint.get("scope"), checkpoint.get("base_model")
        if was != ({"form": self.form}, self.base_model):
            raise ValueError(
                f"this checkpoint is of {was}, not of a scope classifier of form {self.form!r} on "
                f"{self.base_model}: set --model.form and --model.encoder as then"
            )
        self.means, self.trained = checkpoint.get("means", {}), True

    @classmethod
    def load(cls, path: str) -> ScopeClassifier:
        """The trained classifier of a checkpoint, to be used; raises EditError for anything else."""
        checkpoint = read_checkpoint(path, "scope", of=cls.__name__)
        try:
            scope = cls(checkpoint["base_model"]["name"], checkpoint["scope"]["form"])
        except KeyError:
            raise EditError(f"{path}: a damaged checkpoint: it does not say its form") from None
        if scope.base_model != checkpoint["base_model"]:
            raise EditError(
                f"{path} was trained from the encoder {checkpoint['base_model']}, and that name now stands for "
                f"weights {scope.base_model['hash']}: bring the encoder back, or train again"
            )
        frozen = {k: v for k, v in scope.state_dict().items() if ".selector." in k}
        try:
            scope.load_state_dict(frozen | checkpoint["state_dict"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise EditError(f"{path}: its weights do not fit its form: {reason}") from None
        return scope.requires_grad_(False)


def _rows(texts: Sequence[str], vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([vectors[text] for text in texts])
