"""Raw records in, exact cases out; splits; loaders; and stopping in the middle of an epoch."""

import gzip
import json
import logging
import re
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from corrigenda.datamodules import base, corpus, files, text_files
from corrigenda.datamodules.base import EditDataModule, subjects
from corrigenda.datamodules.counterfact import CounterFact
from corrigenda.datamodules.files import DataError, read_rows
from corrigenda.datamodules.loader import CaseLoader
from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.datamodules.zsre import ZsRE
from corrigenda.modules import hub

DATA = Path(__file__).parents[1].parent / "shared" / "data"

ZSRE_ROW = {
    "subject": "Mount Ada",
    "src": "Which range is Mount Ada in?",
    "pred": "Andes",
    "rephrase": "To which range does Mount Ada belong?",
    "alt": " the Alps",
    "answers": ["Saint Elias", "Alaska Range"],
    "loc": "nq question: who wrote the origin of species",
    "loc_ans": "Darwin ",
    "cond": "Andes >> the Alps || Which range is Mount Ada in?",
    "portability": {"New Question": "On which continent is that range?", "New Answer": "Europe"},
}
ORIGINAL_ROW = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} was founded in",
        "subject": "Orchard Press",
        "relation_id": "P159",
        "target_new": {"str": "Lima", "id": "Q1"},
        "target_true": {"str": "Oslo", "id": "Q2"},
    },
    "paraphrase_prompts": ["It rained.\n\nOrchard Press began in", "The city of Orchard Press is"],
    "neighborhood_prompts": ["Fjord Books was founded in", "Nordlys began in"],
    "attribute_prompts": ["Andes Press was founded in"],
    "generation_prompts": ["Orchard Press prints", "Orchard Press prints"],
}
FLAT_ROW = {
    "case_id": 3,
    "prompt": "The home of Orchard Press is",
    "target_new": "Lima",
    "subject": "Orchard Press",
    "ground_truth": "Oslo",
    "rephrase_prompt": "Orchard Press is based in",
    "locality_prompt": "Fjord Books is based in",
    "locality_ground_truth": "Oslo",
}


