"""Texts by likeness: encoders of sentences, and one retriever for whatever is looked up.

A text becomes a unit vector (mean of its tokens' last states, normalised), so that the dot product of two is
their cosine. Search is exact: a product with every stored vector, in pieces; 100,000 entries of 384 numbers
are 150 MB and some hundredths of a second.

Shapes: N entries, B queries, D width of a vector, K results.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from modules.editing import write_tensors
from modules.encoder import TextEncoder
from modules.hooks import capture, first
from modules.lm import LanguageModel, cache_dir

log = logging.getLogger(__name__)

FORMAT = "corrigenda-retriever-1"
ENCODED_TOGETHER = 64
SEARCHED_TOGETHER = 65536  # entries whose scores are held at once


class Encoder(ABC):
    """Texts to unit vectors.

    Attributes:
        name: what the user calls it.
        hash: of its weights: vectors of another hash cannot be compared with its own.
    """

    name: str
    hash: str

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length one, [N, D], float32, on the CPU."""


class SentenceEncoder(Encoder):
    """A Hugging Face encoder, read by the mean over a text's tokens.

    Args:
        name: ``minilm``, which comes as a Python package, a hub id, or a local folder.
        device: where it runs.
    """

    def __init__(self, name: str = "minilm", device: str | torch.device = "cpu") -> None:
        self.name = name
        self._net = TextEncoder(name).to(device).requires_grad_(False)
        self.hash = self._net.weights_hash()

    def encode(self, texts: Sequence[str]) -> Tensor:
        return self._net.encode(texts, ENCODED_TOGETHER).cpu()


class LanguageModelStates(Encoder):
    """A language model's own hidden states in the middle of its depth, by the mean over a text's tokens.

    The first token is left out: models park much of their attention there, and a state so large would make
    all texts alike.

    Args:
        lm: asked without the edits in force.
        layer: block whose output is read, from 0; the middle one if not given.
    """

    def __init__(self, lm: LanguageModel, layer: int | None = None) -> None:
        layer = lm.structure.num_layers // 2 if layer is None else layer
        self._lm, self._block = lm, lm.structure.block_name(layer)
        self.name, self.hash = f"{lm.name}, block {layer}", f"{lm.weights_hash}-{layer}"

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        block = self._lm.net.get_submodule(self._block)
        vectors = []
        with self._lm.pristine():
            for begin in range(0, len(texts), ENCODED_TOGETHER):
                rows = self._lm.rows(texts[begin : begin + ENCODED_TOGETHER])
                with capture({self._block: block}, stop=True) as seen:
                    self._lm.net(rows.ids_BT, attention_mask=rows.mask_BT, use_cache=False)
                mask_BT = rows.mask_BT.clone()
                mask_BT[:, 0] *= rows.length_B == 1
                vectors.append(_mean(first(seen[self._block][1]), mask_BT))
        return torch.cat(vectors)


def find_encoder(encoder: str | Encoder, lm: LanguageModel) -> Encoder:
    """The encoder as it is, the one of that name, or for ``lm`` the language model's own states."""
    if isinstance(encoder, Encoder):
        return encoder
    return LanguageModelStates(lm) if encoder == "lm" else SentenceEncoder(encoder, lm.device)


