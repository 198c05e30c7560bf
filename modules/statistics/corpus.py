"""Ordinary text that an editor or a measurement reads: which one, and what the model itself writes of it."""

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

IMPORTED = "imported"  # the source of statistics that were not gathered here


@dataclass(frozen=True)
class Corpus:
    """Which text second moments, perplexity and unrelated prompts come from.

    Args:
        source: ``facts`` (sentences of the Facts training split), ``model`` (text sampled from the model
            itself), a text or JSONL file, a ``datasets`` hub id, or ``imported`` (what
            ``corrigenda moments --import`` took over).
        tokens: how many tokens; at least ten times the key width is advisable.
        seed: of the sampling.
        tolerance: stop earlier, once twice the text changed no layer's C by more than this share of its
            norm; 0 reads all the tokens.
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
        """Raises ValueError or OSError, before any work is done, unless the source has a first text."""
        if self.source != "model" and next(corpus_texts(self.source), None) is None:
            raise ValueError(f"{self.source}: there is no text in it")

    @property
    def key(self) -> str:
        """A name that tells this corpus from every other; a local file is told by its content, not its path."""
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
    """Endless text sampled from the unedited model, from the most likely first words of a text.

    ``length`` tokens follow the first word, fewer where the model cannot take in as many.
    """
    starts = "The In A It This He She I When For As On There At".split()  # noqa: SIM905  shorter so
    if lm.max_length is not None:
        length = min(length, lm.max_length - max(map(len, lm.tokens.encode(starts))))
    round_ = 0
    while True:
        prompts = [starts[i % len(starts)] for i in range(batch)]
        with lm.pristine(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 100_003 + round_)
            new = lm.generate(prompts, length, top_k=50, batch_size=batch)
        yield from (start + text for start, text in zip(prompts, new, strict=True))
        round_ += 1
