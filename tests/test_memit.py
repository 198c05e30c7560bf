"""MEMIT, EMMET and AlphaEdit: their solutions, how values are spread over layers, and what is left alone."""

import logging
from contextlib import suppress

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.editor import editing_mode
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors import spread
from corrigenda.modules.editors.alphaedit import AlphaEdit
from corrigenda.modules.editors.emmet import EMMET
from corrigenda.modules.editors.key_value import SubjectRows, solve_update
from corrigenda.modules.editors.memit import MEMIT
from corrigenda.modules.editors.rome import ROME, _rank_one
from corrigenda.modules.model.delta import Delta, EditError, LowRank
from corrigenda.modules.model.hooks import capture, first, hooked
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import sizes
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.moments import Moments
from tests.samples import LOCATED_EDITS, models_by_family, without_edits_afterwards

EDITS = [*LOCATED_EDITS, Edit("They go to {}", "the Tin Owl", "rain")]
EACH = [[edit] for edit in EDITS]
TEXT = [
    f"{subject} {verb} the {thing} {when}."
    for subject in ("The town", "He", "A writer", "São Paulo", "Zorbania")
    for verb in ("is on", "was not", "said that", "has")
    for thing in ("ice", "table", "capital", "story of the year")
    for when in ("in 1984", "and so", "where it was")
]
FREE = {"weight_decay": 0.0, "kl_weight": 0.0, "clamp_norm": 20.0}


# --- the solutions, in float64 on random matrices ---

WIDTH, VALUE, COUNT = 12, 5, 3


@pytest.fixture
def moment():
    keys = torch.randn(200, WIDTH).double()
    return keys.T @ keys / 200


@pytest.fixture
def problem(moment):
    """A second moment's factor, three keys and what they lack."""
    keys, residual = torch.randn(WIDTH, COUNT).double(), torch.randn(VALUE, COUNT).double()
    return torch.linalg.cholesky(moment), keys, residual


def solved(*args):
    left, right = solve_update(*args)
    return left @ right


