"""A Weights & Biases logger whose failures do not end a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import urlopen

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

log = logging.getLogger(__name__)
SECONDS_TO_CONNECT = 8.0
OF_A_STREAM = (
    "val/",
    "current/",
    "guard/",
    "forgetting/",
    "abilities/",
)  # metrics over the number of edits
MAX_TAG = 64  # characters


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Board, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # no failure of the logger may end the run
            self._disable(error)
            return None

    return call


class _NoRun:
    """Takes the place of a W&B run; every call does nothing."""

    def __getattr__(self, _: str) -> _NoRun:
        return self

    def __call__(self, *_: Any, **__: Any) -> _NoRun:  # noqa: ANN401
        return self


class Board(WandbLogger):
    """A W&B logger that never ends a run: after a failure it logs one warning and is disabled.

    All values are also in the run folder.
    """

    log_metrics = _guarded(WandbLogger.log_metrics)
    log_hyperparams = _guarded(WandbLogger.log_hyperparams)
    log_image = _guarded(WandbLogger.log_image)
    after_save_checkpoint = _guarded(WandbLogger.after_save_checkpoint)
    log_table = _guarded(WandbLogger.log_table)
    finalize = _guarded(WandbLogger.finalize)

    @_guarded
    def describe(self, config: dict[str, Any], tags: list[str]) -> None:
        """Adds the configuration, and tags by which runs are found."""
        run = self.experiment
        if isinstance(run, _NoRun):
            return
        run.config.update(config, allow_val_change=True)
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), *map(_shortened, tags)]))

    @_guarded
    def guarded(self, work: Callable[[], None]) -> None:
        """Does some work for the board, whose failure does not end the run either."""
        if not isinstance(self.experiment, _NoRun):
            work()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401
        if self._experiment is None:
            import wandb  # takes a second

            self._wandb_init.pop("anonymous", None)  # W&B warns about it even if it is unset
            settings = self._wandb_init.setdefault("settings", wandb.Settings())
            settings.init_timeout = settings.login_timeout = SECONDS_TO_CONNECT
            try:
                if not self._offline and os.environ.get("WANDB_MODE", "online") == "online":
                    _require_connection(settings.base_url)
                _ = super().experiment
            except Exception as error:
                self._disable(error)
        return self._experiment

    def _disable(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        log.warning("Weights & Biases is disabled after an error, the run continues: %s", reason)
        self._experiment = cast(Any, _NoRun())


def _shortened(tag: str) -> str:
    """A tag within W&B's limit of 64 characters; of a path, its end."""
    return tag[-MAX_TAG:]


def _require_connection(url: str) -> None:
    """Raises OSError if the server does not respond; W&B itself would retry for much longer."""
    try:
        urlopen(url, timeout=SECONDS_TO_CONNECT).close()
    except HTTPError:  # the server has responded
        return


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """The W&B loggers; none in processes that do not write."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    return boards if trainer.is_global_zero else []


class Axes:
    """What W&B plots metrics over: those of a stream over its number of edits, others over the trainer's steps.

    Metrics are declared one by one: W&B's versions differ in which of several matching patterns wins.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def choose(self, trainer: Trainer, is_stream: bool, names: Iterable[str]) -> None:
        """Declares the metrics among ``names`` that are new."""
        boards = wandb_loggers(trainer)
        new = set(names) - self._known if boards else set()
        self._known |= new
        for name in sorted(new):
            counted = is_stream and name.startswith(OF_A_STREAM)
            axis = "edit/num_edits" if counted else "trainer/global_step"
            for board in boards:
                with suppress(Exception):  # the logger reports its own failures
                    board.experiment.define_metric(name, step_metric=axis)


def log_beside(trainer: Trainer, axes: Axes, values: dict[str, float], num_edits: int) -> None:
    """Logs values of a stream at once, whatever ``log_every_n_steps`` is."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        logger.log_metrics(values | {"edit/num_edits": float(num_edits)}, trainer.global_step)
    axes.choose(trainer, True, values)
