"""``fit`` and ``validate``: Lightning's command line with additional options and a folder for every run.

Options are the constructor arguments of the classes named in YAML, and are checked before anything is loaded.
Classes can be given by their short name (``ROME``, ``MEND``, ``Facts``).
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import pkgutil
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.trust import (
    import_plugins,
    known_classes,
    read_yaml,
    restrict_parsing,
    take_plugins,
)

# Warnings of libraries about intended behaviour.
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
    r".*`training_step` returned `None`.*",  # of a task that is learned already
    r".*recommended to use `self.log.*sync_dist=True.*",  # these values are the same in all processes
    # The first block of a model may be offloaded; its tokens are on the right device nevertheless.
    r".*`input_ids` being on a device type different.*",
)
CONFIGS = Path(__file__).parents[1] / "configs"
MIN_COLUMNS = 40
# Environment variables that Lightning reads when it is imported.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "WORLD_SIZE")


def fit_or_validate(args: list[str]) -> None:
    """Runs ``fit`` or ``validate``; :func:`corrigenda.pipeline.cli.main` reports its errors."""
    # Outside a step of SLURM this process is the only one, whatever its job is allowed.
    for name in (*RANKS, "SLURM_NTASKS") if "SLURM_STEP_ID" in os.environ else RANKS:
        if not (rank := os.environ.get(name, "0")).isdecimal():
            raise UserError(f"the environment variable {name} must be a whole number, got {rank!r}")
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from corrigenda.modules.processes import leave_group
    from corrigenda.pipeline import board  # noqa: F401  so that configurations can name its class
    from corrigenda.pipeline.lightning_cli import PipelineCLI

    atexit.register(leave_group)
    _prepare_libraries()
    plugins, args = take_plugins(args)
    args = [args[0], *_files_first(args[1:])]
    import_methods()
    import_plugins(plugins)
    restrict_parsing(known_classes([*args, *_contents(args)]), plugins)

    try:
        with ExitStack() as exit_stack:
            cli = PipelineCLI(args, CONFIGS / "defaults.yaml", exit_stack)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    if cli.trainer.interrupted:
        raise KeyboardInterrupt


def _prepare_libraries() -> None:
    """Silences libraries, and prevents errors of Lightning in narrow terminals and SLURM jobs."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    if "SLURM_NTASKS" in os.environ and "SLURM_STEP_ID" not in os.environ:
        # Not started by srun, so this is the only process.
        os.environ["SLURM_JOB_NAME"] = "interactive"
    if shutil.get_terminal_size().columns < MIN_COLUMNS:  # Lightning's table divides by zero
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()


def import_methods() -> None:
    """Imports all editors and data modules, so that YAML can name classes without their path."""
    for package in ("corrigenda.modules.editors", "corrigenda.datamodules"):
        folder = importlib.import_module(package).__path__
        for module in pkgutil.iter_modules(folder, f"{package}."):
            importlib.import_module(module.name)
    importlib.import_module("corrigenda.modules.training.tuning")


def _files_first(words: Sequence[str]) -> list[str]:
    """Moves configuration files before all other options, which override them.

    An option such as ``--data.limit`` can only be parsed after a file has named the class.
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


def _contents(words: Sequence[str]) -> list[str]:
    """The texts of the configuration files among these words."""
    files = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [Path(file).read_text("utf-8") for file in files]


def _found(file: str) -> Path:
    """The path of a configuration file; a missing ``configs/...`` is looked up in the installed package."""
    path = Path(file).expanduser()
    if file and not path.exists():
        inside = path.relative_to("configs") if path.parts[0] == "configs" else path
        path = CONFIGS / inside
    if not file or not path.exists():
        raise UserError(
            f"no configuration file {file or '(an empty name)'}; the installed ones are in {CONFIGS}"
        )
    if not isinstance(read_yaml(path), dict):
        raise UserError(
            f"{path}: expected a mapping of options, such as model, data, edit, trainer"
        )
    return path