def write(path, rows):
    """Writes rows in the format of the file name; returns the path as text."""
    name = str(path)
    if name.removesuffix(".gz").endswith(".jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    with (gzip.open if name.endswith(".gz") else open)(name, "wt", encoding="utf-8") as file:
        file.write(text)
    return name


def zsre_rows(count, start=0):
    """Records about ``count`` subjects, two each."""
    return [
        ZSRE_ROW
        | {"subject": f"Hill {i}.", "src": f"{question} Hill {i}.?", "case_id": f"{i}{tag}"}
        for i in range(start, start + count)
        for tag, question in (("a", "Where is"), ("b", "How high is"))
    ]


def ids(cases):
    return [case.case_id for case in cases]


def numbered(count):
    return [EditCase(str(i), (Edit("{} is", f"s{i}", "t"),)) for i in range(count)]


def attach(data, **parts):
    """A stand-in for the Trainer: what the data module reads of it."""
    module = SimpleNamespace(**parts.pop("module", {}))
    data.trainer = SimpleNamespace(
        lightning_module=module, state=SimpleNamespace(fn=parts.pop("fn", "fit")), **parts
    )
    return data


# Reading files


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_all_file_forms_give_the_same_rows(tmp_path, name):
    rows = [{"text": "Łódź \u2028 one line"}, {"text": "two"}]
    path = write(tmp_path / name, rows)
    assert [row for _, row in read_rows(path)] == rows
    assert ids(ZsRE(write(tmp_path / name, [ZSRE_ROW, ZSRE_ROW])).cases("test")) == ["0", "1"]


def test_rows_say_where_they_stand(tmp_path):
    path = str(tmp_path / "a.jsonl")
    Path(path).write_text('{"a": 1}\n\n{"a": 2}\r\n', encoding="utf-8")
    assert [where for where, _ in read_rows(path)] == [f"{path}, line 1", f"{path}, line 3"]
    path = write(tmp_path / "a.json", [{}, {}])
    assert [where for where, _ in read_rows(path)] == [
        f"{path}, record 1 (line 2)", f"{path}, record 2 (line 3)"
    ]  # fmt: skip


def test_missing_file_names_the_path_and_the_public_source(tmp_path):
    path = str(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError) as error:
        ZsRE(path).cases("test")
    assert str(error.value) == f"{path}: no such file; public source: {ZsRE.source}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON"),
        ("a.json", b'[\n{"a": 1},\n{"a" 1}]', "a.json, line 3: not JSON"),
        ("a.json", b'{"a": 1}', "a.json: expected a JSON list of records, got a record"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: expected a record with named fields, got a list"),
        ("a.json", b"[3]", "a.json, record 1: expected a record with named fields, got a number"),
        ("a.jsonl", b'{"a": "\xff"}', "a.jsonl: not UTF-8 text"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: not a complete gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9],
            "a.jsonl.gz: not a complete gzip",
        ),
        ("a.yaml", b"a: b", "a.yaml: expected a file ending in .json, .jsonl, .json.gz, .jsonl.gz"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        list(read_rows(str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_empty_file(tmp_path):
    with pytest.raises(DataError, match=r"a\.json: no records"):
        ZsRE(write(tmp_path / "a.json", [])).cases("test")


@pytest.fixture
def datasets_library(monkeypatch):
    """A stand-in for the datasets library; records its calls."""
    calls = []

    def load_dataset(name, config, split=None):
        calls.append((name, config, split))
        if name == "no/where":
            raise FileNotFoundError("Dataset 'no/where' doesn't exist\non the Hub")
        parts = {"train": [{"text": "a"}, {"text": ""}], "test": [{"text": "b"}]}
        if name == "one/split":
            parts = {"train": parts["train"]}
        return parts[split] if split else parts

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=True)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_datasets(datasets_library):
    assert list(read_rows("own-er/na.me:test")) == [("own-er/na.me:test, record 1", {"text": "b"})]
    assert list(corpus.texts("owner/name/part:train")) == ["a"]
    assert list(corpus.texts("one/split")) == ["a"]
    assert datasets_library == [
        ("own-er/na.me", None, "test"),
        ("owner/name", "part", "train"),
        ("one/split", None, None),
    ]


def test_hub_errors(datasets_library):
    with pytest.raises(DataError, match="owner/name: add the split, one of :train, :test"):
        list(read_rows("owner/name"))
    with pytest.raises(
        DataError, match="no/where: no such file, and not loaded from the Hub: Data"
    ):
        list(read_rows("no/where"))
    with pytest.raises(FileNotFoundError, match="nothing: no such file; public source: x"):
        read_rows("nothing", "x")


def test_without_a_network_an_unknown_dataset_fails_at_once(monkeypatch):
    """One request finds that out; the datasets library would retry for half a minute."""
    import datasets

    calls = []

    class Session:
        def head(self, url, timeout):
            calls.append(timeout)
            raise ConnectionError("no network")

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    message = (
        "^nobody/no-such-dataset: no such file, and not loaded from the Hub: Couldn't reach .*$"
    )
    with pytest.raises(DataError, match=message):
        list(read_rows("nobody/no-such-dataset"))
    assert calls == [5.0] and time.perf_counter() - start < 15
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rephrase": None}, "field 'rephrase': missing (the record has subject, src,"),
        ({"src": 5}, "field 'src': expected text, got a number"),
        ({"rephrase": " "}, "field 'rephrase': empty"),
        ({"subject": ""}, "field 'subject': empty"),
        ({"answers": []}, "field 'answers': expected at least one answer, got an empty list"),
        ({"answers": "x"}, "field 'answers': expected a list of texts, got text"),
        (
            {"answers": ["x", ""]},
            "field 'answers': expected a list of texts, got an empty one at 2",
        ),
        ({"answers": [None]}, "field 'answers': expected a list of texts, got null at 1"),
        ({"loc_ans": None}, "field 'loc_ans': missing"),
        ({"loc_ans": ""}, "field 'loc_ans': empty"),
        ({"loc": None}, "field 'loc': missing"),
        ({"portability": "x"}, "field 'portability': expected a record, got text"),
        ({"portability": {"New Question": "x"}}, "field 'portability.New Answer': missing"),
        ({"case_id": [1]}, "field 'case_id': expected a whole number or text, got a list"),
        ({"case_id": True}, "field 'case_id': expected a whole number or text, got true or false"),
        (
            {"subject": "K2"},
            "field 'src': the subject 'K2' does not occur in 'Which range is Mount Ada in?'",
        ),
        ({"src": "Is {} {}?"}, "field 'src': an edit's prompt needs exactly one {}"),
        ({"case_id": "0"}, "field 'case_id': '0' was used at "),
    ],
)
def test_bad_zsre_rows(tmp_path, change, message):
    path = write(tmp_path / "a.jsonl", [ZSRE_ROW, ZSRE_ROW | change])
    with pytest.raises(DataError) as error:
        ZsRE(path).cases("test")
    assert str(error.value).startswith(f"{path}, line 2, {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target_true": {}},
            "field 'requested_rewrite.target_true.str': missing (the record has no fields)",
        ),
        ({"target_new": {"str": ""}}, "field 'requested_rewrite.target_new.str': empty"),
        (
            {"prompt": "was founded"},
            "field 'requested_rewrite.prompt': an edit's prompt needs exactly",
        ),
        ({"subject": None}, "field 'requested_rewrite.subject': missing"),
    ],
)
def test_bad_counterfact_rows(tmp_path, change, message):
    row = ORIGINAL_ROW | {"requested_rewrite": ORIGINAL_ROW["requested_rewrite"] | change}
    path = write(tmp_path / "a.json", [row])
    with pytest.raises(DataError) as error:
        CounterFact(path).cases("test")
    assert str(error.value).startswith(f"{path}, record 1 (line 2), {message}")


