"""Every argument of every class that a configuration can name is checked when the object is made.

The test walks the classes and their signatures: a new method is tested as soon as its file is there.
"""

import importlib
import inspect
import math
import pkgutil
import typing
from types import UnionType

import pytest
from lightning.pytorch import LightningDataModule, LightningModule

from corrigenda.datamodules.facts import Facts
from corrigenda.modules import checks
from corrigenda.modules.editing.editor import Editor
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.retrieval.encoder import TextEncoder
from corrigenda.modules.statistics.corpus import Corpus

for package in ("corrigenda.modules", "corrigenda.datamodules"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)


def descendants(cls):
    for child in cls.__subclasses__():
        yield child
        yield from descendants(child)


def is_ours(cls):
    return cls.__module__.startswith("corrigenda.")


bases = (Editor, LightningModule, LightningDataModule)
CLASSES = sorted(
    {c for base in bases for c in descendants(base) if is_ours(c) and not inspect.isabstract(c)}
    | {Corpus, LanguageModel, TextEncoder},
    key=lambda c: c.__name__,
)


def members(hint):
    """The types of a union, or the one type."""
    return set(typing.get_args(hint)) if isinstance(hint, UnionType) else {hint}


def arguments(cls):
    """{name: the types that its annotation allows}; those behind ``**search`` are the parent's."""
    found = {}
    for parent in cls.__mro__:
        init = parent.__dict__.get("__init__")
        if init is None or not is_ours(parent):
            continue
        hints = typing.get_type_hints(init)
        names = inspect.signature(init).parameters.values()
        kinds = {p.name: p.kind for p in names if p.name != "self"}
        for name, kind in kinds.items():
            if kind is not inspect.Parameter.VAR_KEYWORD:
                found.setdefault(name, members(hints[name]))
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            return found
    return found


def of_kind(*kinds):
    return [
        pytest.param(cls, name, id=f"{cls.__name__}-{name}")
        for cls in CLASSES
        for name, types in arguments(cls).items()
        if types & set(kinds)
    ]


NUMBERS = of_kind(int, float)
LISTS = [
    pytest.param(cls, name, id=f"{cls.__name__}-{name}")
    for cls in CLASSES
    for name in arguments(cls)
    if name in ("layers", "contexts", "margins")
]

# Where 0 means something; everywhere else it is refused.
ZERO_MEANS = {
    "layer": "the first block",
    "seed": "a seed",
    "order_seed": "the seed of the run",
    "weight_decay": "no decay",
    "kl_weight": "the meaning of the subject may drift",
    "stop_loss": "all steps are made",
    "ridge": "EMMET's constraint is exact",
    "keep": "RECT keeps nothing: the end of its scale",
    "threshold": "a cosine, a probability or a share of 0",
    "share": "one prompt is enough for a neuron",
    "largest_change": "always the bare prompt's key",
    "erase_scale": "the old answer stays",
    "write_scale": "the new answer is not written",
    "num_demonstrations": "facts alone in front of a question",
    "max_distance": "equal prompts only",
    "memory_weight": "neurons may fire anywhere",
    "c_edit": "one loss alone",
    "c_loc": "one loss alone",
    "lr_alpha": "step sizes stay as they begin",
    "lr_scales": "step sizes stay as they begin",
    "lr_head": "the head stays as it begins",
    "warm_up": "the full rate from the first step",
    "num_normalising": "inputs are not normalised",
    "margin": "no drift is allowed",
    "least_margin": "the margin may shrink to nothing",
    "num_negatives": "only pairs within scope",
    "strength": "plain fine-tuning",
    "gamma": "only the last task counts",
    "to_base": "any distance from the base",
    "to_last": "any distance from the last task",
    "generate_tokens": "no free answers",
    "val_fraction": "nothing is held out",
    "tolerance": "all tokens are read",
    "cache_memory_gib": "nothing is kept there",
    "cache_disk_gib": "nothing is kept there",
}
BUT_NOT = {
    ("AlphaEdit", "threshold"),
    ("MEMIT", "ridge"),
    ("MALMEN", "num_normalising"),
    ("MALMEN", "strength"),
}
NEGATIVE_MEANS = {("MemPrompt", "threshold"): "a cosine"}
INFINITE_MEANS = {("ROME", "largest_change"): "no limit"}


