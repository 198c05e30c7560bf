"""What rows are made of: good inputs that all of them share, and one function for every way to spoil a file.

A row's ``files`` map a name to a text, or to ``{maker: arguments}`` with one of the functions below. Texts may
hold ``{inputs}`` (the folder of good inputs) and ``{canary}`` (a file that only code from a foreign file
writes). A name that ends with a slash is a folder.
"""

from __future__ import annotations

import copy
import gzip as gzip_
import json as json_
import os
import pickle as pickle_
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, safe_open, save_file

from corrigenda.modules.files import DIGEST, write_tensors
from tests.bad_inputs.rows import fill
from tests.conftest import ANSWERS, SUBJECTS, random_net, tiny_tokenizer
from tests.processes import Process

RUNS = {  # folders of finished runs, by the command that makes them
    "rome": "validate {rome} --data.limit 2",
    "ft": "validate {ft} --data.limit 2",
    "grace": "validate {grace} --edit.schedule epoch --data.limit 2",
    "memprompt": "validate {memprompt} --edit.schedule epoch --data.limit 2",
    "mend": "fit {mend}",
    "lora": "fit {lora_fit} --data.limit 2",
    "stream": "fit {stream}",
}


def fact(number: int) -> dict[str, Any]:
    """A good CounterFact record."""
    subject, answer = SUBJECTS[number], ANSWERS[number % 4]
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "{} was made in", "subject": subject, "relation_id": "P0",
            "target_new": {"str": answer}, "target_true": {"str": ANSWERS[(number + 1) % 4]},
        },
        "paraphrase_prompts": [f"The origin of {subject} is"],
        "neighborhood_prompts": [f"Neighbour {number} was made in"],
        "generation_prompts": [],
    }  # fmt: skip


def question(number: int) -> dict[str, Any]:
    """A good zsRE record."""
    subject, answer = SUBJECTS[number], ANSWERS[number % 4]
    return {
        "subject": subject, "src": f"Who made {subject}?", "rephrase": f"{subject} is the work of whom?",
        "alt": answer, "answers": [ANSWERS[(number + 1) % 4]], "loc": f"nq question: what is number {number}",
        "loc_ans": f"it is {number}",
    }  # fmt: skip


def chain(number: int) -> dict[str, Any]:
    """A good MQuAKE record."""
    rewrite = fact(number)["requested_rewrite"] | {
        "question": f"Where was {SUBJECTS[number]} made?"
    }
    hop = {"question": rewrite["question"], "cloze": f"{SUBJECTS[number]} was made in",
           "answer": rewrite["target_true"]["str"], "answer_alias": []}  # fmt: skip
    new = hop | {"answer": rewrite["target_new"]["str"]}
    return {
        "case_id": number, "requested_rewrite": [rewrite], "questions": [rewrite["question"]],
        "answer": hop["answer"], "answer_alias": [], "new_answer": new["answer"], "new_answer_alias": [],
        "single_hops": [hop], "new_single_hops": [new],
        "orig": {"triples_labeled": [], "new_triples_labeled": []},
    }  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Good inputs: two tiny models, an encoder, data, a text; they need no command to have run."""
    for name, seed in (("lm", 0), ("lm-other", 1)):
        random_net("gpt2", seed).save_pretrained(folder / name)
        tiny_tokenizer(False).save_pretrained(folder / name)
    tokenizer = tiny_tokenizer(False)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "bert")
    sizes = {"vocab_size": 404, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=64)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    jsonl(folder / "facts.jsonl", [fact(i) for i in range(4)])
    jsonl(folder / "zsre.jsonl", [question(i) for i in range(4)])
    jsonl(folder / "zsre-train.jsonl", [question(i) for i in range(4, 12)])
    jsonl(folder / "mquake.jsonl", [chain(i) for i in range(2)])
    lines = [f"{a} met {b} near {c}.\n" for a in SUBJECTS for b in SUBJECTS for c in ANSWERS]
    text(folder / "text.txt", "".join(lines))


def make_runs(folder: Path, words: Mapping[str, Sequence[str]]) -> None:
    """Finished runs in ``folder/runs``, and the second moments of one in ``folder/cache``."""
    (folder / "runs").mkdir()
    for name, command in words.items():
        command = [str(folder / "runs" / name) if word == "run" else word for word in command]
        env = {"CORRIGENDA_CACHE": str(folder / "cache")}
        ended = Process(command, folder / "runs", env).end()
        assert ended.status == 0, f"the good run {name} failed: {ended.err}"


def make(path: Path, given: Any, places: Mapping[str, object]) -> None:
    """One file or folder of a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(given, str):
        text(path, fill(given, places))
        return
    ((name, argument),) = given.items()
    if isinstance(argument, str):
        argument = fill(argument, places)
    elif isinstance(argument, dict) and "of" in argument:
        argument = argument | {"of": fill(argument["of"], places)}
    if name == "folder":
        path.mkdir(exist_ok=True)
    else:
        globals()[name](path, argument)


