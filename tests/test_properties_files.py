"""Properties of what is written to and read from files, for arbitrary content."""

import json
import tempfile
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from corrigenda.datamodules.counterfact import CounterFact
from corrigenda.datamodules.files import DataError
from corrigenda.datamodules.mquake import MQuAKE
from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.datamodules.zsre import ZsRE
from corrigenda.modules.editing.memory import FORMAT, SavedMemory
from corrigenda.modules.files import file_name, read_tensors, write_tensors
from corrigenda.modules.model.delta import Delta, EditError, LowRank, add_deltas
from corrigenda.modules.retrieval.retriever import as_tensor

quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = texts.filter(str.strip)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "one.safetensors"


# ---------------------------------------------------------------------------- names


@quick
@given(st.lists(st.text(max_size=8) | st.text("aA/_.~", max_size=4), unique=True, max_size=15))
def test_every_id_has_a_file_of_its_own(ids):
    """Also where upper and lower case, or spellings of one accent, are the same to the file system."""
    names = [file_name(case_id) for case_id in ids]
    assert len({unicodedata.normalize("NFKC", name).casefold() for name in names}) == len(ids)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            file = Path(folder) / f"{name}.safetensors"
            assert file.parent.resolve() == file.resolve().parent and not name.startswith(".")
            file.touch()
        assert len(list(Path(folder).iterdir())) == len(ids)


@quick
@given(st.from_regex(r"[a-z0-9]([a-z0-9_.-]{0,30}[a-z0-9])?", fullmatch=True))
def test_a_safe_id_is_its_own_name(case_id):
    assert file_name(case_id) == case_id


@pytest.mark.parametrize("case_id", ["x" * 300, "ü" * 300, "..", "", ".", "con\0", "a/" * 200])
def test_odd_ids_have_a_usable_name(tmp_path, case_id):
    write_tensors(tmp_path / f"{file_name(case_id)}.safetensors", {}, {})
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------- deltas

numbers = st.floats(-1e3, 1e3, width=32)


@st.composite
def updates(draw, names=("a.weight", "b.c.weight")):
    """Updates of some 3 x 4 matrices, low-rank or dense, and of a bias."""
    found = {}
    for name in draw(st.sets(st.sampled_from(names))):
        torch.manual_seed(draw(st.integers(0, 999)))
        rank = draw(st.integers(0, 3))
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        if draw(st.booleans()):
            found[name] = LowRank(
                torch.randn(3, rank, dtype=dtype), torch.randn(rank, 4, dtype=dtype)
            )
        else:
            found[name] = torch.randn(3, 4, dtype=dtype)
    if draw(st.booleans()):
        found["a.bias"] = torch.randn(3)
    return found


no_braces = texts.filter(lambda text: not set("{}") & set(text))
edit_lists = st.lists(
    st.builds(lambda before, *rest: [f"{before}{{}}", *rest], no_braces, words, words), max_size=3
)
metadata = st.fixed_dictionaries(
    {}, optional={"base": texts, "model": texts, "edits": edit_lists, "notes": st.lists(texts)}
)


@quick
@given(updates(), metadata, st.booleans())
def test_a_delta_survives_its_file(path, parts, meta, with_keys):
    keys = {name: torch.ones(2, 4) for name in parts if with_keys}
    delta = Delta(parts, meta, keys)
    delta.save(path)
    again = Delta.load(path)
    assert again.metadata == meta
    assert delta.tensors().keys() == again.tensors().keys()
    for name, tensor in delta.tensors().items():
        assert tensor.dtype == again.tensors()[name].dtype
        assert torch.equal(tensor, again.tensors()[name])


@quick
@given(st.lists(updates(), min_size=1, max_size=3))
def test_a_sum_of_deltas_is_the_sum_of_their_matrices(parts):
    deltas = [Delta(part, {"notes": [i]}) for i, part in enumerate(parts)]
    total = add_deltas(deltas)
    assert total.metadata == {"notes": list(range(len(parts)))}
    assert set(total.updates) == {name for part in parts for name in part}
    for name in total.updates:
        wanted = sum(delta.dense(name) for delta in deltas if name in delta.updates)
        tensors = [t for d in deltas for n, t in d.tensors().items() if n.startswith(name)]
        error = 0.1 if torch.bfloat16 in {t.dtype for t in tensors} else 1e-5
        torch.testing.assert_close(total.dense(name), wanted, rtol=error, atol=error)


@quick
@given(st.text(max_size=40) | json_values.map(json.dumps))
def test_any_header_is_a_delta_or_one_line(path, header):
    write_tensors(
        path, {"a.dense": torch.ones(2, 2)}, {"format": "corrigenda-delta-1", "delta": header}
    )
    one_line(lambda: Delta.load(path), path)


def one_line(read, path):
    try:
        read()
    except EditError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@quick
@given(st.data())
def test_damaged_bytes_are_noticed(path, data):
    """Whichever byte is another one: what is read is what was written, or one line says that it is not."""
    delta = Delta({"a.weight": torch.arange(6.0).reshape(2, 3)}, {"base": "x"})
    delta.save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.unlink()
    path.write_bytes(content[: data.draw(st.integers(0, 2 * len(content)))])
    try:
        again = Delta.load(path)
    except EditError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(again.dense("a.weight"), delta.dense("a.weight"))


# ---------------------------------------------------------------------------- memories


edits = st.builds(
    lambda before, after, *rest: Edit(f"{before}{{}}{after}", *rest),
    no_braces, no_braces, words, words, st.none() | texts,
)  # fmt: skip


