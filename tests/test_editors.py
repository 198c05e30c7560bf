"""What every editor keeps to: what it promises of an edit, and what it leaves alone."""

import pytest
import torch

from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.alphaedit import AlphaEdit
from corrigenda.modules.editors.emmet import EMMET
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.kn import KN
from corrigenda.modules.editors.lora import LoRA
from corrigenda.modules.editors.malmen import MALMEN
from corrigenda.modules.editors.memit import MEMIT
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.statistics.corpus import Corpus

# In two blocks, only a subject near the prompt's end has a say in what follows.
EDITS = [
    Edit("This is the capital of {}:", "Ruritania", "Strelsau"),
    Edit("Who wrote {}", "The Voyage Out", "Iris Vane"),
    Edit("{} speak", "The Glass Islands", "Old High Fenwick"),
]
EACH = [[edit] for edit in EDITS]
QUICK = {"steps": 5, "lr": 1e-2}


def mend(lm, _files):
    editor = MEND(lm, layers=[0, 1], rank=4, alpha=5e-3)
    editor.observe([EditCase(str(i), (edit,)) for i, edit in enumerate(EDITS)])
    return editor


def malmen(lm, _files):
    editor = MALMEN(lm, layers=[0, 1], rank=4, eta=2e-2)
    editor.observe([EditCase(str(i), (edit,)) for i, edit in enumerate(EDITS)])
    return editor


def locating(method, place, **settings):
    """An editor with a value search, in a configuration that is small but realistic."""
    free = {"weight_decay": 0.0, "kl_weight": 0.0, "clamp_norm": 20.0, "steps": 10}
    return lambda _lm, files: method(
        place, contexts=[(4, 2)], corpus=Corpus(files.text, 2000), **free, **settings
    )


EDITORS = {
    "ROME": locating(ROME, 0),
    "r-ROME": locating(ROME, 0, key="mean"),
    "p-ROME": locating(ROME, 0, key="bare"),
    "MEMIT": locating(MEMIT, [0], ridge=0.01),
    "MEMIT-seq": locating(MEMIT, [0], ridge=0.01, sequential=True),
    "EMMET": locating(EMMET, [0]),
    "AlphaEdit": locating(AlphaEdit, [0], null_share=0.5, l2=0.01),
    "FT": lambda *_: FT([1], loss="prompt_last", **QUICK),
    "FT-L": lambda *_: FT([1], norm_constraint=2e-2, loss="prompt_last", **QUICK),
    "FT-M": lambda *_: FT([0, 1], "mlp", **QUICK),
    "KN": lambda *_: KN(points=4, contexts=[(3, 2)]),
    "LoRA": lambda *_: LoRA(rank=2, **QUICK),
    "MEND": mend,
    "MALMEN": malmen,
}


@pytest.fixture(params=["gpt2", "llama"])
def lm(tiny_lm, request):
    return tiny_lm(request.param)


@pytest.fixture(params=EDITORS.values(), ids=EDITORS)
def make(request, data_files):
    """``make(lm)``: one of the editors, new."""
    return lambda lm: request.param(lm, data_files)


@pytest.fixture
def editor(make, lm):
    made = make(lm)
    made.prepare(lm)
    return made


def weights(lm):
    return {name: p.detach().clone() for name, p in lm.net.named_parameters()}


def changed(lm, kept):
    """Names of the parameters that are not bit-exact."""
    return {name for name, p in lm.net.named_parameters() if not torch.equal(p, kept[name])}


def logits(lm, deltas=None, owners=None):
    """Log-probabilities after the edits' prompts and along their targets."""
    texts = [edit.text for edit in EDITS], [edit.target_new for edit in EDITS]
    return lm.score(*texts, deltas, owners, full=True).full_BMV


def likelihood(lm):
    scores = lm.score([edit.text for edit in EDITS], [edit.target_new for edit in EDITS])
    return scores.logprob_BM.sum(1) / scores.mask_BM.sum(1)


def test_editing_raises_the_target_and_touches_what_it_says(lm, editor):
    for i, edit in enumerate(EDITS):
        kept, before = weights(lm), likelihood(lm)[i]
        handle = editor.edit(lm, [edit])
        assert likelihood(lm)[i] > before + 0.05, edit
        assert changed(lm, kept) == set(handle.delta.updates)
        assert lm.handles == [handle]
        handle.remove()
        assert not changed(lm, kept) and not lm.handles


def test_no_edit_at_all_is_refused(lm, make):
    kept = weights(lm)
    editor = make(lm)
    for call in (editor.edit, editor.propose):
        with pytest.raises(EditError, match="was given no edit: give at least one"):
            call(lm, [])
    for groups in ([], [EDITS[:1], []]):
        with pytest.raises(EditError, match="was given no edit: give at least one"):
            editor.propose_each(lm, groups)
    assert not changed(lm, kept) and not lm.handles


def test_edits_that_contradict_each_other_are_named_in_one_line(lm, caplog):
    again = [Edit(e.prompt, e.subject, "something else") for e in EDITS[:2]]
    with caplog.at_level("WARNING"):
        FT([1], steps=1).edit(lm, [*EDITS, *EDITS[:1], *again, again[0]]).remove()
    (message,) = [m for m in caplog.messages if "is to be both" in m]
    assert message.startswith(
        "'This is the capital of Ruritania:' is to be both 'Strelsau' and 'some"
    )
    assert "(2 such prompts)" in message


