"""The page that helps to choose says what the configurations, measurements and formulas say now."""

import pytest
import yaml

from benchmarks import choosing
from corrigenda.pipeline.fit import CONFIGS
from tests.samples import ROOT

PAGE = (ROOT / "docs" / "choosing.md").read_text("utf-8")


def test_the_tables_are_up_to_date():
    """After a change of a configuration: ``python -m benchmarks.choosing``."""
    assert choosing.filled(PAGE) == PAGE


def test_every_configuration_of_a_method_is_listed_once():
    """But for the scope classifier that SERAC shares between all published models."""
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        if path.parent.name in choosing.LEFT_OUT or path.stem == "distilbert-scope":
            continue
        name = f"`{path.relative_to(CONFIGS).with_suffix('')}`"
        assert PAGE.count(f"| {name} |") == 1, name


def test_settings_by_hand():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert (
        "| `lora/gpt2-xl` | LoRA | – | targets attention, rank 8, alpha 32, steps 30, lr 0.005 |"
        in rows
    )
    (memit,) = [row for row in rows if row.startswith("| `memit/gpt2-xl` ")]
    assert "| MEMIT | 13 to 17 | steps 20, ridge 3.125," in memit
    (rect,) = [row for row in rows if row.startswith("| `rect/smollm2` ")]
    assert "| RECT of ROME | 3 |" in rect


def test_costs_by_hand():
    """ROME at 135M holds 18.9 MB and its peak was measured as 53.1 MB."""
    (rome,) = [line for line in choosing.costs().splitlines() if line.startswith("| ROME |")]
    assert rome.startswith("| ROME | 72 MB, 2.3 s |") and rome in PAGE


def test_a_changed_configuration_is_noticed(tmp_path, monkeypatch):
    for path in choosing._files():
        copy = tmp_path / path.relative_to(CONFIGS)
        copy.parent.mkdir(exist_ok=True)
        content = yaml.safe_load(path.read_text("utf-8"))
        if path.match("rome/gpt2-xl.yaml") and path.parent.name == "rome":
            content["edit"]["editor"]["init_args"]["layer"] = 18
        copy.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(choosing, "CONFIGS", tmp_path)
    assert choosing.filled(PAGE) != PAGE


def test_a_missing_mark_is_named():
    with pytest.raises(ValueError, match="no mark for the table costs"):
        choosing.filled("# Choose")
