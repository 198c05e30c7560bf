"""Adapters: active and removed, with announced prompts, saved and loaded."""

import json

import pytest
import torch
from safetensors.torch import save_file

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.adapters import Adapter, ModuleEditor, ModulePatch
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.files import read_tensors
from corrigenda.modules.model.delta import Delta, EditError, LowRank
from corrigenda.modules.model.lm import LanguageModel
from tests.samples import scores_of

PROMPTS = ["The capital of Ruritania is", "He said", "In the year of Old Humbria the town was not"]
TARGETS = ["Strelsau", "no", "in the ice"]


class Marks(Adapter):
    """Adds a vector to prompts of an odd number of tokens, at every token, and records the announced prompts."""

    def __init__(self, sites, width, strength=1.0):
        super().__init__(sites, width=width, strength=strength)
        self.strength, self.announced = strength, []
        self.register_buffer("added_ND", torch.zeros(0, width))

    def forward(self, site, x, y, batch):
        if batch is None:
            return y
        assert x.dim() == y.dim() == 3
        if self not in batch.decided:
            batch.decided[self] = batch.prompt_BT.sum(1) % 2 == 1
            self.announced.append((batch.prompt_BT.clone(), batch.last_B))
        odd = batch.decided[self]
        changed = y + self.strength * self.added_ND.sum(0).to(y.dtype)
        return torch.where(odd[:, None, None], changed, y)


class Marker(ModuleEditor):
    def __init__(self, layer=1, strength=1.0):
        self.layer, self.strength = layer, strength

    def empty(self, lm):
        return Marks([lm.structure.out_name(self.layer)], lm.structure.width, self.strength)

    def learn(self, lm, memory, edits):
        for edit in edits:
            if edit.subject == "nobody":
                raise ValueError("on purpose")
            noise = torch.randn(1, lm.structure.width, generator=torch.manual_seed(len(edit.text)))
            memory.added_ND = torch.cat([memory.added_ND, noise])
        return [{"length": len(memory.added_ND)} for _ in edits]


EDITS = [Edit("The capital of {} is", "Ruritania", "Strelsau"), Edit("{} said", "He", "no")]


@pytest.fixture(params=["gpt2", "llama", "opt", "falcon"])
def lm(request, tiny_lm):
    """A transposed, a gated, a flattened and a parallel MLP."""
    return tiny_lm(request.param, num_hidden_layers=3)


answers = scores_of(PROMPTS, TARGETS)


def odd(lm, prompts=PROMPTS):
    return torch.tensor([len(row) % 2 == 1 for row in lm.tokens.encode(prompts)])


def test_it_changes_answers_and_no_weight(lm):
    base, kept = answers(lm), lm.weights_hash
    patch = Marker().edit(lm, EDITS[:1])
    changed = answers(lm)
    moved = (changed - base).abs().amax((1, 2)) > 0
    assert torch.equal(moved, odd(lm)) and moved.any() and not moved.all()
    assert torch.equal(changed[~moved], base[~moved])
    with lm.pristine():
        assert torch.equal(answers(lm), base)
    assert torch.equal(answers(lm), changed)
    del lm.edits.weights_hash
    assert lm.weights_hash == kept
    patch.remove()
    assert torch.equal(answers(lm), base) and not lm.handles


def test_a_memory_without_edits_is_the_identity(lm):
    base = answers(lm)
    ModulePatch(lm, Marker().empty(lm))
    assert torch.equal(answers(lm), base)


def test_targets_are_no_part_of_the_prompt(lm):
    editor = Marker()
    patch = editor.edit(lm, EDITS[:1])
    for targets in (TARGETS, ["in the ice", "Strelsau is where he was", "no"]):
        patch.adapter.announced.clear()
        lm.score(PROMPTS, targets)
        prompts = [p for prompt_BT, _ in patch.adapter.announced for p in prompt_BT.sum(1).tolist()]
        assert sorted(prompts) == sorted(len(row) for row in lm.tokens.encode(PROMPTS))
        for prompt_BT, last_B in patch.adapter.announced:
            assert torch.equal(last_B, prompt_BT.sum(1) - 1)


def test_unequal_rows_are_as_each_alone(lm):
    Marker().edit(lm, EDITS)
    together = lm.score(PROMPTS, TARGETS)
    for i in range(len(PROMPTS)):
        alone = lm.score(PROMPTS[i : i + 1], TARGETS[i : i + 1])
        width = int(alone.mask_BM.sum())
        torch.testing.assert_close(
            together.logprob_BM[i, :width], alone.logprob_BM[0], atol=1e-4, rtol=0
        )


def test_what_is_decided_on_the_prompt_holds_for_generated_tokens(lm, uncached):
    """Batched and cached generation is that of each prompt alone, every token from a pass over all of them."""
    base = lm.generate(PROMPTS, 6)
    patch = Marker(strength=20.0).edit(lm, EDITS)
    texts = lm.generate(PROMPTS, 6)
    assert [a != b for a, b in zip(texts, base, strict=True)] == odd(lm).tolist()
    (prompt_BT, last_B) = patch.adapter.announced[-1]
    assert (last_B == prompt_BT.shape[1] - 1).all()  # padded on the left
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert uncached(lm, prompt, 6) == text
    stop = [text[:3] for text, is_odd in zip(texts, odd(lm), strict=True) if is_odd]  # most rows
    alone = [lm.generate([prompt], 6, stop=stop)[0] for prompt in PROMPTS]
    assert lm.generate(PROMPTS, 6, stop=stop) == alone


