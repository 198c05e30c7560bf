"""Published shapes with random weights: what an edit costs where no hub is at hand. What they say is noise."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PretrainedConfig

from corrigenda.modules.model.lm import LanguageModel

# The tokenizer is SmolLM2's, with 49,152 words: Llama's own vocabulary of 32,000 would be too small.
SHAPES: dict[str, type[PretrainedConfig]] = {"gpt-j": GPTJConfig, "llama-7b": LlamaConfig}
WORDS = {"llama-7b": {"vocab_size": 49_152}}


class RandomModel(LanguageModel):
    """A network of a published shape, drawn where it is to stand, with SmolLM2's tokenizer.

    Args:
        shape: one of ``SHAPES``, whose configurations are the defaults of transformers.
        dtype: of the weights.
        device: where they are drawn.
    """

    def __init__(self, shape: str, dtype: Any, device: str | None) -> None:  # noqa: ANN401
        self._place = device or "cpu"
        super().__init__(shape, dtype=dtype)

    def _load(self, name: str, dtype: torch.dtype, *_: object) -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = SHAPES[name](**WORDS.get(name, {}))
        with torch.device(self._place):
            net = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return net, LanguageModel("smollm2").tokenizer

    @property
    def weights_hash(self) -> str:  # type: ignore[override]
        """Named, not read: the seed says which weights these are."""
        return f"random-{self.name}"
