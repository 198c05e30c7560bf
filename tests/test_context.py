"""Editing in context: the prompts that IKE and MemPrompt use instead, and the memory that they share."""

import json
import random
import zlib

import pytest
import torch

from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.modules.editing.memory import SavedMemory, fit
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.ike import IKE
from corrigenda.modules.editors.mello import MeLLo
from corrigenda.modules.editors.memprompt import MemPrompt, edit_distance, normalise
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model.delta import Delta, EditError
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.retrieval.retriever import Encoder
from corrigenda.pipeline.callbacks import EditCallback

NAMES = [
    "Quill",
    "Brel",
    "Onna",
    "Vane",
    "Larch",
    "Stone",
    "Ember",
    "Fenwick",
    "Sable",
    "Marr",
    "Holt",
    "Wynn",
]
PARIS = Edit("{} was born in", "Ada Quill", "Paris", "Rome")
OSLO = Edit("{} was born in", "Otto Vane", "Oslo", "Lima")
OWL = Edit("The owner of {} is", "the Tin Owl", "Iris", "Mira")


class Words(Encoder):
    """Texts with the same words are alike, no two exactly."""

    name = hash = "words"

    def encode(self, texts):
        vectors_ND = torch.zeros(len(texts), 512)
        for vector_D, text in zip(vectors_ND, texts, strict=True):
            own = torch.Generator().manual_seed(zlib.crc32(text.encode()))
            vector_D += 1e-3 * torch.randn(512, generator=own)
            for word in text.lower().split():
                vector_D[zlib.crc32(word.encode()) % 512] += 1
        return torch.nn.functional.normalize(vectors_ND, dim=-1)


