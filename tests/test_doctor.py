"""The doctor: what it says of models, where it would edit, and whether its edit went in and out."""

import random
from functools import partial

import pytest
import torch
import transformers
import yaml

from corrigenda.datamodules.fact_tables import Fact, Relation
from corrigenda.datamodules.facts import Facts
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import UnsupportedModel, find_structure
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.statistics.tracing import LAST_SUBJECT, ROLES, CausalTrace, causal_trace
from corrigenda.pipeline import doctor as module
from corrigenda.pipeline.doctor import propose_layers, self_test
from corrigenda.pipeline.errors import UserError

PLACES = ["stone", "story", "river", "lake", "forest", "winter", "piano", "storm", "harbour", "village",
          "tower", "table", "city", "company", "south", "engine", "mountain", "letter", "daughter",
          "children"]  # fmt: skip
STATEMENT, AGAIN = "The capital of {} is", "In {} they go to the"
RELATION = Relation("capital", STATEMENT, (AGAIN,) * 6, "What is the capital of {}?")
FACTS = tuple(
    Fact(RELATION, f"Zorba {last}", place)
    for last, place in zip("tioaswcmfpbdegklnryI", PLACES, strict=True)
)
BEFORE = ["", "", "It was said. ", "He works there. "]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """A GPT-2 that knows twenty facts; attention of its first block is off (see test_rome)."""
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder("gpt2"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(
        tiny_folder("gpt2"), loss_type="ForCausalLM", hidden_size=64, initializer_range=0.05,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net = transformers.AutoModelForCausalLM.from_config(config).train()
    net.transformer.h[0].attn.c_proj.weight.data.zero_()
    net.transformer.h[0].attn.requires_grad_(False)
    learned = [p for p in net.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learned, lr=5e-3, weight_decay=0.01)
    steps, draw = 200, random.Random(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 5e-3, total_steps=steps)
    for _ in range(steps):
        batch = [
            f"{draw.choice(BEFORE)}{fact.say(draw.choice([STATEMENT, AGAIN]))} {fact.object}."
            for fact in FACTS
        ]
        ids = [torch.tensor(row) for row in tokenizer(batch).input_ids]
        labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        loss = net(labels.clamp(min=0), labels=labels, use_cache=False).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def taught(trained, monkeypatch):
    """That model in a world that has no other facts, and ROME with steps that suit its size."""
    monkeypatch.setattr("corrigenda.datamodules.facts.all_facts", lambda: FACTS)
    search = {"steps": 30, "lr": 0.05, "clamp_norm": 10, "weight_decay": 0.01}
    monkeypatch.setattr(module, "ROME", partial(ROME, contexts=[(4, 5)], **search))
    return trained


def section(text, title):
    """The lines of one part of the report."""
    return text.split(f"{title}\n", 1)[1].split("\n\n", 1)[0]


# --- the command ---


def test_a_model_that_knows_something(corrigenda, taught, tmp_path, capsys):
    args = [
        "doctor",
        taught,
        "--out",
        "found",
        "--facts",
        "4",
        "--samples",
        "3",
        "--tokens",
        "3000",
    ]
    assert corrigenda(*args) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    found = section(text, "Model")
    for part in ("2 at transformer.h, width 64", "mlp.c_proj, 256 -> 64, stored [in, out]", "attn",
                 "mlp.c_fc (plain)", "ln_1, ln_2", "transformer.ln_f", "lm_head, tied to",
                 "128 tokens"):  # fmt: skip
        assert part in found
    traced = section(text, "Causal trace")
    facts = [case.edits[0] for case in Facts().cases("train")]
    assert traced.startswith("  4 facts, such as ") and any(repr(f.text) in traced for f in facts)
    clean, corrupted = (float(word.strip(",")) for word in traced.split() if word[:2] == "0.")
    assert clean > 0.5 > corrupted
    assert (
        "block outputs: largest effect at the " in traced
        and "MLP outputs: largest effect at the " in traced
    )
    assert (tmp_path / "found" / "causal_trace.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((tmp_path / "found" / "rome.yaml").read_text())
    editor = config["edit"]["editor"]["init_args"]
    assert editor == {"layer": 0, "corpus": {"source": "facts", "tokens": 3000}}
    pasted = section(text, "Where to edit").split("rome.yaml:\n")[1]
    assert yaml.safe_load(pasted) == config
    assert "every token is predicted" in section(text, "Self-test")
    assert "restored bit-exactly" in section(text, "Self-test")
    assert corrigenda("validate", "-c", "found/rome.yaml", "--data", "Facts", "--print_config") == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["edit"]["editor"]["init_args"]["layer"] == 0
    assert parsed["model"]["init_args"]["lm"]["init_args"]["name"] == str(taught)


def test_without_matplotlib_there_is_no_picture(corrigenda, taught, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(module.sys.modules, "matplotlib.figure", None)
    assert corrigenda("doctor", taught, "--facts", "1", "--samples", "1", "--tokens", "3000") == 0
    text = capsys.readouterr().out
    assert "no heat map: matplotlib is not installed" in text
    (folder,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in folder.iterdir()] == ["rome.yaml"]


def test_an_edit_that_does_not_take_fails(corrigenda, tiny_folder, capsys, monkeypatch):
    """A random model knows nothing to trace, and one step changes nothing."""
    monkeypatch.setattr(module, "ROME", partial(ROME, contexts=[(3, 1)], steps=1))
    monkeypatch.setattr(module, "MAX_SCORED", 64)
    assert corrigenda("doctor", tiny_folder("llama"), "--tokens", "2000") == 2
    text, error = capsys.readouterr()
    assert "the model answers none of 64 facts" in section(text, "Causal trace")
    assert "Self-test" not in text
    (line,) = [line for line in error.splitlines() if line.startswith("corrigenda: error")]
    assert "self-test failed: after ROME at block" in line and "the answer to" in line
    assert "<|begin|>" in section(text, "Tokenizer")
    assert "lm_head, not tied to the embedding" in text and "(gated)" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere/at-all"], ["cannot load the model 'nowhere/at-all'"]),
        ([], ["model", "corrigenda doctor --help"]),
        (["MODEL", "--facts", "0"], ["facts must be at least 1"]),
        (["MODEL", "--lm.dtpye", "float32"], ["--lm.dtpye"]),
    ],
    ids=lambda value: value[-1] if value else "none",
)
def test_a_mistake_ends_in_one_line(corrigenda, taught, capsys, args, words):
    assert corrigenda("doctor", *[taught if word == "MODEL" else word for word in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("corrigenda: error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_a_model_it_cannot_read_is_refused(corrigenda, taught, capsys, monkeypatch):
    def refuse(net):
        raise UnsupportedModel("mixture: experts are not supported, choose a dense model")

    monkeypatch.setattr("corrigenda.modules.model.active_edits.find_structure", refuse)
    assert find_structure is not refuse
    assert corrigenda("doctor", taught) == 2
    assert "choose a dense model" in capsys.readouterr().err


# --- its parts ---


def test_a_trace_shows_where_the_model_looks(taught):
    """All subjects differ in their last token alone, and the first block moves nothing between tokens."""
    lm = LanguageModel(str(taught))
    edits = [case.edits[0] for case in Facts().cases("train")[:4]]
    found = causal_trace(lm, edits, samples=3)
    lost = found.clean - found.corrupted
    assert found.clean > 0.8 and lost > 0.3
    hidden, mlp = (found.effect[site][: LAST_SUBJECT + 1, 0] for site in ("hidden", "mlp"))
    assert hidden[LAST_SUBJECT] > 0.8 * lost and mlp[LAST_SUBJECT] > 0.05 * lost
    assert hidden[:LAST_SUBJECT].abs().max() < 0.2 * lost
    assert mlp[:LAST_SUBJECT].abs().max() < 0.5 * mlp[LAST_SUBJECT]


def test_what_is_not_restored_fails(taught, monkeypatch):
    lm = LanguageModel(str(taught))
    fact = Facts().cases("train")[0].edits[0]
    corpus = Corpus("facts", 3000)
    self_test(lm, fact, 0, corpus)
    remove = WeightPatch.remove

    def nearly(self):
        remove(self)
        next(self.lm.net.parameters()).data[0, 0] += 1e-6

    monkeypatch.setattr(WeightPatch, "remove", nearly)
    with pytest.raises(UserError, match="has not restored the weights"):
        self_test(lm, fact, 0, corpus)


def trace(*mlp):
    """A trace with these effects of MLPs at the subject's last token."""
    effect = torch.zeros(len(ROLES), len(mlp))
    effect[LAST_SUBJECT] = torch.tensor(mlp)
    return CausalTrace({"hidden": torch.zeros_like(effect), "mlp": effect}, 0.9, 0.1, 3)


def test_the_lowest_strong_block_without_a_sink_is_proposed():
    effects = trace(0.0, 0.2, 0.3, 0.3, 0.4, 0.3, 0.1, 0.3)
    plain = propose_layers(effects, [0.1] * 8)
    assert (plain.rome, plain.layers, plain.mend) == (1, [1, 2, 3, 4, 5], [5, 6, 7])
    assert plain.memit == [1, 2, 3, 4, 5] and "around block 4" in plain.reason
    sinks = propose_layers(effects, [0.1, 0.3, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert sinks.rome == 3 and sinks.layers == [3, 4, 5]
    peak = propose_layers(effects, [0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    assert peak.rome == 1 and peak.layers == [1, 2, 3]
    wide = propose_layers(trace(*[0.3] * 9), [0.0] * 9)
    assert wide.memit == [0, 1, 2, 3, 4] and wide.layers == list(range(9))


def test_without_a_trace_a_low_block_is_proposed():
    shares = [0.1, 0.1, 0.9, 0.9, 0.1, 0.1, *[0.1] * 24]
    for nothing in (None, trace(*[-0.1] * 30), trace(*[float("nan")] * 30)):
        proposal = propose_layers(nothing, shares)
        assert proposal.rome == 4 and proposal.mend == [27, 28, 29]
        assert proposal.layers == list(range(4, 16))
    assert propose_layers(None, [0.9, 0.5, 0.8]).rome == 1  # all are bad: the least
    assert propose_layers(None, [0.1]).layers == [0]


def test_the_configuration_keeps_the_precision(tiny_folder, tmp_path):
    lm = LanguageModel(str(tiny_folder("gemma2")), dtype="bfloat16")
    lines = module._proposed(lm, propose_layers(None, [0.1, 0.1]), Corpus("facts", 900), tmp_path)
    config = yaml.safe_load((tmp_path / "rome.yaml").read_text())
    assert config["model"]["init_args"]["lm"] == {"name": lm.name, "dtype": "bfloat16"}
    assert any("MEMIT  not supported: the model normalises MLP outputs" in line for line in lines)


def test_memory_is_that_of_the_tensors(tiny_lm):
    """The editor's size is counted on the editor itself, which is not built for it."""
    lm = tiny_lm("llama")
    text = "\n".join(module._memory(lm))
    editor = MEND(lm)
    learned = sum(p.numel() for n, p in editor.named_parameters() if not n.startswith("lm."))
    assert f"{learned:,} parameters" in text
    assert f"{16 * 80 * 80 / 1024:.3g} KiB per edited block" in text
    assert f"{4 * 80 * 32 / 1024:.3g} KiB to undo it" in text
    assert module._bytes(3 * 2**30) == "3 GiB" and module._bytes(80) == "80 B"


def test_tokenizers_are_looked_through(tiny_lm):
    edits = [case.edits[0] for case in Facts().cases("train")[:5]]
    lm = tiny_lm("llama")
    lines = module._tokenizer(lm, edits)
    assert lm.tokens.num_boundary_merges == 0
    found = {line.split("  ")[0]: line for line in lines}
    assert "<|begin|>" in found["special tokens added first"]
    assert "5 of 5 prompts have the same tokens" in found["prompt + target"]
    assert "5 of 5 targets have different tokens" in found["leading space"]
    year = lm.tokens.rows(["It was in"], ["1984"])
    assert f"is {int(year.length_B[0] - year.start_B[0])} tokens" in found["numbers"]
    assert "400 tokens; 4 rows" in found["vocabulary"]
