"""``chat: true``: prompts inside the chat template, in editing, evaluation and generation."""

from pathlib import Path

import pytest
import torch

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.ike import IKE
from corrigenda.modules.editors.memit import MEMIT
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.model.chat import ChatTemplate, answer_of
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import ModelError
from corrigenda.modules.statistics.corpus import Corpus

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
FORMS = {
    "chatml": ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
               "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"),
    "llama": ("<s>{{ strftime_now('%d %b %Y') }} {{ date_string }}{% for m in messages %}"
              "\n{{ m['role'] }}:\n\n{{ m['content'] | trim }}</s>{% endfor %}"
              "{% if add_generation_prompt %}\nassistant:\n\n{% endif %}"),
    "mistral": ("<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
                "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"),
    "qwen": ("{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}</s>\n{% endfor %}"
             "{% if add_generation_prompt %}[assistant]\n"
             "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"),
    "thinks": ("{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}</s>\n{% endfor %}"
               "{% if add_generation_prompt %}[assistant]\n<think>\n{% endif %}"),
}  # fmt: skip
EDIT = Edit("The capital of {} is", "Zorbania", "Quill Port")
OTHER = Edit("Who leads {} now?", "Mount Brel", "Otto")


@pytest.fixture
def templated(tiny_folder, tmp_path):
    """``templated(template, **options)``: a tiny model whose tokenizer has that template."""

    def load(template=TEMPLATE, family="llama", **options):
        lm = LanguageModel(str(tiny_folder(family, num_hidden_layers=3)))
        lm.tokenizer.chat_template = template
        folder = tmp_path / "model"
        lm.net.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        return LanguageModel(str(folder), **{"chat": True, **options})

    return load


@pytest.fixture(scope="module")
def corpus(data_files):
    return Corpus(data_files.text, tokens=1500)


# ---------------------------------------------------------------------------- the template


class Tokenizer:
    """What a template needs of a tokenizer."""

    def __init__(self, template, real):
        self.template, self.real = template, real

    def get_chat_template(self):
        return self.template

    def apply_chat_template(self, *args, **kwargs):
        return self.real.apply_chat_template(*args, **kwargs)


@pytest.fixture
def template(llama):
    return lambda text: ChatTemplate.of(Tokenizer(text, llama.tokenizer), "tiny")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("said", ["Who?", "  two\nlines ", "{{ braces }}"])
def test_the_text_is_the_templates(template, llama, form, said):
    """A prompt in the text around the placeholder is what the template makes of that prompt."""
    made = template(FORMS[form])
    dated = FORMS[form].replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    expected = llama.tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], chat_template=dated,
        tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024",
    )  # fmt: skip
    text, offset = made.around(said)
    more = {"mistral": " ", "thinks": "\n</think>\n\n"}.get(form, "")
    assert text == (expected.rstrip() if form == "thinks" else expected) + more
    word = said.split()[0]
    assert text[offset + said.index(word) :].startswith(word)


def test_thinking_is_off_and_dates_are_fixed(template):
    assert template(FORMS["qwen"]).tail.endswith("[assistant]\n<think>\n\n</think>\n\n")
    assert template(FORMS["thinks"]).tail.endswith("<think>\n</think>\n\n")
    dated = "{{ strftime_now('%A, %d %B %Y, %H:%M') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    assert template(dated).head == "Friday, 26 July 2024, 00:00 "


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no chat template: leave out chat"),
        ("{{ raise_exception('only in pairs') }}", "cannot be used: only in pairs"),
        ("{{ messages[0].content | upper }}", "does not contain the user's words"),
        ("{% if %}", "cannot be used"),
        ("nothing", "does not contain the user's words"),
    ],
)
def test_templates_that_cannot_be_used(template, llama, text, says):
    with pytest.raises(ModelError, match=says):
        template(text) if text else ChatTemplate.of(llama.tokenizer, "tiny")