def test_a_model_that_is_not_finite_is_said_so(lm, make, caplog):
    """Whatever an editor reads off it: a loss, a gradient, an attribution."""
    editor = make(lm)
    editor.prepare(lm)
    lm.net.get_submodule(lm.structure.out_name(1)).weight.data[0, 0] = torch.nan
    with caplog.at_level("WARNING"):
        editor.edit(lm, EDITS[:1]).remove()
    said = ("nan", "not finite", "ended at an NLL above 1")
    assert any(word in message for message in caplog.messages for word in said), caplog.messages


def test_what_the_model_says_already_and_a_subject_at_the_very_start(lm, editor):
    """Odd, but possible: nothing raises, and nothing stays behind."""
    kept, prompt = weights(lm), "{} speak"
    answer = lm.generate(["Zembla speak"], 2)[0].strip() or "x"
    for edit in (Edit(prompt, "Zembla", answer), Edit("{}", "Z", "red"), Edit("{} is", "Z", "a")):
        editor.edit(lm, [edit]).remove()
    assert not changed(lm, kept) and not lm.handles


def test_inside_pristine_the_model_is_the_base(lm, editor):
    kept, base = weights(lm), logits(lm)
    handle = editor.edit(lm, EDITS)
    edited = weights(lm)
    with lm.pristine():
        assert not changed(lm, kept) and torch.equal(logits(lm), base)
    assert not changed(lm, edited) and not torch.equal(logits(lm), base)
    handle.remove()


def test_edits_come_off_in_reverse_order_only(lm, editor):
    base = weights(lm)
    first = editor.edit(lm, EDITS[:1])
    between = weights(lm)
    second = editor.edit(lm, EDITS[1:])
    with pytest.raises(EditError, match="1 later edit"):
        first.remove()
    second.remove()
    assert not changed(lm, between)
    first.remove()
    assert not changed(lm, base)
    with pytest.raises(EditError, match="already been removed"):
        first.remove()


def test_same_seed_same_edit(lm, make):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        editor = make(lm)
        torch.rand(len(results))  # what others draw in between is none of its business
        handle = editor.edit(lm, EDITS)
        results.append(weights(lm))
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))


def test_a_saved_delta_is_the_edit(lm, editor, tmp_path, tiny_lm):
    handle = editor.edit(lm, EDITS)
    edited, after = weights(lm), logits(lm)
    handle.delta.save(tmp_path / "edit.safetensors")
    handle.remove()
    delta = Delta.load(tmp_path / "edit.safetensors")
    assert delta.metadata["editor"] == type(editor).__name__
    assert delta.metadata["edits"] == [[e.prompt, e.subject, e.target_new] for e in EDITS]
    WeightPatch(lm, delta)
    assert torch.equal(logits(lm), after) and not changed(lm, edited)
    with pytest.raises(EditError, match="belongs to a model with weights"):
        WeightPatch(tiny_lm("gpt2", seed=1), delta)


def test_side_by_side_is_one_at_a_time(lm, editor):
    with editing_mode():
        together = editor.propose_each(lm, EACH)
        alone = [editor.propose(lm, group) for group in EACH]
    beside = logits(lm, together, list(range(len(EDITS))))
    for i, (edit, delta) in enumerate(zip(EDITS, alone, strict=True)):
        handle = editor.edit(lm, [edit])
        torch.testing.assert_close(beside[i], logits(lm)[i], atol=1e-4, rtol=0)
        handle.remove()
        for name in delta.updates:
            near = {"atol": 1e-4 * delta.dense(name).abs().max().item(), "rtol": 1e-4}
            torch.testing.assert_close(together[i].dense(name), delta.dense(name), **near)


def test_nothing_is_left_behind(lm, editor):
    def traces():
        flags = [(n, p.requires_grad, p.grad) for n, p in lm.named_parameters()]
        modules = [
            (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), type(m))
            for n, m in lm.named_modules()
        ]
        return flags, modules, torch.get_rng_state().tolist(), torch.is_grad_enabled()

    before = traces()
    editor.edit(lm, EDITS).remove()
    with editing_mode():
        for delta in editor.propose_each(lm, EACH):
            assert not any(t.requires_grad for t in delta.tensors().values())
    assert traces() == before


def test_modes_of_the_caller_change_nothing(lm, editor):
    """Lightning validates under no_grad or in inference mode, and under autocast."""
    modes = [torch.enable_grad(), torch.no_grad(), torch.inference_mode(),
             torch.autocast("cpu", torch.bfloat16)]  # fmt: skip
    results = []
    for mode in modes:
        with mode:
            handle = editor.edit(lm, EDITS)
        results.append({name: handle.delta.dense(name) for name in handle.delta.updates})
        base = handle._spare
        assert not any(lm.net.get_parameter(name).is_inference() for name in base)
        with mode:
            handle.remove()
    for other in results[1:]:
        assert all(torch.equal(value, results[0][name]) for name, value in other.items())