class Pool:
    """Training cases of our own, each with two wordings and two neighbours."""

    def __init__(self, count=40, **without):
        self.splits = []
        self.records = []
        for n in range(count):
            place = "born in" if n % 2 else "owner of"
            edit = Edit(f"{{}} ({place} {n})", f"{NAMES[n % 12]} {n}", f"new{n}", f"old{n}")
            probes = {
                "generality": tuple(
                    Probe(f"Reworded{k} {edit.subject}:", f"new{n}") for k in range(2)
                ),
                "locality": tuple(Probe(f"Neighbour{k} of {n} is", f"true{n}") for k in range(2)),
            }
            self.records.append(EditCase(str(n), (edit,), probes))

    def cases(self, split):
        self.splits.append(split)
        return self.records


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("CORRIGENDA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("gpt2", max_position_embeddings=4096)


def ike(**changes):
    return IKE(**({"pool": Pool(), "num_demonstrations": 8, "encoder": Words()} | changes))


def memprompt(**changes):
    return MemPrompt(**({"encoder": Words(), "threshold": 0.7} | changes))


EDITORS = {
    "ike": ike,
    "memprompt": memprompt,
    "mello": lambda: MeLLo(encoder=Words(), round_tokens=4, rounds=2),
}


def blocks(text):
    """The demonstrations of a prompt, each as (fact, prompt and answer), and the last two lines."""
    *shown, last = text.split("\n\n")
    return [tuple(block.split("\n")) for block in shown], last.split("\n")


# ---------------------------------------------------------------------------- the memory


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", EDITORS)
def test_no_weight_changes_and_nothing_is_left_behind(tiny_lm, kind, name):
    lm = tiny_lm(kind, max_position_embeddings=4096)
    before, prompts = hash_weights(lm.net), [PARIS.text, "The sea is"]
    plain, said = lm.score(prompts, ["Paris", "deep"]).logprob_BM, lm.generate(prompts, 4)
    handle = EDITORS[name]().edit(lm, [PARIS, OSLO])
    edited = lm.score(prompts, ["Paris", "deep"]).logprob_BM
    lm.generate(prompts, 4)
    assert hash_weights(lm.net) == before
    assert not torch.equal(edited[0], plain[0])
    with lm.pristine():
        assert torch.equal(lm.score(prompts, ["Paris", "deep"]).logprob_BM, plain)
    handle.remove()
    assert torch.equal(lm.score(prompts, ["Paris", "deep"]).logprob_BM, plain)
    assert lm.generate(prompts, 4) == said and lm.handles == []


@pytest.mark.parametrize("name", EDITORS)
def test_a_second_edit_adds_to_the_memory_and_comes_off_first(lm, name):
    editor = EDITORS[name]()
    first = editor.edit(lm, [PARIS])
    memory = first.memory
    second = editor.edit(lm, [OSLO, OWL])
    assert second.memory is memory and memory.edits == [PARIS, OSLO, OWL]
    assert second.nearest(["Ada Quill born", "the Tin Owl's owner", "Otto Vane"]) == [
        (PARIS, pytest.approx(1, abs=1)), (OWL, pytest.approx(1, abs=1)), (OSLO, pytest.approx(1, abs=1)),
    ]  # fmt: skip
    with pytest.raises(EditError, match="1 later edit"):
        first.remove()
    assert len(memory) == 3
    second.remove()
    assert memory.edits == [PARIS] and len(memory.retriever) == 1
    assert first.nearest(["the Tin Owl"])[0][0] == PARIS
    first.remove()
    assert len(memory) == len(memory.retriever) == 0


@pytest.mark.parametrize("make", [ike, memprompt])
def test_taking_an_edit_out_restores_every_prompt(lm, make):
    editor, prompts = make(), [PARIS.text, OWL.text, "Ada Quill was happy in", "The sea is"]
    first = editor.edit(lm, [PARIS])
    before = first.rewrite(prompts)
    second = editor.edit(lm, [OWL])
    assert second.rewrite(prompts) != before
    second.remove()
    assert first.rewrite(prompts) == before


@pytest.mark.parametrize("make", [ike, memprompt])
def test_the_newest_handle_answers_for_all_and_no_prompt_is_rewritten_twice(lm, make):
    editor = make()
    editor.edit(lm, [PARIS])
    newest = editor.edit(lm, [OSLO])
    prompts, targets = [PARIS.text, OSLO.text], ["Paris", "Oslo"]
    edited, said = lm.score(prompts, targets).logprob_BM, lm.generate(prompts, 3)
    rewritten = newest.rewrite(prompts)
    with lm.pristine():
        plain = lm.score(rewritten, targets).logprob_BM
        torch.testing.assert_close(edited, plain, rtol=0, atol=1e-4)
        assert said == lm.generate(rewritten, 3)


def test_an_older_handle_knows_nothing_of_newer_edits(lm):
    editor = memprompt()
    older = editor.edit(lm, [PARIS])
    newer = editor.edit(lm, [OWL])
    newer.swap()
    assert older.rewrite([OWL.text]) == [OWL.text]
    assert older.rewrite([PARIS.text]) != [PARIS.text]
    newer.swap()
    assert newer.rewrite([OWL.text]) != [OWL.text]


@pytest.mark.parametrize("make", [ike, memprompt])
def test_the_newest_edit_of_a_prompt_counts(lm, make):
    editor, again = make(), Edit(PARIS.prompt, PARIS.subject, "Lima")
    editor.edit(lm, [PARIS, OSLO])
    text = editor.edit(lm, [again]).rewrite([PARIS.text])[0]
    assert "Ada Quill was born in Lima" in text and "Ada Quill was born in Paris" not in text
    assert editor.memory(lm).newest(3) == {PARIS.text: again, OSLO.text: OSLO}


def test_memories_of_two_models_are_apart(lm, tiny_lm):
    editor, other = memprompt(), tiny_lm("llama")
    editor.edit(lm, [PARIS])
    assert editor.edit(other, [OSLO]).rewrite([PARIS.text]) == [PARIS.text]
    assert editor.memory(lm).edits == [PARIS]


def test_weights_and_texts_are_edited_side_by_side(lm):
    name = lm.structure.out_name(0) + ".weight"
    delta = Delta({name: torch.randn(lm.net.get_parameter(name).shape[::-1]) * 0.05})
    handle = memprompt().edit(lm, [PARIS])
    beside = lm.score([PARIS.text], ["Paris"], [delta]).logprob_BM
    patch = WeightPatch(lm, delta)
    torch.testing.assert_close(
        lm.score([PARIS.text], ["Paris"]).logprob_BM, beside, rtol=0, atol=1e-4
    )
    patch.remove()
    handle.remove()


@pytest.mark.parametrize("name", EDITORS)
def test_a_handle_saves_its_own_edits(lm, tmp_path, name):
    editor = EDITORS[name]()
    editor.edit(lm, [PARIS])
    editor.edit(lm, [OWL, OSLO]).save(tmp_path / "edits" / "St. Louis.safetensors")
    found = SavedMemory.load(tmp_path / "edits" / "St. Louis.safetensors")
    assert found.edits == [OWL, OSLO]
    assert found.metadata["editor"] == type(editor).__name__ and found.metadata["model"] == lm.name
    with pytest.raises(EditError, match="was given no edit"):
        editor.edit(lm, [])


def test_a_resumed_stream_has_its_memory(lm, tmp_path):
    callback = EditCallback(memprompt(), "stream")
    callback._handles = [callback.editor.edit(lm, [edit]) for edit in (PARIS, OWL)]
    before = lm.handles[-1].rewrite([PARIS.text, OWL.text, "The sea is"])
    torch.save(callback.state_dict(), tmp_path / "state.ckpt")
    for handle in reversed(list(lm.handles)):
        handle.remove()
    again = EditCallback(memprompt(), "stream")
    again.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    again._restore(EditingModule(lm))
    assert len(lm.handles) == 2 and again._handles == lm.handles
    assert lm.handles[-1].rewrite([PARIS.text, OWL.text, "The sea is"]) == before
    lm.handles[-1].remove()
    assert lm.handles[-1].rewrite([OWL.text]) == [OWL.text]


# ---------------------------------------------------------------------------- what fits


def test_the_least_similar_demonstrations_are_left_out_never_the_question(tiny_lm):
    lm = tiny_lm()  # 128 tokens
    shown = [f"demonstration number {n}. " for n in range(20)]
    whole, dropped = fit(lm, shown, "the question", reserve=5)
    assert 0 < dropped < 20 and whole == "".join(shown[dropped:]) + "the question"
    longer = "".join(shown[dropped - 1 :]) + "the question"
    assert len(lm.tokens.encode([whole])[0]) + 5 <= 128 < len(lm.tokens.encode([longer])[0]) + 5
    tight, more = fit(lm, shown, "the question", reserve=60)
    assert more > dropped and len(lm.tokens.encode([tight])[0]) + 60 <= 128
    assert fit(lm, shown[:2], "the question", 0) == ("".join(shown[:2]) + "the question", 0)
    assert fit(lm, shown, "the question", reserve=128 - len(lm.tokens.encode(["the question"])[0])) == (
        "the question", 20,
    )  # fmt: skip
    with pytest.raises(EditError, match="longer than the context of .*, 128 tokens"):
        fit(lm, shown, "why? " * 100, 0)


# ---------------------------------------------------------------------------- IKE


def test_demonstrations_stand_in_the_ratio_and_the_question_is_last(lm):
    handle = ike(num_demonstrations=32).edit(lm, [PARIS])
    shown, last = blocks(handle.rewrite(["Where was Ada Quill born?"])[0])
    assert last == ["New Fact: Ada Quill was born in Paris", "Prompt: Where was Ada Quill born?"]
    assert shown[-1] == (
        "New Fact: Ada Quill was born in Paris",
        "Prompt: Ada Quill was born in Paris",
    )
    roles = [kind(*block) for block in shown[:-1]]
    assert [roles.count(role) for role in ("copy", "update", "retain")] == [4, 12, 16]
    assert roles != sorted(roles), "the parts stand in a drawn order"


def kind(fact, prompt):
    number = fact.split("new")[-1]
    if prompt.startswith("Prompt: Reworded"):
        assert prompt.endswith(f" new{number}")
        return "update"
    if prompt.startswith("Prompt: Neighbour"):
        assert prompt.endswith(f" of {number} is true{number}")
        return "retain"
    assert prompt.removeprefix("Prompt: ") == fact.removeprefix("New Fact: ")
    return "copy"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(16, (2, 6, 8)), (8, (1, 3, 4)), (3, (0, 1, 2)), (1, (0, 0, 1)), (0, (0, 0, 0))],
)
def test_other_numbers_keep_the_ratio(lm, count, expected):
    handle = ike(num_demonstrations=count).edit(lm, [PARIS])
    shown, _ = blocks(handle.rewrite(["x"])[0])
    roles = [kind(*block) for block in shown[:-1]]
    assert tuple(roles.count(role) for role in ("copy", "update", "retain")) == expected