def test_a_model_without_a_template_is_refused_in_one_line(corrigenda, capsys, tiny_folder):
    words = [
        "--model",
        "EditingModule",
        "--model.lm.name",
        tiny_folder("llama"),
        "--model.lm.chat",
        "true",
        "--wandb",
        "off",
    ]
    assert corrigenda("validate", *words, "--data", "Facts") == 2
    err = capsys.readouterr().err
    assert "has no chat template" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris", "Paris"),
        ("<think>Is it?</think>\n\nParis", "\n\nParis"),
        ("It is.</think>Paris", "Paris"),
        ("\n<think>Is it", ""),
    ],
)
def test_thinking_parts_are_left_out(text, answer):
    assert answer_of(text) == answer


# ---------------------------------------------------------------------------- tokens


def test_prompts_and_targets_stand_in_the_template(templated):
    lm = templated()
    (row,) = lm.tokens.rows([EDIT.text], [EDIT.target_new]).unpadded()
    said = lm.tokenizer.decode(row, clean_up_tokenization_spaces=False)
    assert said == f"[user] {EDIT.text}<|end|>\n[assistant] {EDIT.target_new}"
    (alone,) = lm.tokens.rows([EDIT.text]).unpadded()
    assert row[: len(alone)] == alone
    plain = lm.tokens.encode([EDIT.text])[0]
    assert lm.tokenizer.decode(plain, skip_special_tokens=True) == EDIT.text


@pytest.mark.parametrize("context", ["", "The river is long. "])
def test_the_subject_is_found_in_the_template(templated, context):
    lm = templated()
    (row,) = lm.tokens.rows([context + EDIT.text]).unpadded()
    last = lm.tokens.subject_end(EDIT, context)
    assert lm.tokenizer.decode(row[: last + 1]).endswith(f"{context}The capital of {EDIT.subject}")


def test_answers_end_with_the_turn(templated):
    """Also where the turn ends with another token than a text."""
    lm = templated(TEMPLATE.replace("<|end|>", "<|begin|>"))
    assert lm.tokens.ends == [1, 0] and lm.tokens.end_token == 1
    assert templated().tokens.ends == [0]
    (row,) = lm.tokens.rows([EDIT.text], [EDIT.target_new], end=True).unpadded()
    assert row[-1] == 1
    head = lm.net.get_output_embeddings()
    with torch.no_grad():  # every answer is the end of the turn
        head.weight.zero_()
        head.weight[1] = lm.net.get_decoder()(
            torch.tensor([lm.tokens.encode_prompts(["x"])[0]])
        ).last_hidden_state[0, -1]
    assert lm.generate(["x"], 5) == [""]


# ---------------------------------------------------------------------------- methods


def methods(corpus):
    search = {"steps": 10, "contexts": [(4, 2)], "corpus": corpus}
    return {
        "rome": ROME(layer=0, **search),
        "memit": MEMIT(layers=[0, 1], **search),
        "ft": FT([1], steps=5, lr=1e-2),
        "grace": GRACE(layer=1, epsilon=0.5, lr=1.0, steps=10),
    }


@pytest.mark.parametrize("name", ["rome", "memit", "ft", "grace"])
def test_methods_edit_what_is_asked_in_the_chat(templated, corpus, name):
    """An edit changes the answer in the chat, equals the one without reuse, and differs from a plain one."""
    found = {}
    for kind, options in {
        "chat": {},
        "reference": {"reuse_prefix": False},
        "plain": {"chat": False},
    }.items():
        lm = templated(**options)
        before = lm.score([EDIT.text], [EDIT.target_new]).logprob_BM.sum()
        methods(corpus)[name].edit(lm, [EDIT])
        after = lm.score([EDIT.text, OTHER.text], [EDIT.target_new, OTHER.target_new])
        assert abs(after.logprob_BM[0].sum() - before) > 0.01
        found[kind] = after.logprob_BM
    torch.testing.assert_close(found["chat"], found["reference"], rtol=1e-3, atol=1e-3)
    assert found["plain"].shape != found["chat"].shape or not torch.allclose(
        found["plain"], found["chat"]
    )


