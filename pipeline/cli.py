"""The command line: Lightning's ``fit`` and ``validate``, and the commands of our own.

Signatures are the schema: every constructor argument of a class named in YAML is an option, checked before
anything is loaded. Classes can be named by their short name (``ROME``, ``MEND``, ``Facts``).
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
import time
import warnings
from argparse import ArgumentError
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from lightning.pytorch.cli import LightningArgumentParser

# Warnings of libraries about what is meant to be so.
NOISE = (
    r".*does not have many workers.*",
    r".*LeafSpec.*is deprecated.*",
    r".*in eval mode at the start of training.*",  # the language model stays in eval mode
    r"LightningCLI's args parameter.*",
    r".*contains no `DataLoader`.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    # A stream of edits trains nothing, and ends after one epoch.
    r".*`max_epochs` was not set.*",
    r".*`LightningModule.configure_optimizers` returned `None`.*",
    r"Using ModelCheckpoint with manual optimization.*",
    r".*recommended to use `self.log.*sync_dist=True.*",  # what is logged then is the same everywhere
)
CONFIGS = Path(__file__).parents[1] / "configs"
NAMED_RUN = "CORRIGENDA_RUN_DIR"  # tells further processes what the first one has named the run
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
            _train_or_validate(args)
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


# ---------------------------------------------------------------------------- fit and validate


def _train_or_validate(args: list[str]) -> None:
    import transformers
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningCLI

    from pipeline.callbacks import EditCallback, RunWriter

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()
    _import_methods()

    class PipelineCLI(LightningCLI):
        """LightningCLI with one more group of options, ``edit``, and a folder for every run."""

        subcommand: str

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            every = LightningCLI.subcommands()
            return {name: every[name] for name in ("fit", "validate")}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(EditCallback, "edit")
            parser.add_argument(
                "--run_dir",
                type=str | None,
                default=None,
                help="folder of this run (default: runs/<time>)",
            )
            parser.add_argument(
                "--wandb",
                type=Literal["offline", "online", "off"],
                default="offline",
                help="Weights & Biases: into the run folder, to your account, or not at all",
            )

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            # As given, before _place: a copy of the file can be run into another folder.
            self.config_text = self._parser(self.subcommand).dump(config, skip_unset=False)
            self.run_dir = _run_dir(config, self.subcommand)
            _place(config, self.run_dir)
            _pass_on_seed(config)

        def instantiate_trainer(self, **kwargs: Any) -> Any:  # noqa: ANN401
            trainer = super().instantiate_trainer(**kwargs)
            seed = self.config[self.subcommand].seed_everything
            writer = RunWriter(self.run_dir, self.subcommand, seed)
            trainer.callbacks.append(writer)  # type: ignore[attr-defined]
            return trainer

        def before_fit(self) -> None:
            self._keep_config()

        def before_validate(self) -> None:
            self._keep_config()

        def _keep_config(self) -> None:
            """config.yaml of a new run; a resumed one keeps its first and adds its own."""
            if not self.trainer.is_global_zero:
                return
            self.run_dir.mkdir(parents=True, exist_ok=True)
            path, number = self.run_dir / "config.yaml", 0
            while path.exists() and (self.run_dir / "checkpoints").exists():
                number += 1
                path = self.run_dir / f"config-resumed-{number}.yaml"
            path.write_text(self.config_text, "utf-8")

    raises = {"exit_on_error": False}
    defaults = {"default_config_files": [str(CONFIGS / "defaults.yaml")], **raises}
    from lightning.pytorch import LightningDataModule, LightningModule

    try:
        cli = PipelineCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"fit": defaults, "validate": defaults, **raises},
            args=_packaged(_files_first(args)),
        )
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    if cli.trainer.interrupted:
        raise KeyboardInterrupt


def _import_methods() -> None:
    """Imports every editor and data module, so that YAML can name classes without their path."""
    for package in ("modules.editors", "datamodules"):
        folder = importlib.import_module(package).__path__
        for module in pkgutil.iter_modules(folder, f"{package}."):
            importlib.import_module(module.name)
    importlib.import_module("modules.tuning")


def _files_first(args: list[str]) -> list[str]:
    """The verb, configuration files in their order, then the options, which win over all of them.

    An option such as ``--data.limit`` can only be read once a file before it has named the class.
    """
    verb, *words = args
    given = [i for i, word in enumerate(words) if word in ("-c", "--config")]
    files = sorted({*given, *(i + 1 for i in given if i + 1 < len(words))})
    options = [word for i, word in enumerate(words) if i not in files]
    return [verb, *(words[i] for i in files), *options]


def _packaged(args: list[str]) -> list[str]:
    """Arguments in which a configs/... file that is not here stands for the one that comes with us."""
    found = list(args)
    for i, arg in enumerate(args[:-1]):
        path = Path(args[i + 1])
        if arg in ("-c", "--config") and not path.exists():
            inside = (
                CONFIGS / Path(*path.parts[1:]) if path.parts[0] == "configs" else CONFIGS / path
            )
            if not inside.is_file():
                raise UserError(
                    f"no configuration file {path}; those that come with us are in {CONFIGS}"
                )
            found[i + 1] = str(inside)
        if arg in ("-c", "--config"):
            _require_yaml(found[i + 1])
    return found


def _require_yaml(path: str) -> None:
    import yaml

    try:
        yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _run_dir(config: Namespace, verb: str) -> Path:
    """The run's folder; refuses one that already holds a run, unless that is resumed."""
    from lightning.pytorch.utilities import rank_zero_only

    folder = Path(config.run_dir) if config.run_dir else _named_by_time(verb)
    if verb != "fit" and config.ckpt_path == "last":
        raise UserError(f"{verb} --ckpt_path needs a file, such as runs/NAME/checkpoints/last.ckpt")
    begun = ("summary.json", "cases.jsonl", "checkpoints", "edits")
    if not any((folder / name).exists() for name in begun):  # at most a run that failed at once
        return folder
    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process writes into it
        return folder
    if (folder / "summary.json").exists():
        raise UserError(
            f"{folder} holds a finished run, and runs are never overwritten: choose another --run_dir"
        )
    if verb != "fit" or config.ckpt_path != "last":
        resume = "resume it with --ckpt_path last, or " if verb == "fit" else ""
        raise UserError(f"{folder} holds an unfinished run: {resume}choose another --run_dir")
    if not list(folder.glob("checkpoints/last*.ckpt")):
        raise UserError(
            f"{folder} has no checkpoints/last.ckpt to resume from: choose another --run_dir"
        )
    return folder


