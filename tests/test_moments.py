"""Second moments: the right number, of the right model, gathered once, whatever happens in between."""

import logging
from functools import partial

import pytest
import torch

from modules import moments as moments_module
from modules.editing import Delta, LowRank, WeightPatch
from modules.hooks import capture
from modules.moments import Corpus, Moments, cholesky, sampled_texts

TEXTS = [
    f"{start} {middle} {end}"
    for start in ("The town", "He", "A long story of the south", "In São Paulo the harbour")
    for middle in ("is", "was not on", "and where they found that", "comes to")
    for end in ("the table.", "rain", "1984, as it was said there.")
]
TOKENS = 400  # ends within a text


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded(tiny_lm):
    made = {}
    return lambda family: made.setdefault(family, tiny_lm(family))


@pytest.fixture
def gather(loaded, source, tmp_path):
    """Moments of a family's model on the texts; a folder of their own if named."""

    def of(family="llama", folder="cache", **changes):
        corpus = Corpus(**({"source": str(source), "tokens": TOKENS} | changes))
        return Moments(loaded(family), corpus, tmp_path / folder)

    return of


def by_hand(lm, layer, length=512, tokens=TOKENS):
    """X'X / n over one text at a time, without padding or batches."""
    module = {"out": lm.net.get_submodule(lm.structure.out_name(layer))}
    keys, left = [], tokens
    for text in TEXTS:
        ids = lm.encode([text])[0][: min(left, length)]
        left -= len(ids)
        if ids:
            with torch.no_grad(), capture(module, stop=True) as seen:
                lm.net(torch.tensor([ids]))
            keys.append(seen["out"][0].reshape(len(ids), -1))
    x = torch.cat(keys).double()
    return x.T @ x / len(x)


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "falcon", "bloom", "gpt_neo"])
def test_it_is_the_mean_outer_product_of_keys(kind, gather):
    """INV-S7: uncentred, over every real token and nothing else; OPT's flattened MLP included."""
    moments = gather(kind)
    for layer in (0, 1):
        found = moments.moment(layer)
        assert found.dtype == torch.float64
        near(found, by_hand(moments.lm, layer))
        torch.testing.assert_close(found, found.T, rtol=0, atol=1e-6 * float(found.abs().max()))
        assert torch.linalg.eigvalsh(found).min() > -1e-6 * found.diagonal().max()
        stored = moments._read(moments._path(layer))
        assert int(stored["tokens"]) == TOKENS


@pytest.mark.parametrize("batch, buffer", [(1, 512), (40, 5), (4096, 1)])
def test_batches_and_padding_do_not_matter(batch, buffer, gather, monkeypatch):
    plain = gather().gather([0, 1])
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", batch)
    monkeypatch.setattr(moments_module, "BUFFER_TEXTS", buffer)
    again = gather(folder="again").gather([0, 1])
    for layer in (0, 1):
        near(again[layer], plain[layer])


def test_long_texts_are_cut(gather, monkeypatch):
    monkeypatch.setattr(moments_module, "MAX_LENGTH", 6)
    moments = gather(tokens=200)
    ids = [moments.lm.encode([text])[0][:6] for text in TEXTS]
    assert max(map(len, moments.lm.encode(TEXTS))) > 6 and sum(map(len, ids)) > 200
    near(moments.moment(0), by_hand(moments.lm, 0, length=6, tokens=200))


# --- resuming ---


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(moments_module, "BUFFER_TEXTS", 5)


@pytest.fixture
def counted(monkeypatch):
    """The buffers whose keys are computed; ``counted.fail_at`` of them is the last."""
    add = Moments._add

    class Counted(list):
        fail_at = None

    seen = Counted()

    def wrapped(self, ids, layers, state):
        if len(seen) == seen.fail_at:
            raise KeyboardInterrupt
        seen.append([tuple(row) for row in ids])
        add(self, ids, layers, state)

    monkeypatch.setattr(Moments, "_add", wrapped)
    return seen


