"""Every command and snippet of README, CONTRIBUTING and docs: commands are parsed by the real parsers, Python runs
on a tiny model, YAML is read as a configuration or a study.

A document is read from top to bottom in an empty folder, as a reader would follow it:

- A block with ``title="NAME"`` is a file of that name, which later blocks use.
- ``fit`` and ``validate`` leave the configuration that they print in their ``--run_dir``.
- Python blocks of a document share their names. One after ``<!-- compiled only: REASON -->`` is not run.
- Commands start with one of the programs below, blocks with one of the languages; ``text`` is for everything else.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml

from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.pipeline.compare import read_study
from tests.samples import ROOT

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"]
)
BLOCK = re.compile(
    r"^(?:<!-- compiled only: (?P<reason>.+?) -->\n+)?```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
TITLE = re.compile(r'title="([^"]+)"')
LINK = re.compile(r"\]\(([^)#\s]+?)(?:#[^)\s]*)?\)")
TARGETS = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
# TODO: always true once everything imports as `corrigenda`.


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, and the line that it begins in."""

    line: int
    language: str
    title: str | None
    text: str
    reason: str | None = None


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        title = TITLE.search(match["info"])
        line = text[: match.start("text")].count("\n")
        found.append(
            Block(line, match["language"], title and title[1], match["text"], match["reason"])
        )
    return found


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


class Parsed(BaseException):
    """Ends a command as soon as its arguments are parsed; holds them."""