def near(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def of_kind(editor, statistic):
    """An editor that solves with the given statistic of layer 0."""
    editor._statistics = {0: statistic}
    return lambda keys, residual, earlier=None: product(
        editor.solve(
            0, EDITS[: keys.shape[1]], keys, residual, keys[:, :0] if earlier is None else earlier
        )
    )


def product(factors):
    return factors[0] @ factors[1]


@pytest.mark.parametrize("count", [3, 12, 40], ids=["dual", "square", "primal"])
@pytest.mark.parametrize("earlier", [0, 7])
def test_memit_solves_its_normal_equations(moment, count, earlier):
    """Both forms of the solver satisfy Delta (lambda C + P P' + K K') = R K'."""
    factor = torch.linalg.cholesky(moment)
    keys, past = torch.randn(WIDTH, count).double(), torch.randn(WIDTH, earlier).double()
    residual = torch.randn(VALUE, count).double()
    left, right = solve_update(factor, keys, residual, 0.3 * WIDTH, past)
    system = 0.3 * WIDTH * moment + past @ past.T + keys @ keys.T
    near(left @ right @ system, residual @ keys.T)
    assert left.shape == (VALUE, count) and right.shape == (count, WIDTH)
    if count <= 4:
        near(of_kind(MEMIT([0], ridge=0.3), factor)(keys, residual, past), left @ right)


@pytest.mark.parametrize(
    ("count", "ridge", "wanted"),
    [
        (3, 0.5, ("solve", 3)),
        (12, 0.5, ("solve", 12)),
        (13, 0.5, ("cholesky", 12)),
        (13, 1e-3, ("cholesky", 12)),
        (3, 0, ("solve", 3)),
        (13, 0, ("solve", 13)),  # without a ridge the other form is another problem
    ],
)
def test_the_smaller_of_the_two_systems_is_solved(moment, count, ridge, wanted, monkeypatch):
    """One equation per key, or one per key dimension."""
    factor, seen = torch.linalg.cholesky(moment), []

    def watched(name):
        plain = getattr(torch.linalg, name)

        def solve(matrix, *rest):
            seen.append((name, len(matrix)))
            return plain(matrix, *rest)

        return solve

    for name in ("solve", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, watched(name))
    with suppress(torch.linalg.LinAlgError):  # 13 keys of 12 dimensions cannot all hold exactly
        solve_update(factor, torch.randn(WIDTH, count), torch.randn(VALUE, count), ridge)
    assert seen == [wanted]


def test_a_single_edit_has_a_closed_form(problem, moment):
    """The output changes by s / (1 + s) of the residual, with s = k' C^-1 k / lambda."""
    factor, keys, residual = problem[0], problem[1][:, :1], problem[2][:, :1]
    change = of_kind(MEMIT([0], ridge=0.5), factor)(keys, residual)
    s = (keys.T @ torch.linalg.solve(moment, keys)).item() / (0.5 * WIDTH)
    near(change @ keys, residual * s / (1 + s))


def test_memit_without_ridge_is_emmet(problem):
    """As the ridge goes to 0 MEMIT becomes EMMET; as it grows the update falls like 1 / lambda."""
    factor, keys, residual = problem
    exact = of_kind(EMMET([0]), factor)(keys, residual)
    near(exact @ keys, residual)
    near(of_kind(MEMIT([0], ridge=1e-13), factor)(keys, residual), exact)
    near(of_kind(EMMET([0], ridge=0.4), factor)(keys, residual),
         of_kind(MEMIT([0], ridge=0.4), factor)(keys, residual))  # fmt: skip
    large = [of_kind(MEMIT([0], ridge=r), factor)(keys, residual).norm() for r in (1e8, 1e9)]
    assert large[0] / large[1] == pytest.approx(10, rel=1e-5)


def test_emmet_with_one_edit_is_rome(problem):
    """With ROME's two keys the update is the same, and the scale of C cancels."""
    factor, key, residual = problem[0], problem[1][:, 0], problem[2][:, 0]
    change = of_kind(EMMET([0]), factor)(key[:, None], residual[:, None])
    near(change, _rank_one(factor, key, key, residual).dense())
    near(change, _rank_one(factor, key, key.clone() + 0, residual).dense())
    near(of_kind(EMMET([0]), 3 * factor)(key[:, None], residual[:, None]), change)


def test_emmet_changes_ordinary_answers_least(problem, moment):
    factor, keys, residual = problem
    change = of_kind(EMMET([0]), factor)(keys, residual)
    aside = torch.eye(WIDTH).double() - keys @ torch.linalg.pinv(keys)
    for _ in range(5):
        other = 0.1 * torch.randn(VALUE, WIDTH).double() @ aside
        near((change + other) @ keys, residual)
        moved, least = (torch.einsum("df,fg,dg->", d, moment, d) for d in (change + other, change))
        assert moved > least


def test_emmet_names_edits_that_cannot_both_hold(problem):
    factor, keys, residual = problem
    same = keys[:, [0, 1, 0]]
    with pytest.raises(
        EditError, match="at layer 0.*'The capital of Zorbania is' and 'In the year"
    ):
        of_kind(EMMET([0]), factor)(same, residual)
    with pytest.raises(EditError, match="20 edits cannot hold exactly, keys are 12 wide"):
        EMMET_solve(factor, 20)
    assert of_kind(EMMET([0], ridge=0.1), factor)(same, residual).isfinite().all()


def EMMET_solve(factor, count):  # noqa: N802
    editor = EMMET([0])
    editor._statistics = {0: factor}
    keys, residual = torch.randn(WIDTH, count).double(), torch.randn(VALUE, count).double()
    editor.solve(0, EDITS[:1] * count, keys, residual, keys[:, :0])


def test_duplicate_edits_contribute_equally(problem):
    """The same edit twice has equal parts in the update, which is finite."""
    factor, keys, residual = problem[0], problem[1][:, [0, 0]], problem[2][:, [0, 0]]
    left, right = solve_update(factor, keys, residual, 1.0)
    assert left.isfinite().all() and right.isfinite().all()
    near(torch.outer(left[:, 0], right[0]), torch.outer(left[:, 1], right[1]))


@pytest.fixture
def alpha(tmp_path, tiny_lm):
    """``alpha(C, **arguments)``: an AlphaEdit that found C in layer 0, and its basis."""
    lm = tiny_lm("llama", intermediate_size=WIDTH)

    def make(moment, **arguments):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        moments = Moments(lm, Corpus("facts"), folder)
        moments._write(moments._path(0), {"moment": moment, "tokens": torch.tensor(200)})
        editor = AlphaEdit([0], **arguments)
        basis = editor.statistics(moments, 0)
        return of_kind(editor, basis), basis

    return make


def test_alphaedit_does_not_change_outputs_outside_its_null_space(alpha):
    """Text whose keys span few directions is answered as before."""
    ordinary = torch.randn(WIDTH, 4).double()
    keys, residual = torch.randn(WIDTH, COUNT).double(), torch.randn(VALUE, COUNT).double()
    solve, basis = alpha(ordinary @ ordinary.T / 4, threshold=1e-9, l2=0.1)
    change = solve(keys, residual)
    assert basis.shape == (WIDTH, WIDTH - 4) and change.norm() > 0.1
    near(change @ ordinary, torch.zeros(VALUE, 4).double())
    projector = basis @ basis.T
    near(projector @ projector, projector)
    near(change @ projector, change)
    tighter = (residual - change @ keys).norm()
    assert tighter < residual.norm()


def test_alphaedit_is_the_published_formula(alpha, moment):
    """The reduced solve equals the published one: (P (K K' + K_p K_p') + l2 I) X = P K R', Delta = X'."""
    solve, basis = alpha(moment, null_share=0.4, l2=0.7)
    assert 0 < basis.shape[1] < WIDTH
    keys, past = torch.randn(WIDTH, COUNT).double(), torch.randn(WIDTH, 6).double()
    residual, projector = torch.randn(VALUE, COUNT).double(), basis @ basis.T
    system = projector @ (keys @ keys.T + past @ past.T) + 0.7 * torch.eye(WIDTH).double()
    published = torch.linalg.solve(system, projector @ keys @ residual.T).T
    near(solve(keys, residual, past), published)


def test_the_null_space_has_the_requested_size(alpha, caplog):
    """By eigenvalue and by share of the trace, including the bounds: no direction free, all directions free."""
    values = torch.tensor([0.0, 0.01, 0.02, 0.07, 0.4, 0.5] + [9.0] * 6).double()
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH).double())[0]
    moment = rotation @ values.diag() @ rotation.T
    assert alpha(moment, threshold=0.02 - 1e-9)[1].shape[1] == 2
    assert alpha(moment, threshold=0.02 + 1e-9)[1].shape[1] == 3
    assert alpha(moment, null_share=0.1 / values.sum().item() + 1e-9)[1].shape[1] == 4
    with pytest.raises(EditError, match="layer 0 has no direction.*larger null_share"):
        alpha(moment + torch.eye(WIDTH), threshold=0.5)
    with caplog.at_level(logging.WARNING):
        solve, basis = alpha(moment, threshold=10.0, l2=2.0)
    assert basis.shape[1] == WIDTH and "nothing is protected" in caplog.text
    keys, residual = torch.randn(WIDTH, COUNT).double(), torch.randn(VALUE, COUNT).double()
    near(solve(keys, residual), solved(torch.eye(WIDTH).double(), keys, residual, 2.0))


