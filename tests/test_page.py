"""The page of a report, read in a headless Chromium as a user reads it; skipped where there is none."""

import csv
import io
import json
import math

import pytest

from corrigenda.pipeline.report import report
from tests.browser import Browser, find_chromium
from tests.test_report import row, write_run

BAD = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">"
RELATIONS = ("capital", "author", "a relation with a long name and <b>markup</b>")
WIDTHS = (1400, 800, 400)
SCHEMES = ("light", "dark")


def probe(criterion, prompt, correct, unchanged=None, **more):
    right = {"wild_prefix": float(correct), "exact": float(correct)}
    same = {} if unchanged is None else {"wild_same": float(unchanged), "agreement": 0.5}
    answer = "Norway, in the north" if correct else f"Chad {BAD}"
    return {"criterion": criterion, "prompt": prompt, "target": "Norway", "prediction": "Nor",
            "answer": answer, **right, **same, **more}  # fmt: skip


def run(folder, correct, **summary):
    """A run of 60 cases, of which those in ``correct`` follow the edit."""
    rows = []
    for case in range(60):
        yes = float(case in correct)
        probes = [
            probe("efficacy", f"Case {case} is in", yes, answer_before="Sweden", target_tokens=1 + case % 5),
            probe("locality", f"Beside case {case} is", True, unchanged=False),
        ]  # fmt: skip
        one = row(case, probes=probes, efficacy_exact=yes, locality_agreement=1 - yes / 2)
        one["edits"] = [{"text": "t", "target_new": "Norway", "relation": RELATIONS[case % 3]}]
        rows.append(one)
    return write_run(folder, rows, **summary)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on a study of many runs, one of which has a hostile name, with answers of the same kind."""
    folder = tmp_path_factory.mktemp("page") / "names"
    budget = {"seconds_per_edit": 2.5, "bytes_per_edit": 9216}
    run(folder / "rome", range(50), budget=budget)
    run(folder / "lora", range(40), budget={"seconds_per_edit": 0.5, "bytes_per_edit": 88_000_000})
    run(folder / "unedited", (), editor=None)
    for number in range(6):
        run(folder / f"a-run-with-a-long-name-{number}", range(number), budget=budget)
    run(folder / "<b onclick=x>$x$", range(3), budget=budget)
    (folder / "study.json").write_text('{"format": 1, "runs": {}}')
    report([folder], folder / "out", "lora")
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium was found (on Debian: apt-get install chromium)")
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def texts(browser, selector):
    found = f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)"
    return browser.run(found)


def runs_in_order(browser):
    return texts(browser, ".headline tbody tr td:first-child")


# ---------------------------------------------------------------------------- in a browser

# Pairs of texts that cover each other by more than a pixel: leaves of the page that are shown.
OVERLAPS = """(() => {
  const leaves = [...document.querySelectorAll('body *')].filter(e => !e.closest('svg, select, script')
    && e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  const boxes = leaves.map(e => [e, [...e.getClientRects()].filter(r => r.width > 0)]);
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < Math.min(boxes.length, i + 40); j++) {
    const [a, ra] = boxes[i], [b, rb] = boxes[j];
    if (a.contains(b) || b.contains(a)) continue;
    for (const x of ra) for (const y of rb) {
      if (Math.min(x.right, y.right) - Math.max(x.left, y.left) > 1
          && Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top) > 3) found.push([a.innerText, b.innerText]);
    }
  }
  return found;
})()"""
# The lowest ratio of luminances between a text and the page behind it.
CONTRAST = """(() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => numbers(text).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = light(getComputedStyle(document.body).backgroundColor);
  const ratio = (l) => (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05);
  return Math.min(...['body', '.soft', 'a', '.interval', 'th button', '.verdict.good', '.verdict.bad']
    .map(s => ratio(light(getComputedStyle(document.querySelector(s)).color))));
})()"""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_is_readable(browser, page, width, scheme):
    browser.open(page, width, scheme, "#case=55")
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    table = browser.run(
        "JSON.stringify(document.querySelector('.headline').getBoundingClientRect())"
    )
    assert json.loads(table)["right"] <= width, "the headline does not fit"
    assert browser.run(OVERLAPS) == []
    assert browser.run(CONTRAST) >= 4.5, "a text is hardly readable"
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    assert browser.errors == [] and browser.requests == [page.as_uri()]


def test_the_title_says_what_was_compared(browser, page):
    browser.open(page)
    assert texts(browser, "h1") == ["names: tiny, Facts"]
    facts = dict(zip(texts(browser, ".facts dt"), texts(browser, ".facts dd"), strict=True))
    assert facts["schedule"] == "each" and facts["compared"] == "10 runs, 60 cases"
    assert "tf_exact@each" in facts["protocol"]
    assert len(facts["finished"].split("-")) == 3


def test_a_column_sorts_with_the_best_on_top(browser, page):
    browser.open(page)
    click = "document.querySelector('.headline button[data-column=\"{}\"]').click()"
    browser.run(click.format(1))  # efficacy
    assert runs_in_order(browser)[:2] == ["rome", "lora"]
    browser.run(click.format(1))
    assert runs_in_order(browser)[-1] == "rome"
    browser.run(click.format(3))  # seconds: lower is better, and the unedited model has none
    order = runs_in_order(browser)
    assert order[0] == "lora" and order[-1] == "unedited"
    assert browser.run("document.querySelector('th[aria-sort=ascending]').innerText").startswith(
        "seconds"
    )


def test_a_narrow_screen_sorts_by_a_list(browser, page):
    browser.open(page, 400)
    assert browser.run("document.querySelector('.sort').checkVisibility()")
    browser.run(
        "(s => { s.value = 1; s.dispatchEvent(new Event('change')) })(document.querySelector('.sort'))"
    )
    assert runs_in_order(browser)[0] == "rome"


def test_the_best_is_marked_in_each_column(browser, page):
    """Of the runs that edit; not what all have in common, and not the unedited model's locality."""
    browser.open(page)
    best = browser.run(
        "[...document.querySelectorAll('.best')].map(c => [c.dataset.label, c.closest('tr').cells[0].innerText])"
    )
    found = {}
    for label, name in best:
        found.setdefault(label.replace("\u00a0", " "), []).append(name)
    assert found["efficacy exact ↑"] == ["rome"]
    assert found["seconds per edit ↓"] == ["lora"]
    assert "rome" in found["size of an edit ↓"] and "lora" not in found["size of an edit ↓"]
    assert found["locality agreement ↑"] == ["a-run-with-a-long-name-0"]


