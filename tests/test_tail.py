"""The frozen prefix gives the logits of the full forward in every family, and changes nothing."""

import copy

import pytest
import torch

from corrigenda.modules.model.hooks import hooked
from corrigenda.modules.model.structure import find_structure, to_storage
from corrigenda.modules.model.tail import Tail, read_at

LENGTH = torch.tensor([9, 3, 7, 12])
MASK = (torch.arange(12) < LENGTH[:, None]).long()
IDS = torch.randint(2, 400, (4, 12), generator=torch.Generator().manual_seed(1)) * MASK
ROW, POSITION = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([8, 6, 2, 5, 11, 4])
# From where on each row may change; a row that may change everywhere has nothing before its cut.
STARTS = {"all": None, "cut": torch.tensor([6, 2, 5, 4]), "uncut row": torch.tensor([6, 0, 3, 4])}
SELECTED = torch.tensor([3, 1])
NEAR = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def made(tiny_net):
    """Each family's network, its structure and its plain logits."""
    kept = {}

    def make(family, **changes):
        key = repr((family, changes))
        if key not in kept:
            net = tiny_net(family, **changes).requires_grad_(False)
            kept[key] = net, find_structure(net), plain_logits(net)
        return kept[key]

    return make


def plain_logits(net):
    with torch.no_grad():
        return net(IDS, attention_mask=MASK, use_cache=False).logits


def check(net, structure, logits, layer, start):
    """A tail's logits, twice, and those of some of its rows."""
    tail = Tail(net, structure, IDS, MASK, layer, start)
    for _ in range(2):
        torch.testing.assert_close(tail.logits(ROW, POSITION), logits[ROW, POSITION], **NEAR)
    part = tail.select(SELECTED)
    at = (torch.tensor([0, 1, 0]), torch.tensor([11, 2, 4]))
    torch.testing.assert_close(part.logits(*at), logits[SELECTED[at[0]], at[1]], **NEAR)
    torch.testing.assert_close(tail.logits(ROW, POSITION), logits[ROW, POSITION], **NEAR)
    return tail


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("layer", [0, 1])
def test_logits_are_those_of_the_full_forward(family, layer, start, made):
    net, structure, logits = made(family)
    blocks = list(net.get_submodule(structure.blocks))
    tail = check(net, structure, logits, layer, STARTS[start])
    assert all(a is b for a, b in zip(net.get_submodule(structure.blocks), blocks, strict=True))
    assert torch.equal(plain_logits(net), logits)
    cut = start != "all" and family != "qwen3_5_text"  # a running state cannot be cut
    assert tail.offset_B.tolist() == (STARTS[start].tolist() if cut else [0] * 4)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("opt", {"do_layer_norm_before": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"attn_implementation": "eager"}),
        ("gemma2", {"attn_implementation": "eager", "head_dim": 8, "sliding_window": 4}),
        ("qwen3_5_text", {"layer_types": ["full_attention", "linear_attention"]}),
    ],
)
def test_variants_of_families(kind, changes, made):
    net, structure, logits = made(kind, **changes)
    for start in STARTS.values():
        check(net, structure, logits, 1, start)


def test_rows_do_not_depend_on_padding(family, made):
    """Right padding changes nothing; the tail counts positions in the unpadded row."""
    net, structure, logits = made(family)
    for row, length in enumerate(LENGTH.tolist()):
        ids = IDS[row : row + 1, :length]
        position = torch.arange(length)
        for tail in (
            Tail(net, structure, ids, torch.ones_like(ids), 0),
            Tail(net, structure, ids, torch.ones_like(ids), 1, torch.tensor([1])),
        ):
            at = position[int(tail.offset_B) :]
            alone = tail.logits(torch.zeros_like(at), at)
            torch.testing.assert_close(alone, logits[row, at], **NEAR)


