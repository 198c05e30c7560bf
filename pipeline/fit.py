"""``fit`` and ``validate``: Lightning's command line, with a folder for every run and our options beside its own.

Signatures are the schema: every constructor argument of a class named in YAML is an option, checked before
anything is loaded. Classes can be named by their short name (``ROME``, ``MEND``, ``Facts``).
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import warnings
from contextlib import ExitStack
from pathlib import Path
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
    r".*recommended to use `self.log.*sync_dist=True.*",  # what is logged then is the same everywhere
)
CONFIGS = Path(__file__).parents[1] / "configs"


def fit_or_validate(args: list[str]) -> None:
    """Runs one of the two; raises what :func:`pipeline.cli.main` makes one line of."""
    import transformers
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningCLI

    from modules.checkpoints import read_checkpoint
    from pipeline.callbacks import EditCallback
    from pipeline.lightning_parts import WholeCheckpoints
    from pipeline.run_folder import open_run
    from pipeline.run_writer import LastCheckpoint, RunWriter

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
            text = self._parser(self.subcommand).dump(config, skip_unset=False)
            self.run = until_the_end.enter_context(open_run(config, self.subcommand, text))
            if config.ckpt_path == "last":
                config.ckpt_path = self.run.checkpoint and str(self.run.checkpoint)
            if config.ckpt_path:
                read_checkpoint(config.ckpt_path, "pytorch-lightning_version")
            _place(config, self.run.path)
            _pass_on_seed(config)

        def instantiate_trainer(self, **kwargs: Any) -> Any:  # noqa: ANN401
            given = self.config_init[self.subcommand].trainer
            if given.enable_checkpointing is not False:
                given.callbacks = [*_as_list(given.callbacks), LastCheckpoint(self.run.path)]
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

    raises = {"exit_on_error": False}
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


def _place(config: Namespace, run_dir: Path) -> None:
    """Everything the run writes goes into its folder: logs, checkpoints, edits."""
    from jsonargparse import Namespace

    trainer = config.trainer
    trainer.default_root_dir = str(run_dir)
    if trainer.logger in (None, True):
        csv = {"save_dir": str(run_dir), "name": "logs", "flush_logs_every_n_steps": 10}
        trainer.logger = [_spec("pipeline.lightning_parts.WholeLog", csv)]
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