def remember(path, edits, header, tensors):
    content = {"edits": as_tensor(edits), **tensors}
    write_tensors(path, content, {"format": FORMAT, "memory": json.dumps(header)})


@quick
@given(st.lists(edits, min_size=1, max_size=4), st.booleans())
def test_a_memory_survives_its_file(path, edits, with_vectors):
    header = {"editor": "IKE", "base": "x"}
    known = {"vectors": torch.randn(len(edits), 4)} if with_vectors else {}
    remember(path, [vars(edit) for edit in edits], header, known)
    again = SavedMemory.load(path)
    assert again.edits == edits and again.metadata == header and again.known.keys() == known.keys()
    assert not with_vectors or torch.equal(again.known["vectors"], known["vectors"])


@quick
@given(json_values, json_values)
def test_any_content_is_a_memory_or_one_line(path, edits, header):
    remember(path, edits, header, {"vectors": torch.ones(2, 3)})
    one_line(lambda: SavedMemory.load(path), path)


@quick
@given(
    st.dictionaries(words, st.lists(numbers, max_size=4), max_size=4), st.dictionaries(words, texts)
)
def test_tensors_and_metadata_survive(path, content, meta):
    tensors = {
        name: torch.tensor(values) for name, values in content.items() if name != "__metadata__"
    }
    write_tensors(path, tensors, meta)
    again, header = read_tensors(path)
    assert again.keys() == tensors.keys() and all(
        torch.equal(again[n], t) for n, t in tensors.items()
    )
    assert meta.items() <= {**header, **{k: v for k, v in meta.items() if k == "digest"}}.items()


# ---------------------------------------------------------------------------- records

probes = st.builds(
    Probe, texts, st.none() | texts, st.none() | texts, st.lists(texts, max_size=2).map(tuple)
)
cases = st.builds(
    EditCase,
    st.sampled_from("ab"),
    st.lists(edits, max_size=2).map(tuple),
    st.dictionaries(st.sampled_from(["efficacy", "locality"]), st.lists(probes, max_size=2).map(tuple)),
    st.lists(texts, max_size=2).map(tuple),
)  # fmt: skip


@quick
@given(cases, cases)
def test_fingerprints_are_equal_for_equal_content_alone(one, other):
    copied = EditCase(
        one.case_id, one.edits, dict(reversed(one.probes.items())), one.generation_prompts
    )
    assert one.fingerprint == copied.fingerprint
    assert (one.fingerprint == other.fingerprint) == (one == other)


# ---------------------------------------------------------------------------- data files

REWRITE = {
    "prompt": "{} is in",
    "subject": "Ada",
    "relation_id": "P0",
    "target_new": {"str": "Rome"},
    "target_true": {"str": "Paris"},
}
ROWS = {
    ZsRE: {
        "subject": "Ada", "src": "Who made Ada?", "rephrase": "Ada is by whom?", "alt": "Iris",
        "answers": ["Otto"], "loc": "nq question: what", "loc_ans": "it", "case_id": 3,
        "portability": {"New Question": "Where?", "New Answer": "there"},
    },
    CounterFact: {
        "case_id": 1, "requested_rewrite": REWRITE, "paraphrase_prompts": ["Ada lies in"],
        "neighborhood_prompts": ["Otto is in"], "generation_prompts": ["Ada"],
    },
    MQuAKE: {
        "case_id": 1, "requested_rewrite": [REWRITE], "questions": ["Where?"], "answer": "here",
        "new_answer": "there", "new_answer_alias": [],
        "new_single_hops": [{"question": "Where?", "answer": "there", "answer_alias": []}],
    },
}  # fmt: skip


def places(row, before=()):
    """Every field, also nested ones, as the keys that lead to it."""
    inner = (
        row.items() if isinstance(row, dict) else enumerate(row) if isinstance(row, list) else ()
    )
    for key, value in inner:
        yield (*before, key)
        yield from places(value, (*before, key))


def changed(row, place, value):
    row = json.loads(json.dumps(row))
    inner = row
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return row


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
@settings(quick, max_examples=80)
@given(st.data())
def test_any_value_in_any_field_gives_a_case_or_one_line(path, kind, data):
    place = data.draw(st.sampled_from(list(places(ROWS[kind]))))
    row = changed(ROWS[kind], place, data.draw(json_values))
    file = path.with_name("rows.jsonl")
    file.write_text(json.dumps(row), "utf-8")
    try:
        (case,) = kind(str(file)).cases("test")
    except DataError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        assert file_name(case.case_id) and case.fingerprint


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
@quick
@given(st.data())
def test_an_accepted_row_survives_writing_and_reading(path, kind, data):
    """However JSON spells it, in both kinds of file, compressed or not."""
    texts_in = [p for p in places(ROWS[kind]) if isinstance(value_at(ROWS[kind], p), str)]
    row = changed(ROWS[kind], data.draw(st.sampled_from(texts_in)), data.draw(st.text(max_size=12)))
    found = []
    for name, text in (
        ("rows.jsonl", json.dumps(row)),
        ("rows.json", json.dumps([row], ensure_ascii=False, indent=1)),
    ):
        file = path.with_name(name)
        file.write_text(text, "utf-8", "surrogatepass")
        try:
            found += kind(str(file)).cases("test")
        except DataError:
            assume(False)
    assert found[0] == found[1] and found[0].fingerprint == found[1].fingerprint


def value_at(row, place):
    for key in place:
        row = row[key]
    return row
