"""Texts that begin alike run once as far as they do, and every number stays what it was."""

import pytest
import torch

from corrigenda.modules.editing.adapters import Adapter, ModulePatch
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.merging import SharedStates, distinct, sees, trees
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.structure import sizes

# Networks that go by the mask and the positions they are given, with all tokens in sight.
BRANCHING = {
    "gpt2", "gptj", "gpt_neox", "opt", "falcon", "llama", "qwen2", "qwen3", "phi", "phi3", "olmo2", "granite",
}  # fmt: skip
TEXTS = [[5, 6, 7], [5, 6, 8, 9], [5, 6], [4, 6, 7], [5, 6, 7]]
OWNERS = torch.tensor([0, 0, 0, 0, 1])
PROMPTS = [
    "The town is in",
    "The town is in",
    "The town of",
    "He said:",
    "The town is in",
    "The town is",
]
TARGETS = ["the north of it", "the south", "the lake", "no", "the north of it", "in the north"]
NEAR = {"atol": 1e-4, "rtol": 0}


def rows_of(texts):
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return Rows(ids, mask, torch.ones(len(texts), dtype=torch.long))


def test_a_tree_holds_every_text_and_every_beginning_once():
    merged = trees(rows_of(TEXTS), OWNERS)
    assert merged.owner_U.tolist() == [0, 1]
    assert merged.rows.unpadded() == [[4, 6, 7, 5, 6, 7, 8, 9], [5, 6, 7]]
    assert merged.rows.depth_BT[0].tolist() == [0, 1, 2, 0, 1, 2, 2, 3]
    sees_BTT = sees(merged.rows.depth_BT)
    for b, text in enumerate(TEXTS):
        row, columns = merged.row_BT[b, : len(text)], merged.column_BT[b, : len(text)]
        assert row.unique().numel() == 1 and merged.owner_U[row[0]] == OWNERS[b]
        assert merged.rows.ids_BT[row, columns].tolist() == text
        for i, column in enumerate(columns):  # a token sees those before it in its text, and itself
            assert sees_BTT[row[i], column].nonzero()[:, 0].tolist() == columns[: i + 1].tolist()


def test_padding_of_a_tree_sees_itself():
    depth = trees(rows_of(TEXTS), OWNERS).rows.depth_BT
    assert sees(depth)[1, 3:].sum(1).tolist() == [1] * 5


def test_a_full_tree_is_followed_by_another(monkeypatch):
    monkeypatch.setattr("corrigenda.modules.model.merging.TREE_TOKENS", 6)
    merged = trees(rows_of([[1, n, 9] for n in range(2, 7)]), torch.zeros(5))
    assert merged.rows.unpadded() == [[1, 2, 9, 3, 9], [1, 4, 9, 5, 9], [1, 6, 9]]
    assert merged.row_BT[:, 0].tolist() == [0, 0, 1, 1, 2]


def test_whole_rows_are_joined_where_they_are_alike():
    merged = distinct(rows_of(TEXTS + TEXTS[:1]), torch.cat([OWNERS, OWNERS[:1]]))
    assert merged.rows.unpadded() == TEXTS and merged.row_BT[:, 0].tolist() == [0, 1, 2, 3, 4, 0]


def test_places_are_read_once():
    merged = trees(rows_of(TEXTS), torch.zeros(5))
    row_K, position_K = torch.tensor([0, 4, 1, 0]), torch.tensor([2, 2, 1, 1])
    row_N, column_N, which_K = merged.places(row_K, position_K)
    assert len(row_N) == 2 and which_K[0] == which_K[1] and which_K[2] == which_K[3]
    found = merged.rows.ids_BT[row_N[which_K], column_N[which_K]]
    assert found.tolist() == [7, 7, 6, 6]


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_those_of_whole_rows(family, layer, tiny_folder):
    lm = LanguageModel(str(tiny_folder(family)))
    plain = LanguageModel(str(tiny_folder(family)), reuse_prefix=False)
    assert lm.reuse._takes_trees == (family in BRANCHING)
    name = lm.structure.out_name(1)
    inputs, outputs = sizes(lm.net.get_submodule(name))
    deltas = [Delta({f"{name}.weight": 0.1 * torch.randn(outputs, inputs)}) for _ in range(2)]
    owners = [0, 0, 1, 0, 1, 1]
    with lm.reuse.shared(layer):
        found = [
            lm.score(PROMPTS, TARGETS, full=True),
            lm.score(PROMPTS, TARGETS, deltas, owners, full=True),
        ]
    expected = [
        plain.score(PROMPTS, TARGETS, full=True),
        plain.score(PROMPTS, TARGETS, deltas, owners, full=True),
    ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logprob_BM, b.logprob_BM, **NEAR)
        torch.testing.assert_close(a.full_BMV, b.full_BMV, **NEAR)
        assert torch.equal(a.greedy_BM, b.greedy_BM) and torch.equal(a.target_BM, b.target_BM)
    assert not torch.allclose(found[0].logprob_BM, found[1].logprob_BM, atol=1e-2)


def test_alibi_is_left_whole(tiny_lm):
    lm = tiny_lm("falcon", alibi=True)
    with lm.reuse.shared(0):
        assert not lm.reuse._takes_trees and lm.score(PROMPTS, TARGETS).logprob_BM.isfinite().all()


class Silent(Adapter):
    """A memory that notes how long the prompts are that it is shown, and changes nothing."""

    def forward(self, site, x_BTI, y_BTO, batch):
        self.seen = batch.prompt_BT.sum(1).tolist()
        return y_BTO


def test_memories_see_whole_rows(tiny_lm):
    """What decides by a row's prompt is not shown trees."""
    lm = tiny_lm("gpt2")
    with lm.reuse.shared(1):
        before = lm.score(PROMPTS, TARGETS)
    memory = Silent([lm.structure.out_name(1)])
    patch = ModulePatch(lm, memory)
    with lm.reuse.shared(1):
        after = lm.score(PROMPTS, TARGETS)
    lengths = {len(row) for row in lm.tokens.encode(PROMPTS)}
    assert (
        len(memory.seen) == 5 and set(memory.seen) == lengths
    )  # two answers differ in their end alone
    torch.testing.assert_close(after.logprob_BM, before.logprob_BM, **NEAR)
    patch.remove()
    with lm.reuse.shared(1):
        assert torch.equal(lm.score(PROMPTS, TARGETS).logprob_BM, before.logprob_BM)


def test_shared_states_are_those_of_the_tokens_before():
    """Computed once per beginning, whichever row or tree it stands in."""
    batches = []

    def run(rows):
        """The sum of the tokens on the way, as a state."""
        batches.append(rows.unpadded())
        depth = (
            rows.depth_BT
            if rows.depth_BT is not None
            else torch.arange(rows.ids_BT.shape[1]).expand_as(rows.ids_BT)
        )
        return sees(depth).float() @ rows.ids_BT[..., None].float()

    shared, rows = SharedStates(1), rows_of(TEXTS[:4])
    merged = trees(rows, OWNERS[:4])
    sums = shared.states(merged.rows, run)[..., 0]
    assert sums.tolist() == [[4, 10, 17, 5, 11, 18, 19, 28]]
    assert shared.states(rows, run)[..., 0].tolist() == [
        [5, 11, 18, 0], [5, 11, 19, 28], [5, 11, 0, 0], [4, 10, 17, 0],
    ]  # fmt: skip
    assert len(batches) == 1
    shared.states(rows_of([[5, 6, 7], [5, 7]]), run)
    assert batches[1] == [[5, 7]]
