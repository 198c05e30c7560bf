"""SERAC's look-up: encoding the whole memory for every query, as the authors' code does, or only the query.

For 100,000 edits the reference path encodes 200, and its time is multiplied. Their vectors are random, in
clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.side_by_side import ratio
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.retrieval.retriever import Encoder, Retriever, SentenceEncoder

FEW, MANY, TIMED = 100, 100_000, 200


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    encoder = SentenceEncoder(device=lm.device)
    texts = [f"{cases[n % len(cases)].edits[0].text} {n}" for n in range(TIMED)]
    question = [cases[5].probes["generality"][0].prompt]
    few = Retriever(encoder)
    few.add(texts[:FEW])
    exact, indexed = _many(encoder, exact_up_to=MANY), _many(encoder, exact_up_to=0)

    def reference(count: int) -> Tensor:
        vectors_ND = encoder.encode(texts[:count] + question)
        return (vectors_ND[:-1] @ vectors_ND[-1]).argmax()

    if reference(FEW) != few.search(question, 1)[1].item():
        raise AssertionError("the two look-ups find different edits")
    query_BD = exact.vectors_ND[:1]
    if exact.nearest(query_BD, 1, MANY)[1] != indexed.nearest(query_BD, 1, MANY)[1]:
        raise AssertionError("the index does not find the nearest vector")
    indexed.search(question, 1)
    size = indexed.nbytes / 2**20
    yield from [
        ratio(f"look-up among {FEW} edits", lambda: reference(FEW), lambda: few.search(question, 1), rounds),
        ratio(f"look-up among {MANY:,} edits (memory of {size:.0f} MiB)", lambda: reference(TIMED),
              lambda: indexed.search(question, 1), rounds, times=MANY // TIMED),
        ratio(f"nearest of {MANY:,} vectors, by exact and by indexed search",
              lambda: exact.nearest(query_BD, 1, MANY), lambda: indexed.nearest(query_BD, 1, MANY), rounds),
    ]  # fmt: skip


def _many(encoder: Encoder, exact_up_to: int) -> Retriever:
    generator = torch.Generator().manual_seed(0)
    centre_CD = normalize(torch.randn(1000, 384, generator=generator), dim=1)
    which_N = torch.randint(1000, (MANY,), generator=generator)
    noise_ND = normalize(torch.randn(MANY, 384, generator=generator), dim=1)
    vectors_ND = normalize(centre_CD[which_N] + 0.6 * noise_ND, dim=1)
    retriever = Retriever(encoder, exact_up_to)
    retriever.add([f"Edit number {n} is" for n in range(MANY)], {"vectors": vectors_ND})
    return retriever