# ---------------------------------------------------------------------------- plain files


def text(path: Path, content: str) -> None:
    path.write_text(content, "utf-8")


def hexadecimal(path: Path, digits: str) -> None:
    path.write_bytes(bytes.fromhex(digits))


def json(path: Path, value: Any) -> None:
    text(path, json_.dumps(value))


def jsonl(path: Path, values: Sequence[Any]) -> None:
    text(path, "".join(json_.dumps(value) + "\n" for value in values))


def encoded(path: Path, given: Mapping[str, str]) -> None:
    """A text in another encoding."""
    path.write_bytes(given["text"].encode(given["as"]))


def gzip(path: Path, content: str) -> None:
    path.write_bytes(gzip_.compress(content.encode()))


def repeated(path: Path, given: Mapping[str, Any]) -> None:
    """``text`` so many ``times``, between ``start`` and ``end``."""
    text(path, given.get("start", "") + given["text"] * given["times"] + given.get("end", ""))


def link(path: Path, target: str) -> None:
    path.symlink_to(target)


def pipe(path: Path, _: object) -> None:
    """A named pipe, which nobody ever writes to."""
    os.mkfifo(path)


def copied(path: Path, source: str) -> None:
    """A file or a folder of the good inputs."""
    (shutil.copytree if Path(source).is_dir() else shutil.copy)(source, path)


def cut(path: Path, given: Mapping[str, Any]) -> None:
    """The first ``share`` of a good file."""
    whole = Path(given["of"]).read_bytes()
    path.write_bytes(whole[: int(given["share"] * len(whole))])


def damaged(path: Path, given: Mapping[str, Any]) -> None:
    """A good file in which 64 bytes are others, at a ``share`` of its length."""
    whole = bytearray(Path(given["of"]).read_bytes())
    at = int(given["share"] * len(whole))
    whole[at : at + 64] = bytes(255 - byte for byte in whole[at : at + 64])
    path.write_bytes(whole)


# ---------------------------------------------------------------------------- texts that grow


def nested(path: Path, given: Mapping[str, Any]) -> None:
    """``depth`` times ``open``, then as many times ``close``, between ``start`` and ``end``."""
    depth = given["depth"]
    inner = given["open"] * depth + given.get("middle", "") + given["close"] * depth
    text(path, given.get("start", "") + inner + given.get("end", ""))


def laughs(path: Path, given: Mapping[str, Any]) -> None:
    """YAML in which every list holds the one before it ten times: 10 ** levels words under ``key``."""
    lines = ["a0: &a0 [ha, ha]"]
    for level in range(1, given["levels"]):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    text(path, "\n".join([*lines, f"{given['key']}: *a{given['levels'] - 1}", ""]))


# ---------------------------------------------------------------------------- records


