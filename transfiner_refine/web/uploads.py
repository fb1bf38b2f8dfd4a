"""What visitors of the page give, checked: photos, mask files, strokes and boxes. Every error is a line for the page.

N masks of a photo, H W its pixels. Uploads come from strangers: sizes are bounded before anything is decoded, and only
the decoders of common image formats are ever asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from transfiner_refine.canvas import Picture
from transfiner_refine.data.coco import Result, decode_masks, load_results
from transfiner_refine.data.mask_image import read_mask
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import PILLOW_ERRORS

MAX_BYTES = 20_000_000
"""Of one uploaded file."""

MAX_PIXELS = 16_000_000
"""Of a photo or a mask: what phones take by default, and 48 MB in memory."""

MAX_MASK_PIXELS = 200_000_000
"""Of all masks of a photo together."""

MAX_MASKS = 100
"""Of a photo, however small: each costs time and memory whatever its pixels, and visitors wait for one another."""

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Image formats, as Pillow names them."""

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

MIN_BOX = 8
"""Shortest side of a box, in pixels."""

GRABCUT_SIDE = 192
"""Long side of a box when its coarse mask is made: coarse, and quick."""

Mask = NDArray[np.bool_] | NDArray[np.float32]
"""``(H, W)`` bool, or float32 probabilities; image frame."""


