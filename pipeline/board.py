"""A Weights & Biases logger whose failures do not end a run."""

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
    finalize = _guarded(WandbLogger.finalize)

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


def _require_connection(url: str) -> None:
    """Raises OSError if the server does not respond; W&B itself would retry for much longer."""
    try:
        urlopen(url, timeout=SECONDS_TO_CONNECT).close()
    except HTTPError:  # the server has responded
        return
