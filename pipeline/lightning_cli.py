"""Lightning's command line with our additional options, and checks made before a run is built.

Importing this module imports Lightning, which takes seconds, so only ``fit`` and ``validate`` do.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import SUPPRESS, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from corrigenda.modules.processes import number_started
from corrigenda.modules.training.checkpoints import read_checkpoint
from corrigenda.pipeline.abilities.callback import Abilities
from corrigenda.pipeline.board_content import BoardContent
from corrigenda.pipeline.budget import Budget
from corrigenda.pipeline.callbacks import EditCallback
from corrigenda.pipeline.checkpointing import LastCheckpoint
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.forgetting import Forgetting
from corrigenda.pipeline.guard import Guard
from corrigenda.pipeline.lightning_parts import WholeCheckpoints
from corrigenda.pipeline.run_folder import open_run
from corrigenda.pipeline.run_writer import RunWriter
from corrigenda.pipeline.screen import Screen
from corrigenda.pipeline.signals import listen
from corrigenda.pipeline.tasks import TaskMatrices
from corrigenda.pipeline.terminal import print_result, say_loading

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

VERBS = {
    "fit": "Train an editor or a fine-tuning baseline, or apply a stream of edits.",
    "validate": "Edit the model and measure efficacy, generality and locality.",
}
ABOVE_ZERO = ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches")
CKPT_PATH = {
    "fit": "the run to resume: a local checkpoint file, where 'last' is the last checkpoint in --run_dir",
    "validate": "a local checkpoint file: what fit has trained",
}
NOT_NEGATIVE = ("gradient_clip_val", "log_every_n_steps", "min_epochs", "min_steps")


class PipelineCLI(LightningCLI):
    """LightningCLI with a further group of options, ``edit``, and a folder for every run.

    Constructing it runs the command.

    Args:
        args: the command line, starting with ``fit`` or ``validate``.
        defaults: a configuration file that is read before all others.
        exit_stack: unlocks the run folder when the run has ended.
    """

    subcommand: str

    def __init__(self, args: list[str], defaults: Path, exit_stack: ExitStack) -> None:
        self._exit_stack = exit_stack
        raises = {"exit_on_error": False, "allow_abbrev": False}
        for_each = {"default_config_files": [str(defaults)], **raises}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={
                **{verb: {**for_each, "description": text} for verb, text in VERBS.items()},
                "prog": "corrigenda",
                **raises,
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        ours = {"ckpt_path", "weights_only", "verbose"}
        return {name: every[name] | ours for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        verb = next(verb for verb, text in VERBS.items() if text == parser.description)
        parser.add_lightning_class_args(EditCallback, "edit")
        parser.add_lightning_class_args(Budget, "budget")
        parser.add_lightning_class_args(Guard, "guard")
        parser.add_lightning_class_args(Forgetting, "forgetting")
        parser.add_lightning_class_args(Screen, "screen")
        parser.add_lightning_class_args(Abilities, "abilities")
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
            help=CKPT_PATH[verb],
        )
        parser.add_argument(
            "--wandb",
            type=Literal["offline", "online", "off"],
            default="offline",
            help="Weights & Biases: log into the run folder, to your account, or not at all",
        )
        # Configuration files of earlier versions contain them.
        parser.add_argument("--weights_only", type=bool, default=True, help=SUPPRESS)
        if verb == "validate":
            parser.add_argument("--verbose", type=bool, default=True, help=SUPPRESS)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: hyperparameters in a checkpoint do not override the configuration."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        path = self.config_init[subcommand].ckpt_path
        given = super()._prepare_subcommand_kwargs(subcommand)
        quiet = {"verbose": False} if subcommand == "validate" else {}  # print_result has the table
        return {**given, **quiet, "ckpt_path": path, "weights_only": True}

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        _require_possible(config)
        _require_local_tensors(config, self.subcommand)
        # Before _redirect_outputs, so that the saved file can be used for a run in another folder.
        text = self._parser(self.subcommand).dump(config, skip_unset=False)
        self.run = self._exit_stack.enter_context(open_run(config, self.subcommand, text))
        say_loading(config, self.run.path)
        if config.ckpt_path == "last":
            config.ckpt_path = self.run.checkpoint and str(self.run.checkpoint)
        if config.ckpt_path:
            read_checkpoint(
                config.ckpt_path, "pytorch-lightning_version", "epoch", "global_step", "loops"
            )
        _redirect_outputs(config, self.run.path)
        _pass_on_seed(config)

    def instantiate_trainer(self, **kwargs: Any) -> Any:  # noqa: ANN401
        given = self.config_init[self.subcommand].trainer
        given.callbacks = [_SignalHandlers(), *_as_list(given.callbacks), TaskMatrices()]
        if given.enable_checkpointing is not False:
            given.callbacks = [*given.callbacks, LastCheckpoint(self.run.path)]
        given.plugins = [*_as_list(given.plugins), WholeCheckpoints()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (
            TypeError,
            RuntimeError,
        ) as error:  # raised for values that Lightning's type hints allow
            raise UserError(f"trainer: {error}") from error
        _require_all_processes(trainer)
        seed = self.config[self.subcommand].seed_everything
        writer = RunWriter(self.run.path, self.subcommand, seed, self.run.depends_on)
        shown = BoardContent(self.run.path, self.run.text)  # after the files that it reads
        trainer.callbacks += [writer, shown]  # type: ignore[attr-defined]
        return trainer

    def before_fit(self) -> None:
        self._save_config()

    def before_validate(self) -> None:
        self._save_config()

    def after_validate(self) -> None:
        print_result(self.run.path)

    def _save_config(self) -> None:
        if self.trainer.is_global_zero:
            self.run.save_config()


def _require_all_processes(trainer: Trainer) -> None:
    """Raises UserError where processes that were started together would not run as one group.

    Each would do the whole run, in the same folder.
    """
    if (started := number_started()) != trainer.world_size and started > 1:
        raise UserError(
            f"{started} processes were started together, and these settings make a group of {trainer.world_size}: "
            "set --trainer.devices to the processes on each machine, --trainer.num_nodes to the machines, and "
            "--trainer.strategy ddp"
        )


class _SignalHandlers(Callback):
    """Installs our signal handlers again, which Lightning replaces when it starts and when it is interrupted."""

    def on_train_start(self, *_: object) -> None:
        listen()

    def on_validation_start(self, *_: object) -> None:
        listen()

    def on_exception(self, *_: object) -> None:
        listen()


def _require_possible(config: Namespace) -> None:
    """Rejects settings that jsonargparse and Lightning accept but fail on later."""
    if config.edit is None:
        raise UserError("edit is null: to edit nothing, leave it out or set editor: null")
    for part in ("edit", "trainer"):
        if not isinstance(config[part], Namespace):
            raise UserError(f"{part} must be a mapping of options, got {config[part]!r}")
    for name in ABOVE_ZERO:
        value = config.trainer[name]
        if isinstance(value, int | float) and value <= 0:
            raise UserError(f"trainer.{name} must be above 0, got {value}")
    for name in NOT_NEGATIVE:
        if (config.trainer[name] or 0) < 0:
            raise UserError(f"trainer.{name} is negative: {config.trainer[name]}")


def _require_local_tensors(config: Namespace, verb: str) -> None:
    """Checkpoints must be local files, which are read as tensors and plain values only."""
    if not config.weights_only:
        raise UserError(
            "weights_only cannot be false: checkpoints are read as tensors and plain values"
        )
    path = config.ckpt_path
    if path is None or (path == "last" and verb == "fit"):
        return
    if not path or not Path(path).is_file():
        raise UserError(
            f"--ckpt_path {path!r}: no such file; {verb} --ckpt_path needs a local file, such as "
            "runs/NAME/checkpoints/last.ckpt" + (", or last" if verb == "fit" else "")
        )


def _redirect_outputs(config: Namespace, run_dir: Path) -> None:
    """Sends everything that the run writes into its folder: logs, checkpoints, edits."""
    trainer = config.trainer
    trainer.default_root_dir = str(run_dir)
    if trainer.logger in (None, True):
        csv = {"save_dir": str(run_dir), "name": "logs", "flush_logs_every_n_steps": 10}
        trainer.logger = [_spec("corrigenda.pipeline.lightning_parts.WholeLog", csv)]
        if config.wandb != "off":
            # Absolute, because W&B's service process has a different working directory.
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
            logger.class_path = "corrigenda.pipeline.board.Board"  # whose failures never end a run
        if isinstance(logger, Namespace):
            given = logger.get("init_args") or Namespace()
            given.save_dir = given.get("save_dir") or str(run_dir)
            logger.init_args = given
    callbacks = _as_list(trainer.callbacks)
    if trainer.enable_progress_bar is False:
        callbacks = trainer.callbacks = [
            c for c in callbacks if not c.class_path.endswith("ProgressBar")
        ]
    for callback in callbacks:
        if callback.class_path.endswith("ModelCheckpoint") and not callback.init_args.dirpath:
            callback.init_args.dirpath = str(run_dir / "checkpoints")


def _as_list(callbacks: Any) -> list[Any]:  # noqa: ANN401
    """Callbacks as a list, given none, one or several."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _pass_on_seed(config: Namespace) -> None:
    """A ``seed`` of 0 of an editor, of tasks or of the order of cases becomes the run's.

    The data's own decides what is evaluated.
    """
    for name, value in list(config.items()):
        own = name.startswith(("model.", "edit.", "data.init_args.tasks."))
        is_seed = own and name.endswith(".init_args.seed")
        if (is_seed or name == "data.init_args.order_seed") and value == 0:
            config[name] = int(config.seed_everything)


def _spec(class_path: str, init_args: dict[str, Any]) -> Namespace:
    return Namespace(class_path=class_path, init_args=Namespace(**init_args))
