"""``corrigenda edit``: one fact and several from the shell, the conversation, model cards and their upload."""

import io
import json
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from corrigenda.datamodules.records import Edit
from corrigenda.modules import hub
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import hash_weights
from corrigenda.pipeline import cards, doctor, method
from corrigenda.pipeline.chat import HELP
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.session import Fact

ONE = ["--prompt", "The capital of {} is", "--subject", "Zorbania", "--target", "Quill Port"]
EDITORS = {
    "lora": ("lora.LoRA", {"layers": [0, 1], "targets": "mlp", "rank": 2, "alpha": 2, "steps": 60, "lr": 0.05}),
    "grace": ("grace.GRACE", {"layer": 1, "epsilon": 0.5, "lr": 1.0, "steps": 50}),
    "memprompt": ("memprompt.MemPrompt", {"encoder": "lm", "threshold": 0.5}),
}  # fmt: skip


@pytest.fixture
def edit(corrigenda, capsys, tiny_folder, tmp_path, monkeypatch):
    """``edit(*words, said="", status=0)``: what the command says of a tiny model, with lines to talk to it."""
    for name, (path, arguments) in EDITORS.items():
        editor = {"class_path": f"corrigenda.modules.editors.{path}", "init_args": arguments}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"edit": {"editor": editor}}))

    def run(*words, said="", status=0, editor="lora.yaml"):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        capsys.readouterr()
        words = [*words, "--editor", editor, "--tokens", "12"]
        assert corrigenda("edit", tiny_folder("llama"), *words) == status, capsys.readouterr()
        captured = capsys.readouterr()
        return captured.err if status == 2 else captured.out

    return run


def test_one_fact_with_paraphrases_and_neighbours(edit):
    out = edit(*ONE, "--rephrase", "Zorbania is ruled from", "--locality", "The capital of Oz is")
    assert re.search(
        r"The capital of Zorbania is  \(prompt\)\n  before  .*\n  after   Quill Port", out
    )
    assert re.search(r"P\(Quill Port\)  [\d.e-]+ % -> [\d.e-]+ %", out)
    assert "prompt:          1 of 1 with the expected answer" in out
    assert "Zorbania is ruled from  (paraphrase)" in out and "of 1 with the same answer" in out
    assert re.search(r"^1 edit in \d+\.\d s", out, re.M)
    assert max(map(len, out.splitlines())) <= 80


def test_the_subject_is_found_whatever_its_case():
    case = Fact("Who rules zorbania?", "Zorbania", "Otto", ["{}'s king is"], ["Near {}:"]).case()
    assert case.edits == (Edit("Who rules {}?", "zorbania", "Otto"),)
    assert case.probes["generality"][0].prompt == "zorbania's king is"
    assert case.probes["locality"][0].prompt == "Near Zorbania:"


def test_several_facts_from_a_file(edit, tmp_path):
    (tmp_path / "facts.csv").write_text(
        "prompt,subject,target_new\nThe capital of {} is,Zorbania,Quill Port\n{} lives in,Otto,Ruritania\n"
    )
    out = edit("--file", "facts.csv", "--save", "two.safetensors")
    assert "2 edits in" in out and "2 of 2 with the expected answer" in out
    assert "saved in two.safetensors" in out and (tmp_path / "two.safetensors").is_file()


CONVERSATION = """
The capital of Zorbania is
/edits
/edit {} lives in | Otto | Ruritania
/edits
/save both.safetensors
/undo
/undo
/undo
/edits
/save none.safetensors
/edit too | few
/edit a | b | c
/nonsense
/help
/quit
never read
"""


@pytest.mark.parametrize("editor", EDITORS)
def test_a_conversation(edit, corrigenda, capsys, editor):
    out = edit(*ONE, "--chat", said=CONVERSATION, editor=f"{editor}.yaml")
    told = out.partition("/help lists the commands.\n")[2]
    first, second = "The capital of Zorbania is -> Quill Port", "Otto lives in -> Ruritania"
    begin = "> \n> The capital of Zorbania is\n" + ("Quill Port" if editor == "lora" else "")
    assert told.startswith(begin)  # the other two make too little of a random model
    assert f"> /edits\n  1  {first}\n> /edit" in told
    assert f"> /edits\n  1  {first}\n  2  {second}\n> /save both.safetensors\nsaved in" in told
    assert f"> /undo\nremoved: {second}\n> /undo\nremoved: {first}\n> /undo\nerror: " in told
    assert "> /edits\nno edit is active\n> /save none.safetensors\nerror: there is no edit" in told
    assert "error: /edit needs three parts" in told and "error: unknown command '/nonsense'" in told
    assert "'b' does not occur in 'a'" in told
    assert told.endswith(f"> /help\n{HELP}\n> /quit\n")
    if editor != "grace":  # of which `edits show` knows nothing
        capsys.readouterr()
        corrigenda("edits", "show", "both.safetensors")
        shown = capsys.readouterr().out
        assert "{Zorbania} is -> Quill Port" in shown and "{Otto} lives in -> Ruritania" in shown


