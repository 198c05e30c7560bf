"""What every memory beside the network keeps to, whatever method made it."""

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editors.calinet import CaliNET
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.melo import MELO
from corrigenda.modules.editors.t_patcher import TPatcher
from corrigenda.modules.editors.wise import WISE
from corrigenda.modules.model.delta import EditError
from corrigenda.modules.statistics.corpus import Corpus
from tests.samples import OTHERS, SHORT_EDITS, scores_of

EDITS = [*SHORT_EDITS[:2], Edit("{} speak", "The Glass Islands", "the house")]
PROMPTS = [e.text for e in EDITS] + OTHERS
TARGETS = [e.target_new for e in EDITS] * 2

EDITORS = {
    "GRACE": lambda files: GRACE(1, steps=30, corpus=Corpus(files.text), num_prompts=32),
    "GRACE-all": lambda files: GRACE(
        1, replace="all", steps=30, corpus=Corpus(files.text), num_prompts=32
    ),
    "WISE": lambda files: WISE(
        1, steps=8, lr=0.3, contexts=[(3, 1)], corpus=Corpus(files.text), num_prompts=8, save_freq=2
    ),
    "T-Patcher": lambda files: TPatcher(steps=60, lr=3e-2, corpus=Corpus(files.text, 300)),
    "CaliNET": lambda _: CaliNET([1, 2], slots=8, steps=30, lr=1e-2, contexts=[(3, 1)]),
    "MELO": lambda files: MELO(
        0, [1, 2], steps=20, lr=3e-2, corpus=Corpus(files.text), num_prompts=32
    ),
}


@pytest.fixture(params=EDITORS.values(), ids=EDITORS)
def editor(request, data_files):
    return request.param(data_files)


answers = scores_of(PROMPTS, TARGETS)


def likelihood(lm):
    scores = lm.score(PROMPTS[:3], TARGETS[:3])
    return scores.logprob_BM.sum(1) / scores.mask_BM.sum(1)


def test_an_edit_raises_its_probability_and_is_removed_bit_exactly(lm, editor):
    base, before = answers(lm), likelihood(lm)
    weights = {name: p.clone() for name, p in lm.net.named_parameters()}
    for i, edit in enumerate(EDITS):
        patch = editor.edit(lm, [edit])
        assert likelihood(lm)[i] > before[i] + 0.3, edit
        patch.remove()
        assert torch.equal(answers(lm), base)
    patch = editor.edit(lm, EDITS)
    edited = answers(lm)
    with lm.pristine():
        assert torch.equal(answers(lm), base)
    assert torch.equal(answers(lm), edited) and not torch.equal(edited, base)
    assert all(torch.equal(p, weights[name]) for name, p in lm.net.named_parameters())
    assert not any(buffer.requires_grad for buffer in patch.adapter.buffers())
    assert patch.metadata["edits"] == [[e.prompt, e.subject, e.target_new] for e in EDITS]
    assert len(patch.metadata["notes"]) == 3 and patch.num_parameters > 0


def test_no_edit_at_all_is_refused(lm, editor):
    with pytest.raises(EditError, match="was given no edit: give at least one"):
        editor.edit(lm, [])
    assert not lm.handles


def test_a_model_that_is_not_finite_is_said_so(llama, editor, caplog):
    editor.prepare(llama)
    llama.net.get_submodule(llama.structure.out_name(2)).weight.data[0, 0] = torch.nan
    with caplog.at_level("WARNING"):
        editor.edit(llama, EDITS[:1]).remove()
    assert any("NLL nan" in message for message in caplog.messages)


def test_a_memory_without_edits_is_the_identity(lm, editor):
    base = answers(lm)
    editor.prepare(lm)
    ModulePatch(lm, editor.empty(lm))
    assert torch.equal(answers(lm), base)


def test_a_saved_memory_is_the_edit(lm, editor, tmp_path):
    patch = editor.edit(lm, EDITS[:2])
    after = answers(lm)
    patch.save(tmp_path / "memory.safetensors")
    patch.remove()
    again = ModulePatch.load(lm, tmp_path / "memory.safetensors")
    assert torch.equal(answers(lm), after) and again.metadata == patch.metadata
    again.remove()
    ModulePatch.restore(lm, patch.state())
    assert torch.equal(answers(lm), after)


def test_further_calls_extend_it_and_removal_restores_it(llama, editor):
    states = [answers(llama)]
    for edit in EDITS:
        editor.edit(llama, [edit])
        states.append(answers(llama))
    sizes = [handle.adapter.size for handle in llama.handles]
    assert sizes[0] < sizes[-1] and not torch.equal(states[0], states[-1])
    for state in reversed(states):
        assert torch.equal(answers(llama), state)
        if llama.handles:
            llama.handles[-1].remove()


def test_a_stream_resumes_with_absorbed_edits(llama, editor, data_files):
    """One handle for all, and another editor object on a restored state makes the same next edit."""
    first = editor.edit(llama, EDITS[:1])
    first.absorb(editor.edit(llama, EDITS[1:2]))
    state = first.state()
    last = editor.edit(llama, EDITS[2:])
    wanted = answers(llama)
    last.remove()
    first.remove()
    ModulePatch.restore(llama, state)
    same_kind = next(make for make in EDITORS.values() if type(make(data_files)) is type(editor))
    fresh = same_kind(data_files) if not isinstance(editor, GRACE) else editor
    fresh.edit(llama, EDITS[2:])
    assert torch.equal(answers(llama), wanted)


def test_rows_of_unequal_length_are_as_each_alone(lm, editor):
    editor.edit(lm, EDITS)
    together = lm.score(PROMPTS, TARGETS)
    for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        alone = lm.score([prompt], [target])
        width = int(alone.mask_BM.sum())
        torch.testing.assert_close(
            together.logprob_BM[i, :width], alone.logprob_BM[0], atol=2e-4, rtol=0
        )


def test_generation_with_a_cache_is_as_without(lm, editor, uncached):
    """Batched, padded on the left, cached: as one by one, all tokens again in every pass."""
    editor.edit(lm, EDITS)
    for prompt, text in zip(PROMPTS, lm.generate(PROMPTS, 5), strict=True):
        assert uncached(lm, prompt, 5) == text


def test_a_shared_prefix_changes_no_number(llama, editor):
    editor.edit(llama, EDITS)
    plain = answers(llama)
    with llama.reuse.shared(llama.edits.lowest_layer()):
        with llama.pristine():
            answers(llama)
        torch.testing.assert_close(answers(llama), plain, atol=1e-5, rtol=0)
        assert torch.equal(answers(llama), answers(llama))


def test_same_seed_same_memory(llama, editor, data_files):
    memories = []
    for _ in range(2):
        torch.rand(3)  # what others draw in between is none of its business
        patch = editor.edit(llama, EDITS[:2])
        memories.append({k: v.clone() for k, v in patch.adapter.state_dict().items()})
        patch.remove()
    assert all(torch.equal(memories[0][name], memories[1][name]) for name in memories[0])
