"""The value search: which output of a projection at the subject's last token makes the target likely.

Values are optimised by gradient descent through the blocks above (after Meng et al., 2022, arXiv 2202.05262).
:class:`ValueEditor` holds the settings that all methods of this family share.

Shapes: N edits (n of them still being optimised), R rows (r of them in one pass), D value width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import WeightEditor
from corrigenda.modules.editors.key_value import KeyRows, sample_contexts
from corrigenda.modules.files import locked, write_tensors
from corrigenda.modules.model.delta import EditError, read_tensors
from corrigenda.modules.model.hooks import first, hooked, replace_first
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.tail import Tail
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.training.optimize import IndependentAdam

log = logging.getLogger(__name__)

VALUE_FORMAT = "corrigenda-value-1"
# With fewer tokens of padding than this, one padded pass is faster than two that each read all weights.
WORTH_A_PASS = 16


def searched_together(lm: LanguageModel, edits: Sequence[Edit], parallel: int) -> list[list[int]]:
    """Indices of the edits whose values are optimised together, the quickest first.

    At most ``parallel`` at once, and with about equally many tokens from the subject on, which every step runs:
    the shorter ones are padded.
    """
    tokens = [
        int(lm.tokens.rows([edit.text], [edit.target_new]).length_B) - lm.tokens.subject_end(edit)
        for edit in edits
    ]
    parts: list[list[int]] = []
    for n in sorted(range(len(edits)), key=tokens.__getitem__):
        if not parts or len(parts[-1]) == parallel or tokens[n] > 1.25 * tokens[parts[-1][0]]:
            parts.append([])
        parts[-1].append(n)
    return parts


def warn_of_unread(lm: LanguageModel, edits: Sequence[Edit], layer: int) -> None:
    """Warns of edits whose value nothing reads, so that no search can move it.

    No attention follows the last block: what it writes at a token predicts the next token alone.
    """
    if layer + 1 < lm.structure.num_layers:
        return
    unread = [
        e.text
        for e in edits
        if lm.tokens.subject_end(e) + 1 < len(lm.tokens.encode_prompts([e.text])[0])
    ]
    if unread:
        log.warning("%r: nothing above layer %d, the last one, reads the subject, so the update is zero (%d such "
                    "edits); use a lower layer", unread[0], layer, len(unread))  # fmt: skip


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the search for a new value; :class:`ValueEditor` has most of them as arguments.

    Attributes:
        steps: evaluations of the loss; at most ``steps - 1`` updates.
        lr: Adam's learning rate.
        weight_decay: weight of ``|delta| / |v0|**2``.
        kl_weight: weight of KL(edited || original) after the essence.
        clamp_norm: delta is clamped to this multiple of ``|v0|``.
        precision: ``bfloat16`` runs the network faster and moves values by a few per cent; losses, moments
            and the value itself stay in float32.
        stop_loss: the optimisation of an edit ends when its loss falls below this.
    """

    steps: int
    lr: float
    weight_decay: float
    kl_weight: float
    clamp_norm: float
    precision: Literal["float32", "bfloat16"] = "float32"
    stop_loss: float = 5e-2

    def __post_init__(self) -> None:
        checks.whole(1, steps=self.steps)
        checks.positive(lr=self.lr, clamp_norm=self.clamp_norm)
        checks.at_least(0, weight_decay=self.weight_decay, kl_weight=self.kl_weight)
        checks.at_least(0, stop_loss=self.stop_loss)


class ValueEditor(WeightEditor):
    """Optimises a new value for every edit; a subclass writes it into the weights.

    Args:
        steps: evaluations of the value's loss; at most one update fewer.
        lr: Adam's learning rate in the search for a value.
        clamp_norm: the value may move by at most this multiple of its norm.
        weight_decay: weight of the size of the value's change in its loss.
        kl_weight: weight of the KL divergence of the next word after the essence.
        contexts: pairs of (tokens, number of texts) of the sampled texts before the prompt.
        essence: text after which the next word should not change, with ``{}`` for the subject; the authors' code
            uses ``{}``.
        corpus: text whose keys give the second moment.
        seed: random seed of the sampled contexts.
        parallel: edits whose values are optimised together.
        precision: ``bfloat16`` makes the search several times faster on hardware that supports it.
    """

    def __init__(
        self,
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
    ) -> None:
        checks.contexts(contexts=contexts)
        checks.with_slot(essence=essence)
        checks.seeds(seed=seed)
        checks.whole(1, parallel=parallel)
        self.lengths, self.essence, self.corpus, self.seed = contexts, essence, corpus, seed
        self.settings = ValueSettings(steps, lr, weight_decay, kl_weight, clamp_norm, precision)
        self.parallel = parallel
        self._prepared: str | None = None

    @abstractmethod
    def read_statistics(self, lm: LanguageModel) -> None:
        """Reads what the subclass needs to know of the keys of ordinary text."""

    def prepare(self, lm: LanguageModel) -> None:
        """Statistics and contexts, once per model, from its unedited weights."""
        if self._prepared == lm.weights_hash:
            return
        self.read_statistics(lm)
        self._contexts = sample_contexts(lm, self.lengths, self.seed)
        self._prepared = lm.weights_hash


@dataclass
class Values:
    """Result of the search, one entry per edit: change of the value, steps, and loss and NLL at the end."""

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
    Edits are optimised together and do not influence each other: the loss is a sum; Adam's moments, the clamp and
    the stopping rule are per edit; and an edit that has finished leaves the batch.
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
    """The loss of some edits as a function of their deltas; stores everything that does not depend on them."""

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
        """logprob_NV of some of the rows, with their edits' deltas added at the subject's last token."""
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
    """Values that were found, one file per edit, so that a search of hours can be interrupted and shared.

    A value is valid only for the same weights and settings of the search.

    Args:
        folder: the folder of the files.
        base: JSON values that identify these: the hash of the weights, the site, contexts, settings.
    """

    def __init__(self, folder: str | Path, base: dict[str, Any]) -> None:
        self.folder, self.base = Path(folder), base

    def read(self, edit: Edit) -> tuple[Tensor, dict[str, Any]] | None:
        """(delta_D, note) of an edit; None if there is no usable file, with a warning if it is damaged."""
        path = self._path(edit)
        if not path.is_file():
            return None
        try:
            tensors, header = read_tensors(path, VALUE_FORMAT, "value")
            return tensors["delta"], json.loads(header["note"])
        except (EditError, KeyError, ValueError) as error:
            log.warning("%s is not usable (%s): searching for the value again", path, error)
            return None

    def write(self, edit: Edit, delta_D: Tensor, note: dict[str, Any]) -> None:
        header = {"format": VALUE_FORMAT, "note": json.dumps(note)}
        with locked(self.folder / ".lock", f"the values in {self.folder}", wait=-1):
            write_tensors(self._path(edit), {"delta": delta_D}, header)

    def _path(self, edit: Edit) -> Path:
        search = {
            **self.base,
            "prompt": edit.prompt,
            "subject": edit.subject,
            "new": edit.target_new,
        }
        digest = hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{digest}.safetensors"
