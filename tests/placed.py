"""What editors compute on a network that is placed in several ways; test_device_map.py runs this as a process.

    python tests/placed.py LLAMA_FOLDER TEXT_FILE

Prints one JSON value: for each placement and each editor, digests of what it computed, or how it failed.
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
import traceback
from dataclasses import replace
from types import SimpleNamespace

import second_device
import torch
import transformers.integrations.accelerate as placing
from test_editors import EDITORS as WEIGHT_EDITORS
from test_editors import EDITS
from test_memories import EDITORS as MEMORIES

from corrigenda.datamodules.records import EditCase, Probe
from corrigenda.modules.editing.editor import WeightEditor, editing_mode
from corrigenda.modules.editors.ke import KE
from corrigenda.modules.editors.memprompt import MemPrompt
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.tracing import causal_trace
from corrigenda.modules.training.learned import LearnedEditor

HERE, THERE = "cpu", f"{second_device.NAME}:0"
PROMPTS = [edit.text for edit in EDITS] + ["He", "The sea was made in"]
OUTER = [Probe(f"Tell me, {edit.text}", edit.target_new) for edit in EDITS]
LOCAL = [Probe("The sea is", "deep"), Probe("He", "came to the house"), Probe("A", "cat")]
TARGETS = [edit.target_new for edit in EDITS] + ["came to the house", "1984"]
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.layers.2",
         "model.norm", "lm_head")  # fmt: skip
# Where these parts are. Beside a device, accelerate runs nothing on the CPU but keeps weights in its memory.
PLACEMENTS = {
    "one device": None,
    "two devices": (HERE, HERE, HERE, THERE, HERE, THERE, HERE),
    "in the CPU's memory": (THERE, THERE, THERE, HERE, HERE, HERE, THERE),
    "on disk": ("disk", HERE, "disk", HERE, "disk", "disk", HERE),
}


def mend(lm, _):
    editor = MEND(lm, layers=[0, 1], rank=4, alpha=5e-3).to(lm.device)
    editor.observe([EditCase(str(i), (edit,)) for i, edit in enumerate(EDITS)])
    return editor


# One of each way to edit; they edit blocks in different places.
WEIGHTS = ("ROME", "MEMIT-seq", "FT-M", "LoRA", "KN")
BESIDE = ("GRACE", "WISE", "CaliNET", "MELO")
EDITORS = {
    **{name: WEIGHT_EDITORS[name] for name in WEIGHTS},
    **{name: lambda _, files, make=MEMORIES[name]: make(files) for name in BESIDE},
    "MEND": mend,
    "KE": lambda lm, _: KE(lm, [0, 1], hidden=4, condition=6).to(lm.device),
    "MemPrompt": lambda *_: MemPrompt(encoder="lm"),
}


# Where everything outside the model is on the second device, too, which is slow.
FEW = {"in the CPU's memory": ("ROME", "KN", "WISE", "MEND", "MemPrompt")}


def placed(folder, places):
    """The model with its parts in these places; with the first of two devices as the one that runs the rest."""
    two = places is not None and {HERE, THERE} == set(places) and places[0] == HERE
    dispatch = functools.partial(DISPATCH, main_device=HERE) if two else DISPATCH
    placing.dispatch_model = dispatch
    device_map = places and dict(zip(PARTS, places, strict=True))
    lm = LanguageModel(folder, device_map=device_map)
    lm.net.set_attn_implementation(
        "eager"
    )  # of fused attention each device has a kernel of its own
    return lm


DISPATCH = placing.dispatch_model


def digest(*tensors):
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]


def answers(lm):
    scores = lm.score(PROMPTS, TARGETS, full=True)
    return [digest(scores.logprob_BM, scores.full_BMV), lm.generate(PROMPTS, 4)]


def computed(lm, editor):
    """Everything that depends on an edit: its tensors, answers with it, side by side, and without it again."""
    base, found = answers(lm), {}
    torch.manual_seed(3)
    handle = editor.edit(lm, EDITS[:2])
    second = editor.edit(lm, EDITS[2:])
    state = {name: v for name, v in handle.state().items() if isinstance(v, dict)}
    found["tensors"] = {
        name: digest(*(tensors[key] for key in sorted(tensors))) for name, tensors in state.items()
    }
    found["answers"] = answers(lm)
    found["logprob"] = lm.score(PROMPTS, TARGETS).logprob_BM.tolist()
    second.remove()
    handle.remove()
    found["restored"] = answers(lm) == base
    if isinstance(editor, WeightEditor):
        with editing_mode():
            deltas = editor.propose_each(lm, [[edit] for edit in EDITS])
        texts = [e.text for e in EDITS], [e.target_new for e in EDITS]
        with lm.reuse.shared(lm.edits.lowest_layer(deltas)):
            scores = lm.score(*texts, deltas, range(3))
        found["beside"] = digest(scores.logprob_BM)
    if isinstance(editor, LearnedEditor):  # a training step
        loss = editor.objective(*editor._losses(EDITS, OUTER, LOCAL))
        loss.backward()
        gradients = [p.grad for p in editor.parameters() if p.grad is not None]
        found["loss"], found["gradients"] = digest(loss), [g.norm().item() for g in gradients]
    return found


def of_all(lm, files, editors):
    """What each editor computes, and the model's own numbers."""
    found = {"model": [lm.weights_hash, str(lm.structure), answers(lm)]}
    trace = causal_trace(lm, [replace(EDITS[0], target_true="in")], samples=2)
    found["trace"] = digest(*trace.effect.values())
    for name in editors:
        torch.manual_seed(0)
        try:
            found[name] = computed(lm, EDITORS[name](lm, files))
        except Exception:
            found[name] = traceback.format_exc()
            while lm.handles:
                lm.handles[-1].remove()
    found["hash"] = lm.edits.__dict__.pop("weights_hash") == lm.weights_hash
    return found


def main(folder, text):
    torch.set_num_threads(1)
    files, found = SimpleNamespace(text=text), {}
    for name, places in PLACEMENTS.items():
        with tempfile.TemporaryDirectory() as cache:
            os.environ["CORRIGENDA_CACHE"] = cache
            editors = FEW.get(name, tuple(EDITORS))
            found[name] = of_all(placed(folder, places), files, editors)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
