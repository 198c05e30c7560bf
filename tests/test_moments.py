"""Second moments: the right number, of the right model, gathered once, whatever happens in between."""

import logging
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from corrigenda.modules import files
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.hooks import capture
from corrigenda.modules.statistics import corpus as corpus_module
from corrigenda.modules.statistics import moments as moments_module
from corrigenda.modules.statistics.corpus import IMPORTED, Corpus, sampled_texts
from corrigenda.modules.statistics.first_tokens import first_token_shares
from corrigenda.modules.statistics.matrices import cholesky
from corrigenda.modules.statistics.moments import Moments
from corrigenda.modules.statistics.published import read_npz
from tests.samples import models_by_family

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
    return models_by_family(tiny_lm)


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
        ids = lm.tokens.encode([text])[0][: min(left, length)]
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
    """Uncentred, over all real tokens and no padding; OPT's flattened MLP included."""
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
    ids = [moments.lm.tokens.encode([text])[0][:6] for text in TEXTS]
    assert max(map(len, moments.lm.tokens.encode(TEXTS))) > 6 and sum(map(len, ids)) > 200
    near(moments.moment(0), by_hand(moments.lm, 0, length=6, tokens=200))


# --- resuming ---


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(moments_module, "BUFFER_TEXTS", 5)
    monkeypatch.setattr(moments_module, "WRITE_SECONDS", 0.0)


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
def test_a_killed_computation_resumes(killed_at, gather, small_buffers, counted):
    """The result is bit-exact, and no finished buffer is computed again."""
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
    save = files.save_file
    calls = []

    def torn(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", torn)
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
        lambda path: files.save_file({"moment": torch.eye(80)}, path, {"weights": "other"}),
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
    assert str(path) in record.getMessage() and "computing it again" in record.getMessage()
    assert moments._read(path) is not None


def test_sums_that_a_killed_process_left_beside_the_moments_are_removed(gather, small_buffers):
    moments = gather()
    moments.gather([0, 1])
    (moments.folder / "layers0-1.partial.safetensors").touch()  # killed before it removed them
    unfinished = moments.folder / "layers0-2.partial.safetensors"
    unfinished.touch()
    gather().moment(0)
    assert [*moments.folder.glob("*.partial.safetensors")] == [unfinished]


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
    """Also if an edit of a lower block is active while they are computed."""
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


def test_the_folder_identifies_model_text_and_settings(tiny_lm, source):
    """Statistics of another model, text, length, seed or precision are never used."""
    lm = tiny_lm("llama")
    corpus = Corpus(str(source), TOKENS)
    folders = [Moments(lm, corpus).folder]
    assert Moments(tiny_lm("llama"), Corpus(str(source), TOKENS)).folder == folders[0]
    for parameter in lm.net.parameters():
        parameter.data.view(-1)[0] += 1e-3
        del lm.edits.weights_hash
        folders.append(Moments(lm, corpus).folder)
    for other in (Corpus(str(source), TOKENS + 1), Corpus(str(source), TOKENS, seed=1), Corpus()):
        folders.append(Moments(lm, other).folder)
    source.write_text("The same name, other text.", encoding="utf-8")
    folders.append(Moments(lm, corpus).folder)
    lm.net.bfloat16()
    folders.append(Moments(lm, corpus).folder)
    assert len(set(folders)) == len(folders)


def test_statistics_are_in_the_cache_folder(tiny_lm, source, cache_folder):
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
    monkeypatch.setattr(corpus_module, "sampled_texts", partial(sampled_texts, length=20, batch=8))
    monkeypatch.setattr(moments_module, "BUFFER_TEXTS", 8)
    found = [
        Moments(loaded("llama"), Corpus("model", tokens=300), tmp_path / f).moment(0) for f in "ab"
    ]
    assert torch.linalg.matrix_rank(found[0]) == 80 and torch.equal(*found)


def test_no_text_is_longer_than_the_model_takes(tiny_lm, source, tmp_path):
    """Learned positions end: neither sampling nor gathering may run past them."""
    lm = tiny_lm("gpt2", max_position_embeddings=24)
    assert lm.max_length == 24
    texts = sampled_texts(lm, seed=0)
    sampled = lm.tokens.encode([next(texts) for _ in range(70)])
    assert max(map(len, sampled)) > 20
    own = Moments(lm, Corpus("model", tokens=300), tmp_path).moment(0)
    assert torch.isfinite(own).all()
    source.write_text("\n".join([" ".join(TEXTS)] * 20), encoding="utf-8")
    moments = Moments(lm, Corpus(str(source), tokens=400), tmp_path)
    ids = lm.tokens.encode([" ".join(TEXTS)])[0][:24]
    module = {"out": lm.net.get_submodule(lm.structure.out_name(1))}
    with torch.no_grad(), capture(module, stop=True) as seen:
        lm.net(torch.tensor([ids]))
    x = seen["out"][0][0].double()
    near(moments.moment(1), (16 * x.T @ x + x[:16].T @ x[:16]) / 400)  # 400 = 16 * 24 + 16


def test_a_model_without_positions_has_no_limit(tiny_lm):
    lm = tiny_lm("bloom")
    lm.net.config.max_position_embeddings = None
    assert lm.max_length is None


# --- the first token ---


def test_the_share_of_first_tokens_is_saved(gather):
    moments = gather()
    lm = moments.lm
    module = {"out": lm.net.get_submodule(lm.structure.out_name(1))}
    first = every = 0.0
    left = TOKENS
    for text in TEXTS:
        ids = lm.tokens.encode([text])[0][:left]
        left -= len(ids)
        if ids:
            with torch.no_grad(), capture(module, stop=True) as seen:
                lm.net(torch.tensor([ids]))
            squares = seen["out"][0][0].double().square().sum(1)
            first, every = first + squares[0], every + squares.sum()
    assert moments.first_token_share(1) == pytest.approx(float(first / every), rel=1e-4)
    assert gather().first_token_share(1) == moments.first_token_share(1)  # off the file


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_the_shares_of_all_blocks_need_no_moments(kind, gather, monkeypatch):
    lm = gather(kind).lm
    shares = first_token_shares(lm, TEXTS)
    for layer in (0, 1):
        moments = gather(kind, tokens=100_000)
        assert shares[layer] == pytest.approx(moments.first_token_share(layer), rel=1e-5)
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", 30)
    assert first_token_shares(lm, TEXTS) == pytest.approx(shares, rel=1e-5)


# --- stopping early ---


def test_it_stops_when_more_text_changes_little(gather, small_buffers, counted, source):
    """Looked at after 1, 2, 4, ... buffers: the change since half as much text."""
    source.write_text("\n".join(TEXTS * 8), encoding="utf-8")
    every = {"tokens": 4000}
    moments = gather(**every)
    moments.moment(0)
    buffers = list(counted)
    sums = [torch.zeros(80, 80).double()]
    counts = [0]
    for ids in buffers:
        state = {"0": sums[-1].clone(), "0.first": torch.zeros(()).double(), "tokens": counts[-1]}
        moments._add([list(row) for row in ids], [0], state)
        sums.append(state["0"])
        counts.append(state["tokens"])
    change = {}
    for n in (2, 4, 8, 16):
        now, then = sums[n] / counts[n], sums[n // 2] / counts[n // 2]
        change[n] = float((now - then).norm() / now.norm())
    assert change[16] < change[4]
    stops = set()
    for tolerance in (1.01 * change[4], 1.01 * change[8], 1.01 * change[16]):
        counted.clear()
        stopped = gather(**every, tolerance=tolerance)
        found = stopped.moment(0)
        n = min(m for m in change if change[m] <= tolerance and counts[m] >= 80)
        near(found, sums[n] / counts[n])
        assert len(counted) == n and int(stopped._read(stopped._path(0))["tokens"]) == counts[n]
        assert stopped.folder != moments.folder
        stops.add(n)
    assert len(stops) > 1


def test_a_killed_run_stops_at_the_same_place(gather, small_buffers, counted, source):
    source.write_text("\n".join(TEXTS * 8), encoding="utf-8")
    settings = {"tokens": 4000, "tolerance": 0.2}
    whole = gather(folder="whole", **settings).moment(0)
    number = len(counted)
    assert 2 < number < 30
    counted.clear()
    counted.fail_at = number - 1
    with pytest.raises(KeyboardInterrupt):
        gather(**settings).moment(0)
    counted.clear()
    counted.fail_at = None
    assert torch.equal(gather(**settings).moment(0), whole) and len(counted) == 1


def test_a_corpus_without_sense_is_refused():
    with pytest.raises(ValueError, match=r"tolerance must be at least 0 and below 1, got 1\.0"):
        Corpus(tolerance=1.0)


# --- several processes ---

PROCESS = """
import sys
from pathlib import Path
import torch
from corrigenda.modules.statistics import moments
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.model.lm import LanguageModel
torch.set_num_threads(1)
moments.BUFFER_TEXTS = 5
moments.WRITE_SECONDS = 0.0
added = []
add = moments.Moments._add
def counted(self, ids, *rest):
    added.append(len(ids))
    add(self, ids, *rest)
moments.Moments._add = counted
torch.distributed.init_process_group("gloo")
lm = LanguageModel(sys.argv[1])
for tokens, tolerance in ((TOKENS, 0.0), (4000, 0.2)):
    added.clear()
    corpus = Corpus(sys.argv[2], tokens, tolerance=tolerance)
    moments.Moments(lm, corpus, Path(sys.argv[3])).gather([0, 1], progress=False)
    print(len(added))
torch.distributed.destroy_process_group()
"""


def test_processes_share_the_text(gather, small_buffers, counted, tiny_folder, source, tmp_path):
    """Each takes every second buffer; both end with what one process finds, in a cache of its own."""
    source.write_text("\n".join(TEXTS * 8), encoding="utf-8")
    alone = gather().gather([0, 1])
    number = len(counted)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    root = Path(__file__).parents[1]
    script = PROCESS.replace("TOKENS", str(TOKENS))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, tiny_folder("llama"), source, tmp_path / f"rank{rank}"],
            env=os.environ | rendezvous | {"RANK": str(rank), "PYTHONPATH": str(root)},
            cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), ended
    plain, stopped = zip(*(map(int, out.split()) for out, _ in ended), strict=True)
    assert sorted(plain) == [number // 2, (number + 1) // 2]
    assert stopped[0] == stopped[1] and stopped[0] in (2, 4, 8)
    counted.clear()
    early = []
    for rank in range(2):
        moments = gather(folder=f"rank{rank}")
        names = {path.name for path in moments.folder.iterdir()}
        assert names == {"layer0.safetensors", "layer1.safetensors"}
        for layer, found in moments.gather([0, 1]).items():
            torch.testing.assert_close(found, alone[layer], rtol=1e-12, atol=1e-15)
            share = gather().first_token_share(layer)
            assert moments.first_token_share(layer) == pytest.approx(share, rel=1e-12)
        early.append(gather(folder=f"rank{rank}", tokens=4000, tolerance=0.2).moment(1))
    assert torch.equal(*early)
    assert not counted  # all of it read, nothing gathered


# --- statistics of others ---


def npz(path, **changes):
    """A file as the authors' code writes it: the sum over tokens, their number, and how it was made."""
    keys = torch.randn(300, 80, dtype=torch.float64)
    content = {
        "mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": 300,
        "mom2.mom2": (keys.T @ keys).float().numpy(), "sample_size": 100,
    }  # fmt: skip
    content |= changes
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return keys.T @ keys / 300


def test_statistics_of_the_authors_are_taken_over(gather, tmp_path):
    lm = gather().lm
    expected = npz(tmp_path / "a.npz")
    moments = Moments(lm, Corpus(IMPORTED), tmp_path / "cache")
    near(moments.take_over(tmp_path / "a.npz", 1), expected)
    again = Moments(lm, Corpus(IMPORTED, tokens=7, seed=3), tmp_path / "cache")
    near(again.moment(1), expected)
    near(again.factor(1) @ again.factor(1).T, expected)
    assert again.first_token_share(1) is None
    newer = npz(tmp_path / "b.npz")
    again.take_over(tmp_path / "b.npz", 1)
    near(again.factor(1) @ again.factor(1).T, newer)
    with pytest.raises(ValueError, match=r"no statistics of layer 0 .*--import FILE --layers 0"):
        again.moment(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mom2.mom2": None}, "it has mom2.constructor, mom2.count, sample_size"),
        ({"mom2.mom2": np.eye(3)}, r"\(3, 3\), but the keys of .* have width 80"),
        ({"mom2.mom2": np.ones((80, 2))}, "must be square"),
        ({"mom2.count": 9}, "from 9 tokens"),
        ({"mom2.mom2": np.full((80, 80), np.nan)}, "not finite, or not symmetric"),
        ({"mom2.mom2": np.triu(np.ones((80, 80)))}, "not finite, or not symmetric"),
        ({"mom2.mom2": np.array([[None]])}, "not a file of second moments"),  # would need pickle
    ],
)
def test_what_cannot_be_statistics_of_this_model_is_refused(gather, tmp_path, changes, words):
    npz(tmp_path / "a.npz", **changes)
    moments = Moments(gather().lm, Corpus(IMPORTED), tmp_path / "cache")
    with pytest.raises(ValueError, match=words):
        moments.take_over(tmp_path / "a.npz", 0)
    assert not moments.folder.exists()


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(ValueError, match=r"a\.npz: not a file of second moments"):
        read_npz(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="no such statistics file"):
        read_npz(tmp_path / "b.npz")


