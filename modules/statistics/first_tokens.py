"""The share of the first tokens of texts in second moments, for all blocks in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from corrigenda.modules.model.hooks import Hook, hooked
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.moments import MAX_LENGTH, padded_batches


@torch.no_grad()
def first_token_shares(lm: LanguageModel, texts: Sequence[str]) -> list[float]:
    """For each block the share of trace(C) that comes from the first tokens of the texts, without computing C."""
    first_L = torch.zeros(lm.structure.num_layers, dtype=torch.float64)
    every_L = first_L.clone()
    ids = [row[: min(MAX_LENGTH, lm.max_length or MAX_LENGTH)] for row in lm.tokens.encode(texts)]
    real: list[Tensor] = []

    def measure(layer: int) -> Hook:
        def hook(_module: nn.Module, args: tuple, _output: Tensor) -> None:
            mask_BT = real[0]
            keys_BTF = args[0].reshape(*mask_BT.shape, -1)
            squares_BT = keys_BTF.float().square().sum(-1).double() * mask_BT
            first_L[layer] += float(squares_BT[:, 0].sum())
            every_L[layer] += float(squares_BT.sum())

        return hook

    names = [lm.structure.out_name(layer) for layer in range(lm.structure.num_layers)]
    pairs = [(lm.net.get_submodule(name), measure(layer)) for layer, name in enumerate(names)]
    with lm.pristine(), hooked(pairs):
        for rows in padded_batches(lm, ids):
            real[:] = [rows.mask_BT]
            lm.net.get_decoder()(input_ids=rows.ids_BT, use_cache=False)
    return (first_L / every_L).tolist()
