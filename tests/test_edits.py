"""``corrigenda edits``: what is said about files of edits, whether they hold, and what others load."""

import json

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from corrigenda.datamodules.records import Edit
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.lora import LoRA
from corrigenda.modules.editors.memprompt import MemPrompt
from corrigenda.modules.model.delta import Delta, LowRank, add_deltas, svd
from corrigenda.modules.model.hooks import hooked
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import read_parameter

ONE = Edit("The capital of {} is", "Zorbania", "Quill Port")
OTHER = Edit("{} said that", "Otto Vane", "the ice")
PROMPTS = ["The capital of Zorbania is", "He said that the ice", "In the year", "I"]
FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="module")
def saved(tiny_lm, tmp_path_factory):
    """``saved(base, how, edit)``: a file with one edit that holds, made once."""
    folder, made = tmp_path_factory.mktemp("edits"), {}

    def save(base="llama", how="low", edit=ONE):
        key = f"{base}-{how}-{edit.subject[:4]}-{edit.target_new[:3]}"
        if key not in made:
            editor = {
                "low": LoRA([0, 1], "mlp", rank=2, alpha=2, steps=60, lr=5e-2),
                "dense": FT([1], steps=60, lr=2e-2),
            }[how]
            lm = tiny_lm(base)
            delta = editor.stamp(lm, editor.propose(lm, [edit]), [edit])
            if how == "dense":  # a bias cannot be exported as an adapter
                delta.updates = {n: u for n, u in delta.updates.items() if n.endswith("weight")}
            made[key] = folder / f"{key}.safetensors"
            delta.save(made[key])
        return made[key]

    return save


@pytest.fixture
def edits(corrigenda, capsys):
    """``edits(*args, status=0)``: what the command says."""

    def run(*args, status=0):
        capsys.readouterr()
        assert corrigenda("edits", *args) == status, capsys.readouterr()
        captured = capsys.readouterr()
        return captured.err if status == 2 else captured.out

    return run


def base_of(file):
    return LanguageModel(Delta.load(file).metadata["model"])


@torch.no_grad()
def logits(net, ids):
    return torch.cat([net(torch.tensor([row])).logits[0] for row in ids])


# ---------------------------------------------------------------------------- singular values


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_singular_vectors_of_factors_and_of_a_matrix(shape):
    left, right = torch.randn(shape[0], 3), torch.randn(3, shape[1])
    product = left.double() @ right.double()
    stacked = LowRank(torch.cat([left, left], 1), torch.cat([0.5 * right, 0.5 * right]))
    for update in (LowRank(left, right), product, product.float(), stacked):
        u, s, v = svd(update)
        assert u.shape == (shape[0], 3) and s.shape == (3,) and v.shape == (3, shape[1])
        torch.testing.assert_close(u * s @ v, product, rtol=0, atol=1e-5)
        torch.testing.assert_close(u.T @ u, torch.eye(3).double())
        torch.testing.assert_close(v @ v.T, torch.eye(3).double())
        torch.testing.assert_close(s, torch.linalg.svdvals(product)[:3], rtol=0, atol=1e-5)
    many = LowRank(torch.randn(shape[0], 20), torch.randn(20, shape[1]))  # of more than full rank
    u, s, v = svd(many)
    assert len(s) == min(shape)
    torch.testing.assert_close(u * s @ v, many.dense(), rtol=0, atol=1e-5)
    assert [part.numel() for part in svd(torch.zeros(shape))] == [0, 0, 0]
    bias = torch.randn(7)
    torch.testing.assert_close((svd(bias)[0] * svd(bias)[1] @ svd(bias)[2])[:, 0], bias.double())


# ---------------------------------------------------------------------------- show