def test_the_most_similar_record_is_last(lm):
    pool, encoder = Pool(), Words()
    editor = ike(pool=pool, num_demonstrations=10)
    shown, _ = blocks("".join(editor.edit(lm, [PARIS]).rewrite(["x"])))
    facts = [block[0].removeprefix("New Fact: ") for block in shown[:-1]]
    every = [f"{c.edits[0].text} {c.edits[0].target_new}" for c in pool.records]
    like = (encoder.encode(["Ada Quill was born in Paris"]) @ encoder.encode(every).T)[0]
    score = dict(zip(every, like.tolist(), strict=True))
    assert [score[f] for f in facts] == sorted(score[f] for f in facts)
    assert min(score[f] for f in facts) >= max(score[f] for f in every if f not in facts)
    assert set(pool.splits) == {"train"}


def test_demonstrations_depend_on_the_edit_and_the_seed_alone(lm):
    alone = ike().edit(lm, [PARIS]).rewrite(["x"])
    lm.handles.clear()
    random.seed(5)
    editor = ike()
    together = editor.edit(lm, [OWL, OSLO, PARIS]).rewrite(["Ada Quill was born in"])
    assert together == [alone[0].removesuffix("x") + "Ada Quill was born in"]
    lm.handles.clear()
    assert ike(seed=1).edit(lm, [PARIS]).rewrite(["x"]) != alone


