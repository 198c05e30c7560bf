"""The command line: selects the command to run, and reports mistakes in one line."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.fit import fit_or_validate
from corrigenda.pipeline.signals import Terminated, interruptible, status_of
from corrigenda.pipeline.stored_help import stored_help
from corrigenda.pipeline.trust import (
    MAX_CHARACTERS,
    ONLY_KNOWN,
    expand_paths,
    restrict_parsing,
    take_plugins,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

USAGE = """\
usage: corrigenda COMMAND [options]        (corrigenda COMMAND --help explains one)

  fit        train an editor or a fine-tuning baseline, or apply a stream of edits
  validate   edit the model and measure efficacy, generality and locality
  compare    execute the runs of a study file, skipping finished ones, and report on them
  report     compare finished runs case by case: tables, confidence intervals, plots
  edit       change facts in a model, see its answers before and after, and talk to it
  judge      have a language model judge whether freely generated answers of finished runs are right
  moments    compute second moments of MLP keys over a corpus (for ROME, MEMIT, EMMET, AlphaEdit)
  edits      show, verify, apply, merge and export saved edits; model cards for exports
  abilities  evaluate a model with saved edits on tasks of lm-evaluation-harness
  doctor     inspect a model: its structure, where to edit it, a test edit applied and removed
  data       check a file of your own facts, and show how it is read

Configuration files are merged in order; options override them:
  corrigenda validate -c configs/rome/smollm2.yaml -c configs/data/facts.yaml --data.limit 30
To use classes of your own, name their module: --plugin MODULE (fit, validate and compare).

Presets for a CPU, a GPU, several devices, loggers: configs/presets. The version: corrigenda --version

exit status: 0 success, 1 edits verify has failed, 2 error, 130 Ctrl-C, 143 SIGTERM
"""

MAX_MESSAGE = 800  # characters
# First words of lines in jsonargparse's messages that describe types, not the mistake.
TYPE_LINES = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value",
    "Not a valid subclass of",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
)


def main(args: list[str] | None = None) -> None:
    """Runs one command; a user's mistake gives one line on stderr and exit status 2."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if args[0] == "--version":
        sys.stdout.write(f"corrigenda {metadata.version('corrigenda')}\n")
        return
    with interruptible():
        _main(args[0], args[1:])


def _main(command: str, words: list[str]) -> None:
    commands = {
        "compare": _compare,
        "report": _report,
        "edit": _edit,
        "judge": _judge,
        "moments": _moments,
        "edits": _edits,
        "abilities": _abilities,
        "doctor": _doctor,
        "data": _data,
    }
    try:
        words = [
            _read_argument(word, before)
            for before, word in zip([command, *words], words, strict=False)
        ]
        if command in ("fit", "validate"):
            if words in (["-h"], ["--help"]) and (text := stored_help(command)):
                sys.stdout.write(text)
                return
            fit_or_validate([command, *words])
        elif command in commands:
            commands[command](words)
        else:
            known = ", ".join(["fit", "validate", *commands])
            raise UserError(f"unknown command {command!r}: choose one of {known}")
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning ends an interrupted run with SystemExit(1).
        by_lightning = isinstance(stop, SystemExit) and command in ("fit", "validate")
        cause = stop.__context__ if by_lightning else stop
        if not isinstance(cause, KeyboardInterrupt):
            raise
        what = "terminated" if isinstance(cause, Terminated) else "interrupted"
        _print_line(f"{what}; files written so far are kept")
        raise SystemExit(status_of(cause)) from None
    except (UserError, ArgumentError, ValueError, OSError, ImportError, UnpicklingError) as error:
        if os.environ.get("CORRIGENDA_TRACEBACK"):
            raise
        _print_line(f"error: {_one_line(error, command)}")
        raise SystemExit(2) from None


def _read_argument(word: str, before: str) -> str:
    """An argument with ``~/`` expanded also after an equals sign, where shells do not."""
    name, equals, value = word.partition("=") if word.startswith("-") else (before, "", word)
    if len(word) > MAX_CHARACTERS:
        raise UserError(
            f"an argument has {len(word):,} characters ({word[:40]!r}...); the limit is {MAX_CHARACTERS:,}"
        )
    if name in ("--run_dir", "--out") and not value and (equals or not word):
        raise UserError(f"{name} is empty: give a folder, or leave the option out")
    return f"{name}={expand_paths(value)}" if equals else str(expand_paths(word))


def _print_line(text: str) -> None:
    """Prints one line on stderr, with control characters replaced by spaces."""
    shown = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)
    sys.stderr.write(f"corrigenda: {shown}\n")