def test_show_needs_no_model(edits, saved, tmp_path):
    file = saved("llama")
    delta = Delta.load(file)
    delta.metadata |= {"model": "nowhere/at-all", "requantized": [{"model.x": 0.25}]}
    delta.updates["model.layers.1.some.bias"] = torch.full((4,), 0.5)
    delta.save(tmp_path / "a.safetensors")
    said = edits("show", "a.safetensors", saved("llama", "dense"))
    assert f"base    nowhere/at-all, weights {delta.metadata['base']}" in said
    assert "editor  LoRA" in said and "editor  FT" in said
    assert said.count("edit    The capital of {Zorbania} is -> Quill Port") == 2
    name = "model.layers.0.mlp.down_proj.weight"
    norm = delta.dense(name).norm().item()
    assert f"change  {name} [32, 80]: low-rank, rank 2, norm {norm:.4g}\n" in said
    assert "model.layers.1.some.bias [4]: dense, rank 1, norm 1\n" in said
    name = "model.layers.1.mlp.down_proj.weight"
    full = Delta.load(saved("llama", "dense")).dense(name)
    rank = torch.linalg.matrix_rank(full.float()).item()
    assert f"{name} [32, 80]: dense, rank {rank}, norm {full.norm():.4g}\n" in said
    assert "quantised  model.x: 0.25 of the update lost" in said


def test_a_text_memory_is_shown_and_recognised(edits, saved, tiny_lm, tmp_path):
    lm, file = tiny_lm("gpt2"), tmp_path / "memory.safetensors"
    MemPrompt(lookup="distance").edit(lm, [ONE, OTHER]).save(file)
    said = edits("show", file, saved("llama"))
    assert f"base    {lm.name}, weights {lm.weights_hash}\n  editor  MemPrompt" in said
    assert "edit    The capital of {Zorbania} is -> Quill Port" in said
    assert "memory  2 edits as text, no vectors" in said and "editor  LoRA" in said
    for verb in (["verify", file], ["apply", file], ["merge", file, saved("llama"), "--out", "x"]):
        message = edits(*verb, status=2)
        assert (
            "memory.safetensors is a text memory of MemPrompt, which changes no weight" in message
        )
        assert message.count("\n") == 1


# ---------------------------------------------------------------------------- verify and apply


@pytest.mark.parametrize("base", FAMILIES)
@pytest.mark.parametrize("how", ["low", "dense"])
def test_an_edit_that_holds(edits, saved, base, how):
    lm = base_of(saved(base, how))
    patch = WeightPatch(lm, Delta.load(saved(base, how)))
    now = lm.score([ONE.text], [ONE.target_new]).logprob_BM.sum().item()
    patch.remove()
    was = lm.score([ONE.text], [ONE.target_new]).logprob_BM.sum().item()
    said = edits("verify", saved(base, how)).splitlines()
    assert (
        said[0].split()
        == f"yes {was:.3f} -> {now:.3f} The capital of {{Zorbania}} is -> Quill Port".split()
    )
    assert said[1] == "1 of 1 edits verified; removed again, all weights are restored"


def test_one_that_does_not(edits, saved, tmp_path):
    delta = Delta.load(saved())
    delta.metadata["edits"].append([OTHER.prompt, OTHER.subject, OTHER.target_new])
    delta.save(tmp_path / "a.safetensors")
    said = edits("verify", "a.safetensors", status=1).splitlines()
    assert said[0].startswith("yes") and said[1].startswith("no ") and "{Otto Vane}" in said[1]
    assert said[2].startswith("1 of 2 edits verified")


def test_verify_notices_a_base_that_is_not_restored(edits, saved, monkeypatch):
    remove = WeightPatch.remove

    def careless(patch):
        remove(patch)
        patch.lm.net.get_parameter("model.norm.weight").data[0] += 1e-3

    monkeypatch.setattr(WeightPatch, "remove", careless)
    assert "does not restore the base model" in edits("verify", saved(), status=2)