def test_records_about_the_edited_subject_are_no_demonstrations(lm):
    pool = Pool(count=9)
    about = Edit("{} was born in", pool.records[4].edits[0].subject.upper(), "Paris")
    text = ike(pool=pool).edit(lm, [about]).rewrite(["x"])[0]
    assert "new4" not in text and all(f"new{n}\n" in text for n in range(9) if n != 4)


def test_a_pool_that_is_too_small_is_said_so(lm):
    pool = Pool(count=9)
    pool.records[3].probes.pop("locality")
    pool.records[2] = EditCase("2", pool.records[2].edits * 2, pool.records[2].probes)
    editor = ike(pool=pool)
    with pytest.raises(
        EditError, match="num_demonstrations is 8, .* only 7 training cases"
    ) as caught:
        editor.edit(lm, [PARIS])
    assert "\n" not in str(caught.value) and lm.handles == []


def test_one_fact_is_given_several_are_looked_up(lm):
    editor = ike()
    alone = editor.edit(lm, [PARIS])
    strange = "Who owns the Tin Owl"
    assert blocks(alone.rewrite([strange])[0])[1][0] == "New Fact: Ada Quill was born in Paris"
    assert editor.memory(lm).retriever is None
    several = editor.edit(lm, [OSLO, OWL])
    facts = [blocks(text)[1][0] for text in several.rewrite([strange, "Where was Otto Vane born"])]
    assert facts == [
        "New Fact: The owner of the Tin Owl is Iris",
        "New Fact: Otto Vane was born in Oslo",
    ]
    numbers = editor.numbers()
    assert numbers["questions"] == 3 and numbers["memory_bytes"] > 3 * 512 * 4
    assert 0 < numbers["lookup_milliseconds"] < 1000