@pytest.mark.parametrize("start", STARTS)
def test_what_is_computed_later_is_not_stored(family, start, made):
    """A tail follows changes from its layer and token on, with gradients; the rest is frozen."""
    net, structure, logits = made(family)
    net, start = copy.deepcopy(net), STARTS[start]
    tail = Tail(net, structure, IDS, MASK, 1, start)
    change = torch.zeros(32, requires_grad=True)
    step = torch.randn(32)
    where = start if start is not None else torch.tensor([6, 0, 3, 4])
    row = torch.arange(4)

    def add(offset, rows):
        def hook(_module, _args, output):
            out = output.view(rows, -1, 32).clone()
            out[row, where - offset] = out[row, where - offset] + change + step
            return out.view(output.shape)

        return hook

    module = net.get_submodule(structure.out_name(1))
    with hooked([(module, add(tail.offset_B, 4))]):
        moved = tail.logits(ROW, POSITION)
    (gradient,) = torch.autograd.grad(moved.square().sum(), change)
    with hooked([(module, add(torch.zeros(4, dtype=torch.long), 4))]):
        plain = net(IDS, attention_mask=MASK, use_cache=False).logits[ROW, POSITION]
    torch.testing.assert_close(moved, plain, **NEAR)
    (expected,) = torch.autograd.grad(plain.square().sum(), change)
    torch.testing.assert_close(
        gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    assert not torch.allclose(moved, logits[ROW, POSITION], atol=1e-2)
    # below the layer nothing is looked at again
    below = net.get_submodule(structure.out_name(0))
    below.weight.data += to_storage(below, torch.randn(32, structure.inner_width))
    torch.testing.assert_close(tail.logits(ROW, POSITION), logits[ROW, POSITION], **NEAR)


def test_nothing_below_the_layer_is_in_the_graph(made):
    """If all parameters are trainable, only those from the layer up get a gradient."""
    net, structure, _ = made("llama")
    net = copy.deepcopy(net).requires_grad_(True)
    Tail(net, structure, IDS, MASK, 1, STARTS["cut"]).logits(ROW, POSITION).sum().backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None}
    above = ("model.layers.1", "model.norm", "lm_head")
    assert reached == {name for name, _ in net.named_parameters() if name.startswith(above)}


def test_an_error_leaves_the_network_as_it_was(family, made):
    net, structure, logits = made(family)
    blocks = list(net.get_submodule(structure.blocks))
    tail = Tail(net, structure, IDS, MASK, 1, STARTS["cut"])

    def fail(*_):
        raise RuntimeError("inside")

    for call in (tail.run, lambda: tail.logits(ROW, POSITION)):
        with pytest.raises(RuntimeError, match="inside"), hooked([(blocks[1], fail)]):
            call()
        assert all(a is b for a, b in zip(net.get_submodule(structure.blocks), blocks, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    torch.testing.assert_close(tail.logits(ROW, POSITION), logits[ROW, POSITION], **NEAR)


def test_lower_blocks_do_not_run(made):
    net, structure, _ = made("gpt2", num_hidden_layers=4)
    ran = []
    names = [structure.block_name(i) for i in range(4)]
    pairs = [(net.get_submodule(n), lambda *_, n=n: ran.append(n)) for n in names]
    tail = Tail(net, structure, IDS, MASK, 2)
    with hooked(pairs):
        tail.run()
        tail.logits(ROW, POSITION)
    assert ran == names[2:] * 2
    plain = Tail(net, structure, IDS, MASK, 2, STARTS["cut"], reuse=False)
    ran.clear()
    with hooked(pairs):
        logits = plain.logits(ROW, POSITION)
    assert ran == names
    torch.testing.assert_close(logits, tail.logits(ROW, POSITION), **NEAR)


def test_the_head_sees_only_what_is_read(made):
    net, structure, logits = made("gemma2")  # caps its logits after the head
    seen = []
    note = hooked([(net.lm_head, lambda _m, args, _o: seen.append(tuple(args[0].shape)))])
    with note, read_at(net, ROW, POSITION), torch.no_grad():
        read = net(IDS, attention_mask=MASK).logits
    assert seen == [(1, 6, 32)]
    torch.testing.assert_close(read[0], logits[ROW, POSITION], **NEAR)
