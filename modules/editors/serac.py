"""SERAC: a memory of edits, a scope classifier, a counterfactual model (Mitchell et al., 2022, arXiv 2206.06520).

The base model is never changed. Edits are kept as text; phi says how likely a prompt x is within the scope of an
edit e, and the model that answers is

    base(x)                 if the memory is empty or max_e phi(e, x) <= 1/2
    psi(e*, x)              else, with e* the edit of the largest phi

psi is a causal LM that reads the edit's text, then the prompt. The two are trained by two runs of ``fit``:
:class:`ScopeClassifier` and :class:`CounterfactualModel`. phi has two forms, with E a sentence encoder:

    distance   phi = exp(-scale * |E(e) - E(x)|^2), on unit vectors
    cross      phi = sigmoid(w' h(e, x)), h the state of the first token of the pair, read together;
               asked only of the edits whose vectors (of the encoder as it came) are nearest

Departures from the authors' code: the decision reads the prompt alone, once, so that a teacher-forced target
cannot give it away; phi reads the edit's prompt without its target, so an edit's scope does not depend on what it
says; the scale is learned; an edit of a prompt that is in the memory takes the older one's place; vectors are
computed once per edit; psi is a learned low-rank update of a base model (with the same base, one network in
memory is enough), trained apart from phi; edit and prompt are joined by a line break.

Shapes: B prompts, N edits in the memory, K candidates per prompt, D width of the encoder.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

from datamodules.records import Edit, EditCase, Probe
from modules.editing import Delta, EditError, Editor, TextPatch, write_tensors
from modules.encoder import TextEncoder
from modules.evaluation import UNMOVED
from modules.lm import LanguageModel, TargetScores
from modules.retrieval import nearest
from modules.tuning import FineTune

MEMORY_FORMAT = "corrigenda-serac-1"
EPSILON = 1e-6  # 1 - phi is not taken to be smaller


def phrasings(case: EditCase) -> list[Probe]:
    """The ways to ask for a case's edit: its own prompt, paraphrases, the question."""
    edit = case.edits[0]
    same = Probe(edit.text, edit.target_new)
    return [same, *case.probes.get("generality", ()), *case.probes.get("question", ())]


def in_front(edit: Edit, prompt: str) -> str:
    """What the counterfactual model reads."""
    return f"{edit.text.rstrip()} {edit.target_new.strip()}\n{prompt}"


# ---------------------------------------------------------------------------- scope


class Scorer(Protocol):
    """A form of phi."""

    num_candidates: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors_BD, by which candidates are found."""

    def log_scores(self, entries: Sequence[str], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(log phi, log(1 - phi)) of B pairs, differentiable."""

    def judge(
        self, queries: Sequence[str], entries: Sequence[Sequence[str]], cosine_BK: Tensor
    ) -> Tensor:
        """phi_BK of each query and its candidates, whose vectors have these inner products."""


class Distance(nn.Module):
    """phi = exp(-scale * squared distance of unit vectors)."""

    num_candidates = 1

    def __init__(self, encoder: str) -> None:
        super().__init__()
        self.encoder = TextEncoder(encoder)
        self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))

    def embed(self, texts: Sequence[str]) -> Tensor:
        return self.encoder.encode(texts)

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
        return torch.exp(-self.log_scale.exp() * (2 - 2 * cosine_BK).clamp(min=0))


