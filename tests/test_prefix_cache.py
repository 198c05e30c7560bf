"""Cached states of a text are those that would be computed, bit-exactly, whatever else is in the batch."""

import os
from dataclasses import replace

import pytest
import torch

from corrigenda.modules.editors.ke import KE
from corrigenda.modules.editors.malmen import MALMEN
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.model.hooks import first
from corrigenda.modules.model.prefix_cache import PrefixCache, Shards
from corrigenda.modules.model.rows import Rows
from tests.samples import EDITS, LOCAL, OUTER

TEXTS = ["A", "The sea", "The sea is deep and blue", "He came to Ruritania, at last, and sat down.",
         "The capital of Ruritania is", "The capital of Ruritania is Strelsau"]  # fmt: skip
GIB = 2**30


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where this test's shards are, and nobody else's."""
    monkeypatch.setenv("CORRIGENDA_CACHE", str(tmp_path))
    return tmp_path / "prefixes"


def kept(lm, texts, layer=2):
    rows = lm.tokens.rows(texts)
    states_BTD = first(lm.reuse.tail(rows, layer).stored)
    return [state_TD[:n].clone() for state_TD, n in zip(states_BTD, rows.length_B, strict=True)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def cache_of(lm):
    return lm.reuse._store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_text_sees_what_is_beside_it(lm, folder, dtype):
    """Alone, in another order, from memory, from disk."""
    lm.net.to(dtype)
    lm.reuse.limits = replace(lm.reuse.limits, disk_gib=0)
    alone = []
    for text in TEXTS:
        lm.reuse.keep(1, 2)
        alone += kept(lm, [text])
    lm.reuse.limits = replace(lm.reuse.limits, disk_gib=1)
    lm.reuse.keep(1, 2)
    together = kept(lm, TEXTS)
    assert same(alone, together) and cache_of(lm).num_computed == 2 * len(TEXTS)
    assert same(alone[::-1], kept(lm, TEXTS[::-1])) and same(alone[2:4], kept(lm, TEXTS[2:4]))
    assert cache_of(lm).num_computed == 2 * len(TEXTS)
    lm.reuse.keep(1, 2)  # writes what there is, and begins anew
    assert same(alone, kept(lm, TEXTS)) and cache_of(lm).num_computed == 0
    assert len(list(folder.glob("*/*.safetensors"))) == 1


def test_a_cached_tail_is_the_tail(family, tiny_lm, folder):
    lm = tiny_lm(family)
    rows = lm.tokens.rows(TEXTS)
    at = torch.arange(len(TEXTS)), rows.length_B - 1
    with torch.no_grad():
        plain = lm.net(rows.ids_BT, attention_mask=rows.mask_BT).logits[at]
        lm.reuse.keep(1, 2)
        for _ in range(2):
            for layer in (1, 2):  # 2: all blocks, so that norm and head alone are left
                tail = lm.reuse.tail(rows, layer)
                torch.testing.assert_close(tail.logits(*at), plain, atol=1e-5, rtol=0)
                part = tail.select(torch.tensor([1, 0])).trimmed()
                got = part.logits(torch.tensor([0, 1]), rows.length_B[[1, 0]] - 1)
                torch.testing.assert_close(got, plain[[1, 0]], atol=1e-5, rtol=0)


def test_texts_that_were_not_used_for_long_go_first(llama, folder):
    llama.reuse.limits = replace(llama.reuse.limits, disk_gib=0)
    llama.reuse.keep(1)
    size = kept(llama, TEXTS[-1:], 1)[0].nbytes
    llama.reuse.limits = replace(llama.reuse.limits, memory_gib=1.5 * size / GIB)
    llama.reuse.keep(1)
    cache = cache_of(llama)
    for n in (0, 5, 0, 4):  # the last one needs the place of the second
        kept(llama, [TEXTS[n]], 1)
    assert cache.num_computed == 3
    kept(llama, [TEXTS[0]], 1)
    assert cache.num_computed == 3
    kept(llama, [TEXTS[5]], 1)
    assert cache.num_computed == 4 and cache._size <= 1.5 * size


def states(*numbers):
    return {f"{n:032x}": torch.full((4, 8), float(n)) for n in numbers}


def test_shards_that_were_not_used_for_long_go_first(tmp_path):
    """Those of other models among them."""
    other = Shards(tmp_path, {"weights": "b"}, 10**6)
    other.add(states(9))
    (size,) = (path.stat().st_size for path in tmp_path.glob("*/*"))
    shards = Shards(tmp_path, {"weights": "a"}, int(2.5 * size))
    shards.add(states(1))
    for n, path in enumerate(sorted(tmp_path.glob("*/*"), key=lambda p: p.parent != other.folder)):
        os.utime(path, (n, n))
    shards.add(states(2))
    again = Shards(tmp_path, {"weights": "b"}, 10**6)
    assert again.find(f"{9:032x}") is None and not list(again.folder.glob("*"))
    assert shards.find(f"{1:032x}").eq(1).all()  # is now the one used last
    shards.add(states(3))
    found = [shards.find(f"{n:032x}") is not None for n in (1, 2, 3)]
    assert found == [True, False, True]


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "foreign"])
def test_what_is_damaged_or_foreign_is_computed_anew(llama, folder, harm):
    llama.reuse.keep(2)
    wanted = kept(llama, TEXTS)
    llama.reuse.drop()
    (path,) = folder.glob("*/*.safetensors")
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[-1] ^= 1  # the last text's last number
    elif harm == "cut":
        del content[-100:]
    elif harm == "empty":
        content.clear()
    else:
        content = bytes(content).replace(llama.weights_hash.encode(), b"0" * 16)
    path.unlink()
    path.write_bytes(content)
    llama.reuse.keep(2)
    assert same(kept(llama, TEXTS), wanted)
    assert cache_of(llama).num_computed == (1 if harm == "flipped" else len(TEXTS))


def test_other_weights_or_threads_are_another_folder(tiny_lm, folder):
    for seed in (0, 1):
        lm = tiny_lm("llama", seed=seed)
        lm.reuse.keep(1)
        kept(lm, TEXTS, 1)
        lm.reuse.drop()
    torch.set_num_threads(2)
    try:
        lm.reuse.keep(1)
        kept(lm, TEXTS, 1)
        assert cache_of(lm).num_computed == len(TEXTS)
        lm.reuse.drop()
    finally:
        torch.set_num_threads(1)
    assert len(list(folder.iterdir())) == 3


def test_nothing_is_cached_of_an_edited_model(llama, folder):
    editor = MEND(llama, layers=[1], rank=2)
    llama.reuse.keep(1, 3)
    handle = editor.edit(llama, EDITS[:1])
    assert llama.reuse.store(1) and not llama.reuse.store(3)
    handle.remove()
    assert llama.reuse.store(1) and llama.reuse.store(3) and not llama.reuse.store(2)
    llama.reuse.enabled = False
    assert not llama.reuse.store(1)


EDITORS = {
    "MEND": (MEND, {"rank": 4, "alpha": 0.05}),
    "KE": (KE, {"hidden": 4, "condition": 6}),
    "MALMEN": (MALMEN, {"rank": 4, "eta": 0.05, "micro_batch": 2}),
}


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("layers", [[1], [1, 2], [0, 2]])
def test_losses_and_gradients_are_those_of_the_plain_way(lm, folder, name, layers):
    cls, settings = EDITORS[name]
    editor = cls(lm, layers=layers, **settings)
    generator = torch.Generator().manual_seed(1)  # no unit of a ReLU comes to stand at zero
    for parameter in editor.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    found = []
    for way in ("plain", "reused", "kept", "kept"):
        lm.reuse.enabled = way != "plain"
        if way == "kept" and lm.reuse._store is None:
            lm.reuse.keep(editor.lowest_layer, lm.structure.num_layers)
        editor.zero_grad()
        edit_loss, kl = editor._losses(EDITS, OUTER, LOCAL)
        (edit_loss + kl).backward()
        gradient = torch.cat([p.grad.flatten() for p in editor.parameters() if p.grad is not None])
        found.append((edit_loss.item(), kl.item(), gradient))
    plain, *others = found
    assert plain[1] > 1e-5 and plain[2].norm() > 0
    for edit_loss, kl, gradient in others:
        assert abs(edit_loss - plain[0]) < 1e-4 and abs(kl - plain[1]) < 1e-4
        assert (gradient - plain[2]).norm() < 1e-5 * plain[2].norm()
    first_time, second_time = others[1:]
    assert first_time[:2] == second_time[:2] and torch.equal(first_time[2], second_time[2])


def test_states_of_one_site_are_not_those_of_another():
    cache = PrefixCache(100, GIB)
    ids = torch.tensor([[5, 6, 7]])
    rows = Rows(ids, torch.ones_like(ids), torch.tensor([2]))
    moved = Rows(ids, torch.ones_like(ids), torch.tensor([1]))

    def run(value):
        return lambda part: torch.full((*part.ids_BT.shape, 2), value)

    assert cache.states("a", rows, run(1.0)).eq(1).all()
    assert cache.states("b", rows, run(2.0)).eq(2).all()
    assert cache.states("a", moved, run(3.0)).eq(3).all()
    assert cache.states("a", rows, run(4.0)).eq(1).all()