# zsRE


def zsre_case(tmp_path, variant, row=ZSRE_ROW):
    return ZsRE(write(tmp_path / "z.jsonl", [row]), variant=variant).cases("test")[0]


def test_zsre_variant_m(tmp_path):
    other = ("Alaska Range",)
    assert zsre_case(tmp_path, "M") == EditCase(
        "0",
        (Edit("Which range is {} in?", "Mount Ada", "Saint Elias"),),
        {
            "efficacy": (Probe("Which range is Mount Ada in?", "Saint Elias", aliases=other),),
            "generality": (
                Probe("To which range does Mount Ada belong?", "Saint Elias", aliases=other),
            ),
            "locality": (Probe("nq question: who wrote the origin of species?", "Darwin"),),
        },
    )


def test_zsre_variant_e(tmp_path):
    assert zsre_case(tmp_path, "E") == EditCase(
        "0",
        (Edit("Which range is {} in?", "Mount Ada", "the Alps", "Saint Elias"),),
        {
            "efficacy": (Probe("Which range is Mount Ada in?", "the Alps"),),
            "generality": (Probe("To which range does Mount Ada belong?", "the Alps"),),
            "locality": (Probe("nq question: who wrote the origin of species", "Darwin"),),
            "portability": (Probe("On which continent is that range?", "Europe"),),
        },
    )


def test_zsre_variant_p_measures_efficacy_on_the_rephrase(tmp_path):
    case, easyedit = zsre_case(tmp_path, "P"), zsre_case(tmp_path, "E")
    assert case.edits == easyedit.edits
    assert case.probes == {**easyedit.probes, "efficacy": easyedit.probes["generality"]}


def test_zsre_reduced_form_has_its_answer_in_alt(tmp_path):
    names = ("subject", "src", "rephrase", "alt", "loc", "loc_ans")
    row = {name: ZSRE_ROW[name] for name in names} | {"case_id": 12, "loc": "nq question: who?"}
    case = zsre_case(tmp_path, "M", row)
    assert case.case_id == "12"
    assert case.edits == (Edit("Which range is {} in?", "Mount Ada", "the Alps"),)
    assert case.probes["locality"] == (Probe("nq question: who?", "Darwin"),)
    assert "portability" not in zsre_case(tmp_path, "E", row).probes


@pytest.mark.parametrize("portability", [None, "", {}, {"Reasoning": []}, {"New Question": ""}])
def test_zsre_optional_fields(tmp_path, portability):
    row = ZSRE_ROW | {"loc": None, "loc_ans": None, "portability": portability}
    assert list(zsre_case(tmp_path, "E", row).probes) == ["efficacy", "generality"]


def test_zsre_true_target_is_named_only_when_another_is_written(tmp_path):
    row = ZSRE_ROW | {"alt": "Saint Elias"}
    assert zsre_case(tmp_path, "E", row).edits[0].target_true is None


def test_subject_in_other_letter_case_takes_the_spelling_of_the_text(tmp_path):
    case = zsre_case(tmp_path, "E", ZSRE_ROW | {"subject": "mount ada "})
    assert case.edits[0].subject == "Mount Ada"
    assert case.edits[0].text == ZSRE_ROW["src"]


def test_zsre_leaves_out_records_with_nothing_to_write(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "a.jsonl", [ZSRE_ROW | {"alt": ""}, ZSRE_ROW])
    assert ids(ZsRE(path, variant="E").cases("test")) == ["1"]
    assert f"{path}: left out 1: 'alt' is empty" in caplog.messages
    assert ids(ZsRE(path, variant="M").cases("test")) == ["0", "1"]
    with pytest.raises(DataError, match="field 'alt': missing"):
        zsre_case(tmp_path, "E", ZSRE_ROW | {"alt": None})


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="variant must be M, E or P, got 'X'"):
        ZsRE(variant="X")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ZsRE(batch_size=0)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        ZsRE(limit=0)
    with pytest.raises(ValueError, match="val_fraction must be at least 0 and below 1, got 1"):
        ZsRE(val_fraction=1)


# CounterFact