def test_undone_edits_leave_nothing(edit, monkeypatch):
    """After /undo all weights are the original ones."""
    seen = []
    note = remembering(LanguageModel.generate, lambda lm: seen.append(hash_weights(lm.net)))
    monkeypatch.setattr(LanguageModel, "generate", note)
    edit(*ONE, "--chat", said="/undo\nThe capital of Zorbania is\n")
    before, after, undone = seen
    assert before == undone != after


def remembering(method, note):
    def call(lm, *args, **kwargs):
        note(lm)
        return method(lm, *args, **kwargs)

    return call


def test_text_arrives_while_it_is_written(llama):
    """Pieces of text add up to the answer, and come one token at a time."""
    pieces = []
    (text,) = llama.generate(["The river"], 12, on_text=pieces.append)
    assert "".join(pieces) == text.removesuffix("\ufffd") and len(pieces) > 3


# ---------------------------------------------------------------------------- methods


def test_shipped_settings_are_found_by_the_models_name():
    found = method.find_settings("rome", "openai-community/gpt2-xl")
    assert found.source == "configs/rome/gpt2-xl.yaml" and found.fits
    assert method.find_settings("rome", "smollm2").source == "configs/rome/smollm2.yaml"
    assert not method.find_settings("rome", "some/other").fits


@pytest.mark.parametrize("name", ["nope", "../rome", "", "base"])
def test_unknown_methods(name):
    with pytest.raises(UserError, match=f"unknown editor '{name}': choose one of .*rome"):
        method.find_settings(name, "smollm2")


@pytest.mark.parametrize("name", ["mend", "ke", "malmen"])
def test_methods_that_must_be_trained_first(name):
    with pytest.raises(
        UserError, match=f"{name} must be trained before .* fit -c configs/{name}/smollm2"
    ):
        method.find_settings(name, "smollm2")


def test_low_layers_are_the_doctors_for_another_model(llama, monkeypatch):
    proposal = doctor.Proposal(1, [1, 2], [1, 2], [2], "because")
    monkeypatch.setattr(doctor, "propose", lambda lm: proposal)
    rome, source = method.build(method.find_settings("rome", "other"), llama)
    assert rome.layer == 1 and rome.corpus.tokens == doctor.moment_tokens(llama)
    assert source == "configs/rome/smollm2.yaml, with the doctor's proposal: layer 1 (because)"
    assert method.build(method.find_settings("memit", "other"), llama)[0].layers == [1, 2]
    assert method.build(method.find_settings("rect", "other"), llama)[0].editor.layer == 1
    assert method.build(method.find_settings("ft", "other"), llama)[0].layers == [1]


def test_high_layers_keep_their_relative_depth(llama):
    grace, source = method.build(method.find_settings("grace", "other"), llama)
    assert grace.layer == 2 and "moved to the same relative depth: layer 2" in source
    melo, _ = method.build(method.find_settings("melo", "other"), llama)
    assert melo.layer == 0 and list(melo.layers) == [1, 2]


def test_a_trained_editor_from_its_checkpoint(edit, tiny_folder, data_files, corrigenda, tmp_path):
    model = ["--model", "MEND", "--model.lm.name", tiny_folder("llama"), "--model.layers", "[1]",
             "--model.rank", "4"]  # fmt: skip
    data = [
        "--data",
        "ZsRE",
        "--data.path",
        data_files.zsre,
        "--data.train_path",
        data_files.zsre_train,
    ]
    steps = ["--trainer.max_steps", "1", "--wandb", "off", "--run_dir", "mend"]
    assert corrigenda("fit", *model, *data, *steps, "--trainer.accelerator", "cpu") == 0
    assert "1 edit in" in edit(*ONE, editor="mend/checkpoints/last.ckpt")
    assert MEND.load_from_checkpoint("mend/checkpoints/last.ckpt").layers == [1]


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", "It is", "--subject", "Otto", "--target", "x"], "'Otto' does not occur in 'It is'"),
        (["--prompt", "Otto Otto", "--subject", "Otto", "--target", "x"], "occurs 2 times"),
        (["--prompt", "Otto is", "--subject", "Otto"], "one fact needs --prompt, --subject and --target"),
        (["--rephrase", "x"], "one fact needs --prompt"),
        ([*ONE, "--file", "facts.csv"], "either one fact .* or --file"),
        ([], "either one fact .* or --file"),
        ([*ONE, "--save", "lora.yaml"], "lora.yaml exists"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_before_the_model_is_loaded(edit, words, says):
    err = edit(*words, status=2)
    assert re.search(says, err) and err.count("\n") == 1 and "loading" not in err


def test_zero_tokens_are_refused(corrigenda, capsys):
    assert corrigenda("edit", "smollm2", *ONE, "--tokens", "0") == 2
    assert "tokens must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("model: {}", "no edit.editor"),
        ("model: 3", "expected a mapping of options with edit.editor"),
        ("[1]", "expected a mapping"),
        ("edit: {editor: {class_path: os.system}}", "os.system"),
        ("edit: {editor: {class_path: corrigenda.modules.editors.rome.ROME, init_args: {layer: x}}}", "layer"),
    ],
)  # fmt: skip
def test_configurations_that_name_no_editor(edit, tmp_path, content, says):
    (tmp_path / "bad.yaml").write_text(content)
    err = edit(*ONE, editor="bad.yaml", status=2)
    assert re.search(says, err.splitlines()[-1]) and "bad.yaml" in err


