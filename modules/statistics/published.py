"""Reads published second moments."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor


def read_npz(path: str | Path) -> tuple[Tensor, int]:
    """(C_FF in float64, number of tokens) from a statistics file published with ROME or MEMIT.

    It holds the sum over tokens (``mom2.mom2``) and their number (``mom2.count``). Raises ValueError for a file
    without these two, and FileNotFoundError if there is no file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such statistics file")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = sorted(file.files)
            if not {"mom2.mom2", "mom2.count"} <= set(names):
                raise ValueError(f"it has {', '.join(names)} instead of mom2.mom2 and mom2.count")
            total, count = np.asarray(file["mom2.mom2"], np.float64), int(file["mom2.count"])
    except (ValueError, OSError, EOFError, BadZipFile, AttributeError) as error:
        raise ValueError(f"{path}: not a file of second moments ({error})") from None
    if total.ndim != 2 or total.shape[0] != total.shape[1] or count < total.shape[0]:
        raise ValueError(
            f"{path}: not a usable second moment: shape {total.shape} from {count} tokens; it must be square and "
            "from at least as many tokens as its width"
        )
    if not np.abs(total - total.T).max() <= 1e-3 * np.abs(total).max():  # also for NaN
        raise ValueError(f"{path}: the second moment is damaged: not finite, or not symmetric")
    return torch.from_numpy(total / count), count
