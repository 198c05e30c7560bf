"""Processes that share the work through ``torch.distributed``; a process alone needs nothing initialised."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


def are_several() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_number() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if are_several():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def number_started() -> int:
    """How many processes torchrun or srun has started together; 1 if neither has started this one.

    Under SLURM, an interactive shell and a batch script have no step of their own and are one process.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env.get("WORLD_SIZE", 1))
    is_step = "SLURM_STEP_ID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return int(env.get("SLURM_NTASKS", 1)) if is_step else 1


def gather(value: Value) -> list[Value]:
    """Every process's value, by rank."""
    _, number = rank_and_number()
    values = [value] * number
    if number > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def require_alike(digest: str, what: str) -> None:
    """Raises ValueError in every process unless all have the same digest."""
    every = gather(digest)
    others = [rank for rank, other in enumerate(every) if other != every[0]]
    if others:
        raise ValueError(
            f"{what} differs between processes 0 and {others[0]}, which start from the same weights and cases: "
            "set --trainer.deterministic true, or run with --trainer.devices 1"
        )


def total(part: Tensor) -> Tensor:
    """The sum of all processes' tensors; the tensor itself is left as it is."""
    summed = part.clone()
    if rank_and_number()[1] > 1:
        torch.distributed.all_reduce(summed)
    return summed


def leave_group() -> None:
    """Closes the connections to the other processes, if there are any.

    The threads of a gloo group that is still open may abort a process that ends (exit status 134).
    """
    if are_several():
        torch.distributed.destroy_process_group()