class CrossEncoder(nn.Module):
    """phi from edit and prompt read together; candidates are found with the encoder as it came."""

    num_candidates = 16

    def __init__(self, encoder: str) -> None:
        super().__init__()
        self.selector = TextEncoder(encoder).requires_grad_(False)
        self.encoder = TextEncoder(encoder)
        self.head = nn.Linear(self.encoder.width, 1)

    def embed(self, texts: Sequence[str]) -> Tensor:
        return self.selector.encode(texts)

    def log_scores(self, entries: Sequence[str], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        logit_B = self.head(self.encoder.pairs(entries, queries))[:, 0]
        return logsigmoid(logit_B), logsigmoid(-logit_B)

    def judge(
        self, queries: Sequence[str], entries: Sequence[Sequence[str]], cosine_BK: Tensor
    ) -> Tensor:
        pairs = [(e, q) for q, some in zip(queries, entries, strict=True) for e in some]
        parts = [pairs[i : i + 64] for i in range(0, len(pairs), 64)]
        scores = [self.log_scores(*zip(*part, strict=True))[0].exp() for part in parts]
        return torch.cat(scores).view(cosine_BK.shape)


FORMS: dict[str, type[Distance] | type[CrossEncoder]] = {
    "distance": Distance,
    "cross": CrossEncoder,
}


@dataclass(frozen=True)
class Pairs:
    """Edits' prompts, prompts asked, and whether the second is in the scope of the first."""

    entries: list[str]
    queries: list[str]
    inside: list[bool]

    @classmethod
    def of(cls, triples: Sequence[tuple[str, str, bool]]) -> Pairs:
        return cls(*map(list, zip(*triples, strict=True)))

    @classmethod
    def to_train(cls, batch: Sequence[EditCase], draw: random.Random, count: int) -> Pairs:
        """One phrasing of each case, and up to ``count`` hard and ``count`` easy negatives.

        Hard: locality probes, and how other cases of the same relation are asked. Easy: unrelated probes, and
        how the rest of the batch is asked. Cases about the same subject and the same or an unnamed relation
        may mean the same and are no negatives.
        """
        triples = []
        for case in batch:
            text = case.edits[0].text
            triples.append((text, draw.choice(phrasings(case)).prompt, True))
            for criterion, alike in (("locality", True), ("unrelated", False)):
                pool: list[Probe | EditCase] = [*case.probes.get(criterion, ())]
                pool += [other for other in batch if _same_relation(case, other) is alike]
                for found in draw.sample(pool, min(count, len(pool))):
                    probe = draw.choice(phrasings(found)) if isinstance(found, EditCase) else found
                    triples.append((text, probe.prompt, False))
        return cls.of(triples)

    @classmethod
    def to_validate(cls, batch: Sequence[EditCase]) -> Pairs:
        """All phrasings of each case, its probes that must not move, and the next case's own prompt."""
        triples = []
        for i, case in enumerate(batch):
            text = case.edits[0].text
            triples += [(text, probe.prompt, True) for probe in phrasings(case)]
            triples += [
                (text, p.prompt, False) for name in UNMOVED for p in case.probes.get(name, ())
            ]
            other = batch[(i + 1) % len(batch)]
            if _same_relation(case, other) is not None:
                triples.append((text, other.edits[0].text, False))
        return cls.of(triples)


def _same_relation(case: EditCase, other: EditCase) -> bool | None:
    """Whether another case has the relation of this one; None where it may even mean the same."""
    mine, its = case.edits[0], other.edits[0]
    alike = mine.relation is not None and mine.relation == its.relation
    about_the_same = mine.subject.casefold() == its.subject.casefold()
    if about_the_same and (alike or mine.relation is None or its.relation is None):
        return None
    return alike


class ScopeClassifier(LightningModule):
    """phi: whether a prompt is within the scope of an edit. Train it with ``fit``; it needs no language model.

    Its checkpoint with the best ``val/scope/auc`` is what SERAC takes.

    Args:
        encoder: a BERT-like model: a hub id, a local folder, or ``minilm``.
        form: ``distance`` compares vectors, one look-up however many edits there are; ``cross`` reads edit and
            prompt together, for the nearest few edits.
        lr: Adam's step size for the encoder.
        lr_head: Adam's step size for the scale or the classifying layer.
        num_negatives: hard and, as many again, easy negatives per case and step.
    """

    trains_on = "train"

    def __init__(
        self,
        encoder: str = "minilm",
        form: Literal["distance", "cross"] = "distance",
        lr: float = 2e-5,
        lr_head: float = 1e-2,
        num_negatives: int = 2,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints leave the frozen encoder out
        self.form, self.num_negatives = form, num_negatives
        self.lr, self.lr_head = lr, lr_head
        self.scorer = FORMS[form](encoder)
        self.base_model = {"name": encoder, "hash": self.scorer.encoder.weights_hash()}
        self.auc, self.pair_accuracy = BinaryAUROC(), BinaryAccuracy()
        self.means: dict[str, float] = {}  # of the last finished validation
        self.method_name = type(self).__name__

    def configure_optimizers(self) -> OptimizerLRScheduler:
        encoder = list(self.scorer.encoder.parameters())
        inside = {id(p) for p in encoder}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in inside]
        return torch.optim.Adam(
            [{"params": encoder, "lr": self.lr}, {"params": others, "lr": self.lr_head}]
        )

    def training_step(self, batch: list[EditCase], batch_idx: int) -> Tensor:
        """Balanced cross-entropy: the mean over pairs within scope plus the mean over pairs without."""
        draw = random.Random(f"{self.current_epoch} {batch_idx}")
        pairs = Pairs.to_train(batch, draw, self.num_negatives)
        log_phi_B, log_rest_B = self.scorer.log_scores(pairs.entries, pairs.queries)
        inside_B = torch.tensor(pairs.inside, device=log_phi_B.device)
        loss = -log_phi_B[inside_B].mean()
        if not inside_B.all():
            loss = loss - log_rest_B[~inside_B].mean()
        self.log("train/loss", loss, batch_size=len(batch), prog_bar=True)
        return loss

    def validation_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Scores pairs of held-out cases; no case is edited, so there are no results of cases."""
        pairs = Pairs.to_validate(batch)
        with torch.no_grad():
            phi_B = self.scorer.log_scores(pairs.entries, pairs.queries)[0].exp()
        inside_B = torch.tensor(pairs.inside, device=phi_B.device)
        self.auc.update(phi_B, inside_B)
        self.pair_accuracy.update(phi_B, inside_B)
        return {"results": []}

    def on_validation_epoch_end(self) -> None:
        self.means = {
            "scope/auc": float(self.auc.compute()),
            "scope/pair_accuracy": float(self.pair_accuracy.compute()),
        }
        self.auc.reset()
        self.pair_accuracy.reset()
        for name, value in self.means.items():
            self.log(f"val/{name}", value, prog_bar=True, sync_dist=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was trained, and which encoder it began with."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if ".selector." not in k}
        checkpoint["scope"] = {"form": self.form}
        checkpoint["base_model"] = self.base_model

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        was = checkpoint.get("scope"), checkpoint.get("base_model")
        if was != ({"form": self.form}, self.base_model):
            raise ValueError(
                f"this checkpoint is of {was}, not of a scope classifier of form {self.form!r} on "
                f"{self.base_model}: set --model.form and --model.encoder as then"
            )

    @classmethod
    def load(cls, path: str) -> ScopeClassifier:
        """The trained classifier of a checkpoint, to be used; raises EditError for anything else."""
        checkpoint = _read(path, "scope", cls.__name__)
        scope = cls(checkpoint["base_model"]["name"], checkpoint["scope"]["form"])
        if scope.base_model != checkpoint["base_model"]:
            raise EditError(
                f"{path} was trained from the encoder {checkpoint['base_model']}, and that name now stands for "
                f"weights {scope.base_model['hash']}: bring the encoder back, or train again"
            )
        frozen = {k: v for k, v in scope.state_dict().items() if ".selector." in k}
        scope.load_state_dict(frozen | checkpoint["state_dict"])
        return scope.requires_grad_(False)


# ---------------------------------------------------------------------------- counterfactual model


class CounterfactualModel(FineTune):
    """psi: answers prompts with the edit's text in front. Train it with ``fit``.

    ``lm`` may be any small causal LM with the tokenizer of the model to be edited. An update of it is learned
    from training cases (:class:`~modules.tuning.FineTune`) and validated on held-out ones: ``efficacy`` and
    ``generality`` ask for an edit's prompt and its paraphrases, with the edit in front. Its checkpoint with the
    best ``val/generality/exact`` is what SERAC takes.
    """

    trains_on = "train"

    @property
    def method_name(self) -> str:
        return type(self).__name__

    def training_step(self, batch: list[EditCase], batch_idx: int) -> Tensor:
        """Mean loss of the new answer to one phrasing of each edit, with the edit in front."""
        draw = random.Random(f"{self.current_epoch} {batch_idx}")
        asked = [draw.choice([p for p in phrasings(case) if p.target]) for case in batch]
        prompts = [in_front(c.edits[0], p.prompt) for c, p in zip(batch, asked, strict=True)]
        return self.loss(prompts, [str(probe.target) for probe in asked])

    def validation_step(self, batch: list[EditCase], batch_idx: int) -> STEP_OUTPUT:
        """Evaluates what is within the edits' scope; psi is never asked anything else."""
        return super().validation_step([self.within_scope(case) for case in batch], batch_idx)

    @staticmethod
    def within_scope(case: EditCase) -> EditCase:
        """The case without probes that must not move, and with the edit in front of the others."""
        probes = {}
        for criterion, some in case.probes.items():
            if criterion not in UNMOVED:
                probes[criterion] = tuple(
                    Probe(in_front(case.edits[0], p.prompt), p.target, p.rival, p.aliases)
                    for p in some
                )
        return EditCase(case.case_id, case.edits, probes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["counterfactual"] = self.own_delta().tensors()


@dataclass(frozen=True)
class _Counterfactual:
    """A trained psi: its base, which may be the model to be edited itself, and the learned update."""

    lm: LanguageModel
    delta: Delta

    @classmethod
    def load(cls, path: str, lm: LanguageModel) -> _Counterfactual:
        checkpoint = _read(path, "counterfactual", CounterfactualModel.__name__)
        base = checkpoint["base_model"]
        own = lm
        if base["hash"] != lm.weights_hash:
            own = LanguageModel(base["name"], device=str(lm.device))
            if own.weights_hash != base["hash"]:
                raise EditError(
                    f"{path} was trained for {base['name']!r} with weights {base['hash']}, and that name now "
                    f"stands for weights {own.weights_hash}: bring the model back, or train again"
                )
            _require_same_words(own, lm)
        tensors = {name: t.to(lm.device) for name, t in checkpoint["counterfactual"].items()}
        return cls(own, Delta.from_tensors(tensors, {}))

    def score(self, prompts: Sequence[str], targets: Sequence[str], full: bool) -> TargetScores:
        with self.lm.pristine(), self.lm.shared_prefix(0):  # no state of the base is reused
            return self.lm.score(prompts, targets, [self.delta], full=full)

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **options: Any) -> list[str]:  # noqa: ANN401
        with self.lm.pristine():
            return self.lm.generate(prompts, max_new_tokens, deltas=[self.delta], **options)


def _require_same_words(one: LanguageModel, other: LanguageModel) -> None:
    rows = [lm.net.get_output_embeddings().weight.shape[0] for lm in (one, other)]
    if one.tokenizer.get_vocab() != other.tokenizer.get_vocab() or rows[0] != rows[1]:
        raise EditError(
            f"the counterfactual model {one.name!r} and the model to be edited, {other.name!r}, have different "
            "vocabularies, so that neither can answer for the other: train one with the tokenizer of "
            f"{other.name!r}"
        )


def _read(path: str, key: str, kind: str) -> dict[str, Any]:
    """A checkpoint of ours, with ``key`` in it; raises EditError for anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise EditError(f"{path}: not a readable checkpoint of a {kind} ({error})") from None
    if key not in checkpoint:
        raise EditError(
            f"{path} is not a checkpoint of a {kind}: give one that its fit has written"
        )
    return checkpoint


# ---------------------------------------------------------------------------- memory


class Memory:
    """Edits and the vectors of their prompts; one edit per prompt, the newest."""

    def __init__(self) -> None:
        self.edits: list[Edit] = []
        self.vectors_ND: Tensor | None = None
        self._place: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def nbytes(self) -> int:
        """Size of the vectors and of the texts."""
        if self.vectors_ND is None:
            return 0
        texts = sum(len((e.text + e.target_new).encode()) for e in self.edits)
        return self.vectors_ND.nbytes + texts

    def copy(self) -> Memory:
        """Another memory with the same content; adding to one leaves the other."""
        other = Memory()
        other.edits, other._place = list(self.edits), dict(self._place)
        other.vectors_ND = self.vectors_ND
        return other

    def add(self, edits: Sequence[Edit], vectors_ED: Tensor) -> None:
        """Appends edits; one whose prompt is known takes the older one's place."""
        new: dict[int, int] = {}  # row of the grown memory: edit
        for e, edit in enumerate(edits):
            key = " ".join(edit.text.casefold().split())
            place = self._place.setdefault(key, len(self.edits))
            if place == len(self.edits):
                self.edits.append(edit)
            self.edits[place] = edit
            new[place] = e
        old_ND = vectors_ED[:0] if self.vectors_ND is None else self.vectors_ND
        grown_ND = old_ND.new_empty(len(self.edits), vectors_ED.shape[1])
        grown_ND[: len(old_ND)] = old_ND
        grown_ND[list(new)] = vectors_ED[list(new.values())]
        self.vectors_ND = grown_ND

    def save(self, path: str | Path, encoder: str = "") -> None:
        """Writes one safetensors file, atomically; ``encoder`` says whose vectors they are."""
        vectors_ND = torch.empty(0, 0) if self.vectors_ND is None else self.vectors_ND
        edits = json.dumps([asdict(edit) for edit in self.edits], ensure_ascii=False)
        header = {"format": MEMORY_FORMAT, "encoder": encoder}
        text = torch.frombuffer(bytearray(edits, "utf-8"), dtype=torch.uint8)
        write_tensors(path, {"vectors": vectors_ND, "edits": text}, header)

    @classmethod
    def load(cls, path: str | Path) -> tuple[Memory, str]:
        """The memory of a file and whose vectors it has; raises EditError for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != MEMORY_FORMAT:
                    raise EditError(f"{path}: not a memory of this project")
                text = bytes(file.get_tensor("edits").tolist()).decode()
                vectors_ND = file.get_tensor("vectors")
        except (SafetensorError, OSError) as error:
            raise EditError(f"{path}: not a readable memory ({error})") from None
        memory = cls()
        edits = [Edit(**fields) for fields in json.loads(text)]
        if edits:
            memory.add(edits, vectors_ND)
        return memory, header["encoder"]


# ---------------------------------------------------------------------------- editor


class ScopePatch(TextPatch):
    """A memory of edits in force: prompts within the scope of one are answered by the counterfactual model."""

    def __init__(self, lm: LanguageModel, editor: SERAC, memory: Memory) -> None:
        self.editor, self.memory = editor, memory
        super().__init__(lm)

    def save(self, path: str | Path) -> None:
        """Writes the memory; :meth:`SERAC.restore` puts it in force again."""
        self.memory.save(path, self.editor.encoder_hash)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: the editor remembers the same edits again."""
        return {"edits": [asdict(edit) for edit in self.memory.edits]}

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, the model answers as if nothing of this editor's memory were there."""
        with ExitStack() as stack:
            for handle in self.lm.handles:
                if isinstance(handle, ScopePatch) and handle.editor is self.editor:
                    stack.enter_context(TextPatch.set_aside(handle))
            yield

    def absorb(self, newer: ScopePatch) -> None:
        """Takes a newer patch of the same editor into this one: its memory holds this one's."""
        if self.lm.handles[-2:] != [self, newer] or newer.editor is not self.editor:
            raise EditError("only the newest edit can be absorbed, by the one before it")
        self.memory = newer.memory
        self.lm.handles.pop()

    def score(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        deltas: Sequence[Delta] | None,
        owners: Sequence[int] | None,
        full: bool,
    ) -> TargetScores:
        """The base model's scores of everything, with rows within scope replaced.

        The base sees the whole batch whatever is within scope, so that the other rows are its own to the bit.
        """
        base = self.lm.score(prompts, targets, deltas, owners, full)
        asked, inside = self._within_scope(prompts)
        if not inside:
            return base
        other = self.editor.counterfactual.score(asked, [targets[b] for b in inside], full)
        rows = torch.tensor(inside, device=base.target_BM.device)
        width = other.target_BM.shape[1]
        same = torch.equal(base.target_BM[rows, :width], other.target_BM)
        if not same or not torch.equal(base.mask_BM[rows, :width], other.mask_BM):
            raise EditError(
                "a target has other tokens where an edit stands in front of its prompt: "
                f"{[(prompts[b], targets[b]) for b in inside][:3]}"
            )
        new = {"logprob_BM": other.logprob_BM, "greedy_BM": other.greedy_BM}
        if full:
            new["full_BMV"] = cast(Tensor, other.full_BMV)
        merged = {}
        for name, values in new.items():
            merged[name] = getattr(base, name).clone()
            merged[name][rows, :width] = values.to(merged[name].device)
        return TargetScores(
            merged["logprob_BM"],
            merged["greedy_BM"],
            base.target_BM,
            base.mask_BM,
            merged.get("full_BMV"),
        )

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **options: Any) -> list[str]:  # noqa: ANN401
        """Who answers is decided once, on the prompt."""
        asked, inside = self._within_scope(prompts)
        outside = [b for b in range(len(prompts)) if b not in set(inside)]
        texts = [""] * len(prompts)
        if outside:
            owners = options.get("owners")
            own = options | {"owners": [owners[b] for b in outside] if owners is not None else None}
            found = self.lm.generate([prompts[b] for b in outside], max_new_tokens, **own)
            for b, text in zip(outside, found, strict=True):
                texts[b] = text
        if inside:
            rest = {k: v for k, v in options.items() if k not in ("deltas", "owners")}
            found = self.editor.counterfactual.generate(asked, max_new_tokens, **rest)
            for b, text in zip(inside, found, strict=True):
                texts[b] = text
        return texts

    def _within_scope(self, prompts: Sequence[str]) -> tuple[list[str], list[int]]:
        """What the counterfactual model is asked, and the prompts it is asked in place of."""
        edits = self.editor.route(self.memory, prompts)
        found = {b: in_front(e, prompts[b]) for b, e in enumerate(edits) if e is not None}
        return list(found.values()), list(found)


