"""Second moments of MLP keys on ordinary text: C = E[k k'], uncentred, its Cholesky factor and eigenvectors.

Cached in safetensors files named by weight hash, corpus, token count and dtype, so that no statistics of
another model, text or precision are ever used. Gathering can be killed and goes on where it was.

Shapes: n tokens, F key width, L layers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.corpus import texts as corpus_texts
from modules.hooks import capture
from modules.lm import LanguageModel, cache_dir

log = logging.getLogger(__name__)

MAX_LENGTH = 512  # tokens of one text
BATCH_TOKENS = 4096
BUFFER_TEXTS = 512  # texts sorted by length together, and the unit of resuming


@dataclass(frozen=True)
class Corpus:
    """Which text second moments come from.

    Args:
        source: ``facts`` (sentences of the Facts training split), ``model`` (text sampled from the model
            itself), a text or JSONL file, or a ``datasets`` hub id.
        tokens: how many tokens; at least ten times the key width is advisable.
        seed: of the sampling.
    """

    source: str = "facts"
    tokens: int = 50_000
    seed: int = 0

    def texts(self, lm: LanguageModel) -> Iterator[str]:
        if self.source == "model":
            return sampled_texts(lm, self.seed)
        return corpus_texts(self.source)

    @property
    def key(self) -> str:
        """A name that tells this corpus from every other."""
        path = Path(self.source)
        content = f"-{path.stat().st_size}-{path.stat().st_mtime_ns}" if path.is_file() else ""
        if self.source == "facts":
            content = "\n".join(corpus_texts("facts"))
        digest = hashlib.sha256(f"{self.source}{content}-{self.seed}".encode()).hexdigest()[:8]
        return f"{path.stem[:24]}-{digest}-{self.tokens}"


def sampled_texts(
    lm: LanguageModel, seed: int, length: int = 128, batch: int = 64
) -> Iterator[str]:
    """Endless text sampled from the unedited model, from the most likely first words of a text."""
    starts = [
        "The",
        "In",
        "A",
        "It",
        "This",
        "He",
        "She",
        "I",
        "When",
        "For",
        "As",
        "On",
        "There",
        "At",
    ]
    round_ = 0
    while True:
        prompts = [starts[i % len(starts)] for i in range(batch)]
        with lm.pristine(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 100_003 + round_)
            new = lm.generate(prompts, length, top_k=50, batch_size=batch)
        yield from (start + text for start, text in zip(prompts, new, strict=True))
        round_ += 1


class Moments:
    """Second moments of one model on one corpus, gathered when first asked for.

    Args:
        lm: the model; statistics are always of its unedited weights.
        corpus: the text.
        folder: where files are kept; the user's cache folder by default.
    """

    def __init__(self, lm: LanguageModel, corpus: Corpus, folder: Path | None = None) -> None:
        self.lm, self.corpus = lm, corpus
        dtype = str(lm.net.dtype).removeprefix("torch.")
        root = folder or cache_dir() / "moments"
        self.folder = root / lm.weights_hash / f"{corpus.key}-{dtype}"

    def moment(self, layer: int) -> Tensor:
        """C_FF of block ``layer``'s output projection, float64."""
        return self.gather([layer])[layer]

    def factor(self, layer: int) -> Tensor:
        """Lower Cholesky factor of C, float64; computed once and kept beside C."""
        path = self.folder / f"layer{layer}.cholesky.safetensors"
        stored = self._read(path)
        if stored is None:
            stored = {"factor": cholesky(self.moment(layer))}
            self._write(path, stored)
        return stored["factor"].to(self.lm.device)

    def eigen(self, layer: int) -> tuple[Tensor, Tensor]:
        """(values_F, vectors_FF) of C, ascending, one vector per column, float64; kept beside C."""
        path = self.folder / f"layer{layer}.eigen.safetensors"
        stored = self._read(path)
        if stored is None:
            values_F, vectors_FF = torch.linalg.eigh(self.moment(layer))
            stored = {"values": values_F.clamp(min=0), "vectors": vectors_FF}
            self._write(path, stored)
        return stored["values"].to(self.lm.device), stored["vectors"].to(self.lm.device)

    def gather(self, layers: Sequence[int], progress: bool = True) -> dict[int, Tensor]:
        """The moments of several layers, missing ones in one pass over the text."""
        stored = {layer: self._read(self._path(layer)) for layer in layers}
        found = {layer: tensors for layer, tensors in stored.items() if tensors is not None}
        missing = sorted(stored.keys() - found)
        if missing:
            found |= self._gather(missing, progress)
        return {layer: found[layer]["moment"].to(self.lm.device) for layer in layers}

    # ------------------------------------------------------------------ gathering

    def _gather(self, layers: list[int], progress: bool) -> dict[int, dict[str, Tensor]]:
        """One pass; each layer's sum is written after every buffer of texts, so that it can resume."""
        partial = self.folder / f"layers{'-'.join(map(str, layers))}.partial.safetensors"
        width = self.lm.structure.inner_width
        state = self._read(partial) or {
            "tokens": torch.zeros((), dtype=torch.int64),
            "buffers": torch.zeros((), dtype=torch.int64),
            **{str(layer): torch.zeros(width, width, dtype=torch.float64) for layer in layers},
        }
        state = {name: tensor.to(self.lm.device) for name, tensor in state.items()}
        for ids in self._buffers(state, progress):
            with self.lm.pristine():
                self._add(ids, layers, state)
            state["buffers"] += 1
            self._write(partial, state)
        if state["tokens"] < width:
            raise ValueError(
                f"the corpus {self.corpus.source!r} has {int(state['tokens'])} tokens, fewer than the key "
                f"width {width}: the second moment would be singular; use more text"
            )
        found = {}
        for layer in layers:
            found[layer] = {
                "moment": state[str(layer)] / state["tokens"],
                "tokens": state["tokens"],
            }
            self._write(self._path(layer), found[layer])
        partial.unlink(missing_ok=True)
        return found

    def _buffers(self, state: dict[str, Tensor], progress: bool) -> Iterator[list[list[int]]]:
        """Buffers of encoded texts that have not been counted yet, up to the token budget."""
        done, seen = int(state["buffers"]), 0
        steps: Iterable[int] = range(self.corpus.tokens)
        bar = iter(track(steps, "second moments", disable=not progress))
        shown = 0
        for index, buffer in enumerate(_batched(self.corpus.texts(self.lm), BUFFER_TEXTS)):
            ids = []
            for row in self.lm.encode([text for text in buffer if text.strip()]):
                row = row[: min(MAX_LENGTH, self.corpus.tokens - seen)]
                seen += len(row)
                ids.append(row)
                if seen >= self.corpus.tokens:
                    break
            if index >= done and ids:
                yield ids
            while shown < seen and next(bar, None) is not None:
                shown += 1
            if seen >= self.corpus.tokens:
                break
        for _ in bar:
            break

    @torch.no_grad()
    def _add(self, ids: list[list[int]], layers: list[int], state: dict[str, Tensor]) -> None:
        """Adds one buffer's keys. Sorted by length and padded on the right, so causal attention needs no mask."""
        names = {self.lm.structure.out_name(layer): layer for layer in layers}
        modules = {name: self.lm.net.get_submodule(name) for name in names}
        ids = sorted((row for row in ids if row), key=len)
        begin = 0
        while begin < len(ids):
            count = 1
            while (
                begin + count < len(ids) and (count + 1) * len(ids[begin + count]) <= BATCH_TOKENS
            ):
                count += 1
            rows = self.lm._pad(ids[begin : begin + count], [1] * count)
            with capture(modules, stop=True) as seen:
                self.lm.net.get_decoder()(input_ids=rows.ids_BT, use_cache=False)
            real = rows.mask_BT.bool().flatten()
            for name, layer in names.items():
                keys_nF = seen[name][0].reshape(len(real), -1)[real].float()
                state[str(layer)] += (keys_nF.T @ keys_nF).double()
            state["tokens"] += int(real.sum())
            begin += count

    # ------------------------------------------------------------------ files

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer{layer}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """What a file holds; None if there is none. A damaged file is named, put aside and made again."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("weights") != self.lm.weights_hash:
                    raise ValueError("statistics of another model")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            log.warning("%s is not usable (%s): gathering it again", path, error)
            path.unlink()
            return None

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, self._header())
        part.replace(path)

    def _header(self) -> dict[str, str]:
        return {
            "weights": self.lm.weights_hash,
            "model": self.lm.name,
            "source": self.corpus.source,
            "tokens": str(self.corpus.tokens),
        }


def cholesky(moment_FF: Tensor) -> Tensor:
    """Lower factor in float64; adds to the diagonal, with a warning, only what it must.

    Sums of float32 products are positive definite up to their rounding only, which the least eigenvalues of a
    second moment can fall below.
    """
    moment_FF = moment_FF.double()
    diagonal_F = moment_FF.diagonal()
    for share in (0.0, 1e-8, 1e-7, 1e-6, 1e-5):
        jitter = share * diagonal_F.mean()
        factor, failed = torch.linalg.cholesky_ex(
            moment_FF + torch.diag(jitter.expand_as(diagonal_F))
        )
        if not failed:
            if share:
                log.warning(
                    "the second moment is singular to rounding: added %.1e to its diagonal", jitter
                )
            return factor
    raise ValueError(
        "the second moment cannot be factored: it is not finite, or of too little text"
    )


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
