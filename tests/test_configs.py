"""Every configuration file that comes with the project fits its signatures, and the shapes of its model."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from corrigenda.modules.editing.adapters import ModuleEditor
from corrigenda.modules.editing.editor import Editor
from corrigenda.modules.model import active_edits, lm
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import find_structure, sizes
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.learned import LearnedEditor
from corrigenda.modules.training.tuning import FineTune
from corrigenda.pipeline.compare import read_study
from corrigenda.pipeline.fit import CONFIGS
from tests.samples import ROOT

APART = ("compare", "published", "study", "tasks")
FILES = sorted(
    file
    for file in (path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))
    if file.parts[0] not in APART
)
PUBLISHED = [file for file in FILES if "-" in file.stem and "smollm2" not in file.stem]
STUDIES = sorted([*CONFIGS.glob("compare/*.yaml"), *CONFIGS.glob("study/*/*.yaml")])
RUNS = [(study, run.name) for study in STUDIES for run in read_study(study).runs]


@pytest.fixture
def parse(corrigenda, capsys):
    """``parse(verb, *args)``: the whole configuration, checked; nothing is loaded."""

    def parse(*args):
        assert corrigenda(*args, "--print_config") == 0, capsys.readouterr().err
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def test_the_command_line_reads_the_configurations_of_this_project():
    assert CONFIGS.samefile(ROOT / "configs")
    assert Path("defaults.yaml") in FILES and Path("rome/smollm2.yaml") in FILES


@pytest.mark.parametrize(
    ("file", "verb"),
    [(file, "fit") for file in FILES]
    + [(file, "validate") for file in FILES if file not in PUBLISHED],
    ids=str,
)
def test_a_file_fits_the_signatures(parse, file, verb):
    found = parse(verb, "-c", CONFIGS / file)
    given = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
    assert list(contained(given, found)) == []


def contained(given, found, path=""):
    """Where a value of the file is not in the parsed configuration."""
    if isinstance(given, dict) and isinstance(found, dict):
        inside = found.get("init_args", {}) if "class_path" in found else {}
        for key, value in given.items():
            name = key.rstrip("+")
            yield from contained(value, found.get(name, inside.get(name)), f"{path}.{name}")
    elif isinstance(given, list) and isinstance(found, list):
        tail = found[len(found) - len(given) :]  # a list may have been appended
        for index, pair in enumerate(zip(given, tail, strict=True)):
            yield from contained(*pair, f"{path}[{index}]")
    elif given != found and not str(found).endswith(str(given)):
        yield f"{path}: {given!r} became {found!r}"


def test_a_misspelt_file_would_be_noticed(corrigenda, tmp_path, capsys):
    (tmp_path / "typo.yaml").write_text("edit: {editor: {class_path: ROME, init_args: {layre: 1}}}")
    assert corrigenda("validate", "-c", "typo.yaml", "--print_config") == 2
    assert "'layre' is not accepted" in capsys.readouterr().err


@pytest.mark.parametrize(("study", "name"), RUNS, ids=lambda value: getattr(value, "stem", value))
def test_a_run_of_a_study_is_a_valid_command(parse, study, name):
    (run,) = [run for run in read_study(study).runs if run.name == name]
    args = [word.replace("{out}", "runs/somewhere") for word in run.args]
    files = [args[i + 1] for i, word in enumerate(args) if word in ("-c", "--config")]
    assert files and all((CONFIGS.parent / file).is_file() for file in files)
    found = parse(*args)
    assert found["model"]["class_path"] and found["data"]["class_path"]


@pytest.mark.parametrize(
    ("study", "common"),
    [
        (study, common)
        for study in STUDIES
        for common in re.findall('--common "([^"]+)"', study.read_text(encoding="utf-8"))
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_the_common_arguments_that_a_study_names_suit_all_its_runs(parse, study, common):
    for run in read_study(study, common=shlex.split(common)).runs:
        assert parse(*[word.replace("{out}", "runs/somewhere") for word in run.args])


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_a_study_uses_only_what_it_has_made(study):
    """A checkpoint of ``{out}/NAME`` is that of a run before."""
    made = []
    for run in read_study(study).runs:
        used = [w.split("/")[1] for w in run.args if w.startswith("{out}/") and w.endswith(".ckpt")]
        assert set(used) <= set(made), f"{study.name}: {run.name} needs {used}, made so far {made}"
        made.append(run.name)


# ---------------------------------------------------------------------------- shapes of published models

LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES = {
    "gpt2": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt-j-6b": ("gptj", {}),
    "llama-160m": ("llama", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                             "num_attention_heads": 12, "vocab_size": 32_000}),
    "llama-7b": ("llama", {**LLAMA, "intermediate_size": 11_008, "vocab_size": 32_000}),
    "Llama-2-7b-hf": ("llama", {**LLAMA, "intermediate_size": 11_008, "vocab_size": 32_000}),
    "Meta-Llama-3-8B-Instruct": ("llama", {**LLAMA, "intermediate_size": 14_336, "num_key_value_heads": 8,
                                           "vocab_size": 128_256}),
    "Mistral-7B-v0.1": ("mistral", {**LLAMA, "intermediate_size": 14_336, "num_key_value_heads": 8}),
    "Qwen2.5-7B-Instruct": ("qwen2", {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
                                      "num_attention_heads": 28, "num_key_value_heads": 4,
                                      "vocab_size": 152_064}),
    "gemma-2-2b": ("gemma2", {}),
}  # fmt: skip
MODELS = ("gpt2-xl", "llama-7b", "llama-2-7b", "llama-3-8b", "qwen2.5-7b")
METHODS = ("mend", "serac", "ke", "malmen", "ft", "ft_m", "lora", "ewc", "ike", "grace", "wise")


@pytest.fixture(scope="module")
def on_meta(tiny_net, tiny_folder):
    """``on_meta(kind, given)``: what a part of a configuration describes, with models of published shapes.

    Their weights are on the meta device, so that they have none; their structure is that of a small twin as deep.
    """
    networks, structures = {}, {}
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("gpt2"))

    def load(name, *_):
        family, shape = SHAPES[name.rpartition("/")[2]]
        if name not in networks:
            config = AutoConfig.for_model(family, **shape)
            net = networks[name] = AutoModelForCausalLM.from_config(config)
            with torch.device("cpu"):
                twin = tiny_net(family, num_hidden_layers=config.num_hidden_layers)
                found = find_structure(twin)
            inner, width = sizes(net.get_submodule(found.out_name(0)))
            structures[net] = replace(found, width=width, inner_width=inner)
        return networks[name], tokenizer

    def build(kind, given):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(kind, "part", required=True)
        with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
            patch.setattr(lm, "load_model", load)
            patch.setattr(active_edits, "find_structure", structures.get)
            patch.setattr(LanguageModel, "_require_causal", lambda _: None)
            return parser.instantiate(parser.parse_object({"part": given})).part

    return build


def changed(editor, model):
    """Paths of the modules that an editor changes or reads, and the shape of its update where it is dense."""
    editor.check(model)
    if isinstance(editor, LearnedEditor):
        return dict.fromkeys(editor.names)
    if isinstance(editor, GradientEditor):
        leaves = editor.start(model, 1)
        return {name.rpartition(".")[0]: leaf.shape for name, leaf in leaves.items()}
    if isinstance(editor, ModuleEditor):
        return dict.fromkeys(editor.empty(model).sites)
    layers = getattr(editor, "layers", None) or [getattr(editor, "layer", 0)]
    return dict.fromkeys(map(model.structure.out_name, layers))


@pytest.mark.parametrize("file", PUBLISHED, ids=str)
def test_a_file_fits_the_shapes_of_its_model(on_meta, file, tmp_path, monkeypatch):
    given = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
    if "lm" not in given["model"]["init_args"]:
        return  # the scope classifier needs no language model
    monkeypatch.chdir(tmp_path)
    module = on_meta(LightningModule, given["model"])
    editor = module.method if isinstance(module, FineTune) else module
    if "editor" in given.get("edit", {}):
        for name in ("scope", "counterfactual"):  # SERAC wants to see that both have been trained
            checkpoint = Path(f"runs/serac-{name}/checkpoints/best.ckpt")
            checkpoint.parent.mkdir(parents=True)
            checkpoint.touch()
        editor = on_meta(Editor, given["edit"]["editor"])
    found = changed(editor, module.lm)
    assert found
    for name, shape in found.items():
        inputs, outputs = sizes(module.lm.net.get_submodule(name))
        assert {inputs, outputs} & {module.lm.structure.width}
        assert shape is None or set(shape[1:]) & {inputs, outputs}
    assert all(p.is_meta for p in module.parameters())


def test_a_file_of_another_model_does_not_fit(on_meta):
    given = yaml.safe_load((CONFIGS / "mend/llama-2-7b.yaml").read_text())["model"]
    given["init_args"]["lm"]["name"] = "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(ValueError, match="layer 29 does not exist: the model has 28 blocks"):
        on_meta(LightningModule, given)


@pytest.mark.parametrize("method", METHODS)
def test_published_models_have_each_method_and_say_whose_settings(method):
    for model in MODELS:
        first = (CONFIGS / method / f"{model}.yaml").read_text().split("model:")[0]
        assert first.startswith("# ") and "ublished" in first, f"{method}/{model}"


@pytest.mark.parametrize("model", MODELS)
def test_a_counterfactual_model_has_the_words_of_its_base(on_meta, model):
    names = [f"serac/{model}-counterfactual.yaml", f"serac/{model}.yaml"]
    parts = [yaml.safe_load((CONFIGS / name).read_text())["model"] for name in names]
    rows = {len(on_meta(LightningModule, p).lm.net.get_output_embeddings().weight) for p in parts}
    assert len(rows) == 1