def read_photo(path: str | Path) -> Picture:
    """Decode an uploaded photo, turned upright.

    Args:
        path: Image file.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        InvalidInputError: If it is no image, is damaged, or has too many bytes or pixels.

    Note:
        Unlike :meth:`Refiner.refine <transfiner_refine.Refiner.refine>`, this applies the EXIF orientation: on the page
        a mask is drawn on what the visitor sees.
    """
    _check_file(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except PILLOW_ERRORS as error:
        raise InvalidInputError(f"{Path(path).name} is damaged and cannot be read as a photo: {error}.") from error


def masks_of_files(paths: Sequence[str | Path], size: tuple[int, int]) -> tuple[list[Mask], list[Result]]:
    """Read the coarse masks of a photo: mask images with one object each, or one file of COCO results.

    Args:
        paths: Uploaded files.
        size: ``(H, W)`` of the photo.

    Returns:
        N masks, and for masks of a results file its N entries.

    Raises:
        InvalidInputError: If there is no file, files are mixed, there are too many masks, or one of the files is of
            another size or cannot be used.
    """
    if not paths:
        raise InvalidInputError("There is no mask yet: add a mask image or COCO results, or draw the mask.")
    if any(Path(path).suffix.lower() == ".json" for path in paths):
        if len(paths) > 1:
            raise InvalidInputError(f"Give either mask images or one file of COCO results, not {len(paths)} files.")
        return _masks_of_results(Path(paths[0]), size)
    _check_count(len(paths), size)
    return [_mask_of_image(Path(path), size) for path in paths], []


def mask_of_strokes(layers: Sequence[NDArray[np.uint8]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Turn what was painted on the drawing board into a mask; what a closed line surrounds is inside.

    Args:
        layers: ``(h, w, 4)`` uint8 RGBA each: the strokes, which may be of another size than the photo.
        size: ``(H, W)`` of the photo.

    Returns:
        ``(H, W)`` bool.

    Raises:
        InvalidInputError: If nothing was painted, or the strokes have another shape than the photo.
    """
    height, width = size
    painted = np.zeros(size, np.uint8)
    for layer in layers:
        rows, columns = layer.shape[:2]
        if abs(rows * width - columns * height) > max(height, width):  # one pixel of rounding
            raise InvalidInputError(
                f"The drawing is of {columns} × {rows} pixels and does not fit the photo of {width} × {height}: "
                "choose the photo again, and draw anew."
            )
        alpha = cv2.resize(np.ascontiguousarray(layer[..., 3]), (width, height), interpolation=cv2.INTER_LINEAR)
        # The strokes are half transparent; the rim of a soft brush is less than that.
        np.maximum(painted, (np.asarray(alpha) >= 64).astype(np.uint8), out=painted)
    if not painted.any():
        raise InvalidInputError("Nothing is drawn yet: paint over the object, or draw a line around it.")
    outlines, _ = cv2.findContours(painted, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(painted, outlines, -1, 1, cv2.FILLED)) > 0


def check_box(values: Sequence[float | None], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Take the four numbers of a box, cut to the photo.

    Args:
        values: Left, top, right and bottom in image pixels; None where nothing was entered.
        size: ``(H, W)`` of the photo.

    Raises:
        InvalidInputError: If a number is missing, or too little of the box lies in the photo.
    """
    if any(value is None or not np.isfinite(value) for value in values):
        raise InvalidInputError("The box is incomplete: tap two opposite corners of it, or enter all four numbers.")
    height, width = size
    bounds = (width, height, width, height)
    left, top, right, bottom = (
        round(min(max(float(value or 0), 0.0), bound)) for value, bound in zip(values, bounds, strict=True)
    )
    if right - left < MIN_BOX or bottom - top < MIN_BOX:
        raise InvalidInputError(
            f"The box needs left < right and top < bottom, and at least {MIN_BOX} × {MIN_BOX} pixels within the photo "
            f"of {width} × {height}."
        )
    return left, top, right, bottom


def mask_of_box(photo: Picture, box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """Guess a coarse mask from a box alone: GrabCut at low resolution, with the box as its start.

    Args:
        photo: ``(H, W, 3)`` uint8 RGB.
        box: Left, top, right, bottom; image pixels.

    Returns:
        ``(H, W)`` bool.

    Raises:
        InvalidInputError: If no object stands out, or there is no background around the box.
    """
    left, top, right, bottom = box
    height, width = photo.shape[:2]
    # As much ground around it as the box is large: it tells GrabCut what the object is not.
    x0, x1 = max(0, left - (right - left) // 2), min(width, right + (right - left) // 2)
    y0, y1 = max(0, top - (bottom - top) // 2), min(height, bottom + (bottom - top) // 2)
    scale = min(1.0, GRABCUT_SIDE / max(right - left, bottom - top))
    small = cv2.resize(photo[y0:y1, x0:x1], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    rows, columns = small.shape[:2]
    inner = [round(value * scale) for value in (left - x0, top - y0, right - x0, bottom - y0)]
    rectangle = (inner[0], inner[1], min(inner[2], columns) - inner[0], min(inner[3], rows) - inner[1])
    if rectangle[2] * rectangle[3] > 0.95 * rows * columns:
        raise InvalidInputError("The box fills the photo, so that no background is left to tell apart: draw the mask.")
    labels = np.zeros((rows, columns), np.uint8)
    cv2.setRNGSeed(0)  # the same box gives the same mask
    cv2.grabCut(np.ascontiguousarray(small), labels, rectangle, None, None, 5, cv2.GC_INIT_WITH_RECT)  # type: ignore[call-overload]
    found = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
    if found.sum() < 0.02 * rectangle[2] * rectangle[3]:
        raise InvalidInputError("No object stands out in the box: draw the mask instead.")
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = np.asarray(cv2.resize(found, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)) >= 0.5
    return mask


def _check_file(path: str | Path) -> None:
    """Refuse a file that is no image of moderate size, by its header alone."""
    name, size = Path(path).name, Path(path).stat().st_size
    if size > MAX_BYTES:
        raise InvalidInputError(f"{name} has {size / 1e6:.0f} MB, at most {MAX_BYTES // 10**6} MB can be taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # told below, with the limit
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise InvalidInputError(f"{name} has too many pixels: at most {MAX_PIXELS // 10**6} million.") from error
    except PILLOW_ERRORS as error:
        raise InvalidInputError(f"{name} is not an image: give a file of {', '.join(FORMATS)}.") from error
    if width * height > MAX_PIXELS:
        raise InvalidInputError(
            f"{name} has {width} × {height} pixels, which is more than {MAX_PIXELS // 10**6} million: make it smaller."
        )


def _check_count(count: int, size: tuple[int, int]) -> None:
    fitting = max(1, MAX_MASK_PIXELS // (size[0] * size[1]))
    if count > min(fitting, MAX_MASKS):
        limit = f"{fitting} masks of a photo of this size" if fitting < MAX_MASKS else f"{MAX_MASKS} masks of a photo"
        raise InvalidInputError(
            f"The page takes at most {limit}, and these are {count}: use the command transfiner-refine image."
        )


def _mask_of_image(path: Path, size: tuple[int, int]) -> Mask:
    _check_file(path)
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
    if (height, width) != size:
        raise InvalidInputError(
            f"The mask {path.name} has {width} × {height} pixels, and the photo {size[1]} × {size[0]}: "
            "give a mask of the photo's size."
        )
    try:
        mask = read_mask(path, size)
    except InvalidInputError as error:
        raise InvalidInputError(str(error).replace(str(path), path.name)) from error
    if not (mask >= 0.5).any():
        raise InvalidInputError(f"The mask {path.name} is empty: the object has to be white, all else black.")
    return mask


def _masks_of_results(path: Path, size: tuple[int, int]) -> tuple[list[Mask], list[Result]]:
    if path.stat().st_size > MAX_BYTES:
        raise InvalidInputError(f"{path.name} is too large: at most {MAX_BYTES // 10**6} MB can be taken.")
    try:
        results = load_results(path)
        if len(images := {entry["image_id"] for entry in results}) != 1:
            raise InvalidInputError(f"{path.name} holds results of {len(images)} photos: give those of this photo.")
        _check_count(len(results), size)
        return list(decode_masks(results, range(len(results)), size)), results
    except InvalidInputError as error:
        raise InvalidInputError(str(error).replace(str(path), path.name)) from error
