"""Models that cannot be edited are refused in one line when they are loaded, or when they first give nonsense."""

import json
import shutil
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from corrigenda.modules import hub
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import ModelError
from corrigenda.modules.retrieval.encoder import TextEncoder
from corrigenda.modules.statistics.corpus import Corpus

BERT = {
    "vocab_size": 404,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a tiny model that a test may damage."""
    return shutil.copytree(tiny_folder("gpt2"), tmp_path / "model")


def weights(folder, change):
    """Changes the stored tensors of a model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(folder):
    with pytest.raises(ModelError) as error:
        LanguageModel(str(folder))
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


def put_model(net, folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    net.save_pretrained(folder)


def test_an_encoder_without_a_head_is_not_given_a_random_one(folder):
    config = BertConfig(**BERT)
    put_model(AutoModel.from_config(config), folder)
    assert "lacks" in (message := refusal(folder)) and "cls.predictions" in message


def test_a_model_that_looks_ahead_is_refused(folder):
    """Its weights are complete, and nothing in its config says that it is an encoder."""
    put_model(BertLMHeadModel(BertConfig(**BERT)), folder)
    assert "looks at the tokens that follow" in refusal(folder)


def test_an_encoder_decoder_is_refused(folder):
    config = T5Config(vocab_size=404, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    put_model(T5ForConditionalGeneration(config), folder)
    assert "encoder-decoder, t5" in refusal(folder)


def test_weights_that_are_missing_are_named(folder):
    weights(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_proj.weight"))
    assert "lacks 1 weights" in (message := refusal(folder)) and "h.1.mlp.c_proj.weight" in message


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"{}"),
        ("model.safetensors", None),  # cut
        ("model.safetensors", b""),
        ("tokenizer.json", b'{"a": 1}'),
    ],
)
def test_damaged_files(folder, file, content):
    content = (folder / file).read_bytes()[:1000] if content is None else content
    (folder / file).write_bytes(content)
    assert "cannot load the model" in refusal(folder)


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal(folder)


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('run')")
    assert "cannot load the model" in refusal(folder)


def test_a_model_whose_logits_are_nan_is_refused(folder):
    weights(folder, lambda tensors: tensors["transformer.ln_f.weight"].fill_(torch.nan))
    assert "not finite" in (message := refusal(folder)) and "float32" in message


def test_unedited_scores_that_are_nan_are_an_error_and_edited_ones_a_result(tiny_lm):
    lm = tiny_lm("gpt2")
    name = lm.structure.out_name(1) + ".weight"
    shape = lm.net.get_parameter(name).shape[::-1]
    broken = Delta({name: torch.full(tuple(shape), torch.nan)})
    assert lm.score(["The town"], ["is"], [broken]).logprob_BM.isnan().all()
    patch = WeightPatch(lm, broken)
    assert lm.score(["The town"], ["is"]).logprob_BM.isnan().all()
    with lm.pristine():
        assert lm.score(["The town"], ["is"]).logprob_BM.isfinite().all()
    patch.remove()
    lm.net.get_parameter(name).data.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite for ordinary text"):
        lm.score(["The town"], ["is"])


def test_a_token_beyond_the_embedding_is_refused_when_it_is_met(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra-{n}>" for n in range(10)])
    tokenizer.save_pretrained(folder)
    lm = LanguageModel(str(folder))  # as published models with a few spare tokens
    lm.score(["The town"], ["is"])
    with pytest.raises(
        ModelError, match=r"token '<extra-9>' has the id 409, and the model embeds 404"
    ):
        lm.score(["The town <extra-9>"], ["is"])


@pytest.mark.parametrize("load", [LanguageModel, TextEncoder])
def test_without_a_network_an_unknown_model_fails_at_once(load, monkeypatch):
    """One request finds that out; transformers would retry each file for half a minute."""
    calls = []

    class Session:
        def head(self, url, timeout):
            calls.append(timeout)
            raise ConnectionError("no network")

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY", None)
    start = time.perf_counter()
    with pytest.raises(ModelError, match="cannot load .* 'nobody-here/no-such-model'"):
        load("nobody-here/no-such-model")
    assert calls == [5.0] and time.perf_counter() - start < 15


def test_no_perplexity_is_compared_with_that_of_a_broken_model(tiny_lm, data_files):
    lm = tiny_lm("gpt2")
    lm.net.get_input_embeddings().weight.data.fill_(torch.nan)
    corpus = Corpus(data_files.text, 50)
    with pytest.raises(ModelError, match="not finite for ordinary text"):
        EditingModule(lm, perplexity=corpus)._perplexity(corpus)