@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_it_goes_on_where_it_was_killed(killed_at, gather, small_buffers, counted):
    """The result is the same to the bit, and no finished buffer is computed again."""
    whole = gather(folder="whole").gather([0, 1])
    buffers = list(counted)
    assert len(buffers) > 4
    counted.clear()
    counted.fail_at = killed_at
    with pytest.raises(KeyboardInterrupt):
        gather().gather([0, 1])
    assert list(counted) == buffers[:killed_at]
    counted.clear()
    counted.fail_at = None
    resumed = gather().gather([0, 1])
    assert list(counted) == buffers[killed_at:]
    assert all(torch.equal(resumed[layer], whole[layer]) for layer in (0, 1))
    left = sorted(path.name for path in gather().folder.iterdir())
    assert left == ["layer0.safetensors", "layer1.safetensors"]


def test_a_kill_while_writing_loses_one_buffer(gather, small_buffers, counted, monkeypatch):
    whole = gather(folder="whole").gather([1])
    buffers = list(counted)
    counted.clear()
    save = moments_module.save_file
    calls = []

    def torn(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(tensors, path, metadata)

    monkeypatch.setattr(moments_module, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        gather().moment(1)
    counted.clear()
    assert torch.equal(gather().moment(1), whole[1])
    assert list(counted) == buffers[2:]


def test_what_is_there_is_read(gather, counted):
    first = gather().gather([0])[0]
    counted.clear()
    assert torch.equal(gather().moment(0), first) and not counted
    both = gather().gather([0, 1])
    assert torch.equal(both[0], first) and len(counted) == 1
    near(both[1], by_hand(gather().lm, 1))


@pytest.mark.parametrize("file", ["layer0", "layer0.cholesky"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 5000),
        lambda path: moments_module.save_file(
            {"moment": torch.eye(80)}, path, {"weights": "other"}
        ),
    ],
    ids=["cut", "empty", "noise", "of another model"],
)
def test_a_damaged_file_is_made_again_with_a_warning(damage, file, gather, caplog):
    moments = gather()
    factor, moment = moments.factor(0).clone(), moments.moment(0).clone()  # off the file
    path = moments.folder / f"{file}.safetensors"
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = gather()
        assert torch.equal(again.factor(0), factor) and torch.equal(again.moment(0), moment)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "gathering it again" in record.getMessage()
    assert moments._read(path) is not None


def test_a_damaged_partial_result_is_made_again(gather, small_buffers, counted, caplog):
    whole = gather(folder="whole").moment(0)
    buffers = list(counted)
    counted.clear()
    counted.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        gather().moment(0)
    (partial,) = gather().folder.glob("*.partial.safetensors")
    partial.write_bytes(partial.read_bytes()[:-8])
    counted.clear()
    counted.fail_at = None
    assert torch.equal(gather().moment(0), whole) and list(counted) == buffers
    assert str(partial) in caplog.text


# --- of the right model and text ---


def test_too_little_text_is_an_error(gather, source):
    with pytest.raises(
        ValueError, match=r"has 70 tokens, fewer than the key width 80.*use more text"
    ):
        gather(tokens=70).moment(0)
    source.write_text("One text.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has \d tokens, fewer than the key width 80"):
        gather().moment(0)


def test_statistics_are_of_the_unedited_model(gather):
    """Also when an edit of a lower block is in force while they are gathered."""
    plain = gather().moment(1)
    lm = gather().lm
    name = lm.structure.out_name(0)
    patch = WeightPatch(
        lm, Delta({f"{name}.weight": LowRank(torch.ones(32, 1), torch.ones(1, 80))})
    )
    edited = gather(folder="edited")
    assert edited.folder.name == gather().folder.name
    assert torch.equal(edited.moment(1), plain)
    assert lm.handles == [patch]
    patch.remove()


def test_every_weight_and_setting_counts_in_the_folders_name(tiny_lm, source):
    """INV-S14: nothing of another model, text, length, seed or precision is ever used."""
    lm = tiny_lm("llama")
    corpus = Corpus(str(source), TOKENS)
    folders = [Moments(lm, corpus).folder]
    assert Moments(tiny_lm("llama"), Corpus(str(source), TOKENS)).folder == folders[0]
    for parameter in lm.net.parameters():
        parameter.data.view(-1)[0] += 1e-3
        del lm.weights_hash
        folders.append(Moments(lm, corpus).folder)
    for other in (Corpus(str(source), TOKENS + 1), Corpus(str(source), TOKENS, seed=1), Corpus()):
        folders.append(Moments(lm, other).folder)
    source.write_text("The same name, other text.", encoding="utf-8")
    folders.append(Moments(lm, corpus).folder)
    lm.net.bfloat16()
    folders.append(Moments(lm, corpus).folder)
    assert len(set(folders)) == len(folders)


def test_it_is_kept_in_the_cache_folder(tiny_lm, source, cache_folder):
    assert Moments(tiny_lm("llama"), Corpus(str(source))).folder.is_relative_to(cache_folder)


def test_sampled_text_comes_from_the_unedited_model_and_the_seed(loaded):
    lm = loaded("llama")

    def sample(seed):
        texts = sampled_texts(lm, seed, length=5, batch=4)
        return [next(texts) for _ in range(8)]

    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].startswith("The") and len(set(first)) == 8
    name = lm.structure.out_name(1)
    delta = Delta({f"{name}.weight": LowRank(5 * torch.randn(32, 1), torch.randn(1, 80))})
    patch = WeightPatch(lm, delta)
    assert sample(1) == first != sample(2)
    patch.remove()