def test_counterfact_original_form(tmp_path):
    assert CounterFact(write(tmp_path / "c.jsonl", [ORIGINAL_ROW])).cases("test") == [
        EditCase(
            "7",
            (Edit("{} was founded in", "Orchard Press", "Lima", "Oslo", "P159"),),
            {
                "efficacy": (Probe("Orchard Press was founded in", "Lima", "Oslo"),),
                "generality": (
                    Probe("It rained.\n\nOrchard Press began in", "Lima", "Oslo"),
                    Probe("The city of Orchard Press is", "Lima", "Oslo"),
                ),
                "locality": (
                    Probe("Fjord Books was founded in", "Oslo", "Lima"),
                    Probe("Nordlys began in", "Oslo", "Lima"),
                ),
            },
            ("Orchard Press prints", "Orchard Press prints"),
        )
    ]


def test_counterfact_easyedit_form(tmp_path):
    other = FLAT_ROW | {"case_id": 4, "locality_ground_truth": "Lima"}
    first, second = CounterFact(write(tmp_path / "c.json", [FLAT_ROW, other])).cases("test")
    assert first == EditCase(
        "3",
        (Edit("The home of {} is", "Orchard Press", "Lima", "Oslo"),),
        {
            "efficacy": (Probe("The home of Orchard Press is", "Lima", "Oslo"),),
            "generality": (Probe("Orchard Press is based in", "Lima", "Oslo"),),
            "locality": (Probe("Fjord Books is based in", "Oslo", "Lima"),),
        },
    )
    assert second.probes["locality"] == (Probe("Fjord Books is based in", "Lima"),)


def test_counterfact_without_prompts_of_a_kind(tmp_path):
    row = {k: v for k, v in ORIGINAL_ROW.items() if k != "generation_prompts"}
    case = CounterFact(write(tmp_path / "c.json", [row | {"neighborhood_prompts": []}])).cases(
        "test"
    )[0]
    assert list(case.probes) == ["efficacy", "generality"]
    assert case.generation_prompts == ()


def test_counterfact_leaves_out_edits_that_change_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    same = FLAT_ROW | {"case_id": 5, "target_new": " Oslo"}
    path = write(tmp_path / "c.jsonl", [same, FLAT_ROW, ORIGINAL_ROW])
    assert ids(CounterFact(path).cases("test")) == ["3", "7"]
    assert f"{path}: left out 1: the new target is the true one" in caplog.messages


# Text


def test_corpus_forms(tmp_path):
    (tmp_path / "a.txt").write_text("one \n\n two\n", encoding="utf-8")
    assert list(corpus.texts(str(tmp_path / "a.txt"))) == ["one", "two"]
    path = write(tmp_path / "a.jsonl.gz", [{"text": "one\ntwo"}, {"text": " "}, {"text": "three"}])
    assert list(corpus.texts(path)) == ["one\ntwo", "three"]


def test_corpus_facts_are_the_projects_own(monkeypatch):
    facts = types.ModuleType("corrigenda.datamodules.fact_tables")
    facts.statements = lambda: iter(["Water is wet."])
    monkeypatch.setitem(sys.modules, "corrigenda.datamodules.fact_tables", facts)
    assert list(corpus.texts("facts")) == ["Water is wet."]