def _named_by_time(verb: str) -> Path:
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process has named it
        if NAMED_RUN not in os.environ:
            raise UserError("processes that are started one by one need the same --run_dir")
        return Path(os.environ[NAMED_RUN])
    first = folder = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}"
    number = 1
    while folder.exists():  # another run began in the same second
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    os.environ[NAMED_RUN] = str(folder)
    return folder


def _place(config: Namespace, run_dir: Path) -> None:
    """Everything the run writes goes into its folder: logs, checkpoints, edits."""
    from jsonargparse import Namespace

    trainer = config.trainer
    trainer.default_root_dir = str(run_dir)
    if trainer.logger in (None, True):
        csv = {"save_dir": str(run_dir), "name": "logs", "flush_logs_every_n_steps": 10}
        trainer.logger = [_spec("lightning.pytorch.loggers.CSVLogger", csv)]
        if config.wandb != "off":
            wandb = {"project": "corrigenda", "name": run_dir.name, "save_dir": str(run_dir)}
            wandb |= {"offline": config.wandb == "offline"}
            trainer.logger.append(_spec("lightning.pytorch.loggers.WandbLogger", wandb))
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        if isinstance(logger, Namespace) and not logger.get("init_args", Namespace()).get(
            "save_dir"
        ):
            logger.setdefault("init_args", Namespace())["save_dir"] = str(run_dir)
    callbacks = trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    if trainer.enable_progress_bar is False:
        callbacks = trainer.callbacks = [
            c for c in callbacks if not c.class_path.endswith("ProgressBar")
        ]
    for callback in callbacks:
        if callback.class_path.endswith("ModelCheckpoint") and not callback.init_args.dirpath:
            callback.init_args.dirpath = str(run_dir / "checkpoints")
    run_dir.mkdir(parents=True, exist_ok=True)


def _pass_on_seed(config: Namespace) -> None:
    """An editor's ``seed`` that was left at 0 is the run's; the data's decides what is asked."""
    for name, value in list(config.items()):
        if name.startswith(("model.", "edit.")) and name.endswith(".init_args.seed") and value == 0:
            config[name] = int(config.seed_everything)


def _spec(class_path: str, init_args: dict[str, Any]) -> Namespace:
    from jsonargparse import Namespace

    return Namespace(class_path=class_path, init_args=Namespace(**init_args))


# ---------------------------------------------------------------------------- our own commands


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

    from modules.lm import LanguageModel
    from modules.moments import IMPORTED, Corpus, Moments

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
