"""States of a frozen model, computed once per text and cached in memory and on disk, each up to a limit.

While an editor is trained the base model is frozen. The input of the lowest edited block, the output of the last
block, and the gradient of an edit's loss at the highest edited block depend on the text alone.

No number may depend on whether a text was cached. On a CPU the last bits of a row's states depend on the width
that it is padded to, but not on the other rows; so a text's width is its length rounded up to a multiple of 8.

On disk the states are in shards, safetensors files of many texts each, in a folder named after everything else
that states depend on. The name of every tensor has a checksum: damaged or foreign tensors are computed again.

Shapes: B rows, T tokens, D width of the states.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from corrigenda.modules.files import write_tensors

if TYPE_CHECKING:
    from corrigenda.modules.model.rows import Rows

log = logging.getLogger(__name__)

FORMAT = "corrigenda-prefix-1"
MULTIPLE = 8  # texts are padded to multiples of this width
SHARD_BYTES = 64 << 20


class PrefixCache:
    """Looks up states of texts, and computes those that are not cached.

    Args:
        batch_tokens: padded tokens of a batch; a single row may have more.
        memory: most bytes in memory.
        shards: the cache on disk, if there is one.
    """

    def __init__(self, batch_tokens: int, memory: int, shards: Shards | None = None) -> None:
        self.batch_tokens, self.memory, self.shards = batch_tokens, memory, shards
        self.num_computed = 0  # texts
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # the last one used comes last
        self._size = 0
        self._unsaved: dict[str, Tensor] = {}

    def states(self, site: str, rows: Rows, run: Callable[[Rows], Tensor]) -> Tensor:
        """states_BTD of rows at a site, zeros where they are padded.

        Args:
            site: name of what ``run`` computes; part of the key, with a row's tokens and start.
            rows: padded on the right.
            run: computes states_BTD of some rows.
        """
        device, lengths = rows.ids_BT.device, rows.length_B.tolist()
        ids = [row[:n] for row, n in zip(rows.ids_BT.cpu(), lengths, strict=True)]
        starts = rows.start_B.tolist()
        keys = [_key(f"{site} {n}", row, device.type) for row, n in zip(ids, starts, strict=True)]
        row_of = dict(zip(keys, range(len(keys)), strict=True))
        found = {key: kept for key in row_of if (kept := self._find(key)) is not None}
        missing = [b for key, b in row_of.items() if key not in found]
        computed = {keys[b]: state_TD for b, state_TD in self._compute(rows, missing, run)}
        found |= computed
        for key in keys:
            self._keep(key, found[key])
        if self.shards is not None:
            self._unsaved |= computed
            if sum(state_TD.nbytes for state_TD in self._unsaved.values()) >= SHARD_BYTES:
                self.save()
        states_BTD = pad_sequence([found[key] for key in keys], batch_first=True)
        return pad(states_BTD, (0, 0, 0, rows.ids_BT.shape[1] - max(lengths))).to(device)

    def save(self) -> None:
        """Writes new states to disk; after a failure nothing more is written."""
        if self.shards is None or not self._unsaved:
            return
        try:
            self.shards.add(self._unsaved)
        except OSError as error:
            log.warning("from here on, states of texts are cached in memory only: %s", error)
            self.shards = None
        self._unsaved = {}

    def _find(self, key: str) -> Tensor | None:
        for kept in (self._kept, self._unsaved):
            if key in kept:
                return kept[key]
        return self.shards.find(key) if self.shards is not None else None

    def _keep(self, key: str, state_TD: Tensor) -> None:
        if key not in self._kept:
            self._size += state_TD.nbytes
        self._kept[key] = state_TD
        self._kept.move_to_end(key)
        while self._size > self.memory:
            self._size -= self._kept.popitem(last=False)[1].nbytes

    def _compute(
        self, rows: Rows, missing: list[int], run: Callable[[Rows], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """(row, state_TD) of the missing rows, in batches of equal width."""
        length_B = rows.length_B.tolist()
        by_width: dict[int, list[int]] = {}
        for b in missing:
            by_width.setdefault(-(-length_B[b] // MULTIPLE) * MULTIPLE, []).append(b)
        for width, same in by_width.items():
            count = max(1, self.batch_tokens // width)
            for some in (same[i : i + count] for i in range(0, len(same), count)):
                part = rows.select(torch.tensor(some, device=rows.ids_BT.device)).widened(width)
                self.num_computed += len(some)
                for b, state_TD in zip(some, run(part).cpu(), strict=True):
                    yield b, state_TD[: length_B[b]].clone()


class Shards:
    """States on disk; the least recently used shard is deleted first.

    Args:
        root: folder of all shards, including those of other models.
        identity: everything that states depend on besides the text, as JSON values.
        limit: most bytes in ``root``.
    """

    def __init__(self, root: Path, identity: dict[str, Any], limit: int) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.root, self.limit = root, limit
        self.header = {"format": FORMAT, "identity": text}
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._files: dict[Path, Any] = {}
        self._places: dict[str, tuple[Path, str]] = {}  # key to shard and name of the tensor
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        with suppress(OSError, SafetensorError):
            file = safe_open(path, framework="pt")
            if self.header.items() <= (file.metadata() or {}).items():
                self._files[path] = file
                self._places |= {name.partition(" ")[0]: (path, name) for name in file.keys()}  # noqa: SIM118

    def find(self, key: str) -> Tensor | None:
        """state_TD, or None if it is missing or damaged."""
        if key not in self._places:
            return None
        path, name = self._places[key]
        state_TD = self._files[path].get_tensor(name)
        with suppress(OSError):  # another process may have deleted it
            os.utime(path)
        return state_TD if name == _signed(key, state_TD) else None

    def add(self, states: dict[str, Tensor]) -> None:
        """Writes a shard, and deletes old ones above the limit."""
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_tensors(path, {_signed(key, t): t for key, t in states.items()}, self.header)
        self._open(path)
        files = [(other.stat(), other) for other in self.root.glob("*/*.safetensors")]
        excess = sum(stat.st_size for stat, _ in files) - self.limit
        for stat, old in sorted(files, key=lambda file: file[0].st_mtime):
            if excess <= 0:
                break
            excess -= stat.st_size
            old.unlink(missing_ok=True)
            self._files.pop(old, None)
            self._places = {key: at for key, at in self._places.items() if at[0] != old}


def _key(site: str, ids_T: Tensor, device: str) -> str:
    """The key of a text at a site, in the precision of autocast."""
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    text = f"{site} {autocast} ".encode() + ids_T.contiguous().numpy().tobytes()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _signed(key: str, state_TD: Tensor) -> str:
    """The key, and a checksum of the states."""
    return f"{key} {zlib.crc32(state_TD.contiguous().view(torch.uint8).numpy().data):08x}"
