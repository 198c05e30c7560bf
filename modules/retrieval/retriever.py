"""Search by similarity: encoders of texts, and a retriever over their vectors.

A text becomes a unit vector (the normalised mean of its tokens' last states), so that the dot product of two
vectors is their cosine. Search is exact up to EXACT_UP_TO entries, and by
:class:`~corrigenda.modules.retrieval.search.Cells` beyond.

Shapes: N entries, B queries, D width of a vector, K results.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from corrigenda.modules.files import locked, write_tensors
from corrigenda.modules.model.delta import read_tensors
from corrigenda.modules.model.hooks import capture, first
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import cache_dir
from corrigenda.modules.retrieval.encoder import TextEncoder
from corrigenda.modules.retrieval.search import Cells, nearest
from corrigenda.modules.retrieval.vectors import as_tensor, from_tensor, require_vectors

log = logging.getLogger(__name__)

FORMAT = "corrigenda-retriever-2"
ENCODED_TOGETHER = 64  # texts
EXACT_UP_TO = 20_000  # entries


class Encoder(ABC):
    """Texts to unit vectors.

    Attributes:
        name: by which users choose it.
        hash: hash of its weights; only vectors of equal hash can be compared.
    """

    name: str
    hash: str

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length one, [N, D], float32, on the CPU."""


class SentenceEncoder(Encoder):
    """A Hugging Face encoder, mean-pooled over a text's tokens.

    Args:
        net: ``minilm``, which comes as a Python package, a hub id, a local folder, or the network itself.
        device: where it runs; a given network is not moved.
    """

    def __init__(
        self, net: str | TextEncoder = "minilm", device: str | torch.device = "cpu"
    ) -> None:
        self._net = net if isinstance(net, TextEncoder) else TextEncoder(net).to(device)
        self._net.requires_grad_(False)
        self.name, self.hash = self._net.name, self._net.weights_hash()

    def encode(self, texts: Sequence[str]) -> Tensor:
        return self._net.encode(texts).cpu()


class LanguageModelStates(Encoder):
    """A language model's own hidden states in the middle of its depth, mean-pooled over a text's tokens.

    The first token is left out: it is an attention sink, and its very large state would make all texts
    similar.

    Args:
        lm: used without its active edits.
        layer: block whose output is used, from 0; the middle one if not given.
    """

    def __init__(self, lm: LanguageModel, layer: int | None = None) -> None:
        layer = lm.structure.num_layers // 2 if layer is None else layer
        self._lm, self._block = lm, lm.structure.block_name(layer)
        self.name, self.hash = f"{lm.name}, block {layer}", f"{lm.weights_hash}-{layer}"
        if lm.tokens.template is not None:
            self.hash += f"-{lm.tokens.template.form}"

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        block = self._lm.net.get_submodule(self._block)
        vectors = []
        with self._lm.pristine():
            for begin in range(0, len(texts), ENCODED_TOGETHER):
                rows = self._lm.tokens.rows(texts[begin : begin + ENCODED_TOGETHER])
                with capture({self._block: block}, stop=True) as seen:
                    self._lm.net(rows.ids_BT, attention_mask=rows.mask_BT, use_cache=False)
                mask_BT = rows.mask_BT.clone()
                mask_BT[:, 0] *= rows.length_B == 1
                vectors.append(_mean(first(seen[self._block][1]), mask_BT))
        return torch.cat(vectors)


def find_encoder(encoder: str | Encoder, lm: LanguageModel) -> Encoder:
    """The given encoder, the one of that name, or for ``lm`` the language model's own states."""
    if isinstance(encoder, Encoder):
        return encoder
    return LanguageModelStates(lm) if encoder == "lm" else SentenceEncoder(encoder, lm.device)