def test_what_is_decided_on_the_prompt_holds_for_every_beam(lm):
    base = lm.generate(PROMPTS, 6, num_beams=3)
    Marker(strength=20.0).edit(lm, EDITS)
    texts = lm.generate(PROMPTS, 6, num_beams=3)
    assert [a != b for a, b in zip(texts, base, strict=True)] == odd(lm).tolist()
    assert texts == [lm.generate([prompt], 6, num_beams=3)[0] for prompt in PROMPTS]


def test_a_pass_that_nobody_announced_is_left_alone(llama):
    ids = torch.tensor(llama.tokens.encode(PROMPTS[:1]))
    with torch.no_grad():
        base = llama.net(ids).logits
        Marker().edit(llama, EDITS[:1])
        assert torch.equal(llama.net(ids).logits, base)
    assert llama.edits.batch is None


def test_a_shared_prefix_and_the_plain_way_change_no_number(tiny_folder, lm):
    Marker().edit(lm, EDITS)
    assert lm.edits.lowest_layer() == 1
    plain = answers(lm)
    with lm.reuse.shared(lm.edits.lowest_layer()):
        with lm.pristine():
            base = answers(lm)
        first, second = answers(lm), answers(lm)
    assert torch.equal(first, second) and not torch.equal(first, base)
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=0)
    folder = str(tiny_folder(lm.net.config.model_type, num_hidden_layers=3))
    other = LanguageModel(folder, reuse_prefix=False)
    Marker().edit(other, EDITS)
    torch.testing.assert_close(answers(other), plain, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------- one after the other


def test_a_further_call_extends_the_memory_and_removal_restores_it(llama):
    editor, base = Marker(), answers(llama)
    first = editor.edit(llama, EDITS[:1])
    one, before = answers(llama), first.adapter.added_ND.clone()
    second = editor.edit(llama, EDITS[1:])
    assert len(second.adapter.added_ND) == 2 and torch.equal(second.adapter.added_ND[:1], before)
    assert second.metadata["edits"] == [[e.prompt, e.subject, e.target_new] for e in EDITS]
    assert second.metadata["notes"] == [{"length": 1}, {"length": 2}]
    assert second.num_parameters == llama.structure.width
    both = answers(llama)
    with llama.pristine():
        assert torch.equal(answers(llama), base)
    assert torch.equal(answers(llama), both) and not torch.equal(both, one)
    with pytest.raises(EditError, match="1 later edit"):
        first.remove()
    second.remove()
    assert torch.equal(answers(llama), one) and torch.equal(first.adapter.added_ND, before)
    first.remove()
    assert torch.equal(answers(llama), base)


def test_another_memory_stands_beside_it(llama):
    first, second = Marker(1).edit(llama, EDITS[:1]), Marker(2).edit(llama, EDITS[:1])
    assert second.older is None and len(second.adapter.added_ND) == 1
    both = answers(llama)
    second.remove()
    first.remove()
    Marker(1).edit(llama, EDITS[:1])
    assert not torch.equal(answers(llama), both)
    Marker(2).edit(llama, EDITS[:1])
    assert torch.equal(answers(llama), both)


def test_absorbing_keeps_one_memory_and_one_undo(llama):
    editor, base = Marker(), answers(llama)
    first = editor.edit(llama, EDITS[:1])
    second = editor.edit(llama, EDITS[1:])
    both = answers(llama)
    first.absorb(second)
    assert llama.handles == [first] and torch.equal(answers(llama), both)
    assert len(first.metadata["edits"]) == 2
    third = Marker(2).edit(llama, EDITS)
    with pytest.raises(EditError, match="newest edit"):
        first.absorb(third)
    third.remove()
    first.remove()
    assert torch.equal(answers(llama), base)


def test_a_failure_leaves_the_earlier_memory_active(llama):
    editor = Marker()
    first = editor.edit(llama, EDITS[:1])
    before = answers(llama)
    with pytest.raises(ValueError, match="on purpose"):
        editor.edit(llama, [EDITS[1], Edit("{} is", "nobody", "x")])
    assert llama.handles == [first] and torch.equal(answers(llama), before)


def test_with_weight_edits_around_it(llama):
    """A weight edit written or beside the network acts before the memory; order of removal is kept."""
    width, inner = llama.structure.width, llama.structure.inner_width
    name = llama.structure.out_name(1)
    delta = Delta({f"{name}.weight": LowRank(torch.randn(width, 1), 0.1 * torch.randn(1, inner))})
    base = answers(llama)
    first = Marker().edit(llama, EDITS[:1])
    beside = llama.score(PROMPTS, TARGETS, [delta], full=True).full_BMV
    weights = WeightPatch(llama, delta)
    torch.testing.assert_close(beside, answers(llama), atol=1e-4, rtol=0)
    between = answers(llama)
    second = Marker().edit(llama, EDITS[1:])
    assert second.older is first
    with llama.pristine():
        assert torch.equal(answers(llama), base)
    second.remove()
    assert torch.equal(answers(llama), between)
    weights.remove()
    first.remove()
    assert torch.equal(answers(llama), base)


# ---------------------------------------------------------------------------- kept


def test_a_saved_memory_is_the_edit(lm, tiny_lm, tmp_path):
    patch = Marker(strength=2.0).edit(lm, EDITS)
    after, file = answers(lm), tmp_path / "edits" / "memory.safetensors"
    patch.save(file)
    patch.remove()
    base = answers(lm)
    again = ModulePatch.load(lm, file)
    assert torch.equal(answers(lm), after)
    assert again.metadata == patch.metadata and again.metadata["editor"] == "Marker"
    assert again.metadata["base"] == lm.weights_hash
    again.remove()
    assert torch.equal(answers(lm), base)
    with pytest.raises(EditError, match="this memory belongs to a model with weights"):
        ModulePatch.load(tiny_lm(lm.net.config.model_type, seed=1, num_hidden_layers=3), file)


def test_a_restored_state_is_the_edit(llama):
    patch = Marker().edit(llama, EDITS)
    after, state = answers(llama), patch.state()
    patch.remove()
    ModulePatch.restore(llama, state)
    assert torch.equal(answers(llama), after)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "something else"}, "not a memory of this project"),
        ({"format": "corrigenda-memory-1"}, "a damaged memory file"),
        (
            {"adapter": json.dumps({"class": "os.path.join", "settings": {}}), "metadata": "{}"},
            "no adapter os.path.join",
        ),
        (
            {"adapter": json.dumps({"class": "nowhere.Memory", "settings": {}}), "metadata": "{}"},
            "no adapter nowhere.Memory",
        ),
    ],
)
def test_a_file_that_is_no_memory_is_refused(llama, tmp_path, header, message):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"format": "corrigenda-memory-1", **header})
    with pytest.raises(EditError, match=message):
        ModulePatch.load(llama, file)
    assert not llama.handles


