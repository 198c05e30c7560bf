"""The tables of docs/choosing.md: memory and time by method and size, and the settings by model.

python -m benchmarks.choosing        writes them into the page again

Measurements are those of docs/scaling.md, other sizes its formulas; settings are read from configs/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cost import SINGLE, Cost, Shape, size
from benchmarks.on_paper import BANDWIDTH, FACT, MODELS, RATE, methods
from benchmarks.scaling import HEADER
from corrigenda.pipeline.fit import CONFIGS

DOCS = Path(__file__).parents[1] / "docs"
# Rows of the measured table and of the formulas; None where a method was not measured.
ROWS = {
    "ROME": ("ROME", "ROME"),
    "MEMIT, 1 edit": ("MEMIT", "MEMIT, 1 edit"),
    "MEMIT, 100 edits": (None, "MEMIT, 100 edits"),
    "AlphaEdit, 100 edits": (None, "AlphaEdit, 100 edits"),
    "KN": ("KN", "KN"),
    "FT, FT-M": ("FT-M", "FT, FT-M"),
    "LoRA": ("LoRA", "LoRA"),
    "MEND, trained": ("MEND", "MEND"),
    "MEND, a training step": ("MEND, a training step", "MEND, a training step"),
    "KE, trained": ("KE", "KE"),
    "GRACE": ("GRACE", "GRACE"),
    "WISE": ("WISE", "WISE"),
    "IKE, a first question": ("IKE, 2 edits, first questions", "IKE, a first question"),
}
UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9}
# Folders that hold no method.
LEFT_OUT = ("base", "compare", "data", "presets", "published", "study", "tasks")
OWN = "smollm2"
PARAMETERS = 134_515_008  # of SmolLM2-135M
LAYERS = ("layer", "layers")


# ---------------------------------------------------------------------------- memory and time


def costs() -> str:
    """Memory beside the model while an edit is made, and seconds, for every method and size."""
    names = ["SmolLM2-135M, measured", *MODELS]
    weights = [size(SINGLE * PARAMETERS), *(size(shape.weights) for shape in MODELS.values())]
    lines = [["", *names], ["---"] * (len(names) + 1), ["the model itself", *weights]]
    measured = _measured()
    for name, (at_135m, on_paper) in ROWS.items():
        small = measured[at_135m] if at_135m else "–"
        lines.append([name, small, *(_predicted(shape, on_paper) for shape in MODELS.values())])
    return _table(lines)


def _predicted(shape: Shape, name: str) -> str:
    cost: Cost = methods(shape)[name](shape, FACT)
    seconds = cost.seconds(shape, RATE, shape.block * shape.bytes / BANDWIDTH)
    return f"{size(cost.held + cost.peak)}, {float(f'{seconds:.2g}'):g} s"


def _measured() -> dict[str, str]:
    """What docs/scaling.md says was measured: held and peak together, and seconds."""
    (rows,) = re.findall(
        re.escape(HEADER) + r"((?:\|.*\n)+)", (DOCS / "scaling.md").read_text("utf-8")
    )
    found = {}
    for line in rows.splitlines():
        name, held, peak, _, _, seconds = (cell.strip() for cell in line.split("|")[1:-1])
        memory = sum(_bytes(cell.split(" / ")[1]) for cell in (held, peak))
        found[name] = f"{size(memory)}, {seconds.split(' / ')[1]} s"
    return found


def _bytes(text: str) -> float:
    number, _, unit = text.partition(" ")
    return float(number) * UNITS[unit]


# ---------------------------------------------------------------------------- settings


def models() -> list[str]:
    """The models of the configurations, the embedded one first."""
    names = {path.stem for path in _files() if OWN not in path.stem and "-" in path.stem}
    parts = ("counterfactual", "scope")  # of SERAC, rows of their base
    return [OWN, *sorted(name for name in names if not name.endswith(parts))]


def settings(model: str) -> str:
    """Layers and further settings of every method for one model; what is not named is the default."""
    lines = [["configuration", "class", "layers", "further settings"], ["---"] * 4]
    for path in _files():
        if path.stem == model or path.stem.startswith(f"{model}-"):
            name, options = _method(yaml.safe_load(path.read_text("utf-8")))
            layers = [_shown(options.pop(key)) for key in LAYERS if key in options]
            rest = ", ".join(f"{key} {_shown(value)}" for key, value in options.items())
            shown = f"`{path.relative_to(CONFIGS).with_suffix('')}`"
            lines.append([shown, name, " and ".join(layers) or "–", rest or "–"])
    return _table(lines)


def _files() -> list[Path]:
    every = sorted(CONFIGS.glob("*/*.yaml"))
    return [path for path in every if path.parent.name not in LEFT_OUT]


def _method(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(class, its options): the editor that a configuration names, or its module that is trained."""
    part = config.get("edit", {}).get("editor") or config["model"]
    name, options = part["class_path"], dict(part.get("init_args", {}))
    options.pop("lm", None)
    inner = options.pop("method", None) or options.pop("editor", None)
    short = name.rpartition(".")[2]
    if not isinstance(inner, dict):
        return short, options
    inside, its = _method({"model": inner})
    return f"{short} of {inside}", its | options


def _shown(value: object) -> str:
    """A value in one line; whole numbers in a row as a range."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {_shown(part)}' for key, part in value.items())})"
    if isinstance(value, list):
        return (
            _range(value)
            if all(type(part) is int for part in value)
            else " ".join(map(_shown, value))
        )
    if isinstance(value, float):
        return f"{value:g}"
    return f"`{value}`" if isinstance(value, str) and "\n" in value else str(value)


def _range(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


# ---------------------------------------------------------------------------- the page


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(map(_plain, line))} |\n" for line in lines)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


def tables() -> Iterator[tuple[str, str]]:
    """(name, table) of all that the page holds between its marks."""
    yield "costs", costs()
    for model in models():
        yield model, settings(model)


def filled(page: str) -> str:
    """The page with all its tables as they are now."""
    for name, table in tables():
        start, end = f"<!-- {name} -->\n\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"docs/choosing.md has no mark for the table {name}")
        page = f"{before}{start}{table}\n{end}{after}"
    return page


if __name__ == "__main__":
    path = DOCS / "choosing.md"
    path.write_text(filled(path.read_text("utf-8")), "utf-8")
