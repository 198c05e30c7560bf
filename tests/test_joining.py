"""Where a prompt and its target meet, how a subject is found, and texts that are too long."""

import json
import time

import pytest
import torch

from corrigenda.datamodules.files import DataError, Row
from corrigenda.datamodules.records import Edit, EditCase, Probe, joined, occurrences, prompt_end
from corrigenda.modules.editing.adapters import ModulePatch
from corrigenda.modules.editing.memory import sentence
from corrigenda.modules.editors.alphaedit import AlphaEdit
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.ike import IKE
from corrigenda.modules.editors.kn import KN
from corrigenda.modules.editors.lora import LoRA
from corrigenda.modules.editors.mello import MeLLo
from corrigenda.modules.editors.melo import MELO
from corrigenda.modules.editors.memit import MEMIT
from corrigenda.modules.editors.memprompt import MemPrompt
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.editors.t_patcher import TPatcher
from corrigenda.modules.editors.wise import WISE
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.training.counterfactual import in_front


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("The capital of France is", "Rome", "The capital of France is Rome"),
        ("The capital of France is  ", "  Rome ", "The capital of France is Rome"),
        ("法国的首都是", "罗马", "法国的首都是罗马"),
        ("法国的首都是：", "罗马", "法国的首都是：罗马"),
        ("法国的首都是?", "Rome", "法国的首都是?Rome"),
        ("フランスの首都は", "ローマ", "フランスの首都はローマ"),
        ("ﾌﾗﾝｽﾉ ｼｭﾄﾊ", "ﾛｰﾏ", "ﾌﾗﾝｽﾉ ｼｭﾄﾊﾛｰﾏ"),
        ("コンピューター", "は", "コンピューターは"),
        ("เมืองหลวงของฝรั่งเศสคือ", "โรม", "เมืองหลวงของฝรั่งเศสคือโรม"),
        ("ນະຄອນຫຼວງແມ່ນ", "ໂຣມ", "ນະຄອນຫຼວງແມ່ນໂຣມ"),
        ("រដ្ឋធានីគឺ", "រ៉ូម", "រដ្ឋធានីគឺរ៉ូម"),
        ("မြို့တော်မှာ", "ရောမ", "မြို့တော်မှာရောမ"),
        ("عاصمة فرنسا هي", "روما", "عاصمة فرنسا هي روما"),
        ("फ्रांस की राजधानी", "रोम", "फ्रांस की राजधानी रोम"),
        ("프랑스의 수도는", "로마", "프랑스의 수도는 로마"),
        ("In Chinese it is", "罗马", "In Chinese it is 罗马"),
        ("2 + 2 =", "4", "2 + 2 = 4"),
        ("", "Rome", " Rome"),
        ("", "罗马", "罗马"),
        ("Q: What is it?\nA:\n", "Rome", "Q: What is it?\nA:\nRome"),
        ("def f():\n    ", "return 1", "def f():\n    return 1"),
        ("name:\t", "Rome", "name:\tRome"),
        ("A list:", "\n- Rome", "A list:\n- Rome"),
    ],
)
def test_a_target_follows_its_prompt_as_it_would_be_written(prompt, target, text):
    assert joined(prompt, target) == text
    assert text.startswith(prompt_end(prompt))


def test_the_separator_can_be_chosen(tiny_folder):
    assert joined("法国的首都是", "罗马", " ") == "法国的首都是 罗马"
    assert joined("The capital", "is", "") == "The capitalis"
    folder = str(tiny_folder("gpt2"))
    lm = LanguageModel(folder, separator="")
    rows = lm.tokens.rows(["The cap"], ["ital"])
    assert rows.unpadded() == lm.tokens.encode(["The capital"])


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("法国的首都是", "罗马", "法国的首都是罗马"),
        ("Q: What is it?\nA:\n", "Rome", "Q: What is it?\nA:\nRome"),
        (
            "To open a file, write",
            "with f:\n    read()",
            "To open a file, write with f:\n    read()",
        ),
        ("عاصمة فرنسا هي", "روما", "عاصمة فرنسا هي روما"),
    ],
)
def test_scores_are_those_of_the_text_as_it_is_written(tiny_lm, prompt, target, text):
    """Of files like those of own data: Chinese, Arabic, a line break at a prompt's end or in a target."""
    lm = tiny_lm("llama")
    (row,) = lm.tokens.encode([text])
    start = len(lm.tokens.encode([prompt_end(prompt)])[0])
    with torch.no_grad():
        plain = lm.net(torch.tensor([row])).logits[0].log_softmax(-1)
    wanted = [plain[n - 1, row[n]].item() for n in range(start, len(row))]
    assert lm.score([prompt], [target]).logprob_BM[0].tolist() == pytest.approx(wanted, abs=1e-4)
    case = EditCase("1", (Edit("{} is", "It", target),), {"efficacy": (Probe(prompt, target),)})
    (result,) = EditingModule(lm).evaluate([case])
    assert result.probes[0]["target"] == target