def test_corpus_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        corpus.texts(str(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        corpus.texts(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="line 1, field 'text': missing"):
        list(corpus.texts(write(tmp_path / "a.jsonl", [{"body": "x"}])))


# Published files


@pytest.mark.parametrize(
    ("dataset", "name", "count"),
    [
        (ZsRE(variant=variant), name, count)
        for variant in ("M", "E", "P")
        for name, count in (
            ("zsre/zsre_mend_eval_portability_gpt4.jsonl", 737),
            ("zsre/zsre_mend_train_1k.jsonl", 997),
            ("zsre/zsre_mend_train_10000_reduced.jsonl", 8981),
        )
    ]
    + [
        (CounterFact(), "counterfact/counterfact.jsonl", 1295),
        (CounterFact(), "counterfact/counterfact_p103.jsonl", 875),
        (CounterFact(), "counterfact/counterfact-edit.jsonl", 9731),
        (CounterFact(), "counterfact/counterfact-train.jsonl", 9119),
        (CounterFact(), "counterfact/counterfact-val.jsonl", 1729),
    ],
)
def test_published_files_parse(dataset, name, count):
    if not (DATA / name).is_file():
        pytest.skip(f"no {DATA / name}")
    cases = dataset.read(str(DATA / name))
    assert len(cases) == count
    for case in cases:
        assert {"efficacy", "generality", "locality"} <= set(case.probes)
        for edit in case.edits:
            assert edit.text[edit.subject_start :].startswith(edit.subject)


def test_published_corpus():
    path = DATA / "text" / "wikitext2_raw_test.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    assert len(list(corpus.texts(str(path)))) == 60


# Splits


@pytest.fixture
def split(tmp_path):
    """30 training subjects, 5 of them also evaluated, in another letter case."""
    evaluated = [row | {"src": row["src"].upper()} for row in zsre_rows(5)]
    evaluated = [row | {"subject": row["subject"].upper()} for row in evaluated]
    return ZsRE(
        write(tmp_path / "test.jsonl", evaluated),
        train_path=write(tmp_path / "train.jsonl", zsre_rows(30)),
        val_fraction=0.2,
    )


def test_splits_share_no_subject(split, caplog):
    caplog.set_level(logging.INFO)
    train, val, test = (split.cases(name) for name in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [40, 10, 10]
    assert not subjects(train) & subjects(val)
    assert not subjects(test) & (subjects(train) | subjects(val))
    assert f"{split.train_path}: left out 10 cases whose subject is evaluated" in caplog.messages


def test_split_depends_on_the_seed_alone(split):
    def held_out(seed):
        return ids(ZsRE(train_path=split.train_path, val_fraction=0.2, seed=seed).cases("val"))

    assert held_out(0) == held_out(0) != held_out(1)


def test_nothing_held_out(split):
    data = ZsRE(train_path=split.train_path, val_fraction=0)
    assert len(data.cases("train")) == 60
    assert data.cases("val") == []


def test_unset_paths():
    with pytest.raises(DataError, match="ZsRE has no training cases: give --data.train_path "):
        ZsRE().cases("val")
    with pytest.raises(DataError, match="ZsRE has no cases to edit: give --data.path "):
        ZsRE().cases("test")
    with pytest.raises(NotImplementedError, match="EditDataModule does not read files"):
        EditDataModule().parse(files.Row("x", 0, {}))


def test_training_on_what_is_evaluated_is_refused(split):
    with pytest.raises(DataError, match="no training case left of 60: 60 are about a subject in"):
        ZsRE(split.train_path, split.train_path).cases("train")


def test_files_are_read_once(split, monkeypatch):
    opened = []
    monkeypatch.setattr(base, "read_rows", lambda *args: opened.append(args[0]) or read_rows(*args))
    for name in ("train", "val", "test", "train"):
        split.cases(name)
    split.edits()
    assert sorted(opened) == sorted([split.path, split.train_path])


# Which cases a loader serves


def served(loader):
    return [case.case_id for batch in loader for case in batch]


def test_learned_editor_trains_on_training_cases(split):
    data = attach(split)
    assert sorted(served(data.train_dataloader())) == sorted(ids(split.cases("train")))
    assert served(data.train_dataloader()) != ids(split.cases("train"))
    assert served(data.val_dataloader()) == ids(split.cases("val"))
    assert served(data.test_dataloader()) == ids(split.cases("test"))
    data.val_limit = 3
    assert served(data.val_dataloader()) == ids(split.cases("val"))[:3]


def test_outside_fit_everything_is_measured_on_the_evaluation_cases(split):
    split.limit = 7
    expected = ids(split.cases("test"))[:7]
    assert served(attach(split, fn="validate").val_dataloader()) == expected
    assert served(attach(split, fn="test").test_dataloader()) == expected


def test_module_that_trains_on_edits_gets_the_evaluation_cases_in_order(split):
    split.limit = 7
    data = attach(split, module={"trains_on": "edits"})
    expected = ids(split.cases("test"))[:7]
    assert served(data.train_dataloader()) == served(data.val_dataloader()) == expected
    assert data.edits() == [case.edits[0] for case in split.cases("test")[:7]]


def test_overfitting_does_not_shuffle(split):
    assert served(attach(split, overfit_batches=2).train_dataloader()) == ids(split.cases("train"))


def test_batches_are_lists_of_cases(split):
    batches = list(attach(split).val_dataloader())
    assert [len(batch) for batch in batches] == [8, 2]
    assert all(isinstance(batch, list) and isinstance(batch[0], EditCase) for batch in batches)
    assert split.transfer_batch_to_device(batches[0], torch.device("cpu"), 0) is batches[0]


def known(split, limit=None):
    """``split`` with a model that knows every third hill, and the sizes of the batches that it scored."""
    chunks = []

    def known(cases):
        chunks.append(len(cases))
        return [int(case.case_id[:-1]) % 3 == 0 for case in cases]

    split.known_only, split.limit, split.batch_size = True, limit, 4
    return attach(split, module={"known": known}, fn="validate"), chunks


def test_known_only(split, monkeypatch):
    monkeypatch.setattr(base, "KNOWN_BATCH", 4)
    data, chunks = known(split)
    assert served(data.val_dataloader()) == ["0a", "0b", "3a", "3b"]
    assert len(data.edits()) == 4
    assert chunks == [4, 4, 2]  # scored once


def test_known_only_stops_at_the_limit(split, monkeypatch):
    monkeypatch.setattr(base, "KNOWN_BATCH", 4)
    data, chunks = known(split, limit=3)
    assert ids(data.evaluation_cases()) == ["0a", "0b", "3a"]
    assert chunks == [4, 4]


def test_known_cases_are_saved_in_checkpoints(split):
    data, chunks = known(split)
    state = data.state_dict()
    assert state == {}
    expected = ids(data.evaluation_cases())
    again = ZsRE(data.path, known_only=True)
    again.load_state_dict(data.state_dict())
    assert ids(again.evaluation_cases()) == expected
    other = ZsRE(data.path, known_only=True, limit=2)
    other.load_state_dict(data.state_dict())
    with pytest.raises(DataError, match="known_only needs a Trainer"):
        other.evaluation_cases()


def test_known_only_errors(split):
    split.known_only = True
    with pytest.raises(DataError, match="known_only needs a Trainer whose LightningModule"):
        split.edits()
    attach(split, module={"known": lambda cases: [False] * len(cases)})
    with pytest.raises(DataError, match="ZsRE: the model answers none of the 10 cases correctly"):
        split.edits()


# The loader


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        loader = CaseLoader(numbered(20), 3, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return served(loader)

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(one) for one in orders}) == 3
    assert all(sorted(one, key=int) == ids(numbered(20)) for one in orders)
    loader = CaseLoader(numbered(20), 3, shuffle=True)
    for epoch in (1, 0):  # a second fit begins with the first epoch again
        loader.set_epoch(epoch)
        assert loader.state_dict()["position"] == 0 and served(loader) == order(0, epoch)


def test_training_order_goes_by_the_seed_of_the_run(split):
    """The data's own seed decides which cases there are."""

    def order(run, data):
        torch.manual_seed(run)
        module = ZsRE(train_path=split.train_path, val_fraction=0, seed=data)
        return served(attach(module).train_dataloader())

    assert order(0, 0) == order(0, 1) != order(1, 0)


def test_loader_can_be_iterated_again_and_abandoned():
    loader = CaseLoader(numbered(7), 2)
    assert len(loader) == 4
    next(iter(loader))
    assert served(loader) == served(loader) == ids(numbered(7))


@pytest.mark.parametrize("count", [16, 17, 18, 19])
def test_training_share_is_even_and_never_repeats(count):
    loaders = [CaseLoader(numbered(count), 3, True, 0, "even", 3, rank) for rank in range(3)]
    assert len({len(loader) for loader in loaders}) == 1
    shares = [served(loader) for loader in loaders]
    assert {len(share) for share in shares} == {count // 3}
    everything = sum(shares, [])
    assert len(set(everything)) == len(everything) == count - count % 3
    assert all(len(list(loader)) == len(loader) for loader in loaders)


def test_evaluation_share_covers_everything_once():
    loaders = [
        CaseLoader(numbered(17), 3, share="each_once", num_replicas=4, rank=r) for r in range(4)
    ]
    assert [len(loader) for loader in loaders] == [2, 2, 1, 1]
    alone = list(CaseLoader(numbered(17), 3))
    together = [batch for loader in loaders for batch in loader]
    assert sorted(together, key=alone.index) == alone


@pytest.mark.parametrize("share", ["even", "each_once"])
def test_too_few_cases_for_the_processes_is_an_error_on_all_of_them(share):
    for rank in range(3):
        loader = CaseLoader(numbered(2), 1, share=share, num_replicas=3, rank=rank)
        with pytest.raises(DataError, match="2 cases in batches of 1 are too few for 3 processes"):
            len(loader)
    assert len(CaseLoader([], 1, share=share, num_replicas=3, rank=0)) == 0


def test_edits_are_the_same_on_every_process():
    loaders = [CaseLoader(numbered(5), 2, share="same", num_replicas=3, rank=r) for r in range(3)]
    assert [served(loader) for loader in loaders] == [ids(numbered(5))] * 3


def test_the_number_of_processes_comes_from_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert served(CaseLoader(numbered(5), 1)) == ["1", "3"]


def test_trainer_says_which_processes_share(split):
    data = attach(split, fn="validate", distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    assert served(data.val_dataloader()) == ids(split.cases("test"))[8:]


def test_the_loader_resumes_from_its_state():
    loader = CaseLoader(numbered(10), 2, shuffle=True)
    assert loader.state_dict()["position"] == loader.state_dict()["epoch"] == 0
    loader.set_epoch(4)
    batches = iter(loader)
    seen = [next(batches), next(batches)]
    again = CaseLoader(numbered(10), 2, shuffle=True)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert again.state_dict() == loader.state_dict()
    again.set_epoch(4)
    assert len(again) == 5
    assert seen + list(again) == list(loader)
    assert len(list(again)) == 5


def test_finished_steps_of_the_epoch_before_do_not_count():
    loader = CaseLoader(numbered(10), 2, processed=lambda: 5)
    assert len(list(loader)) == loader.state_dict()["position"] == 5
    loader.set_epoch(1)
    assert loader.state_dict()["position"] == 0


def test_loader_refuses_the_state_of_other_data():
    loader = CaseLoader(numbered(10), 2, shuffle=True)
    next(iter(loader))
    for other in (CaseLoader(numbered(11), 2, True), CaseLoader(numbered(10), 3, True)):
        with pytest.raises(DataError, match="cannot resume in the middle of an epoch"):
            other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize(("share", "seen"), [("even", 6), ("each_once", 6), ("same", 2)])
def test_cases_that_some_process_has_seen_may_not_change(share, seen):
    """After one batch of two in each of three processes."""
    cases = numbered(18)
    loaders = [CaseLoader(cases, 2, share=share, num_replicas=3, rank=rank) for rank in range(3)]
    assert {repr(next(iter(loader)) and loader.state_dict()) for loader in loaders} == {
        repr(loaders[0].state_dict())
    }
    for place in range(len(cases)):
        changed = [*cases[:place], EditCase("other", cases[place].edits), *cases[place + 1 :]]
        again = CaseLoader(changed, 2, share=share, num_replicas=3, rank=0)
        if place < seen:
            with pytest.raises(DataError, match="cannot resume in the middle of an epoch"):
                again.load_state_dict(loaders[0].state_dict())
        else:
            again.load_state_dict(loaders[0].state_dict())


def test_a_stream_may_grow_when_resumed():
    loader = CaseLoader(numbered(6), 2, share="same")
    next(iter(loader))
    longer = CaseLoader(numbered(8), 2, share="same")
    longer.load_state_dict(loader.state_dict())
    assert served(longer) == ["2", "3", "4", "5", "6", "7"]


# Stopping and resuming with a real Trainer

EPOCHS, BATCHES = 3, 5


class CrashError(Exception):
    pass


class Recorder(LightningModule):
    """Notes the cases of every finished training step; may fail inside one."""

    def __init__(self, trains_on="train", crash_in=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trains_on = trains_on
        self.crash_in = crash_in
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.crash_in:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "in_step.ckpt")
            raise CrashError
        return (self.weight - 1) ** 2

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, ids(batch)))

    def validation_step(self, batch, batch_idx):
        self.validated.append(ids(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class CrashAfter(Callback):
    """Fails in ``hook`` once so many steps are done, after writing a checkpoint there."""

    def __init__(self, hook, steps):
        self.steps = steps
        setattr(self, hook, self._crash)

    def _crash(self, trainer, *rest):
        if trainer.global_step == self.steps and not trainer.sanity_checking:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "hook.ckpt")
            raise CrashError


@pytest.fixture(scope="module")
def training_file(tmp_path_factory):
    """10 subjects, 20 cases; one subject held out, so 18 cases: five batches, the last of two."""
    return write(tmp_path_factory.mktemp("resume") / "train.jsonl", zsre_rows(10))


@pytest.fixture
def fit(training_file, tmp_path):
    torch.set_num_threads(1)

    def run(module, callbacks=(), ckpt_path=None, **trainer_arguments):
        limits = {"max_epochs": EPOCHS} | trainer_arguments
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            **limits,
        )
        if module.trains_on == "train":
            data = ZsRE(train_path=training_file, batch_size=4)
        else:
            data = ZsRE(training_file, batch_size=4, limit=18)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module

    return run


def test_uninterrupted_run(fit):
    seen = fit(Recorder()).seen
    assert [(epoch, index) for epoch, index, _ in seen] == [
        (epoch, index) for epoch in range(EPOCHS) for index in range(BATCHES)
    ]
    orders = [sum((batch for e, _, batch in seen if e == epoch), []) for epoch in range(EPOCHS)]
    assert len({tuple(order) for order in orders}) == EPOCHS
    assert len({frozenset(order) for order in orders}) == 1


@pytest.mark.parametrize("steps", [1, 5, 7, 9, 10, 12])
@pytest.mark.parametrize("trains_on", ["train", "edits"])
def test_resumed_run_sees_what_the_uninterrupted_one_does(fit, tmp_path, trains_on, steps):
    whole = fit(Recorder(trains_on)).seen
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=1)
    first = Recorder(trains_on, crash_in=steps)
    with pytest.raises(CrashError):
        fit(first, [keep])
    assert first.seen == whole[:steps]
    again = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=1)
    assert fit(Recorder(trains_on), [again], ckpt_path="last").seen == whole[steps:]