def test_what_does_not_fit_is_left_out_and_counted(tiny_lm):
    lm = tiny_lm("gpt2", max_position_embeddings=200)
    editor = ike(num_demonstrations=16)
    handle = editor.edit(lm, [PARIS])
    whole = editor.demonstrations(lm, PARIS)
    targets = ["Paris", "Paris " * 20]
    scores = lm.score([PARIS.text, PARIS.text], targets)
    assert scores.mask_BM.sum(1).tolist() == [
        len(lm.tokens.encode([f" {t.strip()}"])[0]) for t in targets
    ]
    text = handle.rewrite([PARIS.text])[0]
    assert text.startswith(whole[-2]) or text.startswith(whole[-1]) or "New Fact" in text
    assert text.endswith("New Fact: Ada Quill was born in Paris\nPrompt: Ada Quill was born in")
    assert len(lm.tokens.encode([text])[0]) <= 200
    assert len(lm.generate([PARIS.text], 30)) == 1
    assert editor.numbers()["demonstrations_left_out"] > 3 * 8


def test_the_pool_is_encoded_once(lm, tiny_lm):
    class Counted(Words):
        texts = 0

        def encode(self, texts):
            Counted.texts += len(texts)
            return super().encode(texts)

    editor = ike(encoder=Counted())
    editor.edit(lm, [PARIS]).remove()
    editor.edit(lm, [PARIS]).remove()
    assert Counted.texts == 40 + 1
    ike(encoder=Counted()).edit(lm, [PARIS])  # from the cache folder
    assert Counted.texts == 40 + 2


# ---------------------------------------------------------------------------- MemPrompt


def test_prompts_like_a_remembered_one_are_clarified_others_left_alone(lm):
    editor = memprompt(threshold=0.7)
    handle = editor.edit(lm, [PARIS, OWL])
    prompts = [
        PARIS.text,
        "Ada Quill was once born in",
        "The sea is",
        "The owner of the Tin Owl is now",
    ]
    assert handle.rewrite(prompts) == [
        "Clarification: Ada Quill was born in Paris.\nAda Quill was born in",
        "Clarification: Ada Quill was born in Paris.\nAda Quill was once born in",
        "The sea is",
        "Clarification: The owner of the Tin Owl is Iris.\nThe owner of the Tin Owl is now",
    ]
    assert editor.numbers()["clarified"] == 3 and editor.numbers()["questions"] == 4
    with lm.pristine():
        plain = lm.score(["The sea is"], ["deep"]).logprob_BM
    assert torch.equal(lm.score(["The sea is"], ["deep"]).logprob_BM, plain)


def test_the_threshold_must_be_exceeded(lm):
    class Fixed(Words):
        def encode(self, texts):
            return torch.tensor(
                [[1.0, 0.0] if t == PARIS.text else [0.5, 0.75**0.5] for t in texts]
            )

    for threshold, hit in ((0.49, True), (0.5, False), (0.51, False)):
        handle = memprompt(encoder=Fixed(), threshold=threshold).edit(lm, [PARIS])
        assert (handle.rewrite(["else"]) != ["else"]) is hit
        handle.remove()


def test_a_distance_of_five_hits_and_six_misses(lm):
    editor = MemPrompt(lookup="distance", encoder="not loaded")
    handle = editor.edit(lm, [Edit("Where was {} born and raised?", "Ada Quill", "Paris")])
    near, far = "Where was Ada Qzzzzz born and raised?", "Where was Ada Qzzzzz born and raisez?"
    key = normalise("Where was Ada Quill born and raised?")
    assert [edit_distance(normalise(text), key, limit=9) for text in (near, far)] == [5, 6]
    found = handle.rewrite([near, far, " WHERE was <i>Ada</i>   Quill, born AND raised"])
    assert [text.startswith("Clarification: ") for text in found] == [True, False, True]
    assert editor.numbers()["memory_bytes"] == 0


