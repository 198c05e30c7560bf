"""``corrigenda data``: checks a file of edits and shows how it is read."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from corrigenda.datamodules.files import DataError, read_rows
from corrigenda.datamodules.own import FIELDS, Edits, known_field, remarks
from corrigenda.datamodules.records import EditCase, Probe
from corrigenda.pipeline.errors import UserError

CRITERIA = {
    "efficacy": "prompt",
    "generality": "rephrase",
    "locality": "locality",
    "portability": "portability",
}
SHOWN = 3  # probes of a criterion in the example


def check(file: str) -> None:
    """Checks a file of your own facts and shows how it is read: fields, subjects, probes, the first record.

    Records that cannot be used are listed, one line each; the exit status is then 2.

    Args:
        file: .json, .jsonl, .csv, .tsv, these also with .gz, .parquet, or a Hub dataset (owner/name:split). The
            fields are explained in docs/own-data.md.
    """
    data = Edits(file, skip_bad=True)
    try:
        cases = data.parse_file(file)
    except DataError:
        if not data.problems:
            raise
        cases = []
    records = [fields for _, fields in read_rows(file, report=lambda _: None)]
    unreadable = len(data.problems)
    _show("File", [f"{file}: {_count(len(cases), 'usable record')}"])
    _show("Fields", _fields(records))
    if cases:
        hows = Counter(data.found[case.case_id] for case in cases).most_common()
        _show("Subjects", [", ".join(f"{count:,} {how}" for how, count in hows)])
        _show("Probes", _probes(cases))
        first = cases[0].case_id
        _show(
            f"The first: {data.places[first].rpartition(', ')[2]}",
            _example(cases[0], data.found[first]),
        )
    _show("Remarks", remarks(cases, data.found, data.places))
    _show("Problems", data.problems)
    if unreadable:
        raise UserError(f"{file}: {_count(unreadable, 'record')} cannot be used")


def _show(title: str, lines: Sequence[str]) -> None:
    if lines:
        sys.stdout.write(f"{title}\n" + "".join(f"  {line}\n" for line in lines) + "\n")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _fields(records: Iterable[dict[str, Any]]) -> list[str]:
    """How many records have each field; fields whose names are unknown come last."""
    counts = Counter(
        name
        for fields in records
        for name, value in fields.items()
        if value not in (None, "", [], {})
    )
    known = {name: known_field(name) for name in counts}
    lines = []
    for field in FIELDS:
        names = [
            f"{counts[n]:,}" + (f" as {n}" if n != field else "")
            for n in counts
            if known[n] == field
        ]
        if names:
            lines.append(f"{field:<13}{', '.join(names)}")
    ignored = [f"{n} ({counts[n]:,})" for n in counts if known[n] is None]
    return [*lines, *([f"{'ignored':<13}{', '.join(ignored)}"] if ignored else [])]


def _probes(cases: Sequence[EditCase]) -> list[str]:
    lines = []
    for criterion, field in CRITERIA.items():
        counts = [len(case.probes.get(criterion, ())) for case in cases]
        having = sum(map(bool, counts))
        told = f"{sum(counts):,} in {_count(having, 'record')}"
        lines.append(
            f"{criterion:<13}{told if having else f'none: not measured without a field {field}'}"
        )
    return lines


def _example(case: EditCase, found: str) -> list[str]:
    """A case as it was read; ``found`` says how its subject was."""
    edit = case.edits[0]
    told = {
        "prompt": edit.prompt,
        "subject": f"{edit.subject} ({found})",
        "target_new": edit.target_new,
        "target_true": edit.target_true,
        "relation": edit.relation,
        "task": case.task,
    }
    lines = [f"{name:<13}{_one_line(text)}" for name, text in told.items() if text is not None]
    for criterion, probes in case.probes.items():
        for probe in probes[:SHOWN]:
            lines.append(f"{criterion:<13}{_one_line(_shown(probe))}")
        if len(probes) > SHOWN:
            lines.append(f"{'':<13}and {len(probes) - SHOWN} more")
    return lines


def _shown(probe: Probe) -> str:
    aliases = f" (also {', '.join(probe.aliases)})" if probe.aliases else ""
    rival = f", not {probe.rival}" if probe.rival else ""
    return f"{probe.prompt} → {probe.target}{aliases}{rival}"


def _one_line(text: str) -> str:
    """At most 200 characters, line breaks written as such."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-45:]}"