def _mean(states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    weights_BT1 = mask_BT[..., None].float()
    mean_BD = (states_BTD.float() * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)
    return normalize(mean_BD, dim=-1).cpu()


# ---------------------------------------------------------------------------- look-up


def nearest(queries_BD: Tensor, entries_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(cosine_BK, index_BK) of the k nearest entries, nearest first; fewer where there are fewer.

    Exact: a product of unit vectors, a chunk of the entries at a time.
    """
    k = min(k, len(entries_ND))
    scores = [queries_BD.new_zeros(len(queries_BD), 0)]
    indices = [torch.zeros(len(queries_BD), 0, dtype=torch.long, device=queries_BD.device)]
    for begin in range(0, len(entries_ND), SEARCHED_TOGETHER):
        part_BN = queries_BD @ entries_ND[begin : begin + SEARCHED_TOGETHER].T
        best = part_BN.topk(min(k, part_BN.shape[1]))
        scores.append(best.values)
        indices.append(best.indices + begin)
    scores_BM, order_BM = torch.cat(scores, 1).sort(dim=1, descending=True, stable=True)
    index_BM = torch.cat(indices, 1).gather(1, order_BM)
    return scores_BM[:, :k], index_BM[:, :k]


class Retriever:
    """Texts and their vectors; finds those nearest to a query by cosine, exactly.

    Args:
        encoder: makes the vectors of entries and queries.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.texts: list[str] = []
        self._room_ND = torch.zeros(0, 0)  # grows by doubling; the first len(self) rows count
        self._seconds, self._queries = 0.0, 0

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def vectors_ND(self) -> Tensor:
        """One unit vector per entry."""
        return self._room_ND[: len(self)]

    @property
    def nbytes(self) -> int:
        """Size of the vectors and the texts."""
        return self.vectors_ND.nbytes + sum(len(text.encode()) for text in self.texts)

    @property
    def seconds(self) -> float:
        """Mean time of looking up one query, encoding included; 0 before the first."""
        return self._seconds / self._queries if self._queries else 0.0

    def add(self, texts: Sequence[str]) -> None:
        """New entries, numbered on from the last."""
        if texts:
            self._append(self.encoder.encode(texts))
            self.texts += texts

    def _append(self, new_ND: Tensor) -> None:
        end = len(self) + len(new_ND)
        if end > len(self._room_ND):
            room_ND = new_ND.new_zeros(max(end, 2 * len(self._room_ND)), new_ND.shape[1])
            if len(self):
                room_ND[: len(self)] = self.vectors_ND
            self._room_ND = room_ND
        self._room_ND[len(self) : end] = new_ND

    def remove(self, indices: Sequence[int]) -> None:
        """Takes entries out; those behind them move up."""
        gone = {
            range(len(self))[i] for i in indices
        }  # an index that is not there raises IndexError
        keep = [i for i in range(len(self)) if i not in gone]
        self._room_ND = self.vectors_ND[keep]
        self.texts = [self.texts[i] for i in keep]

    def search(
        self, queries: Sequence[str], k: int, among: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(scores_BK, index_BK): cosine and number of the nearest entries, nearest first.

        Args:
            queries: B texts.
            k: how many; fewer come back where there are fewer entries.
            among: only the first so many entries.
        """
        start = time.perf_counter()
        scores_BK, index_BK = nearest(self.encoder.encode(queries), self.vectors_ND[:among], k)
        self._seconds += time.perf_counter() - start
        self._queries += len(queries)
        return scores_BK, index_BK

    def save(self, path: str | Path) -> None:
        """One safetensors file, written atomically; texts and encoder are in its header."""
        header = {"encoder": self.encoder.name, "hash": self.encoder.hash, "texts": self.texts}
        metadata = {"format": FORMAT, "retriever": json.dumps(header, ensure_ascii=False)}
        write_tensors(path, {"vectors": self.vectors_ND}, metadata)

    @classmethod
    def load(cls, path: str | Path, encoder: Encoder) -> Retriever:
        """What :meth:`save` wrote; raises ValueError for another encoder's vectors or another file."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such retriever file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path}: not a retriever of this project (wanted {FORMAT!r})")
                header = json.loads(metadata["retriever"])
                vectors_ND = file.get_tensor("vectors")
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not a readable retriever file ({error})") from None
        if header["hash"] != encoder.hash:
            raise ValueError(
                f"{path}: its vectors are of the encoder {header['encoder']!r} with weights "
                f"{header['hash']}, not of {encoder.name!r} with weights {encoder.hash}"
            )
        retriever = cls(encoder)
        retriever.texts, retriever._room_ND = header["texts"], vectors_ND
        return retriever

    @classmethod
    def cached(cls, texts: Sequence[str], encoder: Encoder) -> Retriever:
        """A retriever of these texts; encoded once and kept in the cache folder."""
        digest = hashlib.sha256(json.dumps([encoder.hash, list(texts)]).encode()).hexdigest()[:16]
        path = cache_dir() / "retrieval" / f"{digest}.safetensors"
        if path.is_file():
            return cls.load(path, encoder)
        log.info("encoding %d texts with %s, into %s", len(texts), encoder.name, path)
        retriever = cls(encoder)
        retriever.add(texts)
        retriever.save(path)
        return retriever
