"""Ctrl-C at any moment inside an edit: the model is afterwards as before it or as after it, never between."""

import ctypes
import math
import signal
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules import interrupts
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editing.memory import MemoryPatch
from corrigenda.modules.editing.text_patch import TextPatch
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.ike import IKE
from corrigenda.modules.editors.memprompt import MemPrompt
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.interrupts import Reversible, replaced, uninterrupted
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.hooks import capture, hooked
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.statistics.corpus import Corpus
from tests.samples import ROOT

OURS = tuple(str(ROOT / "corrigenda" / package) for package in ("modules", "datamodules"))
EDITS = [Edit("{} was made in", "Ada Quill", "Paris"), Edit("{} is", "Lake Onna", "red")]


class _Signal:
    """Turns what a trace function is called with into the number of SIGINT."""

    @staticmethod
    def from_param(_value):
        sys.settrace(None)
        return ctypes.c_int(signal.SIGINT)


class _Ignored:
    @staticmethod
    def from_param(_value):
        return ctypes.c_int(0)


# As a trace function C's `raise` sends a signal before an instruction, and no Python code runs before the
# interpreter's next look for signals: it arrives as one from outside would.
interrupt = ctypes.CDLL(None)["raise"]
interrupt.argtypes = [_Signal, _Ignored, _Ignored]
interrupt.restype = None


def interrupted(action, at):
    """Runs ``action`` with SIGINT at the instruction number ``at`` of project code; how many it counted."""
    count = 0

    def each(frame, event, _argument):
        nonlocal count
        count += event == "opcode"
        return interrupt if count == at else each

    def enter(frame, _event, _argument):
        if count >= at or not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return each

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        action()
        time.sleep(0)  # the interpreter looks for signals here at the latest
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count


def looks(lm):
    """All that an edit may change: weights, hooks, blocks, handles, what is set aside or remembered."""
    modules = dict(lm.net.named_modules())
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in modules.items()
        if module._forward_hooks or module._forward_pre_hooks
    }
    kinds = [type(module).__name__ for module in modules.values()]
    texts = [(h._active, h._aside) for h in lm.handles if isinstance(h, TextPatch)]
    memories = [len(h.memory) - h.end for h in lm.handles[-1:] if isinstance(h, MemoryPatch)]
    spares = [sorted(h._spare) for h in lm.handles if isinstance(h, WeightPatch)]
    sizes = [h.adapter.size for h in lm.handles if isinstance(h, ModulePatch)]
    state = lm.edits._suspended, lm.edits.batch, lm.reuse._shared, lm.reuse._finds_prefixes
    handles = list(map(type, lm.handles))
    return hash_weights(lm.net), hooks, kinds, handles, texts, memories, spares, sizes, state


def clear(lm):
    while lm.handles:
        lm.handles[-1].remove()


