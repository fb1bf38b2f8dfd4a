"""Masks as image files, one object each."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import PILLOW_ERRORS

DARK, BRIGHT = 64, 128
"""Below the one a colour passes for black beside a colour from the other on."""

GREY_NOISE = 16
"""Most that a grey pixel's channels differ, as after JPEG."""


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
        InvalidInputError: If it cannot be read, has another size, or looks like a map of instances, by numbers or by
            colours.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            values, mode = np.array(image), image.mode
            palette = np.array(image.convert("RGB")) if mode == "P" else None
    except PILLOW_ERRORS as error:
        raise InvalidInputError(f"expected a mask image, got {name}: {error}") from error
    if values.shape[:2] != size:
        raise InvalidInputError(
            f"expected a mask of the photo's size, {size[1]} x {size[0]} pixels, got "
            f"{values.shape[1]} x {values.shape[0]} in {name}"
        )
    if mode in ("LA", "RGBA"):
        alpha = values[..., -1]
        values = alpha if alpha.min() < alpha.max() else values[..., :-1]
    if palette is not None and len(np.unique(values)) <= 2:
        values = _objects_colour(palette, name)
    elif values.ndim == 3:
        values = _one_channel(values, name)
    if values.dtype == bool or len(levels := np.unique(values)) == 1 or (len(levels) == 2 and levels[0] == 0):
        return values != 0
    if mode == "P" or values.dtype != np.uint8 or levels[-1] < 128:
        raise InvalidInputError(
            f"expected one object in {name}, black and white, or grey with 8 bits, got the values {levels[:5]}: "
            "split a map of instance numbers into one image per instance"
        )
    return np.divide(values, 255, dtype=np.float32)


def _objects_colour(colours: NDArray[np.uint8], name: str) -> NDArray[np.bool_]:
    """Tell the object of an image with a palette of two colours, ``(H, W, 3)``: the one that is not black.

    Which of the two has the number 0 is up to the program that wrote it.
    """
    bright = colours.max(axis=2)
    if bright.min() >= BRIGHT and bright.min() == bright.max():
        return np.ones_like(bright, bool)
    if (levels := np.unique(bright))[0] and not (len(levels) == 2 and levels[0] < DARK and levels[1] >= BRIGHT):
        raise InvalidInputError(
            f"expected the object of {name} on black, got the colours "
            f"{np.unique(colours.reshape(-1, 3), axis=0)[:2].tolist()}: save it black and white"
        )
    return bright > levels[0]


def _one_channel(values: NDArray, name: str) -> NDArray:
    """Bring a picture of grey, or of one colour on black, ``(H, W, C)``, to one channel."""
    brightest = values.max(axis=2)
    noise = GREY_NOISE if brightest.max() >= BRIGHT else 0
    is_grey = not (brightest > values.min(axis=2).astype(np.int64) + noise).any()
    if is_grey or np.count_nonzero(values.any(axis=(0, 1))) == 1:
        return brightest
    colours = np.unique(values.reshape(-1, values.shape[2]), axis=0)
    if np.count_nonzero(colours.any(axis=1)) > 1:
        raise InvalidInputError(
            f"expected one object in {name}, black and white, got {len(colours)} colours: split a map of instances by "
            "colours into one image per instance"
        )
    return brightest != 0