def test_the_models_own_text_is_enough(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(moments_module, "sampled_texts", partial(sampled_texts, length=20, batch=8))
    monkeypatch.setattr(moments_module, "BUFFER_TEXTS", 8)
    found = [
        Moments(loaded("llama"), Corpus("model", tokens=300), tmp_path / f).moment(0) for f in "ab"
    ]
    assert torch.linalg.matrix_rank(found[0]) == 80 and torch.equal(*found)


# --- the factor ---


def test_the_factor_is_lower_and_its_square_is_the_moment(gather):
    factor, moment = gather().factor(1), gather().moment(1)
    assert factor.dtype == torch.float64 and torch.equal(factor, factor.tril())
    near(factor @ factor.T, moment)


def test_eigenvectors_give_the_moment_back_and_are_kept(gather, monkeypatch):
    moments = gather()
    values, vectors = moments.eigen(1)
    assert values.dtype == torch.float64 and (values.diff() >= 0).all() and values[0] >= 0
    near(vectors @ values.diag() @ vectors.T, moments.moment(1))
    near(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64))
    monkeypatch.setattr(torch.linalg, "eigh", None)  # from here on it is read
    again = gather().eigen(1)
    assert torch.equal(again[0], values) and torch.equal(again[1], vectors)


def test_a_singular_moment_gets_the_least_help(caplog):
    x = torch.randn(50, 6).double()
    assert torch.equal(cholesky(x.T @ x), torch.linalg.cholesky(x.T @ x)) and not caplog.records
    x[:, 5] = 0  # a unit that is always off
    moment = x.T @ x
    mean = moment.diagonal().mean()
    for rounding, added in ((0.0, 1e-8), (3e-8, 1e-7), (2e-7, 1e-6)):
        moment[5, 5] = -rounding * mean  # sums of float32 products can be that far off
        factor = cholesky(moment)
        assert f"singular to rounding: added {added * mean:.1e}" in caplog.records[-1].getMessage()
        torch.testing.assert_close(
            factor @ factor.T, moment, rtol=0, atol=float(1.1 * added * mean)
        )
    for hopeless in (-torch.eye(3), torch.full((3, 3), torch.nan)):
        with pytest.raises(ValueError, match="cannot be factored"):
            cholesky(hopeless)