# --- the factor ---


def test_the_factor_is_lower_and_its_square_is_the_moment(gather):
    factor, moment = gather().factor(1), gather().moment(1)
    assert factor.dtype == torch.float64 and torch.equal(factor, factor.tril())
    near(factor @ factor.T, moment)


def test_eigenvectors_reconstruct_the_moment_and_are_cached(gather, monkeypatch):
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
        assert f"numerically singular: added {added * mean:.1e}" in caplog.records[-1].getMessage()
        torch.testing.assert_close(
            factor @ factor.T, moment, rtol=0, atol=float(1.1 * added * mean)
        )
    for hopeless in (-torch.eye(3), torch.full((3, 3), torch.nan)):
        with pytest.raises(ValueError, match="has no Cholesky factor"):
            cholesky(hopeless)


# --- files of others ---


def rewritten(path, change):
    """The file with its own header and other tensors."""
    tensors, header = files.read_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    path.unlink()
    files.save_file(change(tensors), path, header)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t | {"moment": 2 * t["moment"]}, "not those that were written"),
        (lambda t: t | {"moment": t["moment"][:9, :9].clone()}, "not those that were written"),
    ],
    ids=["other numbers", "other shape"],
)
@pytest.mark.parametrize("with_digest", [True, False])
def test_other_numbers_in_a_cached_file_are_not_used(gather, caplog, change, reason, with_digest):
    moment = gather().moment(0).clone()
    path = gather()._path(0)
    if with_digest:
        rewritten(path, change)
    else:  # of other content altogether, written by our own code
        reason = "its keys do not have width 80"
        gather()._write(path, {"moment": torch.eye(9), "tokens": torch.tensor(9)})
    assert torch.equal(gather().moment(0), moment)
    assert reason in caplog.text and "computing it again" in caplog.text
    assert path.with_name(f"{path.name}.unusable").exists()