def _mean(states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    weights_BT1 = mask_BT[..., None].float()
    mean_BD = (states_BTD.float() * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)
    return normalize(mean_BD, dim=-1).cpu()


# ---------------------------------------------------------------------------- search


class Retriever:
    """Texts and their vectors; finds the nearest to a query by cosine.

    Args:
        encoder: makes the vectors of entries and queries.
        exact_up_to: with more entries an index is used. Entries that are newer than the index are searched
            exactly, until there are so many that it is rebuilt.
        probes: how many cells of the index a query searches.
    """

    def __init__(self, encoder: Encoder, exact_up_to: int = EXACT_UP_TO, probes: int = 32) -> None:
        self.encoder, self.exact_up_to, self.probes = encoder, exact_up_to, probes
        self.texts: list[str] = []
        self.cells: Cells | None = None
        self._room_ND = torch.zeros(0, 0)  # grows by doubling; the first len(self) rows count
        self._text_bytes = 0
        self._seconds, self._queries = 0.0, 0

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def vectors_ND(self) -> Tensor:
        """One unit vector per entry."""
        return self._room_ND[: len(self)]

    @property
    def nbytes(self) -> int:
        """Size of the vectors, the index and the texts."""
        cells = 0 if self.cells is None else self.cells.nbytes
        return self.vectors_ND.nbytes + cells + self._text_bytes

    @property
    def seconds(self) -> float:
        """Mean time of one query, encoding included; 0 before the first."""
        return self._seconds / self._queries if self._queries else 0.0

    def add(self, texts: Sequence[str], known: Mapping[str, Tensor] | None = None) -> None:
        """Appends entries.

        Args:
            texts: their texts.
            known: their :meth:`tensors`, so that they need not be encoded.
        """
        if texts:
            new_ND = self.encoder.encode(texts) if known is None else known["vectors"]
            if known and "members" in known and not len(self):
                member_N = known["members"]
                self.cells = Cells(known["centres"], known["ends"], member_N, new_ND[member_N])
            self._append(new_ND)
            self.texts += texts
            self._text_bytes += sum(len(text.encode()) for text in texts)
            self._index()

    def _append(self, new_ND: Tensor) -> None:
        end = len(self) + len(new_ND)
        if end > len(self._room_ND):
            room_ND = new_ND.new_zeros(max(end, 2 * len(self._room_ND)), new_ND.shape[1])
            if len(self):
                room_ND[: len(self)] = self.vectors_ND
            self._room_ND = room_ND
        self._room_ND[len(self) : end] = new_ND

    def remove(self, indices: Sequence[int]) -> None:
        """Removes entries; later ones move up."""
        gone = {range(len(self))[i] for i in indices}  # raises IndexError for a missing one
        keep = [i for i in range(len(self)) if i not in gone]
        self._room_ND = self.vectors_ND[keep]
        self._text_bytes -= sum(len(self.texts[i].encode()) for i in gone)
        self.texts = [self.texts[i] for i in keep]
        if self.cells is not None and min(gone, default=len(self)) < len(self.cells):
            self.cells = None

    def search(
        self, queries: Sequence[str], k: int, among: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(scores_BK, index_BK): cosine and index of the nearest entries, nearest first.

        Args:
            queries: B texts.
            k: how many; fewer are returned if there are fewer entries.
            among: search only this many of the first entries.
        """
        end = len(self) if among is None else among
        self._index()
        start = time.perf_counter()
        found = self.nearest(self.encoder.encode(queries), k, end)
        self._seconds += time.perf_counter() - start
        self._queries += len(queries)
        return found

    def _index(self) -> None:
        """Builds the index if there is none yet, or if entries have grown by a fifth since."""
        if len(self) > max(self.exact_up_to, 1.2 * len(self.cells or ())):
            start = time.perf_counter()
            self.cells = Cells.of(self.vectors_ND)
            log.info("indexed %d entries in %.1f s", len(self), time.perf_counter() - start)

    def nearest(self, query_BD: Tensor, k: int, end: int) -> tuple[Tensor, Tensor]:
        """Like :meth:`search`, for vectors and with the current index."""
        entries_ND = self.vectors_ND[:end]
        if self.cells is None or end <= self.exact_up_to:
            return nearest(query_BD, entries_ND, k)
        return self.cells.search(query_BD, entries_ND, k, self.probes)

    def tensors(self, begin: int = 0, end: int | None = None) -> dict[str, Tensor]:
        """Vectors of some entries, and the index if it covers no others, for storage."""
        tensors = {"vectors": self.vectors_ND[begin:end]}
        if self.cells is not None and begin == 0 and len(self.cells) <= len(tensors["vectors"]):
            cells = self.cells
            tensors |= {"centres": cells.centre_CD, "ends": cells.end_C, "members": cells.member_N}
        return tensors

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file in one step, with the encoder in its header."""
        header = {"format": FORMAT, "encoder": self.encoder.name, "hash": self.encoder.hash}
        write_tensors(Path(path), {**self.tensors(), "texts": as_tensor(self.texts)}, header)

    @classmethod
    def load(cls, path: str | Path, encoder: Encoder) -> Retriever:
        """Reads a file of :meth:`save`; raises ValueError for another encoder's vectors and for other files."""
        tensors, header = read_tensors(path, FORMAT, "retriever")
        if header.get("hash") != encoder.hash:
            raise ValueError(
                f"{path}: its vectors are of the encoder {header.get('encoder')!r} with weights "
                f"{header.get('hash')}, not of {encoder.name!r} with weights {encoder.hash}"
            )
        try:
            texts = from_tensor(tensors.pop("texts"))
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("its texts are not a list of texts")
            require_vectors(tensors, len(texts))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: a damaged retriever file ({error})") from None
        retriever = cls(encoder)
        retriever.add(texts, tensors)
        return retriever

    @classmethod
    def cached(cls, texts: Sequence[str], encoder: Encoder) -> Retriever:
        """A retriever of these texts, which are encoded once and stored in the cache folder."""
        digest = hashlib.sha256(json.dumps([encoder.hash, list(texts)]).encode()).hexdigest()[:16]
        path = cache_dir() / "retrieval" / f"{digest}.safetensors"
        with locked(path.with_suffix(".lock"), f"the vectors in {path}", wait=-1):
            if path.is_file():
                try:
                    return cls.load(path, encoder)
                except ValueError as error:
                    log.warning("%s: encoding the texts again", error)
            log.info("encoding %d texts with %s, into %s", len(texts), encoder.name, path)
            retriever = cls(encoder)
            retriever.add(texts)
            retriever.save(path)
            return retriever
