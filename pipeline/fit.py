"""``fit`` and ``validate``: Lightning's command line, with a folder for every run and our options beside its own.

Signatures are the schema: every constructor argument of a class named in YAML is an option, checked before
anything is loaded. Classes can be named by their short name (``ROME``, ``MEND``, ``Facts``).
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.signals import listen
from corrigenda.pipeline.trust import (
    import_plugins,
    known_classes,
    read_yaml,
    restrict_parsing,
    take_plugins,
)

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
    r".*recommended to use `self.log.*sync_dist=True.*",  # what is logged then is the same everywhere
)
CONFIGS = Path(__file__).parents[1] / "configs"
VERBS = {
    "fit": "Train an editor or a fine-tuning baseline, or apply a stream of edits.",
    "validate": "Edit the model and measure efficacy, generality and locality.",
}
MIN_COLUMNS = 40
ABOVE_ZERO = ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches")


def fit_or_validate(args: list[str]) -> None:
    """Runs one of the two; raises what :func:`corrigenda.pipeline.cli.main` makes one line of."""
    import transformers
    from jsonargparse import SUPPRESS
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback
    from lightning.pytorch.cli import LightningCLI

    from corrigenda.modules.training.checkpoints import read_checkpoint
    from corrigenda.pipeline import board  # noqa: F401  may be named then
    from corrigenda.pipeline.callbacks import EditCallback
    from corrigenda.pipeline.lightning_parts import WholeCheckpoints
    from corrigenda.pipeline.run_folder import open_run
    from corrigenda.pipeline.run_writer import LastCheckpoint, RunWriter

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    if "SLURM_NTASKS" in os.environ and "SLURM_STEP_ID" not in os.environ:
        # Not started by srun: one process, not one of several.
        os.environ["SLURM_JOB_NAME"] = "interactive"
    if shutil.get_terminal_size().columns < MIN_COLUMNS:  # Lightning's table would divide by zero
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    # jsonargparse's null logger makes a record of each of the names that may not be imported, 80,000 of them.
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric",
        "jsonargparse_null_logger",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()
    plugins, args = take_plugins(args)
    args = [args[0], *_files_first(args[1:])]
    _import_methods()
    import_plugins(plugins)
    restrict_parsing(known_classes(), plugins)

    class PipelineCLI(LightningCLI):
        """LightningCLI with one more group of options, ``edit``, and a folder for every run."""

        subcommand: str

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            every = LightningCLI.subcommands()
            ours = {"ckpt_path", "weights_only"}
            return {name: every[name] | ours for name in ("fit", "validate")}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(EditCallback, "edit")
            parser.add_argument(
                "--run_dir",
                type=str | None,
                default=None,
                help="folder of this run (default: runs/<time>)",
            )
            parser.add_argument(
                "--ckpt_path",
                type=str | None,
                default=None,
                help="a checkpoint of this machine: what fit has trained, for validate; the run to go on "
                "with, for fit, where last is that of --run_dir",
            )
            parser.add_argument(
                "--wandb",
                type=Literal["offline", "online", "off"],
                default="offline",
                help="Weights & Biases: into the run folder, to your account, or not at all",
            )
            # Configuration files of earlier versions say it, too.
            parser.add_argument("--weights_only", type=bool, default=True, help=SUPPRESS)

        def _parse_ckpt_path(self) -> None:
            """A checkpoint's hyperparameters do not overrule the configuration."""

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            path = self.config_init[subcommand].ckpt_path
            given = super()._prepare_subcommand_kwargs(subcommand)
            return {**given, "ckpt_path": path, "weights_only": True}

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            _require_possible(config)
            _require_local_tensors(config, self.subcommand)
            # As given, before _place: a copy of the file can be run into another folder.
            text = self._parser(self.subcommand).dump(config, skip_unset=False)
            self.run = until_the_end.enter_context(open_run(config, self.subcommand, text))
            if config.ckpt_path == "last":
                config.ckpt_path = self.run.checkpoint and str(self.run.checkpoint)
            if config.ckpt_path:
                read_checkpoint(
                    config.ckpt_path, "pytorch-lightning_version", "epoch", "global_step", "loops"
                )
            _place(config, self.run.path)
            _pass_on_seed(config)

        def instantiate_trainer(self, **kwargs: Any) -> Any:  # noqa: ANN401
            given = self.config_init[self.subcommand].trainer
            given.callbacks = [Listening(), *_as_list(given.callbacks)]
            if given.enable_checkpointing is not False:
                given.callbacks = [*given.callbacks, LastCheckpoint(self.run.path)]
            given.plugins = [*_as_list(given.plugins), WholeCheckpoints()]
            trainer = super().instantiate_trainer(**kwargs)
            seed = self.config[self.subcommand].seed_everything
            writer = RunWriter(self.run.path, self.subcommand, seed, self.run.depends_on)
            trainer.callbacks.append(writer)  # type: ignore[attr-defined]
            return trainer

        def before_fit(self) -> None:
            self._keep_config()

        def before_validate(self) -> None:
            self._keep_config()

        def _keep_config(self) -> None:
            if self.trainer.is_global_zero:
                self.run.keep_config()

    class Listening(Callback):
        """Lightning replaces our signal handlers when it begins to run, and when it is interrupted."""

        def on_train_start(self, *_: object) -> None:
            listen()

        def on_validation_start(self, *_: object) -> None:
            listen()

        def on_exception(self, *_: object) -> None:
            listen()

    raises = {"exit_on_error": False, "allow_abbrev": False}
    defaults = {"default_config_files": [str(CONFIGS / "defaults.yaml")], **raises}
    from lightning.pytorch import LightningDataModule, LightningModule

    try:
        with ExitStack() as until_the_end:
            cli = PipelineCLI(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,
                seed_everything_default=0,
                parser_kwargs={
                    **{verb: {**defaults, "description": text} for verb, text in VERBS.items()},
                    "prog": "corrigenda",
                    **raises,
                },
                args=args,
            )
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    if cli.trainer.interrupted:
        raise KeyboardInterrupt