@pytest.mark.parametrize(
    ("header", "moment", "reason"),
    [
        ({"corpus": "another"}, 1.0, "its corpus is 'another'"),
        ({"dtype": "bfloat16"}, 1.0, "its dtype is 'bfloat16'"),
        ({"weights": "0"}, 1.0, "its weights is '0'"),
        ({}, torch.nan, "not finite"),
        ({}, torch.inf, "not finite"),
    ],
    ids=["corpus", "dtype", "weights", "nan", "infinity"],
)
def test_statistics_of_something_else_are_not_used(gather, caplog, header, moment, reason):
    wanted = gather(folder="whole").moment(0)
    moments = gather()
    content = {"moment": moment * torch.eye(80), "tokens": torch.tensor(TOKENS)}
    files.write_tensors(moments._path(0), content, moments._header() | header)
    assert torch.equal(gather().moment(0), wanted) and reason in caplog.text


def test_a_file_of_an_earlier_version_is_read(gather, counted):
    moments = gather()
    header = moments._header()
    old = {name: header[name] for name in ("weights", "model", "source", "tokens")}
    moments.folder.mkdir(parents=True)
    files.save_file({"moment": torch.eye(80).double()}, moments._path(0), old)
    assert torch.equal(gather().moment(0), torch.eye(80).double()) and not counted
    assert torch.equal(gather().factor(0), torch.eye(80).double())