def _changed(record: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A record with fields set or removed; a field in another is written ``outer.inner``, a list's as ``0``."""
    record = copy.deepcopy(record)
    for field in [*given.get("set", {}), *given.get("drop", [])]:
        *outer, last = field.split(".")
        inner: Any = record
        for name in outer:
            inner = inner[int(name) if isinstance(inner, list) else name]
        if field in given.get("drop", []):
            del inner[last]
        else:
            inner[last] = given["set"][field]
    return record


def facts(path: Path, given: Mapping[str, Any]) -> None:
    """CounterFact records, the second one spoiled."""
    jsonl(path, [fact(0), _changed(fact(1), given)])


def questions(path: Path, given: Mapping[str, Any]) -> None:
    """zsRE records, the second one spoiled."""
    jsonl(path, [question(0), _changed(question(1), given)])


def chains(path: Path, given: Mapping[str, Any]) -> None:
    """MQuAKE records, the second one spoiled."""
    jsonl(path, [chain(0), _changed(chain(1), given)])


def long_fact(path: Path, given: Mapping[str, Any]) -> None:
    """CounterFact records; in the second one a field holds a long text."""
    record = _changed(
        fact(1), {"set": {given["field"]: given.get("start", "") + given["text"] * given["times"]}}
    )
    jsonl(path, [fact(0), record])


# ---------------------------------------------------------------------------- tensors and checkpoints


def safetensors(path: Path, given: Mapping[str, Any]) -> None:
    """A file with these ``tensors`` (shapes, filled with ``value``) and this ``metadata``."""
    value = float(given.get("value", 0.5))
    tensors = {name: torch.full(shape, value) for name, shape in given["tensors"].items()}
    save_file(tensors, path, given.get("metadata"))


def header(path: Path, given: Mapping[str, Any]) -> None:
    """A safetensors file whose JSON header is this text, with a length that may be a lie."""
    content = given["text"].encode()
    path.write_bytes(struct.pack("<Q", given.get("length", len(content))) + content)


def repacked(path: Path, given: Mapping[str, Any]) -> None:
    """A good safetensors file with some of its metadata set or dropped, or its tensors changed.

    ``json`` sets values in the JSON of one metadata field, ``{field: {name: value}}``; ``fill`` sets every
    number of the floating-point tensors; ``rename`` replaces a part of all tensors' names; ``only`` keeps the
    first so many rows of each.
    """
    source = Path(given["of"])
    source = next(source.glob("*.safetensors")) if source.is_dir() else source
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {}
    tensors = load_file(source)
    metadata |= given.get("set", {})
    for name in given.get("drop", []):
        metadata.pop(name)
    for name, values in given.get("json", {}).items():
        metadata[name] = json_.dumps(json_.loads(metadata[name]) | values)
    if "fill" in given:
        number = float(given["fill"])
        tensors = {
            name: torch.full_like(tensor, number) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
    for old, new in given.get("rename", {}).items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    if "rows" in given:
        tensors = {name: tensor[: given["rows"]].contiguous() for name, tensor in tensors.items()}
    if "suffix" in given:  # only those tensors
        tensors = {n: t for n, t in tensors.items() if n.endswith(given["suffix"])}
    if "cast" in given:
        tensors = {
            name: tensor.to(getattr(torch, given["cast"])) for name, tensor in tensors.items()
        }
    metadata.pop(DIGEST, None)
    write_tensors(path, tensors, metadata)


def saved(path: Path, value: Any) -> None:
    """What ``torch.save`` makes of a value."""
    torch.save(value, path)


def checkpoint(path: Path, given: Mapping[str, Any]) -> None:
    """A good checkpoint with keys set or dropped; ``fill`` sets all numbers of its weights.

    ``at`` is a list of keys and indices, and ``value`` what is set there.
    """
    content = torch.load(given["of"], "cpu", weights_only=True)
    content |= given.get("set", {})
    if "at" in given:
        *outer, last = given["at"]
        inner: Any = content
        for key in outer:
            inner = inner[key]
        inner[last] = given["value"]
    for name in given.get("drop", []):
        content.pop(name)
    if "fill" in given:
        for tensor in content["state_dict"].values():
            if tensor.is_floating_point():
                tensor.fill_(float(given["fill"]))
    if "first" in given:  # only so many weights
        content["state_dict"] = dict(list(content["state_dict"].items())[: given["first"]])
    torch.save(content, path)


class _Writes:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def pickle(path: Path, canary: str) -> None:
    """A pickle that runs code when it is loaded."""
    path.write_bytes(pickle_.dumps({"state_dict": _Writes(canary)}))


def saved_code(path: Path, canary: str) -> None:
    """A checkpoint of torch's own format that runs code when it is unpickled."""
    torch.save({"state_dict": {}, "callbacks": _Writes(canary)}, path)


def npz(path: Path, given: Mapping[str, Any]) -> None:
    """A file of second moments: so many ``rows`` and ``columns`` of ``value`` from ``count`` tokens."""
    total = np.full(
        (given.get("rows", 128), given.get("columns", 128)), float(given.get("value", 1))
    )
    if given.get("value") is None:
        np.fill_diagonal(total, 200.0)
    if given.get("skew"):
        total[0, -1] = 1e6
    names = given.get("names", ["mom2.mom2", "mom2.count"])
    np.savez(path, **dict(zip(names, [total, np.int64(given.get("count", 500))], strict=True)))


def npz_code(path: Path, canary: str) -> None:
    """A file of second moments that holds a pickle."""
    np.savez(path, **{"mom2.mom2": np.array([_Writes(canary)], dtype=object), "mom2.count": 5})


# ---------------------------------------------------------------------------- run folders


def unfinished(path: Path, source: str) -> None:
    """A run folder that was interrupted: that of a good run without its summary."""
    shutil.copytree(source, path)
    (path / "summary.json").unlink(missing_ok=True)


def finished(path: Path, given: Mapping[str, Any]) -> None:
    """A finished run folder with values of its summary and of its first row set or dropped."""
    shutil.copytree(given["of"], path)
    summary = json_.loads((path / "summary.json").read_text())
    json(path / "summary.json", _changed(summary, given.get("summary", {})))
    rows = [json_.loads(line) for line in (path / "cases.jsonl").read_text().splitlines()]
    jsonl(path / "cases.jsonl", [_changed(rows[0], given.get("row", {})), *rows[1:]])


# ---------------------------------------------------------------------------- models


def model(path: Path, given: Mapping[str, Any]) -> None:
    """A tiny model: its ``family``, ``config`` values, which files it lacks (``without``), and what is spoiled.

    ``tokenizer: false`` leaves it out, ``nan`` is a parameter that is not finite, ``edit`` sets values in its
    config.json, ``head: false`` keeps no head.
    """
    config = given.get("config", {})
    family = given.get("family", "gpt2")
    net = random_net(family, **config)
    if "nan" in given:
        net.get_parameter(given["nan"]).data.fill_(float("nan"))
    (net if given.get("head", True) else net.base_model).save_pretrained(path)
    if given.get("tokenizer", True):
        tiny_tokenizer(False).save_pretrained(path)
    for name in given.get("without", []):
        (path / name).unlink()
    if "edit" in given:
        file = path / "config.json"
        text(file, json_.dumps(json_.loads(file.read_text()) | given["edit"]))


def t5(path: Path, _: object) -> None:
    """A tiny encoder-decoder."""
    sizes = {
        "vocab_size": 404,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 4,
    }
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(path)
    tiny_tokenizer(False).save_pretrained(path)


def remote_code(path: Path, canary: str) -> None:
    """A model folder whose config.json names a Python file of its own."""
    model(path, {"edit": {"model_type": "own", "auto_map": {
        "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}})  # fmt: skip
    text(path / "own.py", f"open({canary!r}, 'w')\n")


def pickled_weights(path: Path, canary: str) -> None:
    """A model folder whose weights are a pickle that runs code."""
    model(path, {"without": ["model.safetensors"]})
    torch.save({"transformer.wte.weight": _Writes(canary)}, path / "pytorch_model.bin")
