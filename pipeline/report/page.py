"""The report as one HTML page that needs no network: tables, figures, cases, and the data to download.

``page.css`` and ``page.js`` are written into the page. Texts from files are escaped in the HTML, and are data in
the JSON, which the script shows as text only; the page's policy allows no other script and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from corrigenda.pipeline.report import answers
from corrigenda.pipeline.report.comparison import Comparison
from corrigenda.pipeline.report.figures import pictures
from corrigenda.pipeline.report.headline import headline
from corrigenda.pipeline.report.runs import Run
from corrigenda.pipeline.report.tables import ABSENT, Table, all_tables, as_csv, counts, legend

HERE = Path(__file__).parent
STYLE, SCRIPT = ((HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
TEACHER_FORCED = (
    "No answers were generated: the answers below are the tokens predicted after the correct ones. "
    "Runs with --model.generate_tokens 20 show what the model writes by itself, before and after."
)


def as_html(comparison: Comparison, study: str | None = None, extra: Sequence[Table] = ()) -> str:
    """The page; ``study`` is the name of the study that the runs belong to."""
    *others, everything = map(_table, all_tables(comparison, extra)[1:])
    figures = (
        f"<figure class=wide>{svg}<figcaption>{caption}</figcaption></figure>"
        for caption, svg in pictures(comparison)
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in legend(comparison))
    title = _title(comparison, study)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_policy()}',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>\n{_facts(comparison)}",
        *(f"<p class=note>{escape(note)}</p>" for note in comparison.notes),
        f"<h2>Headline</h2>\n{headline(comparison)}",
        '<p class="downloads script">Download: <button data-file=report.csv>table (CSV)</button> '
        "<button data-file=cases.csv>answers (CSV)</button> "
        "<button data-file=report.json>everything (JSON)</button></p>",
        *figures,
        f"<h2>How to read this</h2>\n<ul>{lines}</ul>",
        *others,
        _groups("By relation", answers.relation_tables(comparison)),
        _groups("By length of the target", answers.length_tables(comparison)),
        _cases(comparison),
        f"<details><summary>All metrics, not scaled</summary>{everything}</details>",
        f'<script type="application/json" id=data>{_as_json(_data(comparison, title))}</script>',
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _policy() -> str:
    """A policy under which nothing is loaded, and no script runs but the page's own."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    rules = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f'<meta http-equiv="Content-Security-Policy" content="{rules}">'


def _title(comparison: Comparison, study: str | None) -> str:
    models, data = (_stated(comparison.runs, key) for key in ("model", "dataset"))
    return f"{study or 'Report'}: {models}, {data}"


def _stated(runs: Sequence[Run], key: str) -> str:
    """What the runs' summaries say, without repetition."""
    found = dict.fromkeys(str(run.summary.get(key) or ABSENT) for run in runs)
    return ", ".join(found)


def _facts(comparison: Comparison) -> str:
    """What was compared, when and how, under the title."""
    singles = [one for run in comparison.runs for one in run.seeds or [run]]
    finished = max((one.path / "summary.json").stat().st_mtime for one in singles)
    protocols = dict.fromkeys(
        run.protocol(metric) for run in comparison.runs for metric in comparison.metrics()
        if metric in comparison.estimates[run.name]
    )  # fmt: skip
    facts = {
        "model": _stated(comparison.runs, "model"),
        "dataset": _stated(comparison.runs, "dataset"),
        "schedule": _stated(comparison.runs, "schedule"),
        "protocol": ", ".join(protocols),
        "runs": ", ".join(run.name for run in comparison.runs),
        "compared": counts(comparison).rstrip("."),
        "finished": f"{datetime.fromtimestamp(finished, UTC):%Y-%m-%d}",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl class=facts>{rows}</dl>"


# ---------------------------------------------------------------------------- tables


def _table(table: Table) -> str:
    note = f"<p class=soft>{escape(table.note)}</p>\n" if table.note else ""
    return f"<h2>{escape(table.title)}</h2>\n{note}{_grid(table)}"


def _grid(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    number, bracket, rest = escape(text).partition(" [")
    interval = f" <span class=interval>[{rest}</span>" if bracket else ""
    return f"<td>{number}{interval}</td>"


def _groups(title: str, tables: Sequence[Table]) -> str:
    """A table per criterion, of which the first is open; a group's name leads to its cases."""
    parts = [
        f"<details{'' if index else ' open'}><summary>{escape(table.title)}</summary>{_linked(table)}</details>"
        for index, table in enumerate(tables)
    ]
    note = f"<p class=soft>{escape(tables[0].note)}</p>" if tables else ""
    return f"<h2>{title}</h2>\n{note}{''.join(parts)}" if parts else ""


def _linked(table: Table) -> str:
    filter_ = "relation" if table.header[0] == "relation" else "tokens"
    rows = (
        f'<tr><td><a href="#cases" data-{filter_}="{escape(first)}">{escape(first)}</a></td>'
        f"{''.join(map(_cell, rest))}</tr>"
        for first, *rest in table.rows
    )
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    return (
        f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# ---------------------------------------------------------------------------- cases


def _cases(comparison: Comparison) -> str:
    """The frame that the script fills: filters, and a list of cases with every run's answers."""
    total, shown = len(comparison.case_ids), min(len(comparison.case_ids), answers.MAX_CASES)
    seed = " Answers of the first seed." if comparison.num_seeds > 1 else ""
    about = "" if answers.are_generated(comparison) else f"<p class=note>{TEACHER_FORCED}</p>"
    runs = _options(run.name for run in comparison.runs)
    return (
        f"<h2 id=cases>Cases ({shown} of {total})</h2>\n{about}"
        "<p class=soft>A case opens with a click: every question, what was expected, and every run's answer. "
        f"The marks show whether the edit worked (✓ or ✗), in the order of the runs.{seed}</p>\n"
        "<form class='filters script'>"
        "<label>Text <input type=search name=text></label>"
        "<label>Relation <select name=relation><option value=''>all</option></select></label>"
        "<label>Tokens <select name=tokens><option value=''>all</option></select></label>"
        f"<label>Run <select name=run><option value=''>any</option>{runs}</select></label>"
        "<label>Outcome <select name=state><option value=''>all</option>"
        "<option value=failed>edit failed</option><option value=worked>edit worked</option>"
        "<option value=changed>other facts changed</option></select></label>"
        "<button type=button>Show all</button> <output></output></form>\n"
        "<div id=list></div><p class=script><button id=more hidden>Show more</button></p>\n"
        "<noscript><p class=note>The cases are shown by a script, which is part of this page.</p></noscript>"
    )


def _options(names: Iterable[str]) -> str:
    return "".join(
        f"<option value={index}>{escape(name)}</option>" for index, name in enumerate(names)
    )


def _data(comparison: Comparison, title: str) -> Mapping[str, Any]:
    """What can be downloaded, and what the script shows."""
    return {
        "title": title,
        "runs": [{"name": run.name, **run.summary} for run in comparison.runs],
        "results": {
            name: {metric: _numbers(estimate) for metric, estimate in of_run.items()}
            for name, of_run in comparison.estimates.items()
        },
        "cases": answers.cases(comparison),
        "csv": as_csv(comparison),
    }


def _numbers(estimate: Any) -> dict[str, Any]:  # noqa: ANN401
    return {key: value if value == value else None for key, value in estimate._asdict().items()}


def _as_json(data: Mapping[str, Any]) -> str:
    """JSON that HTML does not read as markup, whatever its texts contain."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
