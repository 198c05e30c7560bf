"""Reads and checks the JSON files that describe runs and studies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from corrigenda.pipeline.errors import UserError

LONGEST_NAME = 100  # bytes of a run's name; file systems allow 255, and suffixes follow


def parse(text: str) -> dict[str, Any]:
    """Parses a JSON object; raises ValueError for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def numbers(part: object, name: str) -> dict[str, float]:
    """The numbers of a JSON object, without null and NaN; raises ValueError for any other value."""
    found = {}
    for key, value in _object(part, name).items():
        if value is None or value != value:
            continue
        if not isinstance(value, int | float) or abs(value) > sys.float_info.max:
            raise ValueError(f"{name} must be finite numbers, and {key} is not")
        found[key] = float(value)
    return found


def _object(part: object, name: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(part).__name__}")
    return part


def probes(part: object) -> list[dict[str, Any]]:
    """The probes of a case; raises ValueError if they are malformed."""
    if not isinstance(part, list):
        raise ValueError(f"probes must be a list, got {type(part).__name__}")
    for probe in part:
        if not isinstance(_object(probe, "each of probes").get("criterion"), str):
            raise ValueError("each of probes must have a criterion, as a string")
    return part


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a run; raises UserError if a field has the wrong type."""
    path = folder / "summary.json"
    try:
        summary = parse(path.read_text(encoding="utf-8"))
        for key in ("means", "budget"):
            numbers(summary.get(key) or {}, key)
        protocols = _object(summary.get("protocols") or {}, "protocols")
        if not all(isinstance(protocol, str) for protocol in protocols.values()):
            raise ValueError("protocols must be strings")
        if not isinstance(summary.get("editor"), str | None):
            raise ValueError("editor must be a string")
        if not isinstance(summary.get("seed"), int | None):
            raise ValueError("seed must be a whole number")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return summary


def read_study_record(folder: Path) -> dict[str, Any]:
    """What ``corrigenda compare`` has recorded in ``study.json`` about the runs of a folder, by name."""
    path = folder / "study.json"
    if not path.exists():
        return {}
    try:
        runs = _object(parse(path.read_text(encoding="utf-8")).get("runs"), "runs")
        for name, run in runs.items():
            _check_recorded_run(name, _object(run, f"run {name}"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); repair it, or remove it to accept the runs as they are"
        ) from None
    return runs


def _check_recorded_run(name: str, run: dict[str, Any]) -> None:
    args = run.get("args") or []
    if not isinstance(args, list) or not all(isinstance(word, str) for word in args):
        raise ValueError(f"args of run {name} must be a list of words")
    if not isinstance(run.get("report", True), bool):
        raise ValueError(f"report of run {name} must be true or false")
    if not is_folder_name(name):
        raise ValueError(f"{name!r} is not a valid run name")


def is_folder_name(name: str) -> bool:
    """Whether this is a valid name of a run: printable, the name of a single folder, not hidden."""
    return (
        name.isprintable()
        and not name.startswith((".", "-"))
        and "/" not in name
        and "\\" not in name
        and 0 < len(name.encode()) <= LONGEST_NAME
    )
