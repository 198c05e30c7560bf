"""Edits, prompts and helpers that several test files use."""

import json
from pathlib import Path

import pytest

from corrigenda.datamodules.records import Edit, EditCase, Probe

ROOT = Path(__file__).parents[1]
QUIET = ["--wandb", "off", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
FAMILIES = pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])  # Conv1D, gated, flattened

# For learned editors and fine-tuning: targets of several tokens.
EDITS = [
    Edit("The capital of {} is", "Ruritania", "Strelsau"),
    Edit("{} was written by", "The Voyage Out", "Iris Vane"),
    Edit("{} plays the", "Ada", "oboe"),
]
OUTER = [Probe(f"Tell me, {edit.text}", edit.target_new) for edit in EDITS]
LOCAL = [
    Probe("The sea is", "deep and blue"),
    Probe("nq question: who", "nobody"),
    Probe("A", "cat"),
]
CASES = [EditCase(str(i), (edit,)) for i, edit in enumerate(EDITS)]

# For adapters: targets of one token, and prompts about none of the edits.
SHORT_EDITS = [
    Edit("The capital of {} is", "Ruritania", "in"),
    Edit("Who wrote {}", "The Voyage Out", "is"),
    Edit("{} speak", "The Glass Islands", "the"),
]
OTHERS = ["The sea was made in", "He", "In the year of 1984 the town was not"]

# For methods that edit at the subject's last token.
LOCATED_EDITS = [
    Edit("The capital of {} is", "Zorbania", "Quill Port"),
    Edit("{} said that", "São Paulo", "the ice"),
    Edit("In the year of {} the town was called", "Old Humbria", "e"),
]


def prompts_and_targets(edits):
    return [edit.text for edit in edits], [edit.target_new for edit in edits]


def scores_of(prompts, targets):
    """``answers(lm)``: log-probabilities of the whole vocabulary, by default for these prompts and targets."""

    def answers(lm, prompts=prompts, targets=targets):
        return lm.score(prompts, targets, full=True).full_BMV

    return answers


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def models_by_family(tiny_lm, **config):
    """A fixture's value: ``loaded(family)``, one model per family for all tests of a file."""
    made = {}
    return lambda family: made.setdefault(family, tiny_lm(family, **config))


def without_edits_afterwards(lm):
    """Yields a model that tests share, and removes the edits that a test has left on it."""
    yield lm
    while lm.handles:
        lm.handles[-1].remove()
