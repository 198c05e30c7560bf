"""Causal tracing: which states carry a fact from its subject to its answer (Meng et al., 2022, arXiv 2202.05262).

The subject's embeddings are corrupted with noise, so that the model no longer knows the answer. Then one state of
the clean run is restored and the probability of the answer is measured:

    effect(token, layer) = mean over noise samples of P(answer | corrupted, state restored) - P(answer | corrupted)

A state is the output of a block (``hidden``), or the outputs of the MLPs of a few neighbouring blocks (``mlp``).
Effects are averaged over facts by the token's role.

Departures from the authors' code: all tokens of the answer count, not only the first; the number of neighbouring
MLPs is proportional to the model's depth (ten of 48 in theirs); tokens before the subject are left out, as their
states are never corrupted. Editing does not always work best where the effect is largest (Hase et al., 2023, arXiv
2301.04213), so use it as a range of candidates.

Shapes: S noise samples, T tokens, K tokens of the subject, P positions restored, D width, L layers, N positions
that predict answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from rich.progress import track
from torch import Tensor, nn

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.model.hooks import Hook, capture, first, hooked, replace_first
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.tail import Tail

ROLES = (
    "first subject token",
    "inner subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
LAST_SUBJECT = ROLES.index("last subject token")
SITES = ("hidden", "mlp")
MAX_ROWS = 256  # per batch of restored runs


@dataclass(frozen=True)
class CausalTrace:
    """Mean effects over facts.

    Attributes:
        effect: for each site a tensor [roles, layers]; NaN where no fact has a token of that role.
        clean: mean probability of the answers.
        corrupted: the same with corrupted subjects.
        facts: number of facts.
    """

    effect: dict[str, Tensor]
    clean: float
    corrupted: float
    facts: int


@torch.no_grad()
def causal_trace(
    lm: LanguageModel,
    edits: Sequence[Edit],
    samples: int = 5,
    noise: float = 3.0,
    window: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CausalTrace:
    """Traces the true answers of some facts through the model, with its active edits.

    Args:
        lm: the model, which should know the facts: there is nothing to restore for others.
        edits: the facts, with ``target_true``; new targets are ignored.
        samples: number of noise samples, which run side by side.
        noise: standard deviation of the noise, relative to that of the subjects' embeddings.
        window: number of neighbouring MLPs that are restored together; by default a fifth of the blocks.
        seed: random seed of the noise.
        progress: show a progress bar.
    """
    if not edits:
        raise ValueError("no facts to trace")
    checks.whole(1, samples=samples, window=window)
    checks.positive(noise=noise)
    checks.seeds(seed=seed)
    depth = lm.structure.num_layers
    width = window or max(1, round(depth * 10 / 48))
    facts = [_Fact(lm, edit) for edit in edits]
    deviation = noise * torch.cat([fact.subject_KD for fact in facts]).std().item()
    generator = torch.Generator().manual_seed(seed)
    total = {site: torch.zeros(len(ROLES), depth) for site in SITES}
    count = torch.zeros(len(ROLES), 1)
    clean = corrupted = 0.0
    for fact in track(facts, "causal trace", disable=not progress, transient=True):
        shape = (samples, *fact.subject_KD.shape)
        fact.corrupt(deviation * torch.randn(shape, generator=generator))
        for role in fact.roles:
            count[role] += 1
        for site in SITES:
            for layer in range(depth):
                effect_P = fact.restored(site, layer, width) - fact.corrupted
                for role, effect in zip(fact.roles, effect_P.tolist(), strict=True):
                    total[site][role, layer] += effect
        clean, corrupted = clean + fact.clean, corrupted + fact.corrupted
        fact.forget()
    mean = {site: total[site] / count for site in SITES}
    return CausalTrace(mean, clean / len(facts), corrupted / len(facts), len(facts))


class _Fact:
    """One fact's clean and corrupted runs."""

    def __init__(self, lm: LanguageModel, edit: Edit) -> None:
        if edit.target_true is None:
            raise ValueError(f"{edit.text!r} has no true answer, which is what is traced")
        self.lm = lm
        self.rows = lm.tokens.rows([edit.text], [edit.target_true])
        self.first, last = lm.tokens.subject_span(edit.text, edit.subject_start, edit.subject)
        end = int(self.rows.start_B[0]) - 1
        self.last = min(last, end)
        self.positions = list(range(self.first, end + 1))
        self.roles = [_role(position, self.first, self.last, end) for position in self.positions]
        embedding = lm.net.get_input_embeddings()
        self.subject_KD = embedding(self.rows.ids_BT)[0, self.first : self.last + 1].float().cpu()
        self.noise_SKD = self.subject_KD[None]
        self.tails: dict[int, Tail] = {}
        self.clean = self.corrupted = 0.0

    @cached_property
    def states(self) -> dict[str, Tensor]:
        """Clean outputs [T, D] of every block and every MLP output projection."""
        structure, length = self.lm.structure, self.rows.ids_BT.shape[1]
        layers = range(structure.num_layers)
        names = [
            *map(structure.block_name, layers),
            *map(structure.out_name, layers),
        ]
        with capture({name: self.lm.net.get_submodule(name) for name in names}) as seen:
            self.lm.net(self.rows.ids_BT, use_cache=False)
        return {name: first(output).reshape(length, -1) for name, (_, output) in seen.items()}

    def corrupt(self, noise_SKD: Tensor) -> None:
        """Sets the noise and measures the probability of the answer without and with it."""
        zero = torch.zeros(1, dtype=torch.long, device=self.lm.device)
        self.noise_SKD = torch.zeros_like(noise_SKD[:1])
        self.clean = float(self._probability(self._tail(0, zero), zero, [])[0])
        self.noise_SKD = noise_SKD
        every = torch.arange(len(noise_SKD), device=self.lm.device)
        self.corrupted = float(self._probability(self._tail(0, every), every, []).mean())

    def forget(self) -> None:
        """Frees the stored states, but not the probabilities."""
        self.tails.clear()
        self.__dict__.pop("states", None)

    def restored(self, site: str, layer: int, window: int) -> Tensor:
        """Mean probability over noise samples with the state of each position at ``layer`` restored; [P]."""
        structure = self.lm.structure
        if site == "hidden":
            layers, name_of = range(layer, layer + 1), structure.block_name
        else:
            begin = max(0, layer - window // 2)
            end = min(structure.num_layers, layer - window // 2 + window)
            layers, name_of = range(begin, end), structure.out_name
        names = [name_of(n) for n in layers]
        count = len(self.noise_SKD)
        every = torch.arange(count, device=self.lm.device)
        if layers[0] not in self.tails:
            self.tails[layers[0]] = self._tail(layers[0], every)
        tail = self.tails[layers[0]]
        found = []
        for part in torch.tensor(self.positions).split(max(1, MAX_ROWS // count)):
            sample_B = every.repeat(len(part))
            position_B = part.to(self.lm.device).repeat_interleave(count)
            hooks = [
                (self.lm.net.get_submodule(name), _restore(self.states[name], position_B))
                for name in names
            ]
            probability_B = self._probability(tail.select(sample_B), sample_B, hooks)
            found.append(probability_B.view(-1, count).mean(1))
        return torch.cat(found).cpu()

    def _tail(self, layer: int, sample_B: Tensor) -> Tail:
        rows = self.rows.select(torch.zeros_like(sample_B))
        with hooked([self._noisy(sample_B)]):
            return self.lm.reuse.tail(rows, layer)

    def _probability(
        self, tail: Tail, sample_B: Tensor, hooks: list[tuple[nn.Module, Hook]]
    ) -> Tensor:
        """Probability of the whole answer in each row, [B]."""
        rows = self.rows.select(torch.zeros_like(sample_B))
        row_N, position_N = rows.answer_positions()
        with hooked([self._noisy(sample_B), *hooks]):
            logprob_NV = tail.logits(row_N, position_N).float().log_softmax(-1)
        target_N = rows.ids_BT[row_N, position_N + 1]
        logprob_N = logprob_NV.gather(1, target_N[:, None])[:, 0]
        return logprob_N.new_zeros(len(sample_B)).index_add(0, row_N, logprob_N).exp()

    def _noisy(self, sample_B: Tensor) -> tuple[nn.Module, Hook]:
        """The embedding and a hook that adds each row's sample to the subject's tokens."""

        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            noisy_BTD = output.clone()
            noise_BKD = self.noise_SKD.to(output)[sample_B.to(output.device)]
            noisy_BTD[:, self.first : self.last + 1] += noise_BKD
            return noisy_BTD

        return self.lm.net.get_input_embeddings(), hook


def _restore(clean_TD: Tensor, position_B: Tensor) -> Hook:
    """A hook that restores the clean state of one position in each row."""

    def hook(_module: nn.Module, _args: tuple, output: object) -> object:
        flat = first(output)
        batch = len(position_B)
        hidden_BTD = flat.reshape(batch, -1, flat.shape[-1]).clone()
        row_B = torch.arange(batch, device=flat.device)
        hidden_BTD[row_B, position_B.to(flat.device)] = clean_TD[position_B].to(flat)
        return replace_first(output, hidden_BTD.view(flat.shape))

    return hook


def _role(position: int, first_subject: int, last_subject: int, end: int) -> int:
    """Index in ROLES of a token from the subject on."""
    if position == last_subject:
        return LAST_SUBJECT
    if position < last_subject:
        return ROLES.index(
            "first subject token" if position == first_subject else "inner subject tokens"
        )
    if position == end:
        return ROLES.index("last token")
    return ROLES.index("first token after" if position == last_subject + 1 else "further tokens")
