"""Masks as image files, one object each."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transfiner_refine.errors import InvalidInputError


def read_mask(
    path: Path | str | BinaryIO, size: tuple[int, int], name: str | None = None
) -> NDArray[np.bool_] | NDArray[np.float32]:
    """Read one mask: a black and white image, a grey one with soft edges, or a cut-out with transparent surroundings.

    Args:
        path: Image file, or its content as an open file.
        size: ``(H, W)`` of the photo.
        name: What errors call it; None for its path.

    Returns:
        ``(H, W)`` bool; float32 probabilities if the edges are soft.

    Raises:
        InvalidInputError: If it cannot be read, has another size, or looks like a map of instance numbers.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            values, mode = np.array(image), image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidInputError(f"expected a mask image, got {name}: {error}") from error
    if values.shape[:2] != size:
        raise InvalidInputError(
            f"expected a mask of the photo's size, {size[1]} x {size[0]} pixels, got "
            f"{values.shape[1]} x {values.shape[0]} in {name}"
        )
    if mode in ("LA", "RGBA"):
        alpha = values[..., -1]
        values = alpha if alpha.min() < alpha.max() else values[..., :-1]
    if values.ndim == 3:
        values = values.max(axis=2)
    if values.dtype == bool or len(levels := np.unique(values)) == 1 or (len(levels) == 2 and levels[0] == 0):
        return values != 0
    if mode == "P" or values.dtype != np.uint8 or levels[-1] < 128:
        raise InvalidInputError(
            f"expected one object in {name}, black and white, or grey with 8 bits, got the values {levels[:5]}: "
            "split a map of instance numbers into one image per instance"
        )
    return np.divide(values, 255, dtype=np.float32)
