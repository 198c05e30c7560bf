"""The command line: which command runs, and how a mistake is told."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from pathlib import Path
from pickle import UnpicklingError

from pipeline.errors import UserError
from pipeline.fit import fit_or_validate

USAGE = """\
usage: corrigenda COMMAND [options]        (corrigenda COMMAND --help explains one)

  fit        train an editor or a fine-tuning baseline, or apply a stream of edits
  validate   edit the model and measure efficacy, generality and locality
  compare    run a study file of several runs, skip what is finished, then report
  report     join finished run folders case by case: tables, intervals, plots
  moments    gather second moments of MLP keys on a text (ROME and its kin need them)
  edits      show, verify, try out, merge and export edits that were saved as files
  doctor     look a model over: what was found, where to edit it, one edit in and out

Configuration files are combined in order, and options win over them:
  corrigenda validate -c configs/rome/smollm2.yaml -c configs/data/facts.yaml --data.limit 30
"""


def main(args: list[str] | None = None) -> None:
    """Runs one command; a user's mistake ends in one line and exit status 2."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    commands = {
        "compare": _compare,
        "report": _report,
        "moments": _moments,
        "edits": _edits,
        "doctor": _doctor,
    }
    command = args[0]
    try:
        if command in ("fit", "validate"):
            fit_or_validate(args)
        elif command in commands:
            commands[command](args[1:])
        else:
            known = ", ".join(["fit", "validate", *commands])
            raise UserError(f"there is no command {command!r}: choose one of {known}")
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning ends an interrupted run with SystemExit(1).
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        _say("interrupted; what was written is kept")
        raise SystemExit(130) from None
    except (UserError, ArgumentError, ValueError, OSError, ImportError, UnpicklingError) as error:
        if os.environ.get("CORRIGENDA_TRACEBACK"):
            raise
        _say(f"error: {_one_line(error, command)}")
        raise SystemExit(2) from None


def _say(text: str) -> None:
    sys.stderr.write(f"corrigenda: {text}\n")


def _one_line(error: Exception, command: str) -> str:
    """What went wrong, without what jsonargparse says about types around it."""
    if isinstance(error, UnpicklingError):
        return "the file given as ckpt_path is not a checkpoint, or not one that only holds tensors"
    around = (
        "Does not validate against",
        "Subtypes:",
        "Errors:",
        "Expected a <class 'NoneType'>",
        "Given value",
    )
    lines = [line.strip(" -") for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(around))
    if isinstance(error, ArgumentError):
        text += f" (options: corrigenda {command} --help)"
    return text


def _compare(args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from pipeline.compare import compare

    parser = ArgumentParser(
        prog="corrigenda compare", description=compare.__doc__, exit_on_error=False
    )
    parser.add_argument("file", type=Path, help="the study file (YAML)")
    parser.add_argument("--only", nargs="+", type=str, help="run only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="make every run once with each")
    parser.add_function_arguments(compare, skip={"file", "only", "seeds"}, as_group=False)
    given = parser.parse_args(args)
    compare(given.file, given.out, given.only, given.seeds)


def _report(args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from pipeline.report import report

    parser = ArgumentParser(
        prog="corrigenda report", description=report.__doc__, exit_on_error=False
    )
    parser.add_argument("dirs", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_function_arguments(report, skip={"dirs", "training"}, as_group=False)
    given = parser.parse_args(args)
    report(given.dirs, given.out, given.baseline)


def _moments(args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from modules.corpus import IMPORTED, Corpus
    from modules.lm import LanguageModel
    from modules.moments import Moments

    parser = ArgumentParser(
        prog="corrigenda moments",
        description="Gathers second moments of MLP keys; resumes if killed.",
        exit_on_error=False,
    )
    parser.add_class_arguments(LanguageModel, "lm")
    parser.add_class_arguments(Corpus, "corpus")
    parser.add_argument("--layers", nargs="+", type=int, required=True, help="blocks, from 0")
    parser.add_argument(
        "--import",
        type=Path,
        help="a statistics file (.npz) of the ROME or MEMIT authors, for one layer of the same model; "
        "edit with corpus.source imported",
    )
    given = parser.parse_args(args)
    file = given["import"]
    if file is not None and len(given.layers) != 1:
        raise UserError(f"{file} is of one layer: give one with --layers, not {len(given.layers)}")
    lm = LanguageModel(**given.lm)
    for layer in given.layers:
        lm.structure.block_name(layer)  # refuses an unknown one before minutes of sampling
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
    sys.stdout.write(f"in {moments.folder}\n")


def _edits(args: list[str]) -> None:
    """Ends with status 1 where an edit that is verified does not hold."""
    from jsonargparse import ArgumentParser

    from modules.lm import LanguageModel
    from pipeline import edits

    parser = ArgumentParser(prog="corrigenda edits", description=edits.__doc__, exit_on_error=False)
    verbs = parser.add_subcommands()
    for verb in ("show", "verify", "apply", "merge", "export"):
        function = getattr(edits, verb)
        what = function.__doc__.partition("\n\n")[0]
        part = ArgumentParser(description=what, exit_on_error=False)
        if verb in ("verify", "export"):
            part.add_argument("file", type=Path, help="edits (.safetensors)")
        else:
            part.add_argument("files", type=Path, nargs="+", help="edits (.safetensors)")
        if verb in ("verify", "apply", "export"):
            part.add_class_arguments(LanguageModel, "lm", skip={"name"})
            part.add_argument("--lm.name", type=str | None, help="the files' own if not given")
        if verb == "apply":
            part.add_argument(
                "--prompt", type=str, nargs="+", help="the edits' own prompts if not given"
            )
        apart: set[str | int] = {"file", "files", "prompt", "lm_options"}
        part.add_function_arguments(function, skip=apart, as_group=False)
        verbs.add_subcommand(verb, part)
    given = parser.parse_args(args)
    options = given[given.subcommand].as_dict()
    if "lm" in options:
        options["lm_options"] = options.pop("lm")
    if getattr(edits, given.subcommand)(**options) is False:
        raise SystemExit(1)


def _doctor(args: list[str]) -> None:
    import transformers
    from jsonargparse import ArgumentParser

    from modules.lm import LanguageModel
    from pipeline.doctor import doctor

    transformers.logging.disable_progress_bar()
    parser = ArgumentParser(
        prog="corrigenda doctor", description=doctor.__doc__, exit_on_error=False
    )
    parser.add_argument("model", type=str, help="a hub id, a folder, or smollm2")
    parser.add_class_arguments(LanguageModel, "lm", skip={"name"})
    parser.add_function_arguments(doctor, skip={"lm"}, as_group=False)
    given = parser.parse_args(args)
    lm = LanguageModel(given.model, **given.lm)
    doctor(lm, given.out, given.facts, given.samples, given.tokens)