@dataclass
class Reader:
    """Follows a document in the current folder."""

    corrigenda: Callable[..., int]
    capsys: pytest.CaptureFixture
    model: Path  # stands in for the embedded one
    monkeypatch: pytest.MonkeyPatch
    names: dict = field(default_factory=lambda: {"__name__": "document"})

    def read(self, block: Block) -> None:
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        languages = {
            "bash": self.shell,
            "python": self.python,
            "yaml": self.yaml,
            "json": self.json,
            "text": lambda _: None,
        }
        assert block.language in languages, (
            f"a block of {block.language or 'no language'}: use one of {', '.join(languages)}"
        )
        languages[block.language](block)

    def python(self, block: Block) -> None:
        code = compile(block.text.replace('"smollm2"', repr(str(self.model))), "document", "exec")
        if block.reason is None:
            exec(code, self.names)

    def json(self, block: Block) -> None:
        for line in block.text.splitlines():
            json.loads(line)

    def yaml(self, block: Block) -> None:
        if "runs" in yaml.safe_load(block.text):
            self.study(block.text)
        elif not block.title:  # a titled one is read by the command that uses it
            Path("block.yaml").write_text(block.text, encoding="utf-8")
            self.command("corrigenda validate -c block.yaml")

    def study(self, text: str) -> None:
        Path("study.yaml").write_text(text, encoding="utf-8")
        for run in read_study(Path("study.yaml")).runs:
            self.run([word.replace("{out}", "runs/out") for word in run.args])

    def shell(self, block: Block) -> None:
        for line in block.text.replace("\\\n", " ").splitlines():
            self.command(line)

    def command(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if not words:
            return
        program, *args = words
        if program in ("torchrun", "srun"):  # what they start is a command like any other
            program, *args = words[words.index("corrigenda") :]
        if program == "corrigenda" and args[:1] in (["fit"], ["validate"]):
            self.run(args)
        elif program == "corrigenda":
            self.parse(args)
        elif program == "make":
            unknown = {arg for arg in args if "=" not in arg} - {*TARGETS}
            assert not unknown, f"make has no target {unknown}"
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
            self.benchmarks(words[2], args[2:])
        elif program in (".venv/bin/pytest", ".ci/run"):
            paths = [program, *args] if program == ".ci/run" else args
            missing = [p for p in paths if not p.startswith("-") and not (ROOT / p).exists()]
            assert not missing, f"there is no {missing}"
        else:
            assert program in ("pip", ".venv/bin/pre-commit"), f"{program}: a program unknown here"

    def run(self, args: list[str]) -> None:
        """The configuration of ``fit`` or ``validate``, with everything in it checked; nothing is loaded."""
        printing = [] if "--print_config" in args else ["--print_config"]
        status = self.corrigenda(*args, *printing)
        printed = self.capsys.readouterr()
        assert status == 0, f"corrigenda {shlex.join(args)}: {printed.err}"
        if "--run_dir" in args:
            folder = Path(args[args.index("--run_dir") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(printed.out, encoding="utf-8")

    def parse(self, args: list[str]) -> None:
        """The arguments of any other command; the study file of ``compare`` is there."""
        original = jsonargparse.ArgumentParser.parse_args

        def stop(parser: object, *a: object, **k: object) -> None:
            raise Parsed(original(parser, *a, **k))

        with self.monkeypatch.context() as patch:
            patch.setattr(jsonargparse.ArgumentParser, "parse_args", stop)
            try:
                status = self.corrigenda(*args)
            except Parsed as parsed:
                (given,) = parsed.args
            else:
                pytest.fail(f"corrigenda {shlex.join(args)}: {status}, {self.capsys.readouterr()}")
        if args[0] == "compare":
            assert any(Path(at, given.file).is_file() for at in (".", ROOT)), f"no {given.file}"

    def benchmarks(self, module: str, args: list[str]) -> None:
        """The arguments of ``python -m benchmarks``, or of its script about memory and time."""
        from benchmarks import scaling
        from benchmarks.__main__ import SCRIPTS, main

        assert module in ("benchmarks", "benchmarks.scaling")
        run = main if module == "benchmarks" else scaling.main
        original = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser) -> None:
            given = original(parser, args)
            assert {*given.names} <= {*SCRIPTS}
            raise Parsed(given)

        with self.monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            run()


@pytest.fixture
def reader(corrigenda, capsys, tiny_folder, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_folder("llama", num_hidden_layers=5, max_position_embeddings=512)
    before = set(sys.modules)
    yield Reader(corrigenda, capsys, model, monkeypatch)
    for name in {name for name in sys.modules if Path(f"{name}.py").exists()} - before:
        del sys.modules[name]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=name_of)
def test_a_document_can_be_followed(document, reader):
    every = blocks(document)
    for number, block in enumerate(every):
        try:
            reader.read(block)
        except BaseException as error:
            error.add_note(f"in {name_of(document)}, line {block.line}")
            raise
        if block.title:
            name = block.title.removesuffix(".py")
            later = [b.text for b in every[number + 1 :]]
            assert any(name in text for text in later), (
                f"{block.title} is not used by a later block"
            )


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files(document):
    links = LINK.findall(document.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not broken, f"{name_of(document)} links to {broken}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {*re.findall(r"[\w./-]+\.md\b", text)} == pages


@pytest.mark.parametrize(
    "line",
    [
        "corrigenda validate -c configs/rome/smollm2.yaml --edit.editor.layr 3",
        "corrigenda fit -c configs/mend/smollm3.yaml",
        "corrigenda validate -c runs/never-made/config.yaml",
        "corrigenda report runs/rome --ouot runs/report",
        "corrigenda compare configs/compare/nothing.yaml",
        "corrigenda explain runs/rome",
        "make demonstration",
        "python -m benchmarks speed",
        ".venv/bin/pytest tests/test_nothing.py",
        "corigenda doctor gpt2",
    ],
)
def test_a_mistake_in_a_command_is_noticed(reader, line):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        reader.command(line)


def test_a_snippet_that_fails_is_noticed(reader):
    with pytest.raises(SyntaxError):
        reader.read(Block(1, "python", None, "lm = LanguageModel('smollm2'", "takes long"))
    with pytest.raises(AssertionError, match="no language"):
        reader.read(Block(1, "", None, "corrigenda fit"))
    with pytest.raises(AssertionError, match="layre"):
        reader.read(
            Block(1, "yaml", None, "edit: {editor: {class_path: ROME, init_args: {layre: 1}}}")
        )


# ---------------------------------------------------------------------------- what documents promise


def written(document: str, *titles: str) -> None:
    """Files of a document, in the current folder."""
    every = {block.title: block.text for block in blocks(ROOT / document)}
    for title in titles:
        Path(title).write_text(every[title], encoding="utf-8")


def summary_of(reader: Reader, *args: object) -> dict:
    """Of a real run on the tiny model."""
    small = ["--model.lm.name", reader.model, "--trainer.accelerator", "cpu", "--wandb", "off"]
    quiet = ["--trainer.enable_progress_bar", "false", "--run_dir", "run"]
    assert reader.corrigenda("validate", *args, *small, *quiet) == 0, reader.capsys.readouterr().err
    return json.loads(Path("run/summary.json").read_text(encoding="utf-8"))


def test_the_example_method_edits(reader):
    written("CONTRIBUTING.md", "rescale.py", "rescale.yaml")
    files = ["-c", "rescale.yaml", "-c", "configs/data/facts.yaml", "--data.known_only", "false"]
    options = ["--data.limit", 3, "--edit.editor.layer", 3, "--edit.editor.steps", 60]
    found = summary_of(reader, "--plugin", "rescale", *files, *options)
    assert found["editor"] == "Rescale" and found["budget"]["num_edits"] == 3
    assert found["means"]["efficacy/preference"] == 1


def test_the_example_dataset_is_evaluated(reader):
    written("docs/add-a-dataset.md", "songs.py", "songs.yaml", "songs.jsonl")
    files = ["-c", "configs/base/smollm2.yaml", "-c", "songs.yaml"]
    found = summary_of(reader, "--plugin", "songs", *files)
    assert found["dataset"] == "Songs"
    assert {"efficacy/preference", "generality/exact", "locality/agreement"} <= {*found["means"]}


def test_the_first_example_prints_what_it_says(smollm2, capsys):
    """With less text and fewer contexts than by default, which would take a minute."""
    (block,) = [b for b in blocks(ROOT / "README.md") if b.language == "python"]
    (said,) = re.findall(r"print\(.*# (.*)$", block.text, re.M)
    code = block.text.replace('LanguageModel("smollm2")', "embedded")
    code = code.replace("ROME(layer=3)", "ROME(3, corpus=little, contexts=[(5, 2)])")
    name = f"{smollm2.structure.out_name(3)}.weight"
    before = smollm2.net.get_parameter(name).clone()
    exec(code, {"embedded": smollm2, "little": Corpus("facts", 2000)})
    assert capsys.readouterr().out.strip() == said
    assert torch.equal(smollm2.net.get_parameter(name), before)
