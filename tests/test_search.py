"""The nearest vectors: exactly, and what an index finds of them."""

import pytest
import torch
from torch.nn.functional import normalize

from corrigenda.modules.retrieval.retriever import Encoder, Retriever
from corrigenda.modules.retrieval.search import Cells, nearest


def random_vectors(count, width=48, seed=0):
    return normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def clustered_vectors(count, width=48, clusters=60):
    centre = random_vectors(clusters, width, seed=1)
    which = torch.randint(clusters, (count,), generator=torch.Generator().manual_seed(2))
    return normalize(centre[which] + 0.6 * random_vectors(count, width, seed=3), dim=1)


def beside(vectors, cosine, seed=4):
    """Unit vectors with this inner product with each of the given ones."""
    noise = random_vectors(len(vectors), vectors.shape[1], seed)
    noise = normalize(noise - (noise * vectors).sum(1, keepdim=True) * vectors, dim=1)
    return cosine * vectors + (1 - cosine**2) ** 0.5 * noise


def test_search_is_exact_across_chunks(monkeypatch):
    monkeypatch.setattr("corrigenda.modules.retrieval.search.SEARCHED_TOGETHER", 7)
    vectors, queries = random_vectors(30, 8), random_vectors(5, 8, seed=9)
    cosine, index = nearest(queries, vectors, 4)
    wanted = (queries @ vectors.T).topk(4, dim=1)
    assert torch.equal(index, wanted.indices)
    torch.testing.assert_close(cosine, wanted.values)
    assert nearest(queries, vectors, 99)[1].shape == (5, 30)


@pytest.mark.parametrize(("make", "least"), [(random_vectors, 0.95), (clustered_vectors, 0.98)])
def test_an_index_finds_what_is_near(make, least):
    """Measured: how many of 500 queries get the same nearest entry as an exact search gives them."""
    vectors = make(20_000)
    cells = Cells.of(vectors)
    assert torch.equal(cells.member_N.sort().values, torch.arange(20_000))
    assert len(cells.centre_CD) == 141 and cells.end_C[-1] == 20_000
    for cosine, share in ((1.0, 1.0), (0.8, least)):
        queries = beside(vectors[::40], cosine)
        wanted = nearest(queries, vectors, 1)
        found = cells.search(queries, vectors, 1, probes=32)
        assert (found[0] <= wanted[0] + 1e-5).all()
        assert (found[1] == wanted[1]).float().mean() >= share
    everywhere = cells.search(queries, vectors, 3, probes=141)
    exact = nearest(queries, vectors, 3)
    assert torch.equal(everywhere[1], exact[1])
    torch.testing.assert_close(everywhere[0], exact[0])


def test_an_index_of_fewer_or_more_than_there_are():
    vectors = random_vectors(900)
    cells = Cells.of(vectors[:600])
    queries = vectors[[3, 599, 700, 899]]
    assert cells.search(queries, vectors, 1, 2)[1][:, 0].tolist() == [3, 599, 700, 899]
    found = cells.search(queries, vectors[:100], 2, 24)
    wanted = nearest(queries, vectors[:100], 2)
    assert torch.equal(found[1], wanted[1])
    many = cells.search(queries, vectors, 800, 1)  # more than a few cells hold
    assert torch.equal(many[1], nearest(queries, vectors, 800)[1])


class Numbers(Encoder):
    """The vector of a text is a row of a table."""

    name, hash = "numbers", "numbers"

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, texts):
        return self.vectors[[int(text) for text in texts]]


def test_a_large_retriever_is_indexed_and_a_small_one_searched_exactly(tmp_path):
    vectors = clustered_vectors(3000)
    retriever = Retriever(Numbers(vectors), exact_up_to=1000)
    retriever.add([str(n) for n in range(1000)])
    retriever.search(["7"], 1)
    assert retriever.cells is None
    retriever.add([str(n) for n in range(1000, 2000)])
    assert retriever.search(["7", "1999"], 1)[1][:, 0].tolist() == [7, 1999]
    assert len(retriever.cells) == 2000
    size = 2000 * 48 * 4 + retriever.cells.nbytes + sum(len(t) for t in retriever.texts)
    assert retriever.nbytes == size
    index = retriever.cells
    retriever.add([str(n) for n in range(2000, 2300)])
    assert retriever.search(["2299", "7"], 1)[1][:, 0].tolist() == [2299, 7]
    assert retriever.cells is index  # a few more are no reason to make it anew
    retriever.save(tmp_path / "many.safetensors")
    again = Retriever.load(tmp_path / "many.safetensors", retriever.encoder)
    again.exact_up_to = 1000
    for name, tensor in vars(index).items():
        assert torch.equal(getattr(again.cells, name), tensor)
    assert again.search(["2299"], 3)[1].tolist() == retriever.search(["2299"], 3)[1].tolist()
    assert retriever.search(["1500"], 1, among=1400)[1].max() < 1400
    retriever.add([str(n) for n in range(2300, 3000)])
    assert retriever.search(["2999"], 1)[1].item() == 2999 and len(retriever.cells) == 3000
    retriever.remove(range(2500, 3000))
    assert retriever.cells is None and retriever.search(["2499"], 1)[1].item() == 2499
    assert retriever.nbytes == 2500 * 48 * 4 + retriever.cells.nbytes + sum(
        len(t) for t in retriever.texts
    )