@pytest.mark.parametrize("kind", ["MEMIT", "AlphaEdit"])
def test_earlier_keys_keep_their_answers_better(kind, alpha, moment):
    """With the keys of the first batch, a second one changes the outputs at those keys less than without."""
    keys, past = torch.randn(WIDTH, COUNT).double(), torch.randn(WIDTH, 4).double()
    residual = torch.randn(VALUE, COUNT).double()
    if kind == "MEMIT":
        solve = of_kind(MEMIT([0], ridge=0.05, sequential=True), torch.linalg.cholesky(moment))
    else:
        solve, _ = alpha(moment, threshold=1e9, l2=0.5)
    with_them, without = solve(keys, residual, past), solve(keys, residual)
    assert (with_them @ past).norm() < 0.7 * (without @ past).norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MEMIT([2, 1]), r"the lowest first, got \[2, 1\]"),
        (lambda: MEMIT([1], ridge=0), "ridge must be positive, got 0"),
        (lambda: AlphaEdit([1], l2=0), "l2 must be positive"),
        (
            lambda: AlphaEdit([1], null_share=1.5),
            "null_share must be above 0 and at most 1, got 1.5",
        ),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- in a network ---


@pytest.fixture(scope="module")
def loaded(tiny_lm):
    return models_by_family(tiny_lm, num_hidden_layers=4)


@pytest.fixture(params=["gpt2", "llama", "opt", "falcon", "granite"])
def lm(request, loaded):
    """A transposed, a gated, a flattened, a parallel and a scaled MLP."""
    yield from without_edits_afterwards(loaded(request.param))