def _one_line(error: Exception, command: str) -> str:
    """The error's message, without jsonargparse's lines about types."""
    if isinstance(error, UnpicklingError):
        return "the file is not a checkpoint, or contains more than tensors and plain values"
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(TYPE_LINES))
    text = re.sub(r"Importing ('.+?') is not allowed, .+? to allow it\.", rf"\1 {ONLY_KNOWN}", text)
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE - 100]} ... {text[-100:]}"
    if isinstance(error, ArgumentError):
        text += f" (options: corrigenda {command} --help)"
    return text


def _parser(command: str, description: str | None) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    restrict_parsing()
    prog = f"corrigenda {command}"
    return ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )


def _compare(args: list[str]) -> None:
    from corrigenda.pipeline.compare import compare

    parser = _parser("compare", compare.__doc__)
    parser.add_argument("file", type=Path, help="the study file (YAML)")
    parser.add_argument("--only", nargs="+", type=str, help="names of the runs to execute")
    parser.add_argument("--seeds", nargs="+", type=int, help="repeat every run with each seed")
    parser.add_function_arguments(
        compare, skip={"file", "only", "seeds", "plugins"}, as_group=False
    )
    plugins, words = take_plugins(args)
    given = parser.parse_args(words)
    compare(given.file, given.out, given.only, given.seeds, given.common, plugins)