@pytest.mark.parametrize("verb", ["verify", "apply", "export"])
def test_another_base_is_refused(edits, saved, tiny_folder, verb):
    more = ["--format", "peft", "--out", "out"] if verb == "export" else []
    other = tiny_folder("llama", 1)
    message = edits(verb, saved(), "--lm.name", other, *more, status=2)
    assert "this delta belongs to a model with weights" in message and message.count("\n") == 1
    message = edits(verb, saved(), "--lm.dtype", "bfloat16", *more, status=2)
    assert "with its dtype and quantization" in message


def shown(answer):
    """One line, with control characters spelt out."""
    line = " ".join(answer.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def test_apply_shows_both_answers(edits, saved):
    lm = base_of(saved())
    was = shown(lm.generate([ONE.text], 6)[0])
    said = edits("apply", saved(), "--tokens", "6").splitlines()
    assert was and said[:2] == [ONE.text, f"  base    {was}"]
    assert said[2].startswith("  edited  Quill P") and len(said) == 3
    said = edits("apply", saved(), saved("llama", "low", OTHER), "--prompt", ONE.text, "He said",
                 "--tokens", "6").splitlines()  # fmt: skip
    for file in (saved(), saved("llama", "low", OTHER)):
        WeightPatch(lm, Delta.load(file))
    texts = [shown(text) for text in lm.generate([ONE.text, "He said"], 6)]
    assert [said[0], said[3]] == [ONE.text, "He said"]
    assert [said[2], said[5]] == [f"  edited  {text}" for text in texts]


# ---------------------------------------------------------------------------- merge


def test_a_merge_is_the_sum(edits, saved, tmp_path):
    files = [saved("llama", "low"), saved("llama", "dense", OTHER)]
    said = edits("merge", *files, "--out", "both.safetensors")
    one, other = map(Delta.load, files)
    both = Delta.load(tmp_path / "both.safetensors")
    assert set(both.updates) == set(one.updates) | set(other.updates)
    for name in both.updates:
        wanted = sum(d.dense(name) for d in (one, other) if name in d.updates)
        torch.testing.assert_close(both.dense(name), wanted, rtol=0, atol=1e-6)
    assert both.metadata["edits"] == one.metadata["edits"] + other.metadata["edits"]
    assert both.metadata["editor"] == "LoRA+FT" and both.metadata["base"] == one.metadata["base"]
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = one.dense(name), other.dense(name)
    cosine = (a * b).sum() / (a.norm() * b.norm())
    (line,) = [line for line in said.splitlines() if line.startswith(name)]
    assert f"changed by 2 files, cosine at most {cosine:.3f} ({files[0]}, {files[1]})" in line
    rows = [torch.linalg.svd(x.float(), full_matrices=False) for x in (a, b)]
    v, w = (row[2][: int(torch.linalg.matrix_rank(row[0] * row[1] @ row[2]))] for row in rows)
    shared = (v @ w.T).square().sum() / min(len(v), len(w))
    assert f"overlap of inputs at most {shared:.3f}" in line
    assert "conflict" not in said and "both.safetensors: 2 edits in 6 parameters" in said
    patched = base_of(files[0])
    WeightPatch(patched, one)
    WeightPatch(patched, other)
    merged = base_of(files[0])
    WeightPatch(merged, both)
    ids = merged.tokens.encode(PROMPTS)
    torch.testing.assert_close(logits(merged.net, ids), logits(patched.net, ids), rtol=0, atol=1e-4)


def test_updates_that_share_nothing_and_everything(edits, saved, tmp_path):
    delta, name = Delta.load(saved()), "model.layers.1.mlp.down_proj.weight"
    u, s, v = svd(torch.randn(32, 80))
    parts = {
        "a": LowRank(u[:, :2] * s[:2], v[:2]),
        "apart": LowRank(u[:, 2:4], v[2:4]),
        "same": LowRank(-u[:, :2] * s[:2], v[:2]),
        "inputs": LowRank(u[:, 5:6], v[:1]),
    }
    for key, update in parts.items():
        Delta({name: update}, delta.metadata).save(tmp_path / f"{key}.safetensors")

    def against(other):
        return edits("merge", "a.safetensors", f"{other}.safetensors", "--out", f"{other}.merged")

    assert "cosine at most 0.000" in against("apart") or "-0.000" in against("apart")
    assert "overlap of inputs at most 0.000" in edits(
        "merge", "a.safetensors", "apart.safetensors", "--out", "again"
    )
    assert "cosine at most -1.000" in (said := against("same"))
    assert "overlap of inputs at most 1.000" in said
    assert "overlap of inputs at most 1.000" in (said := against("inputs")) and "0.000 (" in said


def test_contradicting_edits_are_named(edits, saved, tmp_path):
    contrary = Edit(ONE.prompt, ONE.subject, "Paris")
    files = [saved(), saved("llama", "low", contrary), saved("llama", "dense")]
    said = edits("merge", *files, saved("llama", "low", OTHER), "--out", "x.safetensors")
    wanted = [(ONE.target_new, files[0]), ("Paris", files[1]), (ONE.target_new, files[2])]
    listed = ", ".join(f"{target!r} ({file})" for target, file in wanted)
    assert f"conflict: {ONE.text!r} -> {listed}\n" in said and said.count("conflict") == 1
    said = edits("merge", files[0], files[2], "--out", "y.safetensors")
    assert "twice: " in said and "conflict" not in said


def test_merges_that_are_refused(edits, saved, tmp_path):
    args = ["merge", saved(), saved("gpt2"), "--out", "x.safetensors"]
    assert "different base models cannot be combined" in edits(*args, status=2)
    assert not (tmp_path / "x.safetensors").exists()
    (tmp_path / "x.safetensors").write_text("mine")
    args[2] = saved("llama", "dense")
    assert "nothing is overwritten" in edits(*args, status=2)
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    assert "two files" in edits("merge", saved(), "--out", "y.safetensors", status=2)


# ---------------------------------------------------------------------------- export


def with_adapter(net, folder):
    """Context: PEFT's LoRA as its documentation has it, W x + (alpha / r) B A x, read from a folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert not (config["use_rslora"] or config["use_dora"]) and config["bias"] == "none"
    transposed = {type(net.get_submodule(path)).__name__ for path in config["target_modules"]}
    assert config["fan_in_fan_out"] == (transposed == {"Conv1D"})

    def add(path):
        rank = config["rank_pattern"].get(path, config["r"])
        scaling = config["alpha_pattern"].get(path, config["lora_alpha"]) / rank
        a = tensors.pop(f"base_model.model.{path}.lora_A.weight")
        b = tensors.pop(f"base_model.model.{path}.lora_B.weight")
        assert len(a) == b.shape[1] == rank and scaling == 1 and a.dtype == torch.float32
        return lambda _module, args, output: output + scaling * (args[0] @ a.T @ b.T)

    pairs = [(net.get_submodule(path), add(path)) for path in config["target_modules"]]
    assert not tensors
    return hooked(pairs)


def edited_logits(file):
    lm = base_of(file)
    ids = lm.tokens.encode(PROMPTS)
    WeightPatch(lm, Delta.load(file))
    return ids, logits(lm.net, ids)


@pytest.fixture
def mixed(saved, tmp_path):
    """``mixed(base)``: low-rank factors of two maps and a dense update of one of them, added up."""

    def save(base):
        one, other = Delta.load(saved(base)), Delta.load(saved(base, "dense", OTHER))
        add_deltas([one, other]).save(tmp_path / "mixed.safetensors")
        return tmp_path / "mixed.safetensors"

    return save


@pytest.mark.parametrize("base", FAMILIES)
@pytest.mark.parametrize("how", ["low", "dense", "mixed"])
def test_an_adapter_gives_the_edited_logits(edits, saved, mixed, tmp_path, base, how):
    file = mixed(base) if how == "mixed" else saved(base, how)
    said = edits("export", file, "--format", "peft", "--out", "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    ids, wanted = edited_logits(file)
    plain = base_of(file).net
    with with_adapter(plain, tmp_path / "adapter"):
        torch.testing.assert_close(logits(plain, ids), wanted, rtol=0, atol=1e-4)
    assert (logits(plain, ids) - wanted).abs().max() > 0.1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    delta = Delta.load(file)
    ranks = {n.removesuffix(".weight"): len(svd(u)[1]) for n, u in delta.updates.items()}
    assert {p: config["rank_pattern"].get(p, config["r"]) for p in ranks} == ranks
    if how == "low":
        assert set(ranks.values()) == {2} and not config["rank_pattern"]
    if how == "mixed":
        assert len(set(ranks.values())) == 2 and config["rank_pattern"] == config["alpha_pattern"]
    for path, rank in ranks.items():
        kind = "low-rank" if isinstance(delta.updates[f"{path}.weight"], LowRank) else "dense"
        assert f"{path}: {kind} update" in said and f"adapter of rank {rank} with" in said
    assert config["base_model_name_or_path"] == delta.metadata["model"]


@pytest.mark.parametrize("base", FAMILIES)
def test_peft_itself_reads_it(edits, mixed, tmp_path, base):
    peft = pytest.importorskip("peft")
    file = mixed(base)
    edits("export", file, "--format", "peft", "--out", "adapter")
    ids, wanted = edited_logits(file)
    net = transformers.AutoModelForCausalLM.from_pretrained(Delta.load(file).metadata["model"])
    model = peft.PeftModel.from_pretrained(net, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", FAMILIES)
def test_the_whole_edited_model(edits, mixed, tmp_path, base):
    file = mixed(base)
    edits("export", file, "--format", "hf", "--out", "folder/model")
    folder = tmp_path / "folder" / "model"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model"]
    assert not list(folder.glob("*.bin")) and (folder / "model.safetensors").is_file()
    ids, wanted = edited_logits(file)
    again = LanguageModel(str(folder))
    assert again.tokens.encode(PROMPTS) == ids
    assert torch.equal(logits(again.net, ids), wanted)
    source = base_of(file)
    WeightPatch(source, Delta.load(file))
    for name in Delta.load(file).updates:
        assert torch.equal(read_parameter(again.net, name), read_parameter(source.net, name))


def refused(edits, tmp_path, delta, *words, out_format="peft"):
    delta.save(tmp_path / "refused.safetensors")
    args = ["export", "refused.safetensors", "--format", out_format, "--out", "out"]
    message = edits(*args, status=2)
    assert all(word in message for word in words) and message.count("\n") == 1, message
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"refused.safetensors"}  # nothing half written


def test_what_an_adapter_cannot_hold(edits, saved, tiny_lm, tmp_path):
    lm = tiny_lm("gpt2", tie_word_embeddings=True)
    meta = {"base": lm.weights_hash, "model": lm.name}
    bias = Delta({"transformer.h.1.mlp.c_proj.bias": torch.ones(32)}, meta)
    refused(edits, tmp_path, bias, "c_proj.bias is not the weight of a linear layer", "--format hf")
    embedding = Delta({"transformer.wte.weight": torch.ones(404, 32)}, meta)
    refused(edits, tmp_path, embedding, "wte.weight is not the weight of a linear layer")
    head = Delta({"lm_head.weight": torch.ones(404, 32)}, meta)
    refused(edits, tmp_path, head, "lm_head.weight is tied to the input embedding")
    name = "transformer.h.1.mlp.c_proj.weight"
    refused(edits, tmp_path, Delta({name: torch.zeros(32, 128)}, meta), "changes nothing")
    broken = LowRank(torch.full((32, 1), torch.nan), torch.ones(1, 128))
    refused(edits, tmp_path, Delta({name: broken}, meta), "not finite: make the edit again")
    nowhere = Delta({"nowhere.weight": torch.ones(32, 128)}, meta)
    refused(edits, tmp_path, nowhere, "has no parameter nowhere")


def test_a_quantised_model_is_not_written(edits, tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = str(tiny_folder("llama"))
    lm = LanguageModel(folder, quantization="int8")
    name = f"{lm.structure.out_name(1)}.weight"
    update = LowRank(0.1 * torch.randn(32, 1), torch.randn(1, 80))
    Delta({name: update}, {"base": lm.weights_hash, "model": folder}).save(tmp_path / "a")
    args = ["export", "a", "--out", "out", "--lm.quantization", "int8", "--format"]
    assert "is quantised" in edits(*args, "hf", status=2)
    assert not (tmp_path / "out").exists()
    edits(*args, "peft")  # which leaves the base as it is
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{lm.structure.out_name(1)}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(b @ a, update.dense(torch.float32), rtol=0, atol=1e-5)


def test_an_existing_folder_is_left_alone(edits, saved, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    args = ["export", saved(), "--format", "hf", "--out", "out"]
    assert "out exists, and nothing is overwritten" in edits(*args, status=2)
    assert not list((tmp_path / "out").iterdir())

    def fail(self, folder, **_):
        (folder / "half").write_text("")
        raise OSError("no space left")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    args[-1] = "new"
    assert "no space left" in edits(*args, status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["show", "nope.safetensors"], ["nope.safetensors: no such delta file"]),
        (["show"], ["files"]),
        (["shwo", "x"], ["shwo"]),
        (["verify", "bare.safetensors"], ["does not list its edits"]),
        (["apply", "bare.safetensors"], ["give a --prompt"]),
        (["apply", "bare.safetensors", "--prompt", "He"], ["give --lm.name"]),
        (["export", "bare.safetensors", "--format", "onnx", "--out", "x"], ["'peft', 'hf'"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_a_mistake_is_one_line(edits, tmp_path, args, words):
    Delta({"x.weight": torch.ones(2, 2)}).save(tmp_path / "bare.safetensors")
    message = edits(*args, status=2)
    assert message.startswith("corrigenda: error: ") and message.count("\n") == 1
    assert all(word in message for word in words), message


NAME = "model.layers.0.mlp.down_proj.weight"


def header(delta=None, **more):
    return {
        "format": "corrigenda-delta-1",
        "delta": json.dumps({} if delta is None else delta),
        **more,
    }


def with_header(meta, tensors=None):
    tensors = {f"{NAME}.dense": torch.ones(32, 80)} if tensors is None else tensors
    return lambda path: save_file(tensors, path, meta)


def with_tensors(**tensors):
    named = {f"{NAME}.{part}": tensor for part, tensor in tensors.items()}
    return with_header(header(), named)


ODD = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not safetensors at all"),
    "folder": lambda path: path.mkdir(),
    "long header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x00{}"),
    "longer header than file": lambda path: path.write_bytes((2**20).to_bytes(8, "little") + b"{}"),
    "header is no JSON": lambda path: path.write_bytes((4).to_bytes(8, "little") + b"{{{{"),
    "no metadata": with_header(None),
    "no delta": with_header({"format": "corrigenda-delta-1"}),
    "delta is no JSON": with_header({"format": "corrigenda-delta-1", "delta": "{"}),
    "delta is deep": with_header({"format": "corrigenda-delta-1", "delta": "[" * 10**5}),
    "delta is a list": with_header(header([1])),
    "edits are text": with_header(header({"edits": "x"})),
    "edits are records": with_header(header({"edits": [{"prompt": "x"}]})),
    "edits are numbers": with_header(header({"edits": [[1, 2, 3]]})),
    "an edit without subject": with_header(header({"edits": [["{} is", "", "x"]]})),
    "model is a number": with_header(header({"model": 3})),
    "base is a list": with_header(header({"base": []})),
    "losses are text": with_header(header({"requantized": [{"a": "b"}]})),
    "NaN": with_tensors(dense=torch.full((2, 2), torch.nan)),
    "infinity": with_tensors(left=torch.full((2, 1), torch.inf), right=torch.ones(1, 2)),
    "ranks": with_tensors(left=torch.ones(2, 1), right=torch.ones(3, 2)),
    "a factor alone": with_tensors(left=torch.ones(2, 1)),
    "the other factor alone": with_tensors(right=torch.ones(2, 1)),
    "a factor of three dimensions": with_tensors(left=torch.ones(1, 1, 1), right=torch.ones(1, 1)),
    "a number": with_tensors(dense=torch.ones(())),
    "whole numbers": with_tensors(dense=torch.ones(2, 2, dtype=torch.long)),
    "both kinds": with_tensors(dense=torch.ones(2, 2), left=torch.ones(2, 1), right=torch.ones(1, 2)),
    "another part": with_tensors(more=torch.ones(2, 2)),
    "no parts": with_header(header(), {"x": torch.ones(2, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_one_line_whatever_is_done_with_them(edits, tmp_path, kind):
    ODD[kind](tmp_path / "odd.safetensors")
    for verb in (
        ["show"], ["verify"], ["apply"], ["merge", "odd.safetensors", "--out", "new"],
        ["export", "--format", "peft", "--out", "new"],
    ):  # fmt: skip
        message = edits(verb[0], "odd.safetensors", *verb[1:], status=2)
        assert (
            message.startswith("corrigenda: error: odd.safetensors") and message.count("\n") == 1
        ), verb
    assert [path.name for path in tmp_path.iterdir()] == ["odd.safetensors"]


def test_parameters_that_do_not_fit_the_model(edits, saved, tmp_path):
    meta = Delta.load(saved()).metadata
    for name, shape, words in (
        ("model.layers.9.mlp.down_proj.weight", (32, 80), "has no parameter model.layers.9"),
        ("model.layers.x..", (32, 80), "has no parameter"),
        ("weight", (32, 80), "has no parameter"),
        ("", (32, 80), "has no parameter"),
        (NAME, (80, 32), "has shape"),
        (NAME, (32,), "has shape"),
    ):
        Delta({name: torch.ones(shape)}, meta).save(tmp_path / "odd")
        for verb in (["verify"], ["apply"], ["export", "--format", "hf", "--out", "new"]):
            message = edits(verb[0], "odd", *verb[1:], status=2)
            assert words in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prompt", ""], "a --prompt is empty"),
        (["--prompt", "He", " \n"], "a --prompt is empty"),
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--tokens", "-1"], "tokens must be at least 1, got -1"),
    ],
)
def test_nothing_to_continue_is_refused(edits, saved, args, words):
    message = edits("apply", saved(), *args, status=2)
    assert words in message and message.count("\n") == 1


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_what_cannot_be_written_leaves_nothing(edits, saved, tmp_path, monkeypatch, verb):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    args = {
        "merge": ["merge", saved(), saved("llama", "dense", OTHER)],
        "export": ["export", saved(), "--format", "peft"],
    }[verb]
    for out in ("file", "file/new", "link", "/proc/new"):
        message = edits(*args, "--out", out, status=2)
        assert (
            message.splitlines()[-1].startswith("corrigenda: error: ")
            and out.split("/")[0] in message
        )

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("corrigenda.modules.files.save_file", full)
    message = edits(*args, "--out", "new", status=2)
    assert "the disk may be full: I/O error: No space left on device" in message
    assert message.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}
    assert (tmp_path / "file").read_text() == "mine"


def test_control_characters_do_not_reach_the_terminal(edits, tmp_path):
    meta = {"edits": [["{} is", "\x1b[2Jx", "\udcff"]], "editor": "\x07"}
    Delta({"a.weight": torch.ones(2, 2)}, meta).save(tmp_path / "odd")
    said = edits("show", "odd")
    assert "editor  \\x07" in said and "{\\x1b[2Jx} is -> \\udcff" in said
