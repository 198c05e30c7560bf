"""Own facts: file formats, fields, subjects, mistakes, ``corrigenda data``, and files of EasyEdit and KnowEdit."""

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from corrigenda.datamodules.facts import Facts
from corrigenda.datamodules.files import DataError, read_rows
from corrigenda.datamodules.own import Edits
from corrigenda.datamodules.records import Edit, located
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.ike import IKE
from tests.samples import QUIET, ROOT

SHARED = ROOT.parent / "shared"
CHECKS = SHARED / "checks" / "own_data"
FRANCE = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}


def write(path, content):
    """A file of records, or of a text as it is."""
    if not isinstance(content, str):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_text(content, encoding="utf-8", newline="")
    return str(path)


@pytest.fixture
def cases(tmp_path):
    """``cases(record, ..., **options)``: the cases of these records."""

    def read(*records, **options):
        return Edits(write(tmp_path / "own.jsonl", records), **options).cases("test")

    return read


def probes(case):
    return {criterion: len(some) for criterion, some in case.probes.items()}


# ---------------------------------------------------------------------------- files


TABLE = "prompt,subject,target_new,target_true,rephrase\nThe capital of {} is,France,Rome,,\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", TABLE),
        ("a.csv", "\ufeff" + TABLE.replace("\n", "\r\n")),
        ("a.csv", TABLE.replace(",", ";")),
        ("a.csv", '"prompt","subject","target_new"\n\n"The capital of {} is","France","Rome"\n'),
        ("a.csv", "prompt,subject,target_new,note\nThe capital of {} is,France,Rome\n"),
        ("a.tsv", TABLE.replace(",", "\t")),
        ("a.tsv", "prompt\tsubject\ttarget_new\nThe capital of {} is \t France\tRome \t\n".replace("\t\n", "\n")),
        ("a.json", json.dumps([FRANCE])),
        ("a.json", json.dumps({"records": [FRANCE]})),
        ("a.json", json.dumps({"0": FRANCE})),
        ("a.jsonl", json.dumps(FRANCE) + "\n\n"),
    ],
)  # fmt: skip
def test_every_form_of_file_gives_the_same_case(tmp_path, name, content):
    (case,) = Edits(write(tmp_path / name, content)).cases("test")
    assert case.edits == (Edit(**FRANCE),) and case.case_id == "0"


def test_a_parquet_file(tmp_path):
    rows = [
        FRANCE | {"locality": [{"prompt": "The sea is", "target": "blue"}], "target_true": None}
    ]
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    (case,) = Edits(path).cases("test")
    assert case.edits == (Edit(**FRANCE),) and probes(case) == {"efficacy": 1, "locality": 1}
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"b\.parquet: not a Parquet file"):
        Edits(str(tmp_path / "b.parquet")).cases("test")


