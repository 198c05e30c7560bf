"""SERAC's scope classifier: which edit, if any, a prompt is about (Mitchell et al., 2022, arXiv 2206.06520).

phi(e, x) is the probability that prompt x is within the scope of edit e. It has two forms, with E a sentence
encoder:

    distance   phi = exp(-scale * |E(e) - E(x)|^2), on unit vectors
    cross      phi = sigmoid(w' h(e, x)), h the state of the first token of the pair, read together;
               evaluated only for the edits whose vectors (of the untrained encoder) are nearest

and is trained on pairs inside and outside an edit's scope, by balanced cross-entropy.

Departures from the authors' code: phi reads the edit's prompt without its target, so an edit's scope does not
depend on its answer; the scale is learned; all prompts of a step are drawn once, and every edit of the step is
compared with all of them, which costs nothing in the distance form; the threshold is not 1/2 but the one that
routes held-out prompts best with all held-out edits in one memory (:func:`best_threshold`).

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
from corrigenda.modules.evaluation.module import warn_untrained
from corrigenda.modules.evaluation.requirements import require_own_dtype, require_unsharded
from corrigenda.modules.model.delta import EditError
from corrigenda.modules.retrieval.encoder import TextEncoder
from corrigenda.modules.retrieval.search import nearest
from corrigenda.modules.training.checkpoints import read_checkpoint
from corrigenda.modules.training.pairs import Pairs, Related, locality_prompts, related_cases

EPSILON = 1e-6  # lower bound of 1 - phi
READ_TOGETHER = 64  # pairs of one forward pass
OTHERS = 20.0  # weight of prompts outside every scope, see best_threshold


# ---------------------------------------------------------------------------- two forms


class Scorer(Protocol):
    """A form of phi."""

    num_candidates: int

    @property
    def finder(self) -> TextEncoder:
        """The encoder of the unit vectors by which candidates are found."""

    def log_scores(self, entries: Sequence[str], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(log phi, log(1 - phi)) of B pairs, differentiable."""

    def judge(
        self, queries: Sequence[str], entries: Sequence[Sequence[str]], cosine_BK: Tensor
    ) -> Tensor:
        """phi_BK of each query and its candidates, given the cosines of their vectors; on the CPU."""


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
    """phi from edit and prompt read together; candidates are found with the untrained encoder."""

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
    """(threshold, balance): how well prompts within scope are routed to their own edit, and others to none.

    Balance is the mean of the two rates. For the choice of the threshold the second counts OTHERS times as much as
    the first, since most prompts that a model is given are about no edit; of equally good thresholds the middle
    one is taken.

    Args:
        score_B: phi of the most likely edit.
        own_B: whether that is the edit the prompt was made for.
        inside_B: whether the prompt was made for an edit at all.
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

    Validation reports ``scope/auc`` over pairs, and ``scope/routed``, the balance of :func:`best_threshold` with
    all validation cases in one memory; the threshold is saved. SERAC uses the checkpoint with the best
    ``val/scope/routed``.

    Args:
        encoder: a BERT-like model: a hub id, a local folder, or ``minilm``.
        form: ``distance`` compares vectors, in one look-up however many edits there are; ``cross`` reads edit and
            prompt together, for the nearest few edits.
        lr: Adam's learning rate for the encoder.
        lr_head: Adam's learning rate for the scale or the classifying layer.
        num_negatives: at most so many hard negatives per case and step, and as many easy ones.
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
        self.trains, self.trained = True, False
        self._related: Related = {}
        self._held_out: list[EditCase] = []  # of the validation that is running

    def setup(self, stage: str) -> None:
        require_own_dtype(self.trainer)
        require_unsharded(self.trainer, type(self).__name__)
        if self.trainer.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} relates the cases of a batch to each other, of which each process would "
                "see only some: train it with --trainer.devices 1"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        encoder = list(self.scorer.encoder.parameters())
        inside = {id(p) for p in encoder}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in inside]
        return torch.optim.Adam(
            [{"params": encoder, "lr": self.lr}, {"params": others, "lr": self.lr_head}]
        )

    def on_train_start(self) -> None:
        """Relates all training cases in advance, because few batches have two cases about one subject."""
        self.trained = True
        self._related = related_cases(self.trainer.datamodule.cases("train"))  # type: ignore[attr-defined]

    def training_step(self, batch: list[EditCase], batch_idx: int) -> Tensor:
        """Balanced cross-entropy: the mean over pairs within scope plus the mean over the others."""
        draw = random.Random(f"{self.current_epoch} {batch_idx}")
        pairs = Pairs.to_train(batch, draw, self.num_negatives, self._related)
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
        """Collects the cases for the epoch's end; nothing is edited, so there are no per-case results."""
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
        """(score_B, own_B, inside_B) of the cases' phrasings and locality prompts, with all cases in one memory.

        Locality prompts that are some case's own prompt are left out.
        """
        entries = list(dict.fromkeys(case.edits[0].text for case in cases))
        known = set(entries)
        routed = [(p.prompt, case.edits[0].text) for case in cases for p in case.phrasings]
        routed += [
            (prompt, "") for c in cases for prompt in locality_prompts(c) if prompt not in known
        ]
        queries = [prompt for prompt, _ in routed]
        near = nearest(_rows(queries, vectors), _rows(entries, vectors), self.scorer.num_candidates)
        score_B, index_B = self.best(queries, entries, *near)
        own_B = [entries[i] == own for i, (_, own) in zip(index_B.tolist(), routed, strict=True)]
        return score_B, torch.tensor(own_B), torch.tensor([own != "" for _, own in routed])

    @torch.no_grad()
    def best(
        self, queries: Sequence[str], entries: Sequence[str], cosine_BK: Tensor, index_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(score_B, index_B): phi and index of the most likely of each query's nearest entries."""
        candidates = [[entries[i] for i in row] for row in index_BK.tolist()]
        best = self.scorer.judge(queries, candidates, cosine_BK).max(1)
        return best.values, index_BK.gather(1, best.indices[:, None])[:, 0]

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the trained weights, and the name and hash of the initial encoder."""
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
        """The trained classifier of a checkpoint; raises EditError if it is not one."""
        checkpoint = read_checkpoint(path, "scope", of=cls.__name__)
        try:
            scope = cls(checkpoint["base_model"]["name"], checkpoint["scope"]["form"])
        except KeyError:
            raise EditError(f"{path}: a damaged checkpoint: it does not name its form") from None
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
            raise EditError(f"{path}: its weights do not match its form: {reason}") from None
        return scope.requires_grad_(False)


def _rows(texts: Sequence[str], vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([vectors[text] for text in texts])
