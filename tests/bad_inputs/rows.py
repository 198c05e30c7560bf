"""The rows of the corpus: a command line, the files it needs, and the one line that it must end in.

A YAML file is a list of groups:

    - run: validate {ft} {x}                # {x} is the row's own part; the others stand in MACROS
      files: {a.yaml: "text", b.bin: {hexadecimal: "00ff"}}     # for every row, see makers.py
      env: {HOME: null}                     # null removes a variable
      rows:
        --data.limit 0: limit must be at least 1          # the row's name is its {x}
        a name: {x: --data.limit -1, says: [limit, "-1"], files: {...}, env: {...}}

``says`` are regular expressions, all of which the message must match. The exit status is 2 unless ``exit``
says otherwise. ``leaves`` names what may be there afterwards that was not there before; where it is not
given, nothing may.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
MACROS = {
    "quiet": "--wandb off --trainer.accelerator cpu --trainer.enable_progress_bar false --run_dir run",
    "lm": "{inputs}/lm",
    "model": "--model EditingModule --model.lm.name {lm}",
    "facts": "--data CounterFact --data.path {inputs}/facts.jsonl",
    "zsre": "--data ZsRE --data.path {inputs}/zsre.jsonl --data.train_path {inputs}/zsre-train.jsonl",
    "base": "{model} {facts} {quiet}",
    "ft": "{base} --edit.editor FT --edit.editor.layers [1] --edit.editor.steps 2",
    "text": "--edit.editor.corpus.source {inputs}/text.txt --edit.editor.corpus.tokens 1500",
    "rome": "{base} --edit.editor ROME --edit.editor.layer 0 --edit.editor.steps 2 {text} "
    "--edit.editor.contexts []",
    "mend": "--model MEND --model.lm.name {lm} --model.layers [1] --model.rank 4 {zsre} {quiet} "
    "--trainer.max_steps 2 --trainer.val_check_interval 1 --trainer.check_val_every_n_epoch null",
    "lora_fit": "--model FineTune --model.lm.name {lm} --model.method LoRA --model.method.layers [1] "
    "--model.method.targets mlp --edit.schedule epoch {facts} {quiet} --trainer.max_epochs 1",
    "grace": "{base} --edit.editor GRACE --edit.editor.layer 1 --edit.editor.epsilon 0.5 --edit.editor.steps 2",
    "memprompt": "{base} --edit.editor MemPrompt --edit.editor.encoder {inputs}/bert "
    "--edit.editor.threshold 0.5",
    "stream": "{grace} --edit.schedule stream --data.batch_size 1 --data.limit 2",
    "moments": "--lm.name {lm} --corpus.source {inputs}/text.txt --corpus.tokens 1500 --layers 0",
}
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        name: unique; the file's name, the group's number and the row's key.
        run: the command line, with places still to be filled.
        says: regular expressions that the message must match.
        files: by name, what makers.py makes of them.
        env: environment variables; None removes one.
        exit: expected exit status.
        leaves: patterns of files that may remain.
    """

    name: str
    run: str
    says: tuple[str, ...]
    files: Mapping[str, Any]
    env: Mapping[str, str | None]
    exit: int = 2
    leaves: tuple[str, ...] = ()

    def words(self, **places: object) -> list[str]:
        """The command line's words; ``places`` are folders that only the runner knows."""
        return [fill(word, places) for word in shlex.split(expand(self.run))]


def expand(text: str) -> str:
    """A text with its macros filled in."""
    while (filled := _PLACE.sub(lambda m: MACROS.get(m[1], m[0]), text)) != text:
        text = filled
    return text


def fill(text: str, places: Mapping[str, object]) -> str:
    """A text with its folders filled in; other braces stay."""
    return _PLACE.sub(lambda match: str(places.get(match[1], match[0])), text)


def read_rows() -> list[Row]:
    """All rows, in the order of their files."""
    rows = [row for path in sorted(FOLDER.glob("*.yaml")) for row in _read(path)]
    names = [row.name for row in rows]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"rows of the same name: {twice}"
    return rows


def _read(path: Path) -> list[Row]:
    rows = []
    for group in yaml.load(path.read_text("utf-8"), yaml.CSafeLoader):
        for key, given in group["rows"].items():
            row = given if isinstance(given, dict) else {"says": given}
            says = row["says"]
            title = f"{group['title']}: " if "title" in group else ""
            rows.append(
                Row(
                    name=f"{path.stem}: {title}{key}",
                    run=group["run"].replace("{x}", str(row.get("x", key))),
                    says=tuple(says) if isinstance(says, list) else (says,),
                    files=group.get("files", {}) | row.get("files", {}),
                    env=group.get("env", {}) | row.get("env", {}),
                    exit=row.get("exit", group.get("exit", 2)),
                    leaves=tuple(row.get("leaves", group.get("leaves", ()))),
                )
            )
    return rows