def _report(args: list[str]) -> None:
    from corrigenda.pipeline.report import report

    parser = _parser("report", report.__doc__)
    parser.add_argument("dirs", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_function_arguments(report, skip={"dirs", "training"}, as_group=False)
    given = parser.parse_args(args)
    report(given.dirs, given.out, given.baseline, figures=given.figures, check=given.check)


def _judge(args: list[str]) -> None:
    from corrigenda.pipeline.judge import judge

    parser = _parser("judge", judge.__doc__)
    parser.add_argument("dirs", nargs="+", type=Path, help="run folders")
    parser.add_function_arguments(judge, skip={"dirs"}, as_group=False)
    judge(**parser.parse_args(args).as_dict())


def _moments(args: list[str]) -> None:
    from corrigenda.modules.model.lm import LanguageModel
    from corrigenda.modules.statistics.corpus import IMPORTED, Corpus
    from corrigenda.modules.statistics.moments import Moments

    parser = _parser("moments", "Computes second moments of MLP keys; resumes if killed.")
    parser.add_class_arguments(LanguageModel, "lm")
    parser.add_class_arguments(Corpus, "corpus")
    parser.add_argument("--layers", nargs="+", type=int, required=True, help="blocks, from 0")
    parser.add_argument(
        "--import",
        type=Path,
        help="a statistics file (.npz) published with ROME or MEMIT, for one layer of the same model; "
        "edit with corpus.source imported",
    )
    given = parser.parse_args(args)
    file = given["import"]
    if file is not None and len(given.layers) != 1:
        raise UserError(f"{file} holds one layer: give one with --layers, not {len(given.layers)}")
    lm = LanguageModel(**given.lm)
    for layer in given.layers:
        lm.structure.block_name(layer)  # raises for an unknown one before minutes of sampling
    moments = Moments(lm, Corpus(IMPORTED) if file is not None else Corpus(**given.corpus))
    if file is not None:
        moments.take_over(file, given.layers[0])
    for layer, moment_FF in moments.gather(given.layers).items():
        moments.factor(layer)
        share = moments.first_token_share(layer)
        of_first = "" if share is None else f", {100 * share:.1f} % of it from first tokens"
        sys.stdout.write(
            f"layer {layer}: {tuple(moment_FF.shape)}, trace {moment_FF.trace():.4g}{of_first}\n"
        )
    sys.stdout.write(f"saved in {moments.folder}\n")


def _edit(args: list[str]) -> None:
    from corrigenda.modules.model.lm import LanguageModel
    from corrigenda.pipeline.edit import edit
    from corrigenda.pipeline.session import Fact

    parser = _parser("edit", edit.__doc__)
    parser.add_argument("model", type=str, help="a Hub id, a folder, or smollm2")
    parser.add_argument("--prompt", type=str, help="a text with the subject, or {} in its place")
    parser.add_argument("--subject", type=str, help="what the fact is about")
    parser.add_argument("--target", type=str, help="the new answer")
    parser.add_argument("--rephrase", type=str, nargs="+", default=[], help="paraphrases to test")
    parser.add_argument(
        "--locality", type=str, nargs="+", default=[], help="prompts whose answers should stay"
    )
    parser.add_argument("--chat", action="store_true", help="talk to the edited model")
    added: set[str | int] = {"model", "lm_options", "fact", "chat"}
    parser.add_function_arguments(edit, skip=added, as_group=False)
    parser.add_class_arguments(LanguageModel, "lm", skip={"name"})
    given = parser.parse_args(args)
    fact = None
    if given.prompt is not None and given.subject is not None and given.target is not None:
        fact = Fact(given.prompt, given.subject, given.target, given.rephrase, given.locality)
    elif any((given.prompt, given.subject, given.target, given.rephrase, given.locality)):
        raise UserError("one fact needs --prompt, --subject and --target; several are in a --file")
    edit(
        given.model,
        given.lm.as_dict(),
        fact,
        given.file,
        given.editor,
        given.save,
        given.chat,
        given.tokens,
    )


def _edits(args: list[str]) -> None:
    """Exits with status 1 if ``edits verify`` fails."""
    from corrigenda.pipeline import edit_files

    functions: list[Callable[..., Any]] = [edit_files.show, edit_files.merge]
    if args[:1] not in (["show"], ["merge"]):  # the others import model libraries, for seconds
        from corrigenda.modules.model.lm import LanguageModel
        from corrigenda.pipeline import cards, edits

        functions += [edits.verify, edits.apply, edits.export, cards.card, cards.push]
    parser = _parser("edits", "Shows, verifies, applies, merges and exports saved edits.")
    verbs = parser.add_subcommands()
    by_name = {function.__name__: function for function in functions}
    for verb, function in by_name.items():
        what = str(function.__doc__).partition("\n\n")[0]
        part = _parser(f"edits {verb}", what)
        if verb == "push":
            part.add_argument("folder", type=Path, help="an export with its model card")
            part.add_argument("repo", type=str, help="owner/name; created if it does not exist")
        elif verb in ("verify", "export", "card"):
            part.add_argument("file", type=Path, help="edits (.safetensors)")
        else:
            part.add_argument("files", type=Path, nargs="+", help="edits (.safetensors)")
        if verb == "card":
            part.add_argument("folder", type=Path, help="the export")
        if verb in ("verify", "apply", "export", "card"):
            part.add_class_arguments(LanguageModel, "lm", skip={"name"})
            part.add_argument(
                "--lm.name", type=str | None, help="the model (default: that of the files)"
            )
        if verb == "apply":
            part.add_argument(
                "--prompt", type=str, nargs="+", help="prompts (default: those of the edits)"
            )
        added: set[str | int] = {"file", "files", "folder", "repo", "prompt", "lm_options"}
        part.add_function_arguments(function, skip=added, as_group=False)
        verbs.add_subcommand(verb, part)
    given = parser.parse_args(args)
    options = given[given.subcommand].as_dict()
    if "lm" in options:
        options["lm_options"] = options.pop("lm")
    if by_name[given.subcommand](**options) is False:
        raise SystemExit(1)


def _abilities(args: list[str]) -> None:
    import transformers

    from corrigenda.modules.editing.memory import MemoryEditor
    from corrigenda.modules.model.lm import LanguageModel
    from corrigenda.pipeline.abilities.command import abilities
    from corrigenda.pipeline.fit import import_methods
    from corrigenda.pipeline.trust import known_classes

    transformers.logging.disable_progress_bar()
    import_methods()
    parser = _parser("abilities", abilities.__doc__)
    restrict_parsing(known_classes(args))
    parser.add_argument("--tasks", type=str, nargs="+", required=True, help="names of tasks")
    parser.add_argument("--edits", type=Path, nargs="+", default=[], help="files of saved edits")
    parser.add_class_arguments(LanguageModel, "lm", skip={"name"}, instantiate=False)
    parser.add_argument(
        "--lm.name", type=str | None, help="the model (default: that of the files, or smollm2)"
    )
    parser.add_subclass_arguments(MemoryEditor, "editor", required=False)
    skip: set[str | int] = {"lm_options", "tasks", "edits", "editor"}
    parser.add_function_arguments(abilities, skip=skip, as_group=False)
    given = parser.instantiate(parser.parse_args(args)).as_dict()
    abilities(lm_options=given.pop("lm"), **given)


def _data(args: list[str]) -> None:
    from corrigenda.pipeline.data import check

    parser = _parser("data", check.__doc__)
    parser.add_argument("file", type=str, help="a file of records, or a Hub dataset")
    check(parser.parse_args(args).file)


def _doctor(args: list[str]) -> None:
    import transformers

    from corrigenda.modules.model.lm import LanguageModel
    from corrigenda.pipeline.doctor import doctor

    transformers.logging.disable_progress_bar()
    parser = _parser("doctor", doctor.__doc__)
    parser.add_argument("model", type=str, help="a Hub id, a folder, or smollm2")
    parser.add_class_arguments(LanguageModel, "lm", skip={"name"})
    parser.add_function_arguments(doctor, skip={"lm"}, as_group=False)
    given = parser.parse_args(args)
    lm = LanguageModel(given.model, **given.lm)
    doctor(lm, given.out, given.facts, given.samples, given.tokens)