@pytest.fixture
def make(tiny_lm, tmp_path):
    """``make(cls, **changes)``: an object of the class with as little as it needs."""
    checkpoint = tmp_path / "some.ckpt"
    checkpoint.touch()
    needs = {
        "lm": lambda: tiny_lm("gpt2"), "layer": lambda: 0, "layers": lambda: [1],
        "pool": Facts, "editor": lambda: FT([1]), "method": lambda: FT([1]),
        "scope": lambda: str(checkpoint), "counterfactual": lambda: str(checkpoint),
        "adapter": lambda: {"peft_type": "LORA", "target_modules": ["c_proj"]},
    }  # fmt: skip

    def make(cls, **changes):
        required = [
            p.name
            for p in inspect.signature(cls).parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        return cls(**{name: needs[name]() for name in required if name not in changes}, **changes)

    return make


def refuse(make, cls, name, value):
    with pytest.raises(ValueError) as caught:
        make(cls, **{name: value})
    message = str(caught.value)
    assert f"{name} must " in message and "got " in message and "\n" not in message, message


def test_the_classes_are_found():
    names = {cls.__name__ for cls in CLASSES}
    assert {"ROME", "AlphaEdit", "MEND", "SERAC", "FineTune", "ScopeClassifier", "Facts"} <= names
    assert {("MEMIT", "kl_weight"), ("MEND", "rank")} <= {
        (p.values[0].__name__, p.values[1]) for p in NUMBERS
    }


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_what_a_number_cannot_be_is_refused(make, cls, name):
    key = (cls.__name__, name)
    wrong = [math.nan, True, "fast", [1]]
    wrong += [] if key in INFINITE_MEANS else [math.inf]
    wrong += [] if key in NEGATIVE_MEANS else [-1]
    wrong += [] if name in ZERO_MEANS and key not in BUT_NOT else [0]
    wrong += [1.5] if float not in arguments(cls)[name] else []
    for value in wrong:
        refuse(make, cls, name, value)


@pytest.mark.parametrize(
    ("cls", "name"),
    [p for p in NUMBERS if p.values[1] in ZERO_MEANS and p.values[0] is not LanguageModel
     and (p.values[0].__name__, p.values[1]) not in BUT_NOT],
)  # fmt: skip
def test_zero_is_accepted_where_it_means_something(make, cls, name):
    assert make(cls, **{name: 0}) is not None


def test_every_exception_is_some_argument():
    every = {p.values[1] for p in NUMBERS}
    pairs = {(p.values[0].__name__, p.values[1]) for p in NUMBERS}
    assert ZERO_MEANS.keys() <= every
    assert BUT_NOT | NEGATIVE_MEANS.keys() | INFINITE_MEANS.keys() <= pairs


WRONG_LISTS = {
    "layers": [[], [1, 1], [-1], [1.5], [True], ["1"], [None], 3, "3"],
    "contexts": [[[0, 0]], [[5, 0]], [[1, 3]], [[5, -1]], [[5]], [[5, 2, 1]], [5], [["a", "b"]], 5, "5"],
    "margins": [[], [0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [1, 0.5, 0], [-1, 1, 1], [0, math.nan, 1], 3],
}  # fmt: skip


@pytest.mark.parametrize(("cls", "name"), LISTS)
def test_what_a_list_cannot_be_is_refused(make, cls, name):
    for value in WRONG_LISTS[name]:
        with pytest.raises(ValueError, match=f"{name} must ") as caught:
            make(cls, **{name: value})
        assert "got " in str(caught.value), caught.value


@pytest.mark.parametrize(
    "cls",
    [c for c in CLASSES if {"layer", "layers"} & arguments(c).keys() and issubclass(c, Editor)],
)
def test_a_block_beyond_the_model_is_refused_before_any_work(make, tiny_lm, cls):
    name = "layers" if "layers" in arguments(cls) else "layer"
    with pytest.raises(ValueError, match="layer 7 does not exist: the model has 2 blocks, 0 to 1"):
        make(cls, **{name: [7] if name == "layers" else 7}).check(tiny_lm("gpt2"))


def test_a_wrapped_editor_is_checked_too(make, tiny_lm):
    for cls in CLASSES:
        if arguments(cls).get("editor"):
            with pytest.raises(ValueError, match="layer 7 does not exist"):
                make(cls, editor=FT([7])).check(tiny_lm("gpt2"))


def test_large_whole_numbers_and_whole_floats():
    checks.whole(1, steps=10**400)
    with pytest.raises(ValueError, match=r"steps must be a whole number, got 2\.0"):
        checks.whole(1, steps=2.0)
    with pytest.raises(ValueError, match="seed must be at most 4294967295, got 4294967296"):
        checks.seeds(seed=2**32)


@pytest.mark.parametrize("text", ["", "nothing", "{} {}", None])
def test_a_text_without_its_slot_is_refused(text):
    with pytest.raises(ValueError, match="essence must be a text with exactly one {}, got"):
        checks.with_slot(essence=text)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("edit.editor.steps", "0", "steps must be at least 1, got 0"),
        ("edit.editor.lr", ".nan", "lr must be positive, got nan"),
        (
            "edit.editor.layers",
            "[]",
            "layers must name at least one block, for example [3], got []",
        ),
        ("edit.editor.steps", "true", "Got value: True"),
        ("edit.editor.lr", "fast", "Got value: fast"),
        ("edit.editor.layers", "3", "Got value: 3"),
        ("edit.editor.layers", "[99]", "layer 99 does not exist: the model has 2 blocks, 0 to 1"),
        ("model.generate_tokens", "-1", "generate_tokens must be at least 0, got -1"),
        ("data.val_limit", "-3", "val_limit must be at least 1, got -3"),
    ],
)
def test_a_user_reads_one_line(corrigenda, capsys, tiny_folder, option, value, message):
    args = ["--model", "EditingModule", f"--model.lm.name={tiny_folder()}", "--data", "Facts",
            "--edit.editor", "FT", "--edit.editor.layers", "[1]", "--run_dir", "run"]  # fmt: skip
    assert corrigenda("validate", *args, f"--{option}", value) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and message in last