def test_what_does_not_fit_the_model_is_refused(llama, tmp_path):
    with pytest.raises(EditError, match="no such memory file"):
        ModulePatch.load(llama, tmp_path / "none.safetensors")
    with pytest.raises(EditError, match=r"has no module model\.layers\.7"):
        ModulePatch(llama, Marks(["model.layers.7.mlp"], 32))
    state = Marker().edit(llama, EDITS).state()
    with pytest.raises(EditError, match=r"\['added_ND'\] do not fit"):
        ModulePatch.restore(llama, state | {"tensors": {}})
    assert len(llama.handles) == 1


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"class": "torn.Memory", "settings": {}}, "no adapter torn.Memory"),
        ({"class": "corrigenda.modules.editors.grace.GRACE", "settings": {}}, "no adapter corr.*grace.GRACE"),
        ({"class": ["x"], "settings": {}}, "no adapter"),
        ({"class": "corrigenda.modules.editing.adapters.Adapter", "settings": {}}, "no adapter corr.*Adapter"),
        ({"class": "{codebook}", "settings": {}}, "damaged"),
        ({"class": "{codebook}", "settings": {"sites": "x"}}, "sites are not a list"),
        ({"class": "{codebook}", "settings": {"sites": [], "inputs": -1}}, "damaged"),
        ([], "damaged"),
        (None, "damaged"),
    ],
)  # fmt: skip
def test_a_memory_file_imports_nothing_that_it_names(
    llama, tmp_path, monkeypatch, description, message
):
    """A module of that name lies in the path, and leaves a mark if it is imported."""
    (tmp_path / "torn.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    text = json.dumps(description).replace(
        "{codebook}", "corrigenda.modules.editors.grace.Codebook"
    )
    file = tmp_path / "x.safetensors"
    save_file(
        {"a": torch.zeros(1)},
        file,
        {"format": "corrigenda-memory-1", "adapter": text, "metadata": "{}"},
    )
    with pytest.raises(EditError, match=message) as caught:
        ModulePatch.load(llama, file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value) and not llama.handles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"added_ND": torch.full_like(t["added_ND"], torch.nan)}, "not finite"),
        (lambda t: t | {"added_ND": t["added_ND"][:, :5].clone()}, "added_ND has the shape"),
        (lambda t: t | {"added_ND": t["added_ND"][0].clone()}, "added_ND has the shape"),
        (lambda t: {"other": t["added_ND"]}, "do not fit this version"),
    ],
)
def test_tensors_of_a_memory_are_checked(llama, tmp_path, change, message):
    patch = Marker().edit(llama, EDITS)
    patch.save(tmp_path / "good")
    patch.remove()
    tensors, metadata = read_tensors(tmp_path / "good")
    del metadata["digest"]
    save_file(change(tensors), tmp_path / "bad", metadata)
    with pytest.raises(EditError, match=message):
        ModulePatch.load(llama, tmp_path / "bad")
    assert not llama.handles
