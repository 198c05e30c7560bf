"""Caches of attention keys and values: of a prefix that rows share, and of rows that grow token by token."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from corrigenda.modules.model.hooks import hooked, stop_forward, until_stopped


def empty_cache(net: PreTrainedModel) -> DynamicCache | None:
    """A cache without tokens; None if a layer keeps a running state instead of keys and values."""
    cache = DynamicCache(config=net.config)
    return cache if all(isinstance(layer, DynamicLayer) for layer in cache.layers) else None


@torch.no_grad()
def run_start(
    net: PreTrainedModel, ids_1T: Tensor, until: nn.Module | None = None
) -> DynamicCache | None:
    """The cache of a single row; None if a layer keeps a running state instead of keys and values.

    With ``until`` the pass ends at that module, and the cache is empty above its block.
    """
    cache = empty_cache(net)
    if cache is None:
        return None
    with until_stopped(), hooked([(until, stop_forward)] if until else []):
        net.get_decoder()(input_ids=ids_1T, past_key_values=cache, use_cache=True)
    return cache


def first_tokens(cache: DynamicCache, count: int, rows: int) -> DynamicCache:
    """A cache of ``rows`` rows with the first ``count`` tokens of a single row's cache, which stays as it is."""
    part = fork(cache)
    for layer in (layer for layer in cast("list[Any]", part.layers) if layer.is_initialized):
        layer.keys, layer.values = layer.keys[..., :count, :], layer.values[..., :count, :]
    part.batch_repeat_interleave(rows)
    return part


def select_rows(cache: DynamicCache, row_R: Tensor) -> None:
    """Keeps some rows of a cache, whose layers may be on different devices."""
    for layer in (layer for layer in cast("list[Any]", cache.layers) if layer.is_initialized):
        layer.batch_select_indices(row_R.to(layer.keys.device))


def can_be_cut(cache: DynamicCache) -> bool:
    """Whether every layer holds keys and values of all tokens, and nothing else."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that starts as this one, which further tokens do not change: updates rebind tensors."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    return part


class _PreallocatedLayer(DynamicLayer):
    """A layer with memory for ``length`` tokens, into which new keys and values are written.

    The layer of ``transformers`` copies everything for every new token.
    """

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self._length = length
        self._memory: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: Literal["keys", "values"], new: Tensor) -> Tensor:
        """Old and new keys or values, concatenated; [rows, heads, tokens, width]."""
        old = getattr(self, name)
        count = old.shape[-2] if old.numel() else 0
        end = count + new.shape[-2]
        memory = self._memory.get(name)
        here = memory is not None and old.data_ptr() == memory.data_ptr()
        if memory is None or not here or len(old) != len(memory) or memory.shape[-2] < end:
            shape = *new.shape[:2], max(self._length, end), new.shape[-1]
            memory = self._memory[name] = new.new_empty(shape)
            if count:
                memory[..., :count, :] = old
        memory[..., count:end, :] = new
        return memory[..., :end, :]


def preallocated(cache: DynamicCache, length: int) -> DynamicCache:
    """A cache that starts as this one and has memory for rows of ``length`` tokens."""
    part = fork(cache)
    part.layers = [
        _PreallocatedLayer(layer, length) if type(layer) is DynamicLayer else layer
        for layer in part.layers
    ]
    return part