def _import_methods() -> None:
    """Imports every editor and data module, so that YAML can name classes without their path."""
    for package in ("corrigenda.modules.editors", "corrigenda.datamodules"):
        folder = importlib.import_module(package).__path__
        for module in pkgutil.iter_modules(folder, f"{package}."):
            importlib.import_module(module.name)
    importlib.import_module("corrigenda.modules.training.tuning")


def _files_first(words: Sequence[str]) -> list[str]:
    """Configuration files in their order, however they are given, then the options, which win over all of them.

    An option such as ``--data.limit`` can only be read once a file before it has named the class.
    """
    files, options, rest = [], [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("-c", "--config"):
            files.append(value if equals else next(rest, ""))
        elif word.startswith("-c"):
            files.append(word.removeprefix("-c"))
        else:
            options.append(word)
    return [*(f"--config={_found(file)}" for file in files), *options]


def _found(file: str) -> Path:
    """A configuration file; a configs/... that is not here stands for the one that comes with us."""
    path = Path(file).expanduser()
    if file and not path.exists():
        inside = path.relative_to("configs") if path.parts[0] == "configs" else path
        path = CONFIGS / inside
    if not file or not path.exists():
        raise UserError(
            f"no configuration file {file or '(an empty name)'}; those that come with us are in {CONFIGS}"
        )
    if not isinstance(read_yaml(path), dict):
        raise UserError(
            f"{path}: expected a mapping of options, such as model, data, edit, trainer"
        )
    return path


def _require_possible(config: Namespace) -> None:
    """Refuses settings that jsonargparse and Lightning take, and then fail with."""
    if config.edit is None:
        raise UserError("edit is null: leave it out, or say editor: null, to edit nothing")
    for name in ABOVE_ZERO:
        value = config.trainer[name]
        if isinstance(value, int | float) and value <= 0:
            raise UserError(f"trainer.{name} must be above 0, got {value}")
    if (config.trainer.gradient_clip_val or 0) < 0:
        raise UserError(
            f"trainer.gradient_clip_val is negative: {config.trainer.gradient_clip_val}"
        )


def _require_local_tensors(config: Namespace, verb: str) -> None:
    """A checkpoint is a file of this machine, read as tensors and plain values."""
    if not config.weights_only:
        raise UserError(
            "weights_only cannot be false: checkpoints are read as tensors and plain values"
        )
    path = config.ckpt_path
    if path is None or (path == "last" and verb == "fit"):
        return
    if not path or not Path(path).is_file():
        raise UserError(
            f"--ckpt_path {path!r}: no such file; {verb} --ckpt_path needs a file of this machine, such as "
            "runs/NAME/checkpoints/last.ckpt" + (", or last" if verb == "fit" else "")
        )


def _place(config: Namespace, run_dir: Path) -> None:
    """Everything the run writes goes into its folder: logs, checkpoints, edits."""
    from jsonargparse import Namespace

    trainer = config.trainer
    trainer.default_root_dir = str(run_dir)
    if trainer.logger in (None, True):
        csv = {"save_dir": str(run_dir), "name": "logs", "flush_logs_every_n_steps": 10}
        trainer.logger = [_spec("corrigenda.pipeline.lightning_parts.WholeLog", csv)]
        if config.wandb != "off":
            # Absolute, as W&B's service has a current folder of its own.
            wandb = {
                "project": "corrigenda",
                "name": run_dir.name,
                "save_dir": str(run_dir.resolve()),
            }
            wandb |= {"offline": config.wandb == "offline"}
            trainer.logger.append(_spec("lightning.pytorch.loggers.WandbLogger", wandb))
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        if isinstance(logger, Namespace) and logger.class_path.endswith(".WandbLogger"):
            logger.class_path = "corrigenda.pipeline.board.Board"  # which never ends a run
        if isinstance(logger, Namespace) and not logger.get("init_args", Namespace()).get(
            "save_dir"
        ):
            logger.setdefault("init_args", Namespace())["save_dir"] = str(run_dir)
    callbacks = _as_list(trainer.callbacks)
    if trainer.enable_progress_bar is False:
        callbacks = trainer.callbacks = [
            c for c in callbacks if not c.class_path.endswith("ProgressBar")
        ]
    for callback in callbacks:
        if callback.class_path.endswith("ModelCheckpoint") and not callback.init_args.dirpath:
            callback.init_args.dirpath = str(run_dir / "checkpoints")


def _as_list(callbacks: Any) -> list[Any]:  # noqa: ANN401
    """Callbacks as they may be given: none, one or several."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _pass_on_seed(config: Namespace) -> None:
    """An editor's ``seed`` that was left at 0 is the run's; the data's decides what is asked."""
    for name, value in list(config.items()):
        if name.startswith(("model.", "edit.")) and name.endswith(".init_args.seed") and value == 0:
            config[name] = int(config.seed_everything)


def _spec(class_path: str, init_args: dict[str, Any]) -> Namespace:
    from jsonargparse import Namespace

    return Namespace(class_path=class_path, init_args=Namespace(**init_args))
