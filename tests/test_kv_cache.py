"""Preallocated caches have the same content as those of transformers, bit-exactly."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from corrigenda.modules.model.kv_cache import preallocated

CONFIG = LlamaConfig(num_hidden_layers=2)


def same(a, b):
    return all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)
        for x, y in zip(a.layers, b.layers, strict=True)
    )


def add(tokens, *caches, rows=3):
    for layer in range(2):
        new = torch.randn(2, rows, 2, tokens, 4)
        read = [cache.update(new[0], new[1], layer) for cache in caches]
        assert all(map(torch.equal, read[0], read[-1]))


@pytest.mark.parametrize("length", [0, 5])
@pytest.mark.parametrize("room", [2, 8, 20])
def test_room_changes_nothing(room, length):
    """Also when it is too little, and when rows or the last tokens are removed in between."""
    own = DynamicCache(config=CONFIG)
    if length:
        add(length, own)
    roomy = preallocated(own, room)
    for tokens in (3, 1, 1, 4):
        add(tokens, own, roomy)
        assert same(own, roomy) and own.get_seq_length() == roomy.get_seq_length()
    for cache in (own, roomy):
        cache.crop(-2)
    add(1, own, roomy)
    for cache in (own, roomy):
        cache.batch_select_indices(torch.tensor([0, 2]))
    add(2, own, roomy, rows=2)
    assert same(own, roomy)


def test_what_it_starts_from_stays_as_it_is():
    start = DynamicCache(config=CONFIG)
    add(4, start)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in start.layers]
    first, second = preallocated(start, 9), preallocated(start, 9)
    add(2, first)
    add(3, second)
    assert all(
        torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        for layer, (keys, values) in zip(start.layers, before, strict=True)
    )
    assert first.get_seq_length() == 6 and second.get_seq_length() == 7


def test_a_new_token_is_written_where_it_stands():
    cache = preallocated(DynamicCache(config=CONFIG), 9)
    add(4, cache)
    place = cache.layers[0].keys.data_ptr()
    add(1, cache)
    assert cache.layers[0].keys.data_ptr() == place


def test_windows_keep_a_layer_of_their_own():
    cache = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    roomy = preallocated(cache, 9)
    assert all(type(layer) is DynamicSlidingWindowLayer for layer in roomy.layers)