# ---------------------------------------------------------------------------- cards


@pytest.fixture
def exported(tiny_lm, corrigenda, tmp_path):
    """``exported(format)``: edits of a tiny model and what ``edits export`` makes of them."""

    def make(kind):
        lm = tiny_lm("llama")
        one = Edit("The capital of {} is", "Zorb|ania", "Quill Port")
        editor = FT([1], steps=60, lr=2e-2)
        editor.stamp(lm, editor.propose(lm, [one]), [one]).save(tmp_path / "a.safetensors")
        assert corrigenda("edits", "export", "a.safetensors", "--format", kind, "--out", kind) == 0
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", ["peft", "hf"])
def test_a_card_names_base_edits_method_and_numbers(exported, corrigenda, kind):
    folder = exported(kind)
    assert corrigenda("edits", "card", "a.safetensors", folder, "--base", "me/tiny") == 0
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["base_model"] == "me/tiny" and "ft" in header["tags"]
    assert header["library_name"] == {"peft": "peft", "hf": "transformers"}[kind]
    row = re.search(
        r"\| The capital of Zorb\\\|ania is \| Quill Port \| (.+) % \| (.+) % \| yes \|", text
    )
    assert float(row[1]) < float(row[2]) <= 100
    assert "1 of 1 edits hold" in text and "method: FT" in text and "layers.1" in text
    used = re.search(r"```python\n(.*?)```", text, re.S)[1]
    compile(used, "card", "exec")
    if kind == "peft":
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == "me/tiny" and '"me/tiny"' in used
    assert corrigenda("edits", "card", "a.safetensors", folder, "--base", "me/tiny") == 2


def test_a_card_needs_a_hub_id_and_its_own_export(exported, corrigenda, capsys, tmp_path):
    folder = exported("peft")
    for words, says in (
        (["a.safetensors", folder], "not named by a Hub id: give it with --base"),
        (["a.safetensors", tmp_path, "--base", "me/tiny"], "is not an export"),
        (["a.safetensors", folder, "--base", "a b"], "not named by a Hub id"),
    ):
        capsys.readouterr()
        assert corrigenda("edits", "card", *words) == 2 and says in capsys.readouterr().err
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("layers.1", "layers.0"))
    assert corrigenda("edits", "card", "a.safetensors", folder, "--base", "me/tiny") == 2
    assert "it changes other layers" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_the_embedded_models_hub_id():
    assert cards._hub_id("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert cards._hub_id("openai-community/gpt2-xl") == "openai-community/gpt2-xl"


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """A folder with a card, a hub that responds and a token, and what is uploaded."""
    (tmp_path / "out").mkdir()
    for name in ("README.md", "config.json"):
        (tmp_path / "out" / name).write_text("{}")
    sent = SimpleNamespace(repos=[], folders=[])
    monkeypatch.setattr(hub, "responds", lambda: True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda repo, **how: sent.repos.append((repo, how))
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **what: sent.folders.append(what))
    return sent


def test_push_uploads_the_folder(pushed, corrigenda, tmp_path):
    assert corrigenda("edits", "push", "out", "me/edits", "--private", "true") == 0
    assert pushed.repos == [("me/edits", {"private": True, "exist_ok": True})]
    assert [str(what["folder_path"]) for what in pushed.folders] == ["out"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("network", "the Hugging Face Hub does not respond"),
        ("token", "push needs a token"),
        ("card", "has no model card"),
        ("name", "must be owner/name"),
        ("upload", "cannot push to me/edits: 403 forbidden"),
    ],
)
def test_push_says_what_it_needs(pushed, corrigenda, capsys, tmp_path, monkeypatch, broken, says):
    def forbidden(**_):
        raise OSError("403\nforbidden")

    if broken == "network":
        monkeypatch.setattr(hub, "responds", lambda: False)
    elif broken == "token":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    elif broken == "card":
        (tmp_path / "out" / "README.md").unlink()
    elif broken == "upload":
        monkeypatch.setattr(huggingface_hub, "upload_folder", forbidden)
    repo = "edits" if broken == "name" else "me/edits"
    assert corrigenda("edits", "push", "out", repo) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not pushed.folders
