"""The files around the code agree with each other."""

import importlib
import importlib.metadata
import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.samples import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = PROJECT["version"]
    assert citation["version"] == version
    assert re.search(rf"^## .*\b{re.escape(version)}\b", changelog, re.M), f"no '## {version}'"


def test_every_console_script_resolves() -> None:
    for script, target in PROJECT["scripts"].items():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), f"{script} = {target}"


def test_every_folder_of_code_is_a_package_under_the_one_import_name() -> None:
    for name in ("pipeline", "modules", "datamodules"):
        assert (ROOT / "corrigenda" / name).resolve() == ROOT / name
        for folder in {path.parent for path in (ROOT / name).rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), f"{folder} is left out of the wheel"


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins.items()}


def required() -> list[Requirement]:
    wanted = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    return [Requirement(line) for line in wanted]


def test_tested_versions_are_within_the_ranges() -> None:
    pins = pinned()
    for requirement in required():
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"constraints.txt does not pin {requirement.name}"
        assert pin in requirement.specifier, f"constraints.txt pins {pin}, not {requirement}"


def test_all_that_is_installed_is_pinned() -> None:
    """What our requirements require in turn, as far as this machine has it.

    A build of torch for CUDA chooses the versions of CUDA's libraries itself.
    """
    pins, left, seen = pinned(), required(), set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        needed = not requirement.marker or any(
            requirement.marker.evaluate({"extra": extra}) for extra in requirement.extras | {""}
        )
        key = name, *sorted(requirement.extras)
        if not needed or key in seen:
            continue
        seen.add(key)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        of_cuda = name.startswith(("nvidia-", "cuda-", "triton"))
        assert name in pins or of_cuda, f"constraints.txt does not pin {name}"
        left += [Requirement(line) for line in lines]
    assert len(seen) > len(required())


def test_every_make_target_has_a_help_text() -> None:
    targets = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1].split()
    assert {"setup", "demo", "test", "faults", "lint", "format", "bench", "clean"} <= {*targets}
    for target in targets:
        assert re.search(rf"^{target}:.*## \w", MAKEFILE, re.M), f"make {target}: no '## text'"


def test_the_lowest_coverage_is_the_documented_one() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    measured, reached, lines, least = (
        int(number.replace(",", ""))
        for number in re.search(
            r"reach (\d+) % of the lines \(([\d,]+) of ([\d,]+),.*fails below\s(\d+) %", text, re.S
        ).groups()
    )
    assert measured == 100 * reached // lines >= least
    assert PYPROJECT["tool"]["coverage"]["report"]["fail_under"] == least >= 92


def test_what_is_promised_is_written_down_and_linked() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert "docs/reliability.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make faults" in text and "python -m tests.bad_inputs" in text
    tried, *verdicts = map(
        int, re.search(r"^\|((?: *\d+ *\|)+)$", text, re.M)[1].strip("|").split("|")
    )
    assert tried == sum(verdicts) >= 300
