"""Published model shapes with random weights, to measure costs without downloading a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PretrainedConfig

from corrigenda.modules.model.lm import LanguageModel

# The tokenizer is SmolLM2's, with 49,152 tokens: Llama's own vocabulary of 32,000 would be too small.
SHAPES: dict[str, type[PretrainedConfig]] = {"gpt-j": GPTJConfig, "llama-7b": LlamaConfig}
VOCABULARY = {"llama-7b": {"vocab_size": 49_152}}


class RandomModel(LanguageModel):
    """A network of a published shape with random weights, initialised on its device, and SmolLM2's tokenizer.

    Args:
        shape: one of ``SHAPES``, whose configurations are the defaults of transformers.
        dtype: type of the weights.
        device: where they are initialised.
    """

    def __init__(self, shape: str, dtype: Any, device: str | None) -> None:  # noqa: ANN401
        self._init_device = device or "cpu"
        super().__init__(shape, dtype=dtype)

    def _load(self, name: str, dtype: torch.dtype, *_: object) -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = SHAPES[name](**VOCABULARY.get(name, {}))
        with torch.device(self._init_device):
            net = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return net, LanguageModel("smollm2").tokenizer

    @property
    def weights_hash(self) -> str:  # type: ignore[override]
        """A name instead of a hash; the seed determines the weights."""
        return f"random-{self.name}"