def test_cells_hold_lists_and_questions(tmp_path):
    path = write(
        tmp_path / "a.csv",
        "prompt,subject,target_new,rephrase,locality_prompt,locality_ground_truth,portability\n"
        'The capital of {} is,France,Rome,"[""{} is run from"", ""France\'s capital is""]",The sea is,blue,'
        '"{""prompt"": ""The river of {}\'s capital is the"", ""target"": [""Tiber"", ""Tevere""]}"\n',
    )
    (case,) = Edits(path).cases("test")
    assert [p.prompt for p in case.probes["generality"]] == [
        "France is run from",
        "France's capital is",
    ]
    (locality,), (portability,) = case.probes["locality"], case.probes["portability"]
    assert (locality.prompt, locality.target, locality.rival) == ("The sea is", "blue", None)
    assert portability.prompt == "The river of France's capital is the"
    assert (portability.target, portability.aliases) == ("Tiber", ("Tevere",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: no columns: the first line must name them"),
        ("a.csv", "prompt,subject,target_new\n", "a.csv: no records"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv, line 1: two columns are called 'prompt'"),
        ("a.csv", "prompt,subject\nIn,a,b\n", "a.csv, line 2: 3 cells, but the first line names 2 columns"),
        ("a.csv", 'prompt,subject\n"a"b,c\n', "a.csv, line 2: not a line of a table"),
        ("a.csv", "prompt,subject\nIn {},a\n", "a.csv, line 2, field 'target_new': missing (the record has "),
        ("a.json", "{}", "a.json: expected a JSON list of records, got a record"),
        ("a.json", '{"a": 1, "b": []}', "a.json: expected a JSON list of records, got a record"),
        ("a.json", f"[\n\n{json.dumps(FRANCE)}, {{}}]", "a.json, record 2 (line 3), field 'target_new': missing"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(DataError) as caught:
        Edits(write(tmp_path / name, content)).cases("test")
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- fields


def test_answers_are_texts_numbers_or_lists(cases):
    number, many, single = cases(
        FRANCE | {"target_new": 1048},
        FRANCE | {"target_new": ["Rome", "Roma", 3.5], "aliases": ["Roma", "the eternal city"]},
        FRANCE | {"target_new": " Rome ", "aliases": "Roma", "target_true": ["Paris", "Lutetia"]},
    )
    assert number.edits[0].target_new == "1048"
    (probe,) = many.probes["efficacy"]
    assert (probe.target, probe.aliases) == ("Rome", ("Roma", "3.5", "the eternal city"))
    (probe,) = single.probes["efficacy"]
    assert (probe.target, probe.rival, probe.aliases) == ("Rome", "Paris", ("Roma",))
    assert single.edits[0].target_true == "Paris"


def test_an_answer_keeps_its_line_breaks(cases):
    (case,) = cases(FRANCE | {"target_new": "one\n  two "})
    assert case.edits[0].target_new == "one\n  two"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_new": True}, "field 'target_new': expected text or a number, got true or false"),
        ({"target_new": []}, "field 'target_new': empty"),
        ({"target_new": ["Rome", ""]}, "field 'target_new': empty"),
        ({"target_new": None}, "field 'target_new': missing"),
        ({"target_new": {"str": "Rome"}}, "field 'target_new': expected text or a number, got a record"),
        ({"subject": " "}, "field 'subject': empty"),
        ({"prompt": "Its capital is"}, "the subject 'France' does not occur in 'Its capital is'"),
        ({"prompt": "{} and {}"}, "field 'prompt': an edit's prompt needs exactly one {}"),
        ({"prompt": "France, capital of France: "}, "the subject 'France' occurs 2 times in"),
        ({"locality": "The sea is"}, "field 'locality': expected a question with its answer"),
        ({"locality": [{"prompt": "The sea is"}]}, "field 'locality[0].target': missing: the answer to 'The sea"),
        ({"portability": {"hop": [{"prompt": "a", "target": 1}, {"prompt": "b"}]}}, "'portability.hop[1].target'"),
        ({"locality": {"near": {"prompt": ["a", "b"], "target": ["c"]}}}, "expected as many answers as there are"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_with_its_line(cases, change, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        cases(FRANCE, FRANCE | change)
    assert "own.jsonl, line 2" in str(caught.value)


@pytest.mark.parametrize(
    "questions",
    [
        {"prompt": "The sea is", "target": "blue"},
        [{"prompt": "The sea is", "ground_truth": ["blue", "deep"]}],
        {"Relation_Specificity": [{"prompt": "The sea is", "ground_truth": [["blue"]]}], "Forgetfulness": []},
        {"neighborhood": {"prompt": "The sea is", "ground_truth": "blue"}},
        {"near": {"prompt": ["The sea is"], "ground_truth": ["blue"]}},
        {"New Question": "The sea is", "New Answer": "blue"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["locality", "portability"])
def test_questions_have_many_forms(cases, field, questions):
    (case,) = cases(FRANCE | {field: questions})
    (probe,) = case.probes[field]
    assert (probe.prompt, probe.target) == ("The sea is", "blue")


def test_questions_without_any_answer_are_left_out(cases):
    several = {"near": {"prompt": ["a", "b"], "target": ["c", []]}}
    empty = FRANCE | {
        "locality": [{"prompt": "The sea is", "ground_truth": [[]]}],
        "portability": {},
    }
    one, other = cases(FRANCE | {"locality": several}, empty)
    assert probes(one) == {"efficacy": 1, "locality": 1} and probes(other) == {"efficacy": 1}


def test_names_of_published_files_are_known(cases):
    flat, wikibio = cases(
        FRANCE | {"ground_truth": "Paris", "rephrase_prompt": "a", "locality_prompt": "b",
                  "locality_ground_truth": "c", "relation_id": "P36", "task": 3, "cond": "x"},
        {"text": "A passage about ada quill. ", "concept": "ada quill", "labels": "She was\nborn."},
    )  # fmt: skip
    assert probes(flat) == {"efficacy": 1, "generality": 1, "locality": 1}
    assert flat.edits[0].relation == "P36" and flat.task == "3"
    assert wikibio.edits[0] == Edit("A passage about {}.", "ada quill", "She was\nborn.")


def test_an_unknown_true_answer_is_none(cases):
    (case,) = cases(FRANCE | {"ground_truth": "<|endoftext|>"})
    assert case.edits[0].target_true is None and case.probes["efficacy"][0].rival is None


def test_the_answer_that_is_already_true_has_no_rival(cases):
    (case,) = cases(FRANCE | {"target_true": "Rome"})
    assert case.probes["efficacy"][0].rival is None


# ---------------------------------------------------------------------------- subjects


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("In France is", "France", ("In France is", "France", [3])),
        ("In FRANCE is", "France", ("In FRANCE is", "FRANCE", [3])),
        ("Indiana, India", "India", ("Indiana, India", "India", [9])),
        ("a b a", "a", ("a b a", "a", [0, 4])),
        ("Sa\u0303o Paulo", "S\u00e3o Paulo", ("S\u00e3o Paulo", "S\u00e3o Paulo", [0])),
        ("S\u00e3o", "SA\u0303O", ("S\u00e3o", "S\u00e3o", [0])),
        ("In Spain", "France", ("In Spain", "France", [])),
    ],
)
def test_where_a_subject_is_found(text, subject, expected):
    assert located(text, subject) == expected


def test_blanks_around_a_subject_and_targets_are_dropped():
    edit = Edit("The capital of {} is", " France ", " Rome ", "\u00a0Paris")
    assert (edit.subject, edit.target_new, edit.target_true) == ("France", "Rome", "Paris")
    assert Edit("{} says", "Ada", "\n  yes ").target_new == "\n  yes"


def test_the_slot_chooses_among_several_occurrences(cases):
    (case,) = cases(FRANCE | {"prompt": "France, whose capital is not that of {}, has"})
    edit = case.edits[0]
    assert edit.text.count("France") == 2 and edit.subject_start == edit.text.rindex("France")


# ---------------------------------------------------------------------------- what is told


def test_bad_records_are_skipped_when_that_is_wanted(tmp_path, caplog):
    lines = [
        json.dumps(FRANCE),
        "not JSON",
        json.dumps({"subject": "x"}),
        json.dumps(FRANCE | {"case_id": "0"}),
    ]
    path = write(tmp_path / "own.jsonl", "\n".join(lines))
    data = Edits(path, skip_bad=True)
    assert len(data.cases("test")) == 1 and len(data.problems) == 3
    assert [re.search(r"line \d", p).group() for p in data.problems] == [
        "line 2",
        "line 3",
        "line 4",
    ]
    assert caplog.messages[0].startswith(f"{path}: 3 skipped; the first: {path}, line 2: not JSON")
    with pytest.raises(DataError, match="line 2: not JSON"):
        Edits(path).cases("test")


def test_a_file_of_bad_records_alone_names_the_first(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"prompt": "x"}])
    with pytest.raises(
        DataError, match=r"no usable record among 1; the first problem: .*'target_new': missing"
    ):
        Edits(path, skip_bad=True).cases("test")


def test_contradictions_are_told_once_with_their_lines(cases, caplog):
    cases(FRANCE, FRANCE, FRANCE | {"target_new": "Lyon"}, FRANCE | {"target_new": "Nice"})
    (line,) = caplog.messages
    assert (
        "'The capital of France is' is to be both 'Rome' (line 1) and 'Lyon' (line 3) (2 such prompts)"
        in line
    )


@pytest.mark.parametrize(
    "make",
    [lambda: FT([1], steps=1), lambda: GRACE(1, epsilon=1.0, steps=1), lambda: IKE(Facts(), 0, encoder="lm")],
    ids=["weights", "modules", "text"],
)  # fmt: skip
def test_every_kind_of_editor_tells_of_contradictions(llama, caplog, make):
    make().edit(llama, [Edit(**FRANCE), Edit(**FRANCE | {"target_new": "Lyon"})]).remove()
    assert sum("is to be both 'Rome' and 'Lyon'" in message for message in caplog.messages) == 1


def test_data_shows_how_a_file_is_read(corrigenda, tmp_path, capsys):
    rows = [
        FRANCE | {"target_true": "Paris", "rephrase": ["a", "b", "c", "d"], "note": "x"},
        FRANCE | {"prompt": "the capital of france is", "target_new": ["Lyon"]},
        {"prompt": "Its capital is", "subject": "France", "target_new": "Rome"},
    ]
    path = write(tmp_path / "own.jsonl", rows)
    assert corrigenda("data", path) == 2
    told = capsys.readouterr()
    lines = [" ".join(line.split()) for line in told.out.splitlines()]
    expected = [
        "prompt 3",
        "rephrase 1",
        "ignored note (1)",
        "1 marked by {}, 1 found in other letter case",
        "generality 4 in 1 record",
        "portability none: not measured without a field portability",
        "subject France (marked by {})",
        "efficacy The capital of France is → Rome, not Paris",
        "and 1 more",
        "1 subject found in other letter case: the prompt's spelling is used",
        f"{path}, line 3, field 'prompt': the subject 'France' does not occur in 'Its capital is'",
    ]
    for line in expected:
        assert line in lines, line
    assert told.err == f"corrigenda: error: {path}: 1 record cannot be used\n"
    assert corrigenda("data", write(tmp_path / "own.jsonl", rows[:1])) == 0
    assert corrigenda("data", tmp_path / "none.csv") == 2
    assert "none.csv: no such file" in capsys.readouterr().err


def test_the_page_shows_what_the_command_says(corrigenda, capsys):
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    table, told = re.findall(r"^```text[^\n]*\n(.*?)^```$", page, re.M | re.S)
    write(Path("facts.csv"), table)
    assert corrigenda("data", "facts.csv") == 0
    assert capsys.readouterr().out.strip() == told.strip()


# ---------------------------------------------------------------------------- runs


@pytest.fixture
def validated(corrigenda, tiny_folder, tmp_path, capsys):
    """``validated(path, *options)``: (status, rows of cases.jsonl, stderr) of a run with FT-M on a tiny model."""
    config = {
        "model": {"class_path": "EditingModule", "init_args": {"lm": {"name": str(tiny_folder("llama"))}}},
        "edit": {"editor": {"class_path": "FT", "init_args": {"layers": [1], "steps": 2}}},
    }  # fmt: skip
    write(tmp_path / "ft.yaml", yaml.safe_dump(config))

    def run(path, *options):
        status = corrigenda("validate", "-c", "ft.yaml", "-c", "configs/data/own.yaml", "--data.path", path,
                            "--run_dir", "run", *QUIET, *options)  # fmt: skip
        found = Path("run/cases.jsonl")
        lines = found.read_text(encoding="utf-8").splitlines() if found.is_file() else []
        return status, [json.loads(line) for line in lines], capsys.readouterr().err

    return run


def test_a_report_says_what_was_not_measured_and_over_how_many_cases(
    validated, corrigenda, tmp_path
):
    rephrased = FRANCE | {"subject": "Peru", "rephrase": "{} is run from"}
    assert validated(write(tmp_path / "own.jsonl", [FRANCE, rephrased]))[0] == 0
    assert corrigenda("report", "run", "--out", "report") == 0
    told = Path("report/report.md").read_text(encoding="utf-8")
    assert "Not measured, as no case has probes for it: locality." in told
    assert re.search(
        r"\| run \| [\d.]+ \[[^|]+\] \|(?: [^|]+ \|)* ?[\d.]+ \[[^|]+\] \(n=1\) \|", told
    )
    assert "n: over so many of them, which have such probes." in told


# ---------------------------------------------------------------------------- the rows of own_data

OUTCOMES = {
    "minimal.json": {"efficacy": 1},
    "minimal.csv": {"efficacy": 2},
    "mixed.jsonl": {"efficacy": 2, "generality": 2, "locality": 1},
    "spaces.tsv": Edit("The capital of {} is", "France", "Rome", "Paris"),
    "bom_crlf.csv": Edit(**FRANCE),
    "case.jsonl": Edit("The capital of {} is", "france", "Rome"),
    "twice.jsonl": "the subject 'Paris' occurs 2 times in 'Paris, the capital of France, is named after Paris': "
    "write {} in its place to choose one",
    "inside_word.jsonl": Edit("Indiana is a state; the capital of {} is", "India", "Mumbai"),
    "no_subject.jsonl": "line 2, field 'prompt': the subject 'France' does not occur in 'Its capital is'",
    "aliases.jsonl": Edit("{} was written by", "Hamlet", "Christopher Marlowe"),
    "long_target.jsonl": {"efficacy": 1},
    "number.jsonl": Edit("{} was founded in", "Oslo", "1048"),
    "list_target.jsonl": Edit("{} was founded in", "Oslo", "1048"),
    "same_subject.jsonl": {"efficacy": 2},
    "dict.json": Edit(**FRANCE),
    "data_key.json": {"efficacy": 2, "generality": 2, "locality": 1},
    "chinese.jsonl": {"efficacy": 1},
    "arabic.jsonl": {"efficacy": 1},
    "nfc_nfd.jsonl": Edit("The mayor of {} is", "S\u00e3o Paulo", "Pel\u00e9"),
    "newline_prompt.jsonl": Edit("Q: What is the capital of {}?\nA:\n", "France", "Rome"),
    "ids.jsonl": {"efficacy": 5},
    "easyedit_flat.json": {"efficacy": 1, "generality": 1, "locality": 1, "portability": 1},
    "empty.csv": "empty.csv: no columns: the first line must name them, such as prompt,subject,target_new",
    "header_only.csv": "header_only.csv: no records",
    "missing_column.csv": "missing_column.csv, line 2, field 'target_new': missing (the record has prompt, "
    "subject)",
}
TOLD = {
    "case.jsonl": "1 subject found in other letter case: the prompt's spelling is used",
    "nfc_nfd.jsonl": "1 subject found in another Unicode form: both are brought to the same, NFC",
    "same_subject.jsonl": "'The capital of France is' is to be both 'Rome' (line 1) and 'Lyon' (line 2): made "
    "together, at most one can hold",
}


def row(name):
    if not (CHECKS / name).is_file():
        pytest.skip(f"no {CHECKS / name}")
    return str(CHECKS / name)


def test_every_row_has_an_outcome_here():
    if not CHECKS.is_dir():
        pytest.skip(f"no {CHECKS}")
    assert {path.name for path in CHECKS.iterdir()} - {"README.md"} == {*OUTCOMES}


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_row_is_read_or_refused_as_stated(name, caplog, corrigenda, capsys):
    path, outcome = row(name), OUTCOMES[name]
    if isinstance(outcome, str):
        with pytest.raises(DataError, match=re.escape(outcome)):
            Edits(path).cases("test")
    else:
        found = Edits(path).cases("test")
        if isinstance(outcome, Edit):
            assert [case.edits for case in found] == [(outcome,)]
        else:
            assert dict(sum((Counter(probes(case)) for case in found), Counter())) == outcome
    told = [message.removeprefix(f"{path}: ") for message in caplog.messages]
    assert told == ([TOLD[name]] if name in TOLD else [])
    assert corrigenda("data", path) == (2 if isinstance(outcome, str) else 0)
    told = capsys.readouterr()
    if isinstance(outcome, str):
        assert outcome in told.out + told.err


def test_rows_with_ids_of_all_kinds_have_a_file_each(validated):
    status, rows, _ = validated(row("ids.jsonl"))
    files = [path for path in Path("run").rglob("*.safetensors")]
    assert status == 0 and len(rows) == len(files) == 5
    assert {path.parent for path in files} == {Path("run/edits")}
    assert not list(Path().parent.glob("up*"))


def test_all_criteria_of_the_row_from_easyedit_are_measured(validated):
    status, rows, _ = validated(row("easyedit_flat.json"))
    assert status == 0
    measured = {"efficacy/exact", "generality/exact", "locality/agreement", "portability/exact"}
    assert measured <= {*rows[0]["metrics"]}


def test_the_row_without_a_subject_is_skipped_and_counted(validated, caplog):
    status, rows, _ = validated(row("no_subject.jsonl"), "--data.skip_bad", "true")
    assert status == 0 and len(rows) == 1
    assert sum("1 skipped; the first" in message for message in caplog.messages) == 1
    status, _, told = validated(row("no_subject.jsonl"), "--run_dir", "other")
    assert status == 2 and "line 2" in told and told.count("\n") == 1


def test_the_row_of_contradicting_edits_is_told_by_the_data_and_the_editor(validated, caplog):
    options = ["--edit.schedule", "batch", "--data.batch_size", "2"]
    status, rows, _ = validated(row("same_subject.jsonl"), *options)
    assert status == 0 and len(rows) == 2
    assert sum("is to be both 'Rome'" in message for message in caplog.messages) == 2


def test_aliases_count_in_free_answers_and_the_target_alone_is_written(validated):
    status, rows, _ = validated(row("aliases.jsonl"), "--model.generate_tokens", "4")
    assert status == 0 and rows[0]["edits"][0]["target_new"] == "Christopher Marlowe"
    assert "efficacy/wild_contains" in rows[0]["metrics"]
    (case,) = Edits(row("aliases.jsonl")).cases("test")
    assert case.probes["efficacy"][0].aliases == ("Marlowe", "Kit Marlowe")
    (case,) = Edits(row("list_target.jsonl")).cases("test")
    assert case.probes["efficacy"][0].aliases == ("the year 1048",)


@pytest.mark.parametrize(
    "name", ["chinese.jsonl", "arabic.jsonl", "newline_prompt.jsonl", "long_target.jsonl"]
)
def test_scores_are_those_of_the_text_as_it_is_written(name, tiny_lm):
    lm = tiny_lm("llama", max_position_embeddings=1024)
    (case,) = Edits(row(name)).cases("test")
    (probe,) = case.probes["efficacy"]
    between = "" if name.startswith(("chinese", "newline")) else " "
    start, whole = probe.prompt, f"{probe.prompt}{between}{probe.target}"
    scores = lm.score([probe.prompt], [probe.target])
    ids = torch.tensor(lm.tokens.encode([whole]))
    first = len(lm.tokens.encode([start])[0])
    logprobs = lm.net(ids).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[0, 1:, None])[first - 1 :, 0]
    found = scores.logprob_BM[0][scores.mask_BM[0].bool()]
    assert len(found) == len(expected) and torch.allclose(found, expected, atol=1e-4)


# ---------------------------------------------------------------------------- published files

PUBLISHED = {
    "knowedit/ZsRE-test-all.jsonl": (1051, 3, {"generality": 1051, "locality": 2102, "portability": 1051}),
    "knowedit/wiki_counterfact_test_cf.jsonl": (
        819, 0, {"generality": 819, "locality": 5863, "portability": 4705}),
    "knowedit/wiki_counterfact_train_cf.jsonl": (1416, 0, {"locality": 2017, "portability": 2200}),
    "knowedit/wiki_recent_recent_train.jsonl": (570, 0, {"locality": 1939, "portability": 751}),
    "knowedit/wikibio-test-all.jsonl": (306, 0, {"locality": 612}),
    "knowedit/wikibio-train-all.jsonl": (464, 0, {"locality": 928}),
    "wise/hallucination-edit.jsonl": (593, 0, {"locality": 593}),
    "wise/hallucination-train.jsonl": (301, 0, {"locality": 301}),
    "wise/temporal-edit.jsonl": (75, 0, {"generality": 75, "locality": 75}),
    "wise/temporal-train.jsonl": (72, 0, {"generality": 72, "locality": 72}),
    "zsre/zsre_mend_eval_portability_gpt4.jsonl": (
        737, 0, {"generality": 737, "locality": 737, "portability": 737}),
    "zsre/zsre_mend_train_1k.jsonl": (997, 0, {"generality": 997, "locality": 997}),
    "zsre/zsre_inverse_relation.jsonl": (371, 5, {"generality": 371, "portability": 371}),
    "zsre/zsre_subject_replace.jsonl": (285, 3, {"generality": 285, "portability": 285}),
    "counterfact/counterfact.jsonl": (1295, 0, {"generality": 2590, "locality": 12950}),
    "counterfact/counterfact-val.jsonl": (1729, 0, {"generality": 1729, "locality": 1729}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_load_as_they_are(name):
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    number, skipped, expected = PUBLISHED[name]
    data = Edits(str(path), skip_bad=True)
    found = data.cases("test")
    assert (len(found), len(data.problems)) == (number, skipped)
    assert all("does not occur in" in problem for problem in data.problems)
    total = sum((Counter(probes(case)) for case in found), Counter())
    assert dict(total) == {"efficacy": number, **expected}


def test_reading_of_records_can_go_on_after_a_bad_one(tmp_path):
    problems = []
    for name, content in (
        ("a.jsonl", '{"a": 1}\n[]\n{"a": 2}\n'),
        ("a.json", '[{"a": 1}, 3, {"a": 2}]'),
        ("a.csv", "a\n1\n2,3\n2\n"),
    ):
        rows = [
            row for _, row in read_rows(write(tmp_path / name, content), report=problems.append)
        ]
        assert [int(row["a"]) for row in rows] == [1, 2]
    assert len(problems) == 3 and all(isinstance(problem, DataError) for problem in problems)
