"""The style of the figures: colours, labels and settings of matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Colours = Mapping[str, str]  # by name of a run
INK = "#0b0c0e"  # replaced by the page's text colour, for dark mode
FAINT = "#8a919b"
MARKERS = "osD^vPX*<>"
# Those of Okabe and Ito, which colour-blind readers can tell apart, and a brown in place of the yellow.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a6d3b")
STYLE: Any = {
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), FAINT),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.25,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
}


def palette(names: Iterable[str], grey: str | None = None) -> Colours:
    """A colour for each name, the same for ``memit@1`` and ``memit@100``; one name may be grey."""
    family = {name: name.partition("@")[0] for name in names if name != grey}
    order = list(dict.fromkeys(family.values()))
    colours = {name: COLOURS[order.index(family[name]) % len(COLOURS)] for name in family}
    return colours if grey is None else colours | {grey: FAINT}


def words(metric: str) -> str:
    return metric.replace("/", " · ").replace("_", " ")