def test_a_factor_belongs_to_its_moment(gather):
    """Also where the moment is another one since, however that came about."""
    moments = gather()
    moments.factor(0), moments.eigen(0)
    other = 2 * moments.moment(0).clone()
    moments._write(moments._path(0), {"moment": other, "tokens": torch.tensor(TOKENS)})
    again = gather()
    near(again.factor(0) @ again.factor(0).T, other)
    values, vectors = again.eigen(0)
    near(vectors @ values.diag() @ vectors.T, other)


def test_a_corpus_is_identified_by_its_content(source, tmp_path):
    first = Corpus(str(source)).key
    os.utime(source, (1, 1))
    other = tmp_path / "elsewhere" / "renamed.txt"
    other.parent.mkdir()
    other.write_bytes(source.read_bytes())
    assert Corpus(str(source)).key == Corpus(str(other)).key == first
    content, times = source.read_text("utf-8"), source.stat()
    source.write_text(content.replace("rain", "snow"), encoding="utf-8")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # as large, and as old
    assert Corpus(str(source)).key != first


GATHERING = """
import sys
import time
from pathlib import Path
from corrigenda.modules.statistics import moments
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.model.lm import LanguageModel
moments.WAIT_SECONDS = 0.1
add = moments.Moments._add
def slow(self, ids, *rest):
    print("gathers", flush=True)
    time.sleep(1)
    add(self, ids, *rest)
moments.Moments._add = slow
lm = LanguageModel(sys.argv[1])
moments.Moments(lm, Corpus(sys.argv[2], TOKENS), Path(sys.argv[3])).gather([0, 1], progress=False)
print("done", flush=True)
"""


