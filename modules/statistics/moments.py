"""Second moments of MLP keys over a corpus: C = E[k k'], uncentred, its Cholesky factor and eigenvectors.

They are cached in safetensors files named by weight hash, corpus, number of tokens and dtype, so statistics of
another model, text or precision are never used. The header of a file repeats these and has a digest of the
tensors; a file that is damaged or does not match is renamed and computed again. If the computation is killed it
resumes. If several programs need the same statistics, one computes them and the others wait. Where
torch.distributed is initialised, every process reads every n-th buffer of texts and the sums are added.

In some layers the keys of a text's first token are many times longer than all others (attention sinks: Sun et al.,
2024, arXiv 2402.17762). They are part of C, as in the published statistics, but their share of trace(C) is stored
with it: where it is large, C represents the other tokens badly.

Statistics published with ROME and MEMIT (.npz, one file per layer; arXiv 2202.05262) can be imported.

Shapes: n tokens, F key width, L layers.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from corrigenda.modules import files, processes
from corrigenda.modules.model.delta import require_finite
from corrigenda.modules.model.hooks import capture
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import cache_dir
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.statistics.corpus import IMPORTED, Corpus
from corrigenda.modules.statistics.matrices import cholesky, eigen, gram
from corrigenda.modules.statistics.published import read_npz

log = logging.getLogger(__name__)

MAX_LENGTH = 512  # tokens per text
BATCH_TOKENS = 4096
BUFFER_TEXTS = (
    512  # texts that are sorted by length together; a resumed run repeats at most one buffer
)
PARTIAL = ".partial.safetensors"  # ends the name of a file of sums
WAIT_SECONDS = 5.0  # between attempts to get the lock of another program
WRITE_SECONDS = 30.0  # between writes of the sums, which are gigabytes in wide models


class Moments:
    """Second moments of one model on one corpus, computed when they are first needed.

    Args:
        lm: the model; statistics are those of its unedited weights.
        corpus: the text.
        folder: folder of the files; by default in the user's cache folder.
    """

    def __init__(self, lm: LanguageModel, corpus: Corpus, folder: Path | None = None) -> None:
        self.lm, self.corpus = lm, corpus
        self._dtype, self._key = str(lm.net.dtype).removeprefix("torch."), corpus.key
        root = folder or cache_dir() / "moments"
        self.folder = root / lm.weights_hash / f"{self._key}-{self._dtype}"

    def moment(self, layer: int) -> Tensor:
        """C_FF of block ``layer``'s output projection, float64."""
        return self.gather([layer])[layer]

    def factor(self, layer: int) -> Tensor:
        """Lower Cholesky factor of C, float64; computed once and cached."""
        stored = self._derived(layer, "cholesky", lambda moment_FF: {"factor": cholesky(moment_FF)})
        return stored["factor"].to(self.lm.device)

    def eigen(self, layer: int) -> tuple[Tensor, Tensor]:
        """(values_F, vectors_FF) of C, ascending, one vector per column, float64; computed once and cached."""
        stored = self._derived(layer, "eigen", eigen)
        return stored["values"].to(self.lm.device), stored["vectors"].to(self.lm.device)

    def _derived(
        self, layer: int, name: str, make: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The result of ``make`` on C, cached in a file with the digest of that C."""
        path, of = self.folder / f"layer{layer}.{name}.safetensors", self._digest(layer)
        stored = None if of is None else self._read(path, of)
        if stored is None:
            stored = make(self.moment(layer))
            self._write(path, stored, self._digest(layer))
        return stored

    def first_token_share(self, layer: int) -> float | None:
        """Share of trace(C) that comes from the first tokens of texts; None for imported statistics."""
        self.gather([layer])
        share = (self._read(self._path(layer)) or {}).get("first_share")
        return None if share is None else float(share)

    def gather(self, layers: Sequence[int], progress: bool = True) -> dict[int, Tensor]:
        """The moments of several layers; missing ones are computed in one pass over the text.

        Where torch.distributed is initialised, all processes must call this with the same layers.
        """
        found = self._cached(layers)
        # By a process that was killed.
        left = any(self.folder.glob(f".*{files.UNFINISHED}")) or bool(self._complete_sums())
        if _missing(layers, found) or _largest(int(left)):
            with self._exclusive():  # another program may have computed them meanwhile
                found = self._cached(layers)
                for sums in self._complete_sums():
                    sums.unlink(missing_ok=True)
                if missing := _missing(layers, found):
                    found |= self._gather(missing, progress)
        return {layer: found[layer]["moment"].to(self.lm.device) for layer in layers}

    def _complete_sums(self) -> list[Path]:
        """Files of partial sums whose layers all have their moments already."""
        return [
            path
            for path in self.folder.glob(f"layers*{PARTIAL}")
            if all(self._path(int(n)).exists() for n in re.findall(r"\d+", path.name.split(".")[0]))
        ]

    def _cached(self, layers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        stored = {layer: self._read(self._path(layer)) for layer in layers}
        return {layer: tensors for layer, tensors in stored.items() if tensors is not None}

    def take_over(self, path: str | Path, layer: int) -> Tensor:
        """Imports C of ``layer`` from a statistics file published with ROME or MEMIT, as source ``imported``.

        Such a file does not identify the model, which is the caller's responsibility. Raises ValueError if its
        shape does not fit.
        """
        moment, tokens = read_npz(path)
        width = self.lm.structure.inner_width
        self.lm.structure.block_name(layer)
        if moment.shape != (width, width):
            raise ValueError(
                f"{path}: the second moment has the shape {tuple(moment.shape)}, but the keys of {self.lm.name!r} "
                f"have width {width}: these are statistics of another model"
            )
        found = {"moment": moment, "tokens": torch.tensor(tokens)}
        self._write(self._path(layer), found)
        return moment.to(self.lm.device)

    # ------------------------------------------------------------------ computation

    def _gather(self, layers: list[int], progress: bool) -> dict[int, dict[str, Tensor]]:
        """Computes C in one pass; the sums are saved regularly, after a buffer of texts, so that it can resume."""
        if self.corpus.source == IMPORTED:
            raise ValueError(
                f"no statistics of layer {layers[0]} of {self.lm.name!r} have been imported: run "
                f"corrigenda moments --lm.name {self.lm.name} --import FILE --layers {layers[0]}"
            )
        rank, world = processes.rank_and_number()
        number = f".rank{rank}of{world}" if world > 1 else ""
        partial = self.folder / f"layers{'-'.join(map(str, layers))}{number}{PARTIAL}"
        state, written = self._initial_sums(partial, layers), time.monotonic()
        for index, ids in enumerate(self._buffers(progress and rank == 0)):
            if index < state["buffers"]:
                continue
            if index % world == rank:
                with self.lm.pristine():
                    self._add(ids, layers, state)
            state["buffers"] += 1
            if (index + 1) % world:
                continue
            if self._has_converged(layers, state, (index + 1) // world):
                break
            if _largest(int(time.monotonic() - written >= WRITE_SECONDS)):
                self._write(partial, state)
                written = time.monotonic()
        width = self.lm.structure.inner_width
        tokens = processes.total(state["tokens"])
        if tokens < width:
            raise ValueError(
                f"the corpus {self.corpus.source!r} has {int(tokens)} tokens, fewer than the key "
                f"width {width}: the second moment would be singular; use more text"
            )
        found = {}
        for layer in layers:
            moment_FF = processes.total(state[str(layer)]) / tokens
            if not moment_FF.isfinite().all():
                raise ValueError(
                    f"the keys of block {layer} of {self.lm.name!r} on the corpus {self.corpus.source!r} are not "
                    f"finite in {self._dtype}: choose another --lm.dtype, or check the model"
                )
            share = processes.total(state[f"{layer}.first"]) / tokens / moment_FF.trace()
            found[layer] = {"moment": moment_FF, "tokens": tokens, "first_share": share}
            log.info("layer %d: %.1f %% of trace(C) is from first tokens", layer, 100 * share)
            self._write(self._path(layer), found[layer])
        partial.unlink(missing_ok=True)
        return found

    def _initial_sums(self, partial: Path, layers: list[int]) -> dict[str, Tensor]:
        """The sums saved by a killed run, or zeros; several processes only resume from the same buffer."""
        width = self.lm.structure.inner_width
        zero, sums = torch.zeros((), dtype=torch.int64), torch.zeros(width, width).double()
        state = {"tokens": zero, "buffers": zero.clone()}
        for layer in layers:
            state |= {str(layer): sums.clone(), f"{layer}.first": sums[0, 0].clone()}
            if self.corpus.tolerance:
                state[f"{layer}.before"] = sums.clone()
        stored = self._read(partial)
        if stored is not None and stored.keys() == state.keys():
            done = int(stored["buffers"])
        else:
            stored, done = state, 0
        if _largest(done) != -_largest(-done):
            stored = state
        return {name: tensor.to(self.lm.device) for name, tensor in stored.items()}

    def _has_converged(self, layers: list[int], state: dict[str, Tensor], rounds: int) -> bool:
        """Whether C has changed less than the tolerance since half as much text; checked in rounds 1, 2, 4, ..."""
        change = 1.0
        if self.corpus.tolerance and not rounds & (rounds - 1):
            change, tokens = 0.0, processes.total(state["tokens"])
            for layer in layers:
                moment_FF = processes.total(state[str(layer)]) / tokens
                difference = (moment_FF - state[f"{layer}.before"]).norm() / moment_FF.norm()
                change = max(change, float(difference))
                state[f"{layer}.before"] = moment_FF
            if tokens < self.lm.structure.inner_width:
                change = 1.0
        # Synchronises in every round, so that processes are at the same buffer when they are killed.
        return bool(_largest(int(change <= self.corpus.tolerance)))

    def _buffers(self, progress: bool) -> Iterator[list[list[int]]]:
        """Buffers of encoded texts up to the number of tokens, the same in all processes."""
        limit = min(MAX_LENGTH, self.lm.max_length or MAX_LENGTH)
        seen = 0
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("second moments", total=self.corpus.tokens)
            texts = iter(self.corpus.texts(self.lm))
            while buffer := list(islice(texts, BUFFER_TEXTS)):
                ids = []
                for row in self.lm.tokens.encode([text for text in buffer if text.strip()]):
                    row = row[: min(limit, self.corpus.tokens - seen)]
                    seen += len(row)
                    ids.append(row)
                    if seen >= self.corpus.tokens:
                        break
                yield ids
                bar.update(task, completed=seen)
                if seen >= self.corpus.tokens:
                    break

    @torch.no_grad()
    def _add(self, ids: list[list[int]], layers: list[int], state: dict[str, Tensor]) -> None:
        """Adds the keys of one buffer to the sums."""
        names = {self.lm.structure.out_name(layer): layer for layer in layers}
        modules = {name: self.lm.net.get_submodule(name) for name in names}
        for rows in padded_batches(self.lm, ids):
            with capture(modules, stop=True) as seen:
                self.lm.net.get_decoder()(input_ids=rows.ids_BT, use_cache=False)
            real = rows.mask_BT.bool().flatten()
            for name, layer in names.items():
                keys_NF = seen[name][0].reshape(len(real), -1).float()
                first_BF = keys_NF[:: rows.ids_BT.shape[1]]
                state[f"{layer}.first"] += first_BF.double().square().sum()
                keys_nF = keys_NF[real]
                state[str(layer)] += gram(keys_nF).double()
            state["tokens"] += int(real.sum())

    # ------------------------------------------------------------------ files

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer{layer}.safetensors"

    def _digest(self, layer: int) -> str | None:
        """The digest of C in its file; None if there is no file for this model and corpus."""
        try:
            header = files.read_metadata(self._path(layer))
            self._require_own(self._path(layer), header)
            return header.get(files.DIGEST) or files.digest(
                files.read_tensors(self._path(layer))[0]
            )
        except (ValueError, OSError):
            return None

    def _read(self, path: Path, of: str | None = None) -> dict[str, Tensor] | None:
        """The tensors in a file; None if there is none. An unusable file is renamed, with a warning.

        Args:
            path: the file.
            of: digest of the C that its content must have been computed from.
        """
        try:
            number = path.stat().st_ino
            tensors, header = files.read_tensors(path)
            self._require_own(path, header)
            if of is not None and header.get("of") != of:
                raise ValueError(f"{path}: computed from another second moment")
            width = self.lm.structure.inner_width
            if any(size != width for tensor in tensors.values() for size in tensor.shape):
                raise ValueError(f"{path}: its keys do not have width {width}")
            require_finite(tensors)
        except FileNotFoundError:
            return None
        except ValueError as error:
            renamed = path.with_name(f"{path.name}.unusable")
            log.warning("%s; computing it again, the file is renamed to %s", error, renamed)
            with self._write_lock():
                if path.exists() and path.stat().st_ino == number:  # still the same file
                    path.replace(renamed)
            return None
        return tensors

    def _require_own(self, path: Path, header: dict[str, str]) -> None:
        """Raises ValueError if a file belongs to another model, corpus or precision."""
        own = self._header()
        # Files of earlier versions do not identify the corpus, but their folder does.
        names = ("weights", "corpus", "dtype") if "corpus" in header else ("weights", "source")
        for name in names:
            if header.get(name) != own[name]:
                raise ValueError(f"{path}: its {name} is {header.get(name)!r}, not {own[name]!r}")

    def _write(self, path: Path, tensors: dict[str, Tensor], of: str | None = None) -> None:
        with self._write_lock():
            files.write_tensors(path, tensors, self._header() | ({"of": of} if of else {}))

    def _header(self) -> dict[str, str]:
        return {
            "weights": self.lm.weights_hash,
            "model": self.lm.name,
            "source": self.corpus.source,
            "tokens": str(self.corpus.tokens),
            "corpus": self._key,
            "dtype": self._dtype,
        }

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        """Locks the folder while a file is written."""
        lock = self.folder.with_name(f".{self.folder.name}.write.lock")
        with files.locked(lock, f"the statistics in {self.folder}", wait=-1):
            yield

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Locks the folder against other programs while statistics are computed.

        With several processes the first one holds the lock for all of them.
        """
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        with ExitStack() as stack:
            for attempt in count():
                held = 0
                if processes.rank_and_number()[0] == 0:
                    wait = WAIT_SECONDS if attempt else 0.0
                    try:
                        stack.enter_context(files.locked(lock, f"the folder {self.folder}", wait))
                        held = 1
                    except BlockingIOError as busy:
                        if not attempt:
                            log.warning(
                                "waiting for another program to compute statistics: %s", busy
                            )
                if _largest(held):
                    break
            if held:
                with self._write_lock():
                    files.remove_unfinished(self.folder)
            yield


def _missing(layers: Sequence[int], found: dict[int, dict[str, Tensor]]) -> list[int]:
    """The layers that any process is missing."""
    return [layer for layer in sorted(set(layers)) if _largest(int(layer not in found))]


def padded_batches(lm: LanguageModel, ids: list[list[int]]) -> Iterator[Rows]:
    """Batches of texts sorted by length, padded on the right so that causal attention needs no mask."""
    ids = sorted((row for row in ids if row), key=len)
    begin = 0
    while begin < len(ids):
        count = 1
        while begin + count < len(ids) and (count + 1) * len(ids[begin + count]) <= BATCH_TOKENS:
            count += 1
        yield lm.tokens.pad(ids[begin : begin + count], [1] * count)
        begin += count


def _largest(number: int) -> int:
    """The maximum over all processes."""
    return max(processes.gather(number))
