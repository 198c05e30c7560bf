"""The help of ``fit`` and ``validate`` as text, stored beside the code.

To build it, Lightning, the model libraries and all methods are imported, which takes seconds. ``make options``
writes the files again, and a test compares them with the options.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import sys
from pathlib import Path

from corrigenda.pipeline.fit import CONFIGS, fit_or_validate

FOLDER = Path(__file__).parent / "help"
LIBRARIES = ("jsonargparse", "lightning")  # whose options and layout the text shows
VERBS = ("fit", "validate")
COLUMNS = 80


def stored_help(verb: str) -> str | None:
    """The help of a command; None if it was written with other versions of Python or the libraries."""
    versions, _, text = (FOLDER / f"{verb}.txt").read_text("utf-8").partition("\n")
    if json.loads(versions) != _versions():
        return None
    return text.replace("{configs}", str(CONFIGS))


def build_help(verb: str) -> str:
    """The content of the stored file: the versions, and what the parser prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        fit_or_validate([verb, "--help"])
    text = re.sub(
        r"default config file locations:\n.*?\n\n",
        "Defaults are those of {configs}/defaults.yaml\n\n",
        printed.getvalue(),
        flags=re.DOTALL,
    )
    return f"{json.dumps(_versions())}\n{text}"


def _versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": ".".join(map(str, sys.version_info[:2])), **libraries}


if __name__ == "__main__":
    os.environ["COLUMNS"] = str(COLUMNS)
    for name in VERBS:
        (FOLDER / f"{name}.txt").write_text(build_help(name), "utf-8")