@pytest.mark.parametrize("steps", [2, 6, 8])
def test_checkpoint_written_inside_a_step_repeats_that_step(fit, tmp_path, steps):
    whole = fit(Recorder()).seen
    with pytest.raises(CrashError):
        fit(Recorder(crash_in=steps))
    assert fit(Recorder(), ckpt_path=tmp_path / "in_step.ckpt").seen == whole[steps:]


@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_validation_batch_end", "on_validation_end"]
)
@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": EPOCHS * BATCHES}])
def test_checkpoints_of_other_hooks(fit, tmp_path, hook, limits):
    """With validation every second batch; 8 steps is in the middle of the second epoch."""
    limits = limits | {"val_check_interval": 2}
    whole = fit(Recorder(), **limits).seen
    with pytest.raises(CrashError):
        fit(Recorder(), [CrashAfter(hook, 7)], **limits)
    resumed = fit(Recorder(), ckpt_path=tmp_path / "hook.ckpt", **limits)
    assert resumed.seen == whole[7:]


def test_checkpoint_of_an_epochs_end(fit, tmp_path):
    whole = fit(Recorder()).seen
    with pytest.raises(CrashError):
        fit(Recorder(), [CrashAfter("on_train_epoch_end", 10)])
    assert fit(Recorder(), ckpt_path=tmp_path / "hook.ckpt").seen == whole[10:]