def choose(browser, name, value):
    browser.run(
        f"(f => {{ f.{name}.value = {json.dumps(value)}; f.dispatchEvent(new Event('input')) }})"
        "(document.querySelector('.filters'))"
    )
    return browser.run("document.querySelector('.filters output').value")


def test_cases_are_filtered(browser, page):
    browser.open(page)
    assert len(texts(browser, ".case")) == 50
    browser.run("document.getElementById('more').click()")
    assert len(texts(browser, ".case")) == 60
    rome = str(runs_in_order(browser).index("rome"))
    choose(browser, "state", "failed")
    assert choose(browser, "run", rome) == "10 of 60 cases"
    assert choose(browser, "relation", "capital") == "3 of 60 cases"  # 51, 54 and 57
    browser.run("document.querySelector('.filters button').click()")
    assert choose(browser, "text", "case 59 IS") == "1 of 60 cases"


def test_runs_and_groups_lead_to_their_cases(browser, page):
    browser.open(page)
    browser.run("document.querySelector('a[data-relation=author]').click()")
    assert browser.run("document.querySelector('.filters output').value") == "20 of 60 cases"
    browser.run("document.querySelector('a[data-tokens=\"4 or more\"]').click()")
    assert browser.run("document.querySelector('.filters output').value") == "24 of 60 cases"
    browser.run(
        "[...document.querySelectorAll('a[data-run]')].find(a => a.innerText === 'rome').click()"
    )
    chosen = "(s => s.options[s.selectedIndex].text)(document.querySelector('.filters').run)"
    assert browser.run(chosen) == "rome"


def test_a_link_opens_one_case_with_free_answers(browser, page):
    browser.open(page, fragment="#case=55")
    assert browser.run("document.querySelector('.filters output').value") == "1 of 60 cases"
    efficacy, locality = texts(browser, ".case[open] .probe")
    assert "Case 55 is in" in efficacy and "Sweden" in efficacy  # before the edit
    assert f"Chad {BAD}" in efficacy and "✗ incorrect" in efficacy and "changed" not in efficacy
    assert (
        "Norway, in the north" in locality and "✓ correct" in locality and "✗ changed" in locality
    )
    assert "Nor\n" not in efficacy + locality  # the teacher-forced tokens


def test_downloads(browser, page, tmp_path):
    browser.open(page)
    table = browser.download(tmp_path, "[data-file='report.csv']", "report.csv")
    assert table == page.with_name("report.csv").read_text()
    text = browser.download(tmp_path, "[data-file='cases.csv']", "cases.csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 60 * 10 * 2
    failed = {"case": "55", "run": "rome", "criterion": "efficacy", "answer": f"Chad {BAD}"}
    (found,) = [r for r in rows if all(r[key] == value for key, value in failed.items())]
    assert (found["before"], found["expected"], found["correct"]) == ("Sweden", "Norway", "false")
    data = json.loads(browser.download(tmp_path, "[data-file='report.json']", "report.json"))
    assert math.isclose(data["results"]["rome"]["efficacy/exact"]["mean"], 50 / 60)
    assert len(data["cases"]) == 60 and data["runs"][0]["model"] == "tiny"


def test_nothing_in_a_file_runs(browser, page):
    """Neither markup in names and answers, nor a script that got into the page, which its policy stops."""
    browser.open(page, fragment="#case=55")
    assert browser.run("document.title") == "names: tiny, Facts"
    assert browser.run("document.querySelectorAll('img, .case b').length") == 0
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title=1'}))"
    )
    assert browser.run("document.title") == "names: tiny, Facts"
    assert any("Content Security Policy" in str(error) for error in browser.errors)


# ---------------------------------------------------------------------------- without a browser


def test_without_generated_answers_it_says_so(tmp_path):
    write_run(tmp_path / "a", [row(case, efficacy_exact=1.0) for case in range(3)])
    report([tmp_path / "a"], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "No answers were generated" in text and "--model.generate_tokens 20" in text
    assert "By relation" not in text and "By length" not in text
    assert "<h1>Report: tiny, Facts</h1>" in text  # the runs are of no study