def test_ike_shows_its_demonstrations_inside_the_users_turn(templated, monkeypatch):
    lm = templated()
    IKE(pool=None, num_demonstrations=0, encoder="lm").edit(lm, [EDIT])
    read = []
    encode = lm.tokens._encode
    monkeypatch.setattr(lm.tokens, "_encode", lambda texts: read.extend(texts) or encode(texts))
    lm.generate(["Where is it?"], 3)
    fact = f"{EDIT.text} {EDIT.target_new}"
    asked = f"New Fact: {fact}\nPrompt: {fact}\n\nNew Fact: {fact}\nPrompt: Where is it?"
    assert read[0] == f"[user] {asked}<|end|>\n[assistant] "


def test_contexts_and_corpora_stay_plain(templated):
    """Statistics are of text, not of conversations; so is perplexity."""
    chat, plain = templated(), templated(chat=False)
    with chat.tokens.as_written():
        written = chat.generate(["The"], 6)
    assert written == plain.generate(["The"], 6)
    assert chat.generate(["The"], 6) != plain.generate(["The"], 6)
    assert chat.perplexity(["The river is long."], 50) == plain.perplexity(
        ["The river is long."], 50
    )


# ---------------------------------------------------------------------------- files and runs


def test_files_say_which_template_an_edit_was_made_with(templated, corrigenda, capsys, tmp_path):
    lm = templated()
    handle = FT([1], steps=60, lr=2e-2).edit(lm, [EDIT])
    handle.save(tmp_path / "a.safetensors")
    assert handle.delta.metadata["chat"] == lm.tokens.template.form
    capsys.readouterr()
    assert corrigenda("edits", "verify", "a.safetensors") == 0  # in the chat, without being told
    assert "1 of 1 edits verified" in capsys.readouterr().out


def test_a_run_says_that_it_chatted_and_is_not_resumed_otherwise(
    templated, corrigenda, data_files, capsys
):
    lm = templated()
    words = ["--model", "EditingModule", "--model.lm.name", lm.name, "--data", "CounterFact", "--wandb", "off",
             "--data.path", data_files.counterfact, "--edit.editor", "FT", "--edit.editor.layers", "[1]",
             "--edit.editor.steps", "1", "--run_dir", "run", "--trainer.accelerator", "cpu"]  # fmt: skip
    assert (
        corrigenda(
            "validate", *words, "--model.lm.chat", "true", "--trainer.limit_val_batches", "1"
        )
        == 0
    )
    summary = (Path("run") / "summary.json").read_text()
    assert '"tf_exact+chat@each"' in summary
    (Path("run") / "summary.json").unlink()
    capsys.readouterr()
    assert corrigenda("validate", *words, "--trainer.limit_val_batches", "1") == 2
    assert "--model.lm.chat has changed" in capsys.readouterr().err


def test_a_trained_editor_keeps_to_its_template(templated, corrigenda, data_files, capsys):
    lm = templated()
    words = ["--model", "MEND", "--model.lm.name", lm.name, "--model.layers", "[1]", "--model.rank", "4",
             "--data", "ZsRE", "--data.path", data_files.zsre, "--data.train_path", data_files.zsre_train,
             "--wandb", "off", "--trainer.accelerator", "cpu"]  # fmt: skip
    chat = ["--model.lm.chat", "true", "--trainer.max_steps", "1", "--run_dir", "mend"]
    assert corrigenda("fit", *words, *chat) == 0
    file = "mend/checkpoints/last.ckpt"
    assert MEND.load_from_checkpoint(file).lm.tokens.form == lm.tokens.form
    capsys.readouterr()
    assert corrigenda("validate", *words, "--ckpt_path", file, "--run_dir", "other") == 2
    assert "trained with another form of prompts" in capsys.readouterr().err