def test_generation_continues_the_prompt_as_it_is_written(tiny_lm, uncached):
    lm = tiny_lm("gpt2")
    for prompt in ("A:\n", "A: ", "法国的首都是"):
        assert lm.generate([prompt], 4) == [uncached(lm, prompt_end(prompt), 4)]
    assert lm.generate(["A:\n"], 4) != lm.generate(["A:"], 4)


def test_whatever_shows_a_fact_writes_it_in_the_same_way(tiny_folder):
    edit = Edit("{}的首都是", "法国", "罗马")
    lm = LanguageModel(str(tiny_folder("gpt2")), separator=" ")
    assert sentence(edit) == "法国的首都是罗马" and in_front(edit, "x") == "法国的首都是罗马\nx"
    patch = MemPrompt(lookup="distance").edit(lm, [edit])
    assert patch.rewrite([edit.text])[0].startswith("Clarification: 法国的首都是 罗马.")
    patch.remove()
    shown = IKE(None, num_demonstrations=0, encoder="lm").edit(lm, [edit]).rewrite(["它是"])[0]
    assert shown.count("法国的首都是 罗马") == 3 and shown.endswith("\nPrompt: 它是")


# ---------------------------------------------------------------------------- subjects


@pytest.mark.parametrize(
    ("text", "subject", "starts"),
    [
        ("Indiana is a state; Indian food comes from the country India", "India", [55]),
        ("Indiana is a state; the capital of India is", "India", [35]),
        ("the Indians", "India", [4]),
        ("São Paulo's mayor", "São Paulo", [0]),
        ("Paris, the capital of France, is named after Paris", "Paris", [0, 45]),
        ("法国的首都是法国", "法国", [0, 6]),
        ("ประเทศฝรั่งเศสคือ", "ฝรั่งเศส", [6]),
        ("C++ or C?", "C", [0, 7]),
        ("(C++)", "C++", [1]),
        ("Rome", "Paris", []),
    ],
)
def test_subjects_are_found_as_whole_words_first(text, subject, starts):
    assert occurrences(text, subject) == starts
    if starts:
        edit = Edit.from_text(text, subject, "x")
        assert edit.text == text and edit.subject_start == occurrences(text, subject)[0]


def test_ambiguous_subjects_are_reported_once_or_marked_with_braces(caplog):
    text = "Rome, the capital of Italy, is named after Rome"
    for _ in range(2):
        edit = Edit.from_text(text, "Rome", "x")
    assert edit.subject_start == 0
    (said,) = [m for m in caplog.messages if "several times" in m]
    assert "'Rome'" in said and "character 1 " in said and "{}" in said
    caplog.clear()
    row = Row("f, line 1", 0, {"src": "Rome is named after {}", "subject": " Rome"})
    assert row.edit("src", "x").subject_start == 20 and not caplog.messages


def test_rows_find_subjects_as_whole_words_whatever_their_case():
    fields = {"src": "INDIANA is near india?", "subject": "India"}
    edit = Row("f, line 1", 0, fields).edit("src", "x")
    assert edit.subject == "india" and edit.subject_start == 16
    with pytest.raises(DataError, match=r"f, line 1, field 'src'.*'Oslo' does not occur"):
        Row("f, line 1", 0, fields | {"subject": "Oslo"}).edit("src", "x")
    with pytest.raises(DataError, match="exactly one {}"):
        Row("f, line 1", 0, fields | {"src": "{} and {}"}).edit("src", "x")


# ---------------------------------------------------------------------------- too long


@pytest.fixture
def short(tiny_lm):
    """Reads at most 40 tokens."""
    return tiny_lm("gpt2", max_position_embeddings=40)


LONG = "The town of " + "very " * 40
TOO_LONG = r"the text 'The town of very .*\.\.\.' has \d+ tokens.* more than the context of '.*', 40 tokens"


