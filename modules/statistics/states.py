"""Inputs and outputs of a module for given prompts, which editors use as keys and queries.

Shapes: R rows, T tokens, H width of the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from corrigenda.modules.model.hooks import capture, first
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows, batches
from corrigenda.modules.model.scoring import read_ids
from corrigenda.modules.statistics.corpus import Corpus

MAX_WORDS = 32  # of an unrelated prompt


@torch.no_grad()
def read_states(
    lm: LanguageModel, rows: Rows, site: str, output: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (row_R, states_RTH) by batch: the input (or output) of module ``site`` at every token, float32."""
    module = lm.net.get_submodule(site)
    for row_R in batches(rows):
        part = rows.select(row_R)
        with lm.edits.announce(part.prompt_BT), capture({site: module}, stop=True) as seen:
            lm.net.get_decoder()(
                input_ids=part.ids_BT, attention_mask=part.mask_BT, use_cache=False
            )
        before, after = seen[site]
        states = after if output else before
        yield row_R, states.view(*part.ids_BT.shape, -1).float()


def last_states(
    lm: LanguageModel, prompts: Sequence[str], site: str, output: bool = False
) -> Tensor:
    """states_RH at every prompt's last token, float32."""
    rows = lm.tokens.rows(prompts)
    found, order = [], []
    for row_R, states_RTH in read_states(lm, rows, site, output):
        at_R = rows.length_B[row_R] - 1
        found.append(states_RTH[torch.arange(len(row_R), device=lm.device), at_R])
        order.append(row_R)
    return torch.cat(found)[torch.cat(order).argsort()]


@torch.no_grad()
def block_outputs(
    lm: LanguageModel, texts: Iterable[str], max_tokens: int, layers: Iterable[int]
) -> dict[int, Tensor]:
    """states_ND by block: hidden states after these blocks, at every token of plain texts, under the active edits.

    Args:
        lm: the language model.
        texts: each is cut at 512 tokens and at the model's limit.
        max_tokens: total number of tokens, N.
        layers: blocks, from 0.
    """
    ids = read_ids(lm.tokens, texts, max_tokens)
    rows = lm.tokens.pad(ids, [len(row) for row in ids])
    names = {lm.structure.block_name(layer): layer for layer in layers}
    sites = {name: lm.net.get_submodule(name) for name in names}
    found: dict[int, list[Tensor]] = {layer: [] for layer in names.values()}
    for row_R in batches(rows):
        part = rows.select(row_R)
        with lm.edits.announce(part.prompt_BT), capture(sites, stop=True) as seen:
            lm.net.get_decoder()(
                input_ids=part.ids_BT, attention_mask=part.mask_BT, use_cache=False
            )
        for name, layer in names.items():
            states_BTD = first(seen[name][1]).view(*part.ids_BT.shape, -1)
            found[layer].append(states_BTD[part.mask_BT.bool().to(states_BTD.device)].float())
    return {layer: torch.cat(states) for layer, states in found.items()}


def unrelated_prompts(corpus: Corpus, count: int, lm: LanguageModel) -> list[str]:
    """The first ``count`` distinct texts of a corpus, each without its last word, like a prompt.

    Texts longer than the context of ``lm`` are left out.
    """
    prompts: dict[str, None] = {}
    for text in islice(corpus.texts(lm), 10 * count):
        words = text.split()[:MAX_WORDS]
        prompt = " ".join(words[:-1] or words)
        if lm.max_length is None or len(lm.tokens.encode_prompts([prompt])[0]) <= lm.max_length:
            prompts[prompt] = None
        if len(prompts) == count:
            break
    if len(prompts) < 2:
        raise ValueError(
            f"the corpus {corpus.source!r} has fewer than two distinct texts: use more text"
        )
    return list(prompts)


def neighbour_distance(
    lm: LanguageModel, prompts: Sequence[str], site: str, output: bool = False
) -> float:
    """Median distance between a prompt and its nearest neighbour, in the states of the unedited model."""
    with lm.pristine():
        states_RH = last_states(lm, prompts, site, output)
    distance_RR = distances(states_RH, states_RH)
    distance_RR.fill_diagonal_(float("inf"))
    return distance_RR.min(1).values.median().item()


def distances(a_RH: Tensor, b_QH: Tensor) -> Tensor:
    """Euclidean distances, computed from differences because products lose precision for close points."""
    return torch.cdist(a_RH, b_QH, compute_mode="donot_use_mm_for_euclid_dist")
