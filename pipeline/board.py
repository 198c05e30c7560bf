"""Weights & Biases as something a run can do without."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import urlopen

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

log = logging.getLogger(__name__)
SECONDS_TO_CONNECT = 8.0


def _spared(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Board, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # whatever happens in there is not the run's business
            self._drop(error)
            return None

    return call


class _Nothing:
    """Stands for a W&B run, and takes everything without doing anything."""

    def __getattr__(self, _: str) -> _Nothing:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:  # noqa: ANN401
        return self


class Board(WandbLogger):
    """A W&B logger that never ends a run: when it fails, that is said once and nothing is logged to it any more.

    Everything that it gets is in the run folder, too.
    """

    log_metrics = _spared(WandbLogger.log_metrics)
    log_hyperparams = _spared(WandbLogger.log_hyperparams)
    log_image = _spared(WandbLogger.log_image)
    after_save_checkpoint = _spared(WandbLogger.after_save_checkpoint)
    finalize = _spared(WandbLogger.finalize)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401
        if self._experiment is None:
            import wandb  # takes a second

            self._wandb_init.pop("anonymous", None)  # W&B warns of it, even unset
            settings = self._wandb_init.setdefault("settings", wandb.Settings())
            settings.init_timeout = settings.login_timeout = SECONDS_TO_CONNECT
            try:
                if not self._offline and os.environ.get("WANDB_MODE", "online") == "online":
                    _require_connection(settings.base_url)
                _ = super().experiment
            except Exception as error:
                self._drop(error)
        return self._experiment

    def _drop(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        log.warning("nothing more is logged to Weights & Biases, the run goes on: %s", reason)
        self._experiment = cast(Any, _Nothing())


def _require_connection(url: str) -> None:
    """Raises OSError where nothing answers; W&B itself tries for much longer."""
    try:
        urlopen(url, timeout=SECONDS_TO_CONNECT).close()
    except HTTPError:  # an answer, too
        return
