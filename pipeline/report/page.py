"""The report as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from corrigenda.pipeline.report.comparison import Comparison
from corrigenda.pipeline.report.figures import pictures
from corrigenda.pipeline.report.runs import Row, Run
from corrigenda.pipeline.report.tables import ABSENT, Table, all_tables, counts, legend

MAX_CASES_SHOWN = 50
CSS = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5d6673; --line: #dfe3e8; --page: #ffffff;
  --band: #f5f7f9; --good: #1d7f49; --bad: #b3374a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa4b1; --line: #343b45;
  --page: #14171b; --band: #1b1f25; --good: #62c98d; --bad: #f08a98; } }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 68rem; color: var(--ink);
  background: var(--page); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2, summary { font-size: 1.15rem; font-weight: 600; margin: 2.6rem 0 0.4rem; }
.soft, figcaption, th, .interval { color: var(--soft); }
.note { border-left: 3px solid #e0a12f; padding: 0.2rem 0.8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
td:first-child { font-weight: 600; }
tbody tr:hover { background: var(--band); }
.text td { white-space: normal; min-width: 3rem; max-width: 22rem; overflow-wrap: anywhere; }
.text tr.first td { border-top: 2px solid var(--line); }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 1.4rem 0; } figure svg { display: block; max-width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
"""


def as_html(comparison: Comparison) -> str:
    headline, *others = map(_table, all_tables(comparison))
    *others, everything = others
    figures = [
        f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
        for caption, svg in pictures(comparison)
    ]
    names = escape(", ".join(run.name for run in comparison.runs))
    lines = "".join(f"<li>{escape(line)}</li>" for line in legend(comparison))
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Report: {names}</title>\n<style>{CSS}</style>\n</head>\n<body>",
        f"<h1>Report</h1>\n<p class=soft>{counts(comparison)} {names}</p>",
        *(f"<p class=note>{escape(note)}</p>" for note in comparison.notes),
        headline,
        *figures,
        f"<h2>How to read this</h2>\n<ul>{lines}</ul>",
        *others,
        f"<details><summary>All metrics, not scaled</summary>{everything}</details>",
        _cases(comparison),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _table(table: Table) -> str:
    rows = (f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f"<h2>{escape(table.title)}</h2>\n<p class=soft>{escape(table.note)}</p>\n"
        f"{_grid(table.header, rows)}"
    )


def _grid(header: Sequence[str], rows: Iterable[str], style: str = "") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(rows)
    return (
        f"<div class=wide><table{style}><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    number, bracket, rest = escape(text).partition(" [")
    interval = f" <span class=interval>[{rest}</span>" if bracket else ""
    return f"<td>{number}{interval}</td>"


def _cases(comparison: Comparison) -> str:
    """The first probe of each criterion of the first cases, with every run's answer."""
    shown = comparison.case_ids[:MAX_CASES_SHOWN]
    of_seed = ", answers of the first seed" if comparison.num_seeds > 1 else ""
    header = ["case", "criterion", "prompt", "target", *(run.name for run in comparison.runs)]
    rows = (row for case in shown for row in _case(comparison.runs, case))
    return (
        f"<details><summary>Cases ({len(shown)} of {len(comparison.case_ids)})</summary>\n"
        f"<p class=soft>The first probe of each criterion{of_seed}. "
        "Green: correct (for locality: unchanged). Red: incorrect.</p>\n"
        f"{_grid(header, rows, style=' class=text')}</details>"
    )


def _case(runs: Sequence[Run], case: str) -> Iterator[str]:
    answers = [_first_probes(run.last[case]) for run in runs]
    for index, (criterion, probe) in enumerate(answers[0].items()):
        texts = ["" if index else case, criterion, probe.get("prompt"), probe.get("target")]
        cells = [f"<td>{escape(str(text or ''))}</td>" for text in texts]
        cells += [_answer(of_run.get(criterion, {})) for of_run in answers]
        yield f"<tr{'' if index else ' class=first'}>{''.join(cells)}</tr>"


def _first_probes(row: Row) -> dict[str, Mapping[str, Any]]:
    probes: dict[str, Mapping[str, Any]] = {}
    for probe in row.probes:
        probes.setdefault(str(probe.get("criterion")), probe)
    return probes


def _answer(probe: Mapping[str, Any]) -> str:
    value = next((probe[key] for key in ("agreement", "exact") if probe.get(key) is not None), None)
    style = "" if value is None else f" class={'good' if value == 1 else 'bad'}"
    return f"<td{style}>{escape(str(probe.get('prediction') or ABSENT))}</td>"