@pytest.mark.parametrize(
    "call",
    [
        lambda lm: lm.score([LONG], ["is"]),
        lambda lm: lm.score(["The town of"], ["very " * 40]),
        lambda lm: lm.generate([LONG], 2),
        lambda lm: lm.generate(["The town of very"], 40),
        lambda lm: lm.tokens.rows([LONG]),
        lambda lm: EditingModule(lm).known(
            [EditCase("1", (Edit("The town of {}", LONG, "x", "y"),))]
        ),
    ],
    ids=["prompt", "target", "generate", "answer", "rows", "known"],
)
def test_what_is_too_long_is_named(short, call):
    with pytest.raises(ValueError, match=r"more than the context of '.*', 40 tokens") as error:
        call(short)
    assert "The town of" in str(error.value) and len(str(error.value)) < 400


def editors(data_files, lm):
    corpus = Corpus(data_files.text, 1000)
    value = {"contexts": [(2, 2)], "corpus": corpus, "steps": 2}
    return {
        "ROME": lambda: ROME(0, **value),
        "MEMIT": lambda: MEMIT([0], **value),
        "AlphaEdit": lambda: AlphaEdit([0], **value),
        "FT": lambda: FT([1], steps=2),
        "LoRA": lambda: LoRA([1], steps=2),
        "GRACE": lambda: GRACE(1, epsilon=0.5, steps=2),
        "MELO": lambda: MELO(0, [1], steps=2),
        "WISE": lambda: WISE(1, corpus=Corpus(data_files.text), steps=2),
        "TPatcher": lambda: TPatcher(corpus=corpus, steps=2),
        "KN": lambda: KN(),
        "MEND": lambda: MEND(lm),
        "IKE": lambda: IKE(None, num_demonstrations=0, encoder="lm"),
        "MemPrompt": lambda: MemPrompt(lookup="distance"),
        "MeLLo": lambda: MeLLo(encoder="lm"),
    }


NAMES = [*editors(type("", (), {"text": ""}), None)]


@pytest.mark.parametrize("name", NAMES)
def test_no_editor_makes_an_edit_that_is_too_long(short, data_files, name):
    editor = editors(data_files, short)[name]()
    edit = Edit(LONG + "{} is", "Onna", "red")
    with pytest.raises(ValueError, match="context of"):
        editor.edit(short, [edit])
        short.score([edit.text], [edit.target_new])  # what is shown in the prompt is read there
    assert all(not isinstance(handle, ModulePatch) for handle in short.handles)


@pytest.mark.parametrize("name", NAMES)
def test_ten_megabytes_are_refused_at_once(short, data_files, name):
    editor = editors(data_files, short)[name]()
    editor.prepare(short)
    text = "word " * 2_000_000
    edit = Edit("{} is " + text, "Onna", "red")
    start = time.process_time()
    for call in (
        lambda: short.score([text], ["is"]),
        lambda: short.score(["It"], [text]),
        lambda: short.generate([text], 2),
        lambda: editor.edit(short, [edit]),
    ):
        with pytest.raises(ValueError, match=r"has 10,000,0\d\d characters|has 10,000,000"):
            call()
    assert time.process_time() - start < 2 and not short.handles


def test_the_command_line_says_so_in_one_line(
    corrigenda, tiny_folder, data_files, tmp_path, capsys
):
    record = {
        "subject": "Onna",
        "src": f"{LONG} Who is Onna?",
        "rephrase": "Onna is who?",
        "alt": "red",
    }
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    run = [
        "validate", "--model", "EditingModule", "--edit.editor", "FT", "--edit.editor.layers", "[1]",
        "--data", "ZsRE",
        "--model.lm.name", tiny_folder("gpt2", max_position_embeddings=40), "--wandb", "off",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--edit.editor.steps", "1",
    ]  # fmt: skip
    assert corrigenda(*run, "--data.path", "long.jsonl", "--run_dir", "long") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "more than the context" in error
    assert not (tmp_path / "long" / "summary.json").exists()
    means = []
    for separator in ("auto", " ", ""):
        given = ["--model.lm.separator", separator, "--run_dir", f"run{len(means)}"]
        assert corrigenda(*run, "--data.path", data_files.zsre, *given) == 0
        text = (tmp_path / f"run{len(means)}" / "summary.json").read_text()
        means.append(json.loads(text)["means"])
    assert means[0] == means[1] != means[2]
