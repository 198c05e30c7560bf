"""``corrigenda report``: compares run folders (as HTML, Markdown, CSV and on the terminal).

- Runs are joined case by case: metrics are compared over the cases, identified by fingerprint, that all runs have
  evaluated.
- Everything is read from ``summary.json`` and ``cases.jsonl``, without knowledge of any method.
- A column holds one protocol. Means have bootstrap intervals over cases, differences are paired.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report.logs import read_training
from corrigenda.pipeline.report.runs import Run, is_finished, read_runs

__all__ = ["is_finished", "report"]


def report(
    dirs: list[Path],
    out: Path,
    baseline: str | None = None,
    training: Sequence[Path] = (),
    figures: bool = False,
    check: bool = False,
) -> None:
    """Compares finished runs case by case; writes report.html, report.md and report.csv, and prints a table.

    Args:
        dirs: run folders, or folders that contain run folders.
        out: folder for the three files; an earlier report there is replaced.
        baseline: name of the run that differences are relative to.
        training: folders of further runs, of which only learning curves are drawn.
        figures: also write every figure into the folder ``figures`` of the report, as SVG and as PNG.
        check: set published numbers of the same methods beside the runs' own.
    """
    runs, unreported, notes = read_runs(dirs)
    # Torch and matplotlib take seconds to import, so mistakes in the folders are reported first.
    from corrigenda.modules.files import write_text
    from corrigenda.pipeline.report.comparison import join
    from corrigenda.pipeline.report.figures import write_pictures
    from corrigenda.pipeline.report.page import as_html
    from corrigenda.pipeline.report.published import published_rows, published_table
    from corrigenda.pipeline.report.tables import as_csv, as_markdown, print_headline

    folders = [*training, *unreported, *(one.path for run in runs for one in run.seeds or [run])]
    trainings = [found for folder in folders if (found := read_training(folder))]
    comparison = join(runs, baseline, notes, trainings)
    extra = [published_table(comparison, published_rows())] if check else []
    texts = {
        "report.csv": as_csv(comparison),
        "report.md": as_markdown(comparison, extra),
        "report.html": as_html(comparison, _study(runs), extra),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {out} is a file; give a folder for the report") from None
    for name, text in texts.items():
        write_text(out / name, text)
    if figures:
        write_pictures(comparison, out / "figures")
    print_headline(comparison, sys.stdout)
    sys.stdout.write(f"\nreport: {out / 'report.html'} (also report.md and report.csv)\n")


def _study(runs: Sequence[Run]) -> str | None:
    """The name of the folder of the study that all runs belong to, if there is one."""
    folders = {one.path.resolve().parent for run in runs for one in run.seeds or [run]}
    names = {f.parent if f.name.startswith("seed-") else f for f in folders}
    studies = [f for f in names if any(f.glob("study.json")) or any(f.glob("seed-*/study.json"))]
    return studies[0].name if len(names) == len(studies) == 1 else None
