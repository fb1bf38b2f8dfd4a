"""Training samples as one array of a kind in a file, which grow while they are collected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def open_columns(
    folder: Path, names: Sequence[str], count: int, columns: Sequence[tuple[tuple[int, ...], Any]]
) -> list[np.memmap]:
    """Open the arrays of a folder, each in a file of its own; those that are not there yet are zeros.

    Args:
        folder: Created if needed.
        names: Name of each array.
        count: Samples.
        columns: Shape of one sample and dtype, for each array.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.npy" for name in names]
    return [
        np.lib.format.open_memmap(file, "r+" if file.exists() else "w+", dtype=dtype, shape=(count, *shape))
        for file, (shape, dtype) in zip(files, columns, strict=True)
    ]