def everywhere(lm, prepare, action, most=200):
    """Interrupts ``action`` at every instruction, or at so many; the model looks as before it or as after it.

    ``action`` takes what ``prepare`` returns.
    """
    base = looks(lm)
    given = prepare()
    before = looks(lm)
    total = interrupted(lambda: action(given), math.inf)
    after = looks(lm)
    handlers = [signal.getsignal(number) for number in interrupts.SIGNALS]
    seen = set()
    for at in range(1, total + 1, -(-total // most)):
        clear(lm)
        assert looks(lm) == base
        given = prepare()
        interrupted(lambda given=given: action(given), at)
        found = looks(lm)
        assert found in (before, after), f"interrupted at instruction {at} of {total}"
        assert [signal.getsignal(number) for number in interrupts.SIGNALS] == handlers
        seen.add(found == after)
    clear(lm)
    assert looks(lm) == base
    return seen


def delta(lm, size=0.3):
    generator = torch.Generator().manual_seed(0)
    names = [f"{lm.structure.out_name(layer)}.weight" for layer in (0, 1)]
    inner, outer = lm.structure.inner_width, lm.structure.width
    draw = lambda *shape: size * torch.randn(*shape, generator=generator)  # noqa: E731
    return Delta({name: LowRank(draw(outer, 1), draw(1, inner)) for name in names})


def nothing():
    return None


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("gpt2")


EDITORS = {
    "weights": lambda: FT([1], steps=2),
    "memory beside the network": lambda: GRACE(1, epsilon=0.5, steps=2),
    "texts": lambda: MemPrompt(lookup="distance"),
    "texts shown": lambda: IKE(None, num_demonstrations=0, encoder="lm"),
}


@pytest.mark.parametrize("kind", EDITORS)
def test_making_an_edit(lm, kind):
    """Also the second of one kind, which extends the memory of the first."""
    editor = EDITORS[kind]()
    for prepare in (nothing, lambda: editor.edit(lm, EDITS[:1])):
        assert everywhere(lm, prepare, lambda _: editor.edit(lm, EDITS[1:]), 60) == {False, True}


def test_edits_that_are_made_provisionally(lm, data_files):
    """ROME writes one edit after the other and takes them out again before it writes their sum."""
    editor = ROME(0, contexts=[(2, 2)], corpus=Corpus(data_files.text, 1000), steps=2)
    editor.prepare(lm)
    assert False in everywhere(lm, nothing, lambda _: editor.edit(lm, EDITS), 60)


def again(lm, kind):
    """Makes two edits one after the other; the same again, quickly: from what was learned the first time."""
    editor = EDITORS[kind]()
    made = [editor.edit(lm, [edit]) for edit in EDITS]
    if isinstance(made[0], MemoryPatch):
        clear(lm)
        return lambda: [editor.edit(lm, [edit]) for edit in EDITS]
    states = [handle.state() for handle in made]
    clear(lm)
    return lambda: [type(made[0]).restore(lm, state) for state in states]


@pytest.mark.parametrize("kind", EDITORS)
def test_removing_and_absorbing(lm, kind):
    two = again(lm, kind)

    assert everywhere(lm, two, lambda made: made[1].remove()) == {False, True}
    assert everywhere(lm, two, lambda made: made[0].absorb(made[1])) == {False, True}


def test_restoring(lm):
    for editor, kind in ((FT([1], steps=2), WeightPatch), (GRACE(1, steps=2), ModulePatch)):
        state = editor.edit(lm, EDITS[:1]).state()
        clear(lm)
        restore = partial(kind.restore, lm, state)
        assert everywhere(lm, nothing, lambda _, restore=restore: restore()) == {False, True}


def inside(context):
    with context:
        len([])


def test_whatever_holds_for_a_block_of_code_ends_with_it(lm):
    """Edits of all kinds deactivated for a block, hooks, side branches, replaced blocks, shared states."""

    makes = [again(lm, kind) for kind in EDITORS]

    def edited():
        return [make() for make in makes][-1][-1]

    block = lm.net.get_submodule(lm.structure.block_name(0))
    pairs = [(block, lambda *_: None)] * 3
    rows = lm.tokens.rows(["It is", "He"], ["red", "here"])
    prompt_BT = rows.prompt_BT
    one = torch.zeros(2, dtype=torch.long)
    for action in (
        lambda _: inside(lm.pristine()),
        lambda patch: inside(patch.set_aside()),
        lambda _: inside(hooked(pairs)),
        lambda _: inside(capture({"block": block})),
        lambda _: inside(lm.edits.side_by_side([delta(lm)], one)),
        lambda _: inside(lm.edits.announce(prompt_BT)),
        lambda _: inside(lm.reuse.shared(1)),
        lambda _: inside(lm.reuse.common_prefix()),
        lambda _: inside(lm.edits.provisional()),
    ):
        assert everywhere(lm, edited, action, 40) == {True}


def test_scoring_and_generating(lm):
    def score(_):
        with lm.reuse.shared(1):
            lm.score(["It is", "It is"], ["red", "here"], [delta(lm)])

    assert everywhere(lm, lambda: WeightPatch(lm, delta(lm)), score) == {True}
    generate = partial(lm.generate, ["It is"], 2, [delta(lm)])
    assert everywhere(lm, nothing, lambda _: generate()) == {True}


@pytest.mark.parametrize("requantize", [False, True])
def test_quantised_layers(tiny_folder, requantize):
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    folder = str(tiny_folder("llama", **wide))
    try:
        lm = LanguageModel(folder, quantization="nf4", requantize=requantize)
    except (RuntimeError, NotImplementedError) as error:  # no backend for the processor
        pytest.skip(f"bitsandbytes does not run here: {error}")
    make = partial(WeightPatch, lm, delta(lm))
    assert everywhere(lm, nothing, lambda _: make(), 60) == {False, True}
    assert everywhere(lm, make, lambda patch: patch.remove(), 60) == {False, True}
    assert everywhere(lm, make, lambda _: inside(lm.pristine()), 60) == {True}


# ---------------------------------------------------------------------------- the means


def test_a_signal_that_was_held_back_is_delivered_afterwards():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_a_block_inside_a_change_can_be_interrupted():
    owner = SimpleNamespace(value=1)
    seen = []
    with pytest.raises(KeyboardInterrupt), replaced(owner, value=2):
        with replaced(owner, value=3), uninterrupted():
            seen.append(owner.value)
        signal.raise_signal(signal.SIGINT)
        seen.append("not reached")
    assert seen == [3] and owner.value == 1


def test_a_change_that_fails_is_taken_back():
    done = []

    def do():
        done.append("do")
        signal.raise_signal(signal.SIGINT)
        done.append("still")

    with pytest.raises(KeyboardInterrupt), Reversible(do, lambda: done.append("undo")):
        done.append("not reached")
    assert done == ["do", "still", "undo"]
    with pytest.raises(ZeroDivisionError), Reversible(lambda: 1 / 0, lambda: done.append("undo")):
        pass
    assert done[3:] == ["undo"]


def test_a_handler_of_the_users_is_called_and_put_back(monkeypatch):
    calls = []

    def own(number, _frame):
        calls.append(number)

    before = signal.signal(signal.SIGTERM, own)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            assert not calls
        assert calls == [signal.SIGTERM]
        with replaced(SimpleNamespace(value=1), value=2):
            signal.raise_signal(signal.SIGTERM)
            assert calls == [signal.SIGTERM] * 2
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_need_nothing():
    result = []

    def run():
        with uninterrupted(), replaced(SimpleNamespace(value=1), value=2):
            result.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert result == [signal.getsignal(signal.SIGINT)]
