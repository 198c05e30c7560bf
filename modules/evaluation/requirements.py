"""Settings of the Trainer that cannot work with a model; each is refused before anything runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.modules.model import placement


def require_own_dtype(trainer: Trainer) -> None:
    """Raises ValueError for a precision that would convert the model's weights."""
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise ValueError(
            f"--trainer.precision {trainer.precision} would convert the weights that edits and checkpoints are "
            "made for: leave it out and set their type with --model.lm.dtype, or use bf16-mixed"
        )


def require_unsharded(trainer: Trainer, module: str) -> None:
    """Raises ValueError for a strategy that would shard the base model of a module of this name."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            f"--trainer.strategy sharded is for training beside a base model, which {module} does "
            "not do here: use ddp, or --model.lm.device_map auto for a model larger than one device"
        )


def require_place(trainer: Trainer, net: Any, module: str, learns: bool) -> None:  # noqa: ANN401
    """Raises ValueError where the places of a network's weights do not allow what is to be done.

    Args:
        trainer: what runs it.
        net: the network.
        module: name of the module that evaluates or trains.
        learns: whether ``fit`` trains something.
    """
    trains = trainer.state.fn == TrainerFn.FITTING and learns
    if not trains:
        require_unsharded(trainer, module)
    if placement.is_placed(net) and trainer.world_size > 1:
        raise ValueError(
            "with --model.lm.device_map every process would place the whole model over all devices: set "
            "--trainer.devices 1, or leave device_map out"
        )
    if placement.is_offloaded(net) and trains:
        raise ValueError(
            f"{module} trains through all blocks above the lowest edited one in every step, and "
            "some of this model's are offloaded to the CPU or the disk: give --model.lm.device_map devices alone, "
            "or train over a sharded base (--trainer.strategy sharded)"
        )