class SERAC(Editor):
    """Keeps edits as text and lets a counterfactual model answer what falls within their scope.

    Edits made one after the other on one model share a memory.

    Args:
        scope: checkpoint of a trained :class:`ScopeClassifier`.
        counterfactual: checkpoint of a trained :class:`CounterfactualModel`.
        threshold: a prompt is within scope above this.
    """

    scope: ScopeClassifier
    counterfactual: _Counterfactual
    encoder_hash: str

    def __init__(self, scope: str, counterfactual: str, threshold: float = 0.5) -> None:
        self.scope_path, self.counterfactual_path = scope, counterfactual
        self.threshold = threshold
        missing = [path for path in (scope, counterfactual) if not Path(path).is_file()]
        if missing:
            raise EditError(
                f"SERAC needs two trained checkpoints, and there is no {' and no '.join(missing)}: train them "
                "with fit (configs/serac/smollm2-scope.yaml and smollm2-counterfactual.yaml) and set "
                "--edit.editor.scope and --edit.editor.counterfactual"
            )
        self._lm: LanguageModel | None = None
        self._seconds, self._lookups, self._bytes, self._entries = 0.0, 0, 0, 0

    def prepare(self, lm: LanguageModel) -> None:
        if self._lm is lm:
            return
        self.scope = ScopeClassifier.load(self.scope_path).to(lm.device)
        scorer = self.scope.scorer
        encoder = scorer.selector if isinstance(scorer, CrossEncoder) else scorer.encoder
        self.encoder_hash = encoder.weights_hash()
        self.counterfactual = _Counterfactual.load(self.counterfactual_path, lm)
        self._lm = lm

    def edit(self, lm: LanguageModel, edits: Sequence[Edit]) -> ScopePatch:
        self.prepare(lm)
        newest = lm.handles[-1] if lm.handles else None
        goes_on = isinstance(newest, ScopePatch) and newest.editor is self
        memory = cast(ScopePatch, newest).memory.copy() if goes_on else Memory()
        if edits:
            memory.add(edits, self.scope.scorer.embed([edit.text for edit in edits]))
        return self._put(lm, memory)

    def restore(self, lm: LanguageModel, path: str | Path) -> ScopePatch:
        """Puts a memory that :meth:`ScopePatch.save` wrote in force; another encoder's vectors are made anew."""
        self.prepare(lm)
        memory, encoder = Memory.load(path)
        if len(memory) and encoder == self.encoder_hash:
            memory.vectors_ND = cast(Tensor, memory.vectors_ND).to(lm.device)
        elif len(memory):
            memory.vectors_ND = self.scope.scorer.embed([edit.text for edit in memory.edits])
        return self._put(lm, memory)

    def _put(self, lm: LanguageModel, memory: Memory) -> ScopePatch:
        self._entries = max(self._entries, len(memory))
        self._bytes = max(self._bytes, memory.nbytes)
        return ScopePatch(lm, self, memory)

    @torch.no_grad()
    def route(self, memory: Memory, prompts: Sequence[str]) -> list[Edit | None]:
        """For each prompt the edit in whose scope it falls, or None."""
        if not len(memory):
            return [None] * len(prompts)
        start = time.perf_counter()
        scorer: Scorer = self.scope.scorer
        unique = list(dict.fromkeys(prompts))
        vectors_ND = cast(Tensor, memory.vectors_ND)
        cosine_BK, index_BK = nearest(scorer.embed(unique), vectors_ND, scorer.num_candidates)
        entries = [[memory.edits[i].text for i in row] for row in index_BK.tolist()]
        best = scorer.judge(unique, entries, cosine_BK).max(1)
        chosen = index_BK.gather(1, best.indices[:, None])[:, 0].tolist()
        found = {
            prompt: memory.edits[i] if score > self.threshold else None
            for prompt, i, score in zip(unique, chosen, best.values.tolist(), strict=True)
        }
        self._seconds += time.perf_counter() - start
        self._lookups += len(unique)
        return [found[prompt] for prompt in prompts]

    def numbers(self) -> dict[str, float]:
        """Size of the largest memory so far and the mean time of a look-up, encoding included."""
        return {
            "memory_entries": float(self._entries),
            "memory_bytes": float(self._bytes),
            "seconds_per_lookup": self._seconds / max(1, self._lookups),
        }
