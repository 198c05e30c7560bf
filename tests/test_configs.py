"""Every configuration file that comes with the project fits the signatures it configures."""

from pathlib import Path

import pytest
import yaml

from corrigenda.pipeline.compare import read_study
from corrigenda.pipeline.fit import CONFIGS

APART = ("compare", "tasks")
FILES = sorted(
    p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml") if p.parent.name not in APART
)
STUDIES = sorted((CONFIGS / "compare").glob("*.yaml"))
RUNS = [(study, run.name) for study in STUDIES for run in read_study(study).runs]


@pytest.fixture
def parse(corrigenda, capsys):
    """``parse(verb, *args)``: the whole configuration, checked; nothing is loaded."""

    def parse(*args):
        assert corrigenda(*args, "--print_config") == 0, capsys.readouterr().err
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def test_they_are_found():
    assert Path("defaults.yaml") in FILES and Path("rome/smollm2.yaml") in FILES


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize("file", FILES, ids=str)
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
    assert CONFIGS == CONFIGS


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_a_study_uses_only_what_it_has_made(study):
    """A checkpoint of ``{out}/NAME`` is that of a run before."""
    made = []
    for run in read_study(study).runs:
        used = [w.split("/")[1] for w in run.args if w.startswith("{out}/") and w.endswith(".ckpt")]
        assert set(used) <= set(made), f"{study.name}: {run.name} needs {used}, made so far {made}"
        made.append(run.name)
