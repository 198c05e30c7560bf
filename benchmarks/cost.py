"""What the formulas of :mod:`benchmarks.formulas` are made of: a model's shape, a text's lengths, a cost.

Passes are counted in token-blocks: one token through one block. One that is trained goes forward and back, which
costs two. Their unit costs 2 P operations, P being a block's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

DOUBLE, SINGLE = 8, 4  # bytes


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a model.

    Attributes:
        layers: L.
        width: D.
        inner: F.
        words: V.
        queries: width of all queries of a block.
        pairs: width of its keys, and of its values.
        inputs: number of the MLP's input projections, 2 where it is gated.
        tied: whether embedding and head are one matrix.
        bytes: of a weight.
    """

    layers: int
    width: int
    inner: int
    words: int
    queries: int
    pairs: int
    inputs: int = 2
    tied: bool = False
    bytes: int = SINGLE

    @classmethod
    def of(
        cls, config: PretrainedConfig, inner: int, inputs: int, dtype: torch.dtype, tied: bool
    ) -> Shape:
        """The shape that a configuration describes, with the MLP's sizes as they were found."""
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        pairs = head * (getattr(config, "num_key_value_heads", None) or heads)
        return cls(
            config.num_hidden_layers, config.hidden_size, inner, config.vocab_size, head * heads, pairs,
            inputs, tied, dtype.itemsize,
        )  # fmt: skip

    @property
    def matrix(self) -> int:
        """Parameters of one MLP matrix."""
        return self.width * self.inner

    @property
    def mlp(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a block's MLP matrices."""
        return [(self.width, self.inner)] * self.inputs + [(self.inner, self.width)]

    @property
    def block(self) -> int:
        """P: parameters of a block's matrices."""
        attention = 2 * self.width * (self.queries + self.pairs)
        return attention + (self.inputs + 1) * self.matrix

    @property
    def parameters(self) -> int:
        return self.layers * self.block + (1 if self.tied else 2) * self.words * self.width

    @property
    def weights(self) -> int:
        """Bytes of the model."""
        return self.bytes * self.parameters

    @property
    def saved(self) -> int:
        """Bytes that one token leaves in one block for the way back: norms, attention, MLP."""
        attention = (
            2 * self.queries + 2 * self.queries
        )  # query, key and value for every head; output
        return self.bytes * (2 * self.width + attention + (self.inputs + 1) * self.inner)

    @property
    def looked_back(self) -> int:
        """Bytes that one stored token leaves in one block for the way back: key and value for every head."""
        return self.bytes * 2 * self.queries

    @property
    def cached(self) -> int:
        """Bytes of keys and values of one token in one block."""
        return self.bytes * 2 * self.pairs

    @property
    def distribution(self) -> int:
        """Bytes of one distribution over the words in training: logits, logarithms, their gradients."""
        return 4 * SINGLE * self.words


@dataclass(frozen=True)
class Text:
    """Tokens of an edit: T, s, m and c."""

    whole: float
    after: float
    answer: float
    context: float


@dataclass(frozen=True)
class Cost:
    """What one edit (or what is made together) costs.

    Attributes:
        held: bytes that the method keeps beside the model before the first edit.
        forward: token-blocks without gradient.
        trained: token-blocks forward and back.
        passes: how often some block's weights are read, forward or back.
        heads: tokens through the head, forward and back.
        operations: others, multiplications and additions.
        peak: bytes at the largest moment of the edit, beside the model and what is held.
        kept: bytes in memory as long as the edit is active.
        disk: bytes of its file.
    """

    held: float = 0
    forward: float = 0
    trained: float = 0
    passes: float = 0
    heads: float = 0
    operations: float = 0
    peak: float = 0
    kept: float = 0
    disk: float = 0

    def flops(self, shape: Shape) -> float:
        """All operations."""
        blocks = self.forward + 2 * self.trained
        return (
            2 * blocks * shape.block + 4 * self.heads * shape.words * shape.width + self.operations
        )

    def seconds(self, shape: Shape, rate: float, pause: float) -> float:
        """Time, given a machine's operations per second and the seconds of a pass of one token through one block.

        That pass is the reading of weights, which no number of tokens makes cheaper.
        """
        return self.flops(shape) / rate + self.passes * pause


def size(number: float) -> str:
    """Bytes in the largest unit that fits, three digits."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}" if number else "0"
        number /= 1000
    return f"{number:.3g} TB"