def test_short_texts_are_not_alike_because_they_are_short(lm):
    handle = MemPrompt(lookup="distance").edit(lm, [Edit("{}?", "Oslo", "Paris")])
    assert handle.rewrite(["Lima?", "Oslo", "Olso"])[::1] == [
        "Lima?",
        "Clarification: Oslo? Paris.\nOslo",
        "Olso",
    ]


def test_the_nearest_key_is_taken_and_of_equals_the_newest(lm):
    one, two = (
        Edit("{} was born in", "Ada Quill", "Paris"),
        Edit("{} was born at", "Ada Quill", "Oslo"),
    )
    handle = MemPrompt(lookup="distance").edit(lm, [two, one])
    assert "Paris" in handle.rewrite(["Ada Quill was born in"])[0]
    assert "Oslo" in handle.rewrite(["Ada Quill was born a"])[0]
    assert "Paris" in handle.rewrite(["Ada Quill was born xx"])[0]


def test_the_banded_distance_is_the_whole_one():
    def plain(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, start=1):
            new = [i]
            for j, y in enumerate(b, start=1):
                new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
            row = new
        return row[-1]

    rng = random.Random(0)
    words = ["".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(60)]
    for a in words:
        for b in words:
            for limit in (0, 2, 5):
                whole = plain(a, b)
                assert edit_distance(a, b, limit) == (whole if whole <= limit else None)


def test_wrong_settings_are_one_clear_line():
    with pytest.raises(ValueError, match="a {} for the fact"):
        MemPrompt(clarification="Note:")
    with pytest.raises(ValueError, match="threshold must be between -1 and 1"):
        MemPrompt(threshold=5)


# ---------------------------------------------------------------------------- a run


@pytest.mark.parametrize(
    ("name", "schedule", "limit", "small"),
    [
        ("ike", "each", 2, ["--edit.editor.num_demonstrations", 2]),
        ("memprompt", "epoch", 3, []),
        ("mello", "each", 1, ["--edit.editor.rounds", 1, "--edit.editor.round_tokens", 3]),
    ],
)
def test_a_run_from_the_command_line(
    corrigenda, tiny_folder, tmp_path, capsys, name, schedule, limit, small
):
    status = corrigenda(
        "validate", "-c", f"configs/{name}/smollm2.yaml", "-c", "configs/data/facts.yaml",
        "--model.lm.name", tiny_folder("gpt2", max_position_embeddings=4096),
        "--data.known_only", "false", "--data.limit", limit, "--edit.schedule", schedule,
        "--edit.editor.encoder", "lm", *small, "--run_dir", "run", "--wandb", "off",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["numbers"]["questions"] > 0 and summary["budget"]["num_edits"] == limit
    assert "efficacy/exact" in summary["means"]
    saved = sorted((tmp_path / "run/edits").iterdir())
    assert len(saved) == (limit if schedule == "each" else 1)
    assert sum(len(SavedMemory.load(path).edits) for path in saved) == limit


def test_without_demonstrations_no_pool_is_read(lm):
    """The fact and its own copy alone; for small models."""
    pool = Pool()
    handle = ike(pool=pool, num_demonstrations=0).edit(lm, [PARIS])
    fact = "Ada Quill was born in Paris"
    assert handle.rewrite(["Ada is from"]) == [
        f"New Fact: {fact}\nPrompt: {fact}\n\nNew Fact: {fact}\nPrompt: Ada is from"
    ]
    assert not pool.splits


def test_a_clarification_may_name_the_fact_twice(lm):
    handle = memprompt(clarification="{}\n{}\n").edit(lm, [PARIS])
    fact = "Ada Quill was born in Paris"
    assert handle.rewrite([PARIS.text]) == [f"{fact}\n{fact}\n{PARIS.text}"]