def test_resuming_twice(fit, tmp_path):
    whole = fit(Recorder()).seen
    seen = []
    for start, steps in ((0, 3), (3, 8), (8, 13)):
        module = Recorder()
        with pytest.raises(CrashError):
            ckpt_path = tmp_path / "hook.ckpt" if start else None
            fit(module, [CrashAfter("on_train_batch_end", steps)], ckpt_path=ckpt_path)
        seen += module.seen
        # The crash comes before the module's own hook has noted the batch.
        seen += whole[steps - 1 : steps]
    assert seen + fit(Recorder(), ckpt_path=tmp_path / "hook.ckpt").seen == whole


# Files of strangers

ROW = json.dumps(ZSRE_ROW)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "[" * 100_000, "line 1: lists or records inside one another too deeply"),
        ("a.json", '[{"a": ' * 100_000, "a.json: lists or records inside one another too deeply"),
        ("a.jsonl", ROW + '\n{"a": ' + "9" * 5000 + "}", "line 2: not usable JSON (Exceeds the limit"),
        ("a.jsonl", ROW.encode("utf-16"), "not UTF-8 text"),
        ("a.jsonl", b"\x00" * 50, "line 1: not JSON"),
        ("a.jsonl", ROW.replace("Andes", "An\0des"), "line 1: not JSON (Invalid control character"),
        ("a.jsonl", ROW.replace("Ada", "\\ud800"), "field 'src': not Unicode"),
        ("a.jsonl", ROW.replace(" the Alps", "x" * 1_000_001), "'alt': 1,000,001 characters, at most 1,000,000"),
        ("a.jsonl", ROW.replace("Darwin", "x" * 10_000_000), "field 'loc_ans': 10,000,001 characters, at most"),
        ("a.jsonl", "", "no records"),
        ("a.json", "", "not JSON"),
        ("a.json", "[]", "no records"),
        ("a.json", '{"a": 1}', "expected a JSON list of records, got a record"),
        ("a.jsonl", "3\n", "line 1: expected a record with named fields, got a number"),
        ("a.jsonl", ROW.replace('"src"', '"case_id": 1.5, "src"'), "a whole number or text, got a number"),
        ("a.jsonl", json.dumps({"k" * 10**6: 1}), "field 'answers'"),
        ("a.yaml", "a: b", "expected a file ending in .json"),
    ],
    ids=lambda value: None if len(value) > 60 else str(value)[:40],
)  # fmt: skip
def test_files_of_strangers_are_one_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        ZsRE(str(file)).cases("test")
    if message == "field 'answers'":  # no field that is needed is there
        message = "missing (the record has kkk"
    assert str(file) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_LINE", 2000)
    file = tmp_path / "a.jsonl"
    file.write_text(f"{ROW}\n{' ' * 3000}{ROW}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: longer than 2,000 characters"):
        ZsRE(str(file)).cases("test")


def test_a_folder_and_an_unknown_users_file_are_named(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    for path, message in (
        (str(tmp_path / "a.jsonl"), "is a folder, not a file"),
        ("~nobody-at-all/a.jsonl", "~nobody-at-all/a.jsonl: no such file"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            ZsRE(path).cases("test")


def test_a_whole_book_is_a_text_of_a_corpus(tmp_path):
    """The limit of a field is that of prompts."""
    file = tmp_path / "books.jsonl"
    file.write_text(json.dumps({"text": "a " * 600_000}))
    assert [len(text) for text in corpus.texts(str(file))] == [1_200_000]