@pytest.fixture
def gpt2(loaded):
    yield from without_edits_afterwards(loaded("gpt2"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    return Corpus(str(path), tokens=2000)


@pytest.fixture
def make(corpus):
    """``make(MEMIT, ...)``: with few steps, short contexts and two layers."""

    def editor(method=MEMIT, **changes):
        settings = {"layers": [1, 2], "steps": 5, "contexts": [(3, 2)], "corpus": corpus} | FREE
        settings |= {"ridge": 0.01} if method is MEMIT else {}
        settings |= {"l2": 0.01, "null_share": 0.5} if method is AlphaEdit else {}
        return method(**(settings | changes))

    return editor


METHODS = pytest.mark.parametrize("method", [MEMIT, EMMET, AlphaEdit])


def seen_at(lm, edit, name, context=""):
    """(input, output) of a module at the subject's last token, from one plain forward."""
    ids = torch.tensor(lm.tokens.encode([context + edit.text]))
    with torch.no_grad(), capture({name: lm.net.get_submodule(name)}, stop=True) as seen:
        lm.net(ids)
    shape = (1, ids.shape[1], -1)
    return [first(t).view(shape)[0, lm.tokens.subject_end(edit, context)] for t in seen[name]]


def at_all(lm, name, index):
    return torch.stack([seen_at(lm, edit, name)[index] for edit in EDITS])


@pytest.fixture
def searched(monkeypatch):
    """What every search for values was given and found."""
    calls = []
    works = spread.optimise_values

    def spy(lm, key_rows, tail, site, v0, settings):
        calls.append((site, v0, works(lm, key_rows, tail, site, v0, settings)))
        return calls[-1][2]

    monkeypatch.setattr(spread, "optimise_values", spy)
    return calls


def test_keys_are_means_over_kinds_of_contexts(lm, make):
    """The bare prompt has weight 1/2, each of five others 1/10; they run in bounded batches."""
    editor = make(contexts=[(3, 5)])
    editor.prepare(lm)
    weights = editor._context_weights()
    torch.testing.assert_close(weights, torch.tensor([0.5] + [0.1] * 5))
    counts = make(contexts=[(2, 2), (3, 1)])._context_weights()
    torch.testing.assert_close(counts, torch.tensor([2, 1, 1, 2]) / 6)
    rows = SubjectRows.of(lm, EDITS, editor._contexts, weights)
    name, alone = lm.structure.out_name(1), [Delta({})] * len(EDITS)
    means = rows.means(lm, name, alone, torch.arange(len(EDITS)))
    for n, edit in enumerate(EDITS):
        each = [seen_at(lm, edit, name, context) for context in editor._contexts]
        for i, mean in enumerate(means):
            expected = sum(w * pair[i] for w, pair in zip(weights, each, strict=True))
            torch.testing.assert_close(mean[n], expected, rtol=0, atol=1e-5)


def test_what_rows_begin_with_is_run_once(lm, make):
    """Where all are read in one model, edited or not; the means are the same."""
    editor = make(contexts=[(8, 3)])
    editor.prepare(lm)
    rows = SubjectRows.of(lm, EDITS, editor._contexts, editor._context_weights())
    below, name = lm.structure.out_name(0), lm.structure.out_name(1)
    outputs, inputs = sizes(lm.net.get_submodule(below))[::-1]
    moved = Delta({f"{below}.weight": LowRank(torch.randn(outputs, 1), torch.randn(1, inputs))})
    tokens = []

    def count(_module, args, output):
        tokens.append(first(output).shape[:2].numel())

    with hooked([(lm.net.get_submodule(lm.structure.block_name(0)), count)]):
        for delta in (Delta({}), moved):
            each = rows.means(lm, name, [delta] * len(EDITS), torch.arange(len(EDITS)))
            alone = sum(tokens)
            tokens.clear()
            shared = rows.means(lm, name, [delta], torch.zeros(len(EDITS), dtype=torch.long))
            assert sum(tokens) < 0.8 * alone
            tokens.clear()
            for a, b in zip(shared, each, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.fixture
def tokens_run(gpt2):
    """``tokens_run(edits, contexts)``: the rows, and how many tokens the means over their contexts run."""
    tokens = []
    block = gpt2.net.get_submodule(gpt2.structure.block_name(0))
    name = gpt2.structure.out_name(1)

    def run(edits, contexts):
        tokens.clear()
        weights = torch.full((len(contexts),), 1 / len(contexts))
        rows = SubjectRows.of(gpt2, edits, contexts, weights)
        group_N = torch.zeros(len(edits), dtype=torch.long)
        with hooked([(block, lambda _m, _a, output: tokens.append(first(output).shape[:2]))]):
            rows.means(gpt2, name, [Delta({})], group_N)
        return rows, sum(count.numel() for count in tokens)

    return run


def test_a_common_start_is_run_apart_if_it_is_one(gpt2, tokens_run, monkeypatch):
    """Not for one edit, whose rows have different contexts, nor where adapters need whole rows."""
    contexts = ["He said that it was on the table. ", "The town is not on the ice. "]
    rows, count = tokens_run(EDITS[:1], contexts)
    assert count == rows.rows.ids_BT.numel() == rows.rows.ids_BT.shape[1] * 2
    rows, shared = tokens_run(EDITS, contexts)
    every, expected = torch.arange(len(rows.rows.ids_BT)).view(-1, 2), 0
    for part in (rows.rows.select(row_n) for row_n in every.T):
        start, width = part.common_start(), part.ids_BT.shape[1]
        assert start > 5
        expected += start + len(EDITS) * (width - start)
    assert shared == expected
    monkeypatch.setattr(type(gpt2.edits), "need_whole_rows", True)
    assert tokens_run(EDITS, contexts)[1] == rows.rows.ids_BT.numel() > shared


def test_the_reference_path_finds_the_same_means(gpt2, monkeypatch):
    """It runs whole rows of one edit at a time, through the whole network."""
    name, weights = gpt2.structure.out_name(1), torch.tensor([0.5, 0.3, 0.2])
    rows = SubjectRows.of(gpt2, EDITS, ["", "The town is on ice. ", "He was not. "], weights)
    group_N = torch.zeros(len(EDITS), dtype=torch.long)
    means = rows.means(gpt2, name, [Delta({})], group_N)
    monkeypatch.setattr(gpt2.reuse, "enabled", False)
    sizes_run = []
    with hooked([(gpt2.net, lambda _m, _a, output: sizes_run.append(len(output.logits)))]):
        plain = rows.means(gpt2, name, [Delta({})], group_N)
    assert sizes_run == [3] * len(EDITS)
    for a, b in zip(means, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_batches_of_rows_do_not_matter(gpt2, make, monkeypatch):
    editor = make()
    whole = editor.propose(gpt2, EDITS)
    monkeypatch.setattr("corrigenda.modules.model.rows.BATCH_TOKENS", 16)
    for name in whole.updates:
        pieces = editor.propose(gpt2, EDITS).dense(name)
        torch.testing.assert_close(pieces, whole.dense(name), rtol=1e-4, atol=1e-5)


def test_the_blocks_output_comes_to_the_value(lm, make, searched):
    """With almost no ridge and the bare prompt alone every edit gets the value that was found for it."""
    editor = make(layers=[1, 2], ridge=1e-9, contexts=[])
    top = lm.structure.block_name(2)
    before = at_all(lm, top, 1)
    handle = editor.edit(lm, EDITS)
    assert {site for site, *_ in searched} == {top}
    v0 = torch.cat([v for _, v, _ in searched])
    assert sorted(v0.sum(1).tolist()) == pytest.approx(sorted(before.sum(1).tolist()), abs=1e-4)
    size = sorted(
        vector.item() for _, _, found in searched for vector in found.delta_ND.norm(dim=1)
    )
    after = at_all(lm, top, 1)
    moved = (after - before).norm(dim=1)
    assert sorted(moved.tolist()) == pytest.approx(size, rel=1e-3) and size[0] > 0.1
    notes = handle.delta.metadata["notes"]
    assert len(notes) == len(EDITS) and all(note["lacking"] < 1e-3 for note in notes)
    assert [note["iterations"] for note in notes] == [5] * 4


def test_residuals_are_computed_again_at_every_layer(gpt2, make, monkeypatch):
    """Residuals are (z - h) / (layers left), with h and the keys read after the lower layers were written."""
    seen = []
    works = MEMIT.solve

    def spy(self, layer, edits, keys, residual, earlier):
        seen.append((layer, keys.T, residual.T))
        return works(self, layer, edits, keys, residual, earlier)

    monkeypatch.setattr(MEMIT, "solve", spy)
    editor = make(layers=[0, 1, 2], contexts=[])
    delta = editor.propose(gpt2, EDITS)
    top = gpt2.structure.block_name(2)
    target = at_all(gpt2, top, 1) + 3 * seen[0][2]
    assert [layer for layer, *_ in seen] == [0, 1, 2]
    for done, (layer, keys, residual) in enumerate(seen):
        name = gpt2.structure.out_name(layer)
        torch.testing.assert_close(keys, at_all(gpt2, name, 0), rtol=0, atol=1e-4)
        expected = (target - at_all(gpt2, top, 1)) / (3 - done)
        torch.testing.assert_close(residual, expected, rtol=0, atol=1e-4)
        assert torch.linalg.matrix_rank(delta.dense(f"{name}.weight")) == len(EDITS)
        WeightPatch(gpt2, Delta({f"{name}.weight": delta.updates[f"{name}.weight"]}))
    assert (seen[1][1] - seen[0][1]).norm() > 0 and (seen[2][2] - seen[1][2]).norm() > 1e-3


@METHODS
def test_one_layer_is_the_plain_solution(method, gpt2, make, searched):
    """Spreading over a single layer is one solve with the whole residual."""
    editor = make(method, layers=[1], contexts=[], parallel=4)
    delta = editor.propose(gpt2, EDITS)
    name = gpt2.structure.out_name(1)
    v0, found = (
        torch.cat(c) for c in zip(*((v0, v.delta_ND) for _, v0, v in searched), strict=True)
    )
    at = [int((v0 - h).norm(dim=1).argmin()) for h in at_all(gpt2, gpt2.structure.block_name(1), 1)]
    keys, residual = at_all(gpt2, name, 0).T, found[at].T
    expected = product(editor.solve(1, EDITS, keys, residual, keys[:, :0]))
    assert list(delta.updates) == [f"{name}.weight"]
    limit = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(delta.dense(f"{name}.weight"), expected, rtol=1e-3, atol=limit)


def test_emmet_on_one_edit_is_rome_through_and_through(lm, make, corpus):
    """A value at the block's output is one at the projection's where the block adds it as it is."""
    if lm.structure.residual_scale != 1:
        pytest.skip("this family scales what it adds, and so the two searches differ")
    emmet = make(EMMET, layers=[1], contexts=[])
    rome = ROME(1, steps=5, contexts=[], corpus=corpus, **FREE)
    one, other = (editor.propose(lm, EDITS[:1]) for editor in (emmet, rome))
    (name,) = one.updates
    limit = 1e-4 * other.dense(name).abs().max().item()
    torch.testing.assert_close(one.dense(name), other.dense(name), rtol=1e-3, atol=limit)


def test_a_normalised_mlp_takes_one_layer(loaded, make, searched):
    """Its value is the projection's own output; several layers are refused."""
    lm = loaded("gemma2")
    with pytest.raises(EditError, match=r"normalises what its MLPs write.*layers \[1, 2\]"):
        make().propose(lm, EDITS)
    name = lm.structure.out_name(1)
    before = at_all(lm, name, 1)
    handle = make(EMMET, layers=[1], contexts=[]).edit(lm, EDITS)
    assert {site for site, *_ in searched} == {name}
    moved = (at_all(lm, name, 1) - before).norm(dim=1)
    size = sorted(v.item() for _, _, found in searched for v in found.delta_ND.norm(dim=1))
    assert sorted(moved.tolist()) == pytest.approx(size, rel=1e-3)
    handle.remove()


@METHODS
def test_independent_edits_do_not_depend_on_the_batch(method, lm, make):
    """An edit's update is the same whatever else is in the batch, also with several edits per case."""
    editor = make(method, parallel=3)
    groups = [*EACH[:2], EDITS[2:]]
    texts = [edit.text for edit in EDITS], [edit.target_new for edit in EDITS]
    with editing_mode():
        together = editor.propose_each(lm, groups)
        alone = [editor.propose(lm, group) for group in groups]
    beside = lm.score(*texts, together, [0, 1, 2, 2]).logprob_BM
    plain = lm.score(*texts).logprob_BM
    for m, (group, delta) in enumerate(zip(groups, alone, strict=True)):
        handle = editor.edit(lm, group)
        rows = [n for n, edit in enumerate(EDITS) if edit in group]
        torch.testing.assert_close(
            beside[rows], lm.score(*texts).logprob_BM[rows], atol=1e-4, rtol=0
        )
        handle.remove()
        assert together[m].updates.keys() == delta.updates.keys()
        for name in delta.updates:
            limit = 1e-4 * delta.dense(name).abs().max().item()
            near(together[m].dense(name), delta.dense(name), atol=limit)
    assert (beside - plain).abs().max() > 0.05


@METHODS
def test_the_order_in_a_batch_does_not_matter(method, gpt2, make):
    """The update of a batch does not depend on the order of its edits."""
    one, other = (make(method).propose(gpt2, edits) for edits in (EDITS, EDITS[::-1]))
    for name in one.updates:
        limit = 1e-4 * one.dense(name).abs().max().item()
        near(one.dense(name), other.dense(name), atol=limit)
    losses = [[note["loss"] for note in delta.metadata["notes"]] for delta in (one, other)]
    assert losses[0] == pytest.approx(losses[1][::-1], abs=1e-4)


def test_more_edits_than_a_key_is_wide(loaded, make):
    """A hundred edits at width 80: dense updates, which still bring most edits towards their values."""
    lm = loaded("llama")
    assert lm.structure.inner_width == 80
    names = [f"{a}{b}ham" for a in "BCDFGHKLMN" for b in "aeiouyäöüá"]
    edits = [Edit("The town of {} is in", name, "rain") for name in names]
    delta = make(steps=2, contexts=[], parallel=32).propose(lm, edits)
    assert all(isinstance(update, torch.Tensor) for update in delta.updates.values())
    lacking = torch.tensor([note["lacking"] for note in delta.metadata["notes"]])
    assert lacking.shape == (100,) and lacking.median() < 0.7


def test_propose_leaves_the_model_unchanged(lm, make):
    """Parameters, gradients, flags, hooks and the random stream are as before."""
    editor = make(MEMIT, sequential=True)
    editor.prepare(lm)
    kept = {name: p.clone() for name, p in lm.net.named_parameters()}
    state = torch.get_rng_state()
    editor.propose(lm, EDITS)
    assert torch.equal(torch.get_rng_state(), state) and not lm.handles
    for name, parameter in lm.net.named_parameters():
        assert torch.equal(parameter, kept[name])
        assert parameter.grad is None and not parameter.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.net.modules())


def test_conflicting_edits_are_reported(gpt2, make, caplog):
    """Different targets of the same prompt in a batch give a warning."""
    with caplog.at_level(logging.WARNING):
        make().edit(gpt2, [EDITS[0], Edit(EDITS[0].prompt, EDITS[0].subject, "rain")])
    assert "'The capital of Zorbania is' is to be both 'Quill Port' and 'rain'" in caplog.text


def test_searches_without_success_are_said_once(gpt2, make, caplog):
    with caplog.at_level(logging.WARNING):
        make(steps=1).propose(gpt2, EDITS)
    (record,) = [r for r in caplog.records if "value searches" in r.message]
    assert record.message.startswith("4 of 4 value searches ended at an NLL above 1")


@METHODS
def test_where_nothing_reads_the_values_it_is_said(method, gpt2, make, caplog):
    """Also of a range of layers that ends at the last one: values are those of the highest."""
    last = gpt2.structure.num_layers - 1
    with caplog.at_level(logging.WARNING):
        delta = make(method, layers=[last - 1, last]).propose(gpt2, EDITS[:1])
    assert not any(delta.dense(name).any() for name in delta.updates)
    (message,) = [m for m in caplog.messages if "the update is zero" in m]
    assert message.startswith(f"'The capital of Zorbania is': nothing above layer {last}")
    make(method, layers=[last - 1]).propose(gpt2, EDITS[:1])
    assert len([m for m in caplog.messages if "the update is zero" in m]) == 1


# --- one batch after the other ---


@pytest.mark.parametrize("method", [MEMIT, AlphaEdit])
def test_keys_of_active_edits_are_respected(method, lm, make):
    """They are read on the edited model, and no longer count once the edit is removed."""
    sequential = {"sequential": True} if method is MEMIT else {}
    editor = make(method, contexts=[], **sequential)
    plain = editor.propose(lm, EDITS[2:])
    earlier = editor.edit(lm, EDITS[:2])
    for layer in editor.layers:
        name = lm.structure.out_name(layer)
        kept = earlier.delta.keys[f"{name}.weight"]
        torch.testing.assert_close(kept, at_all(lm, name, 0)[:2], rtol=0, atol=1e-4)
    with_them = editor.propose(lm, EDITS[2:])
    keys, earlier.delta.keys = earlier.delta.keys, {}
    without = editor.propose(lm, EDITS[2:])
    name = f"{lm.structure.out_name(editor.layers[0])}.weight"
    disturbed = [(d.dense(name) @ keys[name].double().T).norm() for d in (with_them, without)]
    assert disturbed[0] < 0.5 * disturbed[1]
    earlier.remove()
    again = editor.propose(lm, EDITS[2:])
    assert torch.equal(again.dense(name), plain.dense(name))


def test_memit_alone_keeps_no_keys(gpt2, make):
    handle = make().edit(gpt2, EDITS[:2])
    assert handle.delta.keys == {}
    base = make().propose(gpt2, EDITS[2:])
    handle.delta.keys = make(sequential=True).propose(gpt2, EDITS[:2]).keys
    for name, update in make().propose(gpt2, EDITS[2:]).updates.items():
        assert torch.equal(update.left_Or, base.updates[name].left_Or)


def test_a_saved_edit_brings_its_keys(gpt2, make, tmp_path):
    """Another process resumes from the file with the same result."""
    editor = make(AlphaEdit)
    handle = editor.edit(gpt2, EDITS[:2])
    expected = editor.propose(gpt2, EDITS[2:])
    handle.delta.save(tmp_path / "edit.safetensors")
    fresh = LanguageModel(gpt2.name)
    WeightPatch(fresh, Delta.load(tmp_path / "edit.safetensors"))
    for name, update in make(AlphaEdit).propose(fresh, EDITS[2:]).updates.items():
        near(update.dense(), expected.dense(name), atol=1e-8)


def test_optimised_values_are_saved_and_reused(gpt2, make, tmp_path, monkeypatch):
    """An interrupted search resumes; values of other settings or of an edited model are not reused."""
    folder = str(tmp_path / "values")
    plain = make(MEMIT).propose(gpt2, EDITS)
    looked_for = []
    search = spread.optimise_values

    def count(lm, key_rows, *rest):
        looked_for.append(key_rows.num_edits)
        if len(looked_for) == 3:
            raise KeyboardInterrupt
        return search(lm, key_rows, *rest)

    monkeypatch.setattr(spread, "optimise_values", count)
    stopped = make(MEMIT, values=folder, parallel=1)
    with pytest.raises(KeyboardInterrupt):
        stopped.propose(gpt2, EDITS)
    again = make(MEMIT, values=folder, parallel=1)
    delta = again.propose(gpt2, EDITS)
    assert looked_for == [1] * 5 and again.numbers() == {"values_taken_over": 2.0}
    for name in plain.updates:
        near = {"rtol": 1e-4, "atol": 1e-4 * plain.dense(name).abs().max().item()}
        torch.testing.assert_close(delta.dense(name), plain.dense(name), **near)
    shared = make(EMMET, values=folder, ridge=0.1)
    shared.propose(gpt2, EDITS)
    assert len(looked_for) == 5 and shared.numbers() == {"values_taken_over": 4.0}
    notes = again.propose(gpt2, EDITS[:1]).metadata["notes"]
    assert {"loss", "nll", "iterations", "lacking"} <= notes[0].keys()
    make(MEMIT, values=folder, lr=0.3).propose(gpt2, EDITS[:1])
    with_one = WeightPatch(gpt2, plain)
    again.propose(gpt2, EDITS[1:2])
    with_one.remove()
    assert len(looked_for) == 7


def test_a_damaged_value_is_optimised_again(gpt2, make, tmp_path, caplog):
    folder = tmp_path / "values"
    first = make(MEMIT, values=str(folder)).propose(gpt2, EDITS[:1])
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    editor = make(MEMIT, values=str(folder))
    second = editor.propose(gpt2, EDITS[:1])
    assert "is not usable" in caplog.text and editor.numbers() == {"values_taken_over": 0.0}
    for name in first.updates:
        assert torch.equal(first.dense(name), second.dense(name))
    editor = make(MEMIT, values=str(folder))
    editor.propose(gpt2, EDITS[:1])
    assert editor.numbers() == {"values_taken_over": 1.0}  # the file is whole again
