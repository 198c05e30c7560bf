"""Corpora of plain text, including text sampled from the model itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from corrigenda.datamodules.corpus import texts as corpus_texts
from corrigenda.modules import checks
from corrigenda.modules.model.lm import LanguageModel

IMPORTED = "imported"  # the source of published statistics


@dataclass(frozen=True)
class Corpus:
    """The text for second moments, perplexity and unrelated prompts.

    Args:
        source: ``facts`` (sentences of the Facts training split), ``model`` (text sampled from the model itself),
            a text or JSONL file, a ``datasets`` Hub id, or ``imported`` (statistics that ``corrigenda moments
            --import`` has read).
        tokens: number of tokens; at least ten times the key width is recommended.
        seed: random seed of the sampling.
        tolerance: stop early when doubling the text changes no layer's C by more than this share of its norm; 0
            reads all tokens.
    """

    source: str = "facts"
    tokens: int = 50_000
    seed: int = 0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        checks.whole(1, tokens=self.tokens)
        checks.seeds(seed=self.seed)
        checks.number("at least 0 and below 1", lambda x: 0 <= x < 1, tolerance=self.tolerance)

    def texts(self, lm: LanguageModel) -> Iterator[str]:
        if self.source == "model":
            return sampled_texts(lm, self.seed)
        return corpus_texts(self.source)

    def require_text(self) -> None:
        """Raises ValueError or OSError if the source cannot be read or is empty."""
        if self.source != "model" and next(corpus_texts(self.source), None) is None:
            raise ValueError(f"{self.source}: the corpus is empty")

    @property
    def key(self) -> str:
        """A unique name of this corpus; a local file is identified by its content, not by its path."""
        if self.source == IMPORTED:
            return IMPORTED
        path, stem = Path(os.path.expanduser(self.source)), Path(self.source).stem[:24]
        what = self.source
        if self.source == "facts":
            what += "\n".join(corpus_texts("facts"))
        elif path.is_file():
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            stem, what = "file", f"{Path(path.name.removesuffix('.gz')).suffix} {content}"
        digest = hashlib.sha256(f"{what}-{self.seed}".encode()).hexdigest()[:8]
        stop = f"-{self.tolerance:g}" if self.tolerance else ""
        return f"{stem}-{digest}-{self.tokens}{stop}"


def sampled_texts(
    lm: LanguageModel, seed: int, length: int = 128, batch: int = 64
) -> Iterator[str]:
    """Samples texts from the unedited model without end, each starting with a common first word.

    ``length`` tokens follow the first word, or fewer if the model's context is shorter.
    """
    starts = "The In A It This He She I When For As On There At".split()  # noqa: SIM905  shorter
    if lm.max_length is not None:
        length = min(length, lm.max_length - max(map(len, lm.tokens.encode(starts))))
    round_ = 0
    while True:
        prompts = [starts[i % len(starts)] for i in range(batch)]
        with lm.pristine(), lm.tokens.as_written(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 100_003 + round_)
            new = lm.generate(prompts, length, top_k=50, batch_size=batch)
        yield from (start + text for start, text in zip(prompts, new, strict=True))
        round_ += 1