def test_two_programs_gather_once(
    gather, tiny_folder, source, tmp_path, counted, caplog, monkeypatch
):
    """The second waits for the first, and reads what it has made."""
    monkeypatch.setattr(moments_module, "WAIT_SECONDS", 0.1)
    root = Path(__file__).parents[1]
    first = subprocess.Popen(
        [sys.executable, "-c", GATHERING.replace("TOKENS", str(TOKENS)), tiny_folder("llama"), source,
         tmp_path / "cache"],
        env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert first.stdout.readline() == "gathers\n"
    found = gather().gather([0, 1])
    assert not counted and "waiting for another program to compute" in caplog.text
    assert first.communicate(timeout=60)[0].endswith("done\n")
    near(found[1], by_hand(gather().lm, 1))


def test_what_a_killed_process_left_is_removed_though_nothing_is_missing(gather, counted):
    """It was killed after the file was complete, before its temporary folder was removed."""
    gather().gather([0])
    left = gather().folder / f".layer0.safetensors{files.UNFINISHED}"
    left.mkdir()
    made = len(counted)
    gather().gather([0])
    assert not left.exists() and len(counted) == made


def test_keys_that_are_not_finite_are_not_saved(tiny_lm, source, tmp_path):
    lm = tiny_lm("llama")
    lm.net.get_submodule(lm.structure.mlp_names(0)[0]).weight.data[0, 0] = torch.nan
    moments = Moments(lm, Corpus(str(source), TOKENS), tmp_path / "cache")
    with pytest.raises(ValueError, match="keys of block 0 of .* are not finite in float32"):
        moments.moment(0)
    assert not list(moments.folder.glob("*.safetensors"))
