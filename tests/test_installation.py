"""The wheel in an environment of its own, and the names that ``corrigenda`` offers."""

import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import corrigenda
from corrigenda import datamodules
from corrigenda.datamodules.base import EditDataModule
from corrigenda.modules import editors
from corrigenda.modules.editing.editor import Editor
from tests.samples import ROOT

SOURCES = ("corrigenda", "modules", "datamodules", "pipeline", "configs")
FILES = ("pyproject.toml", "README.md", "LICENSE")
PARTS = (".py", ".yaml", ".json", ".tsv", ".txt", ".css", ".js")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
RAISES = "raise ImportError('a file of the current folder was imported')\n"


def run(*command, cwd):
    """What a command prints in a folder from which Python imports first."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this tree in a fresh environment; its dependencies are those of the present one.

    ``bin`` is the environment's folder of commands, ``packages`` that of its packages, and ``folder`` a
    project with folders and files of the same names as ours, which fail when they are imported.
    """
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools")
    base = tmp_path_factory.mktemp("installation")
    source, environment, folder = base / "source", base / "environment", base / "project"
    cached = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=cached)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index")
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", base, source, cwd=base)
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=base)
    (wheel,) = base.glob("*.whl")
    binaries = environment / "bin"
    run(*pip, "--python", binaries / "python", "install", *offline, wheel, cwd=base)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), "utf-8")

    for name in ("modules", "pipeline", "datamodules", "configs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(RAISES, "utf-8")
    (folder / "pipeline.py").write_text(RAISES, "utf-8")
    return SimpleNamespace(bin=binaries, packages=packages, folder=folder)


@pytest.mark.slow
def test_public_names_are_imported_from_the_wheel(installed):
    code = (
        "import corrigenda\n"
        "from corrigenda import Edit, LanguageModel, ROME\n"
        "print(corrigenda.__file__, corrigenda.__version__)"
    )
    path, version = run(installed.bin / "python", "-c", code, cwd=installed.folder).split()
    assert Path(path).is_relative_to(installed.packages)
    assert version == PROJECT["version"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [("corrigenda",), ("python", "-m", "corrigenda")], ids=" ".join)
def test_the_command_works_beside_folders_of_the_same_names(installed, command):
    program, *rest = command
    out = run(installed.bin / program, *rest, "--help", cwd=installed.folder)
    assert "corrigenda validate -c configs/rome/smollm2.yaml" in out


@pytest.mark.slow
def test_configurations_come_with_the_wheel(installed):
    files = ["configs/rome/smollm2.yaml", "configs/data/facts.yaml"]
    args = [word for file in files for word in ("-c", file)]
    program = installed.bin / "corrigenda"
    out = run(program, "validate", *args, "--print_config", cwd=installed.folder)
    found = yaml.safe_load(out)
    assert found["data"]["class_path"] == "corrigenda.datamodules.facts.Facts"
    assert found["edit"]["editor"]["class_path"] == "corrigenda.modules.editors.rome.ROME"


@pytest.mark.slow
def test_the_wheel_installs_one_import_name_with_all_of_its_files(installed):
    (info,) = installed.packages.glob("corrigenda-*.dist-info")
    assert (info / "top_level.txt").read_text("utf-8").split() == ["corrigenda"]
    names = {path.name for path in installed.packages.iterdir()} - {"__pycache__"}
    assert names == {"corrigenda", info.name, "dependencies.pth"}

    package = installed.packages / "corrigenda"
    assert (package / "py.typed").is_file()
    for name in SOURCES[1:]:
        ours = {
            path.relative_to(ROOT)
            for path in (ROOT / name).rglob("*")
            if path.is_file() and path.suffix in PARTS
        }
        missing = {str(path) for path in ours if not (package / path).is_file()}
        assert ours and not missing

    code = (
        "from importlib.resources import files\n"
        "print(*(files('corrigenda') / 'configs' / 'rome').iterdir())"
    )
    found = run(installed.bin / "python", "-c", code, cwd=installed.folder).split()
    assert str(package / "configs" / "rome" / "smollm2.yaml") in found


# ---------------------------------------------------------------------------- public names


def test_the_version_is_that_of_the_installed_package():
    assert corrigenda.__version__ == metadata.version("corrigenda")


def test_every_listed_name_can_be_imported_and_no_other():
    names = dir(corrigenda)
    assert {"__version__", "Edit", "EditCallback", "EditingModule", "LanguageModel"} <= {*names}
    for name in names:
        found = getattr(corrigenda, name)
        assert name == "__version__" or found.__name__ == name
    with pytest.raises(AttributeError, match="'corrigenda' has no attribute 'Rome'"):
        corrigenda.Rome  # noqa: B018


def public_classes(package, base):
    """Classes with nothing abstract that a package's files define."""
    for file in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(file.name)
        for name, found in inspect.getmembers(module, inspect.isclass):
            is_own = found.__module__ == file.name and issubclass(found, base)
            if is_own and not name.startswith("_") and not inspect.isabstract(found):
                yield found


@pytest.mark.parametrize(
    ("package", "base"),
    [(editors, Editor), (datamodules, EditDataModule)],
    ids=["editors", "data modules"],
)
def test_every_editor_and_data_module_is_a_public_name(package, base):
    found = {*public_classes(package, base)} - {base}
    assert len(found) > 3
    assert {each.__name__ for each in found} <= {*dir(corrigenda)}
    assert all(getattr(corrigenda, each.__name__) is each for each in found)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, corrigenda; print([n for n in ('torch', 'transformers', 'lightning') if n in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"
