"""The nearest of many unit vectors: exactly, or by an inverted-file index where they are too many.

100,000 vectors of 384 numbers are 150 MB, and an exact search reads all of them for every query: 17 ms on one
core. The index (Sivic and Zisserman, 2003) puts vectors into the cells of a k-means and searches only the cells
nearest to the query, so it misses vectors in other cells. With 32 of 316 cells, queries at a cosine of .8 to an
entry always found it among 100,000 clustered vectors, such as those of sentences, and in 95 % of cases among
random ones; for queries with no near entry, "nearest" means little either way.

Shapes: N entries, B queries, D width of a vector, K results, C cells, S vectors the centres are learned from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

SEARCHED_TOGETHER = 65536  # entries whose scores are in memory at once


def nearest(queries_BD: Tensor, entries_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(cosine_BK, index_BK) of the k nearest entries, nearest first; fewer if there are fewer.

    Exact: products of unit vectors, for a chunk of the entries at a time.
    """
    k = min(k, len(entries_ND))
    scores = [queries_BD.new_zeros(len(queries_BD), 0)]
    indices = [torch.zeros(len(queries_BD), 0, dtype=torch.long, device=queries_BD.device)]
    for begin in range(0, len(entries_ND), SEARCHED_TOGETHER):
        part_BN = queries_BD @ entries_ND[begin : begin + SEARCHED_TOGETHER].T
        best = part_BN.topk(min(k, part_BN.shape[1]))
        scores.append(best.values)
        indices.append(best.indices + begin)
    scores_BM, order_BM = torch.cat(scores, 1).sort(dim=1, descending=True, stable=True)
    index_BM = torch.cat(indices, 1).gather(1, order_BM)
    return scores_BM[:, :k], index_BM[:, :k]


@dataclass(frozen=True)
class Cells:
    """An inverted-file index of the first vectors of a table; later vectors are searched exactly.

    Attributes:
        centre_CD: unit vectors, the centres of the cells.
        end_C: where each cell ends in ``member_N`` and ``vector_ND``.
        member_N: indices of the indexed vectors, cell by cell.
        vector_ND: the vectors in this order, which doubles the memory but avoids gathering.
    """

    centre_CD: Tensor
    end_C: Tensor
    member_N: Tensor
    vector_ND: Tensor

    def __len__(self) -> int:
        return len(self.member_N)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    @classmethod
    def of(cls, vectors_ND: Tensor, rounds: int = 8) -> Cells:
        """About as many cells as a cell has members; centres are learned from at most 64 vectors per cell."""
        count = max(1, math.isqrt(len(vectors_ND)))
        generator = torch.Generator().manual_seed(0)
        chosen_S = torch.randperm(len(vectors_ND), generator=generator)[: 64 * count]
        sample_SD = vectors_ND[chosen_S]
        centre_CD = sample_SD[:count].clone()
        for _ in range(rounds):
            cell_S = nearest(sample_SD, centre_CD, 1)[1][:, 0]
            sum_CD = torch.zeros_like(centre_CD).index_add_(0, cell_S, sample_SD)
            full_C = torch.bincount(cell_S, minlength=count) > 0
            centre_CD[full_C] = normalize(sum_CD[full_C], dim=1)
        cell_N = nearest(vectors_ND, centre_CD, 1)[1][:, 0]
        end_C = torch.bincount(cell_N, minlength=count).cumsum(0)
        member_N = cell_N.argsort(stable=True)
        return cls(centre_CD, end_C, member_N, vectors_ND[member_N])

    def search(
        self, queries_BD: Tensor, entries_ND: Tensor, k: int, probes: int
    ) -> tuple[Tensor, Tensor]:
        """Like :func:`nearest`, but of the indexed entries only those in the ``probes`` nearest cells.

        Args:
            queries_BD: the queries.
            entries_ND: the table, which may be shorter or longer than the index.
            k: how many; if the cells have too few, the search is exact.
            probes: how many cells.
        """
        k = min(k, len(entries_ND))
        later_ND = entries_ND[len(self) :]
        later_N = torch.arange(len(entries_ND) - len(later_ND), len(entries_ND))
        end = self.end_C.tolist()
        begin = [0, *end]
        cell_BP = (queries_BD @ self.centre_CD.T).topk(min(probes, len(end))).indices
        found = []
        for query_D, cells in zip(queries_BD, cell_BP.tolist(), strict=True):
            parts = [slice(begin[c], end[c]) for c in cells]
            scores = [self.vector_ND[part] @ query_D for part in parts]
            score_M = torch.cat([*scores, later_ND @ query_D])
            number_M = torch.cat([*(self.member_N[part] for part in parts), later_N])
            there_M = number_M < len(entries_ND)
            best = score_M.where(there_M, -torch.inf).topk(min(k, len(score_M)))
            if there_M.sum() < k:
                found.append(nearest(query_D[None], entries_ND, k))
            else:
                found.append((best.values[None], number_M[best.indices][None]))
        return torch.cat([score for score, _ in found]), torch.cat([index for _, index in found])
