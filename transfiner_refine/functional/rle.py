"""COCO segmentations, decoded to and encoded from boolean masks.

A COCO segmentation is a run-length encoding, ``{"size": [H, W], "counts": ...}`` with ``counts`` compressed (a string)
or plain (a list of integers), or a list of polygons, each ``[x1, y1, x2, y2, ...]`` in image pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from transfiner_refine.errors import InvalidInputError

Segmentation = Mapping[str, Any] | Sequence[Sequence[float]]
"""One object in COCO's form: run lengths or polygons."""

MAX_COORDINATE = 1e6
"""Largest polygon coordinate, in pixels: pycocotools walks every edge in steps of a fifth of a pixel."""

MAX_OUTLINE = 4e6
"""Longest outline of one object's polygons, in pixels: each takes pycocotools about 80 bytes."""

MAX_DIGITS = 7
"""Most characters of one compressed run length: 5 bits each, so that longer ones exceed 32 bits."""


def decode(segmentation: Segmentation, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode one COCO segmentation.

    Args:
        segmentation: Run lengths (compressed or plain) or polygons.
        size: ``(H, W)`` of its image.

    Returns:
        ``(H, W)`` bool.

    Raises:
        InvalidInputError: If the segmentation is broken or belongs to an image of another size.
    """
    mask = np.empty(size, bool)
    _decode_into(mask, segmentation)
    return mask


def decode_batch(segmentations: Sequence[Segmentation], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode the COCO segmentations of one image.

    Args:
        segmentations: N segmentations, run lengths and polygons in any mixture.
        size: ``(H, W)`` of the image.

    Returns:
        ``(N, H, W)`` bool.

    Raises:
        InvalidInputError: If one is broken or belongs to an image of another size; the message says which.
    """
    masks = np.empty((len(segmentations), *size), bool)
    for index, segmentation in enumerate(segmentations):
        try:
            _decode_into(masks[index], segmentation)
        except InvalidInputError as error:
            raise InvalidInputError(f"segmentation {index}: {error}") from None
    return masks


def compress(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """Bring one COCO segmentation to compressed run lengths: checked as ``decode`` does, but never drawn.

    Args:
        segmentation: Run lengths (compressed or plain) or polygons.
        size: ``(H, W)`` of its image.

    Returns:
        ``size`` ``[H, W]`` and ``counts`` as str, ready for JSON and safe for pycocotools.

    Raises:
        InvalidInputError: If the segmentation is broken or belongs to an image of another size.
    """
    runs = _runs(segmentation, size)
    if isinstance(segmentation, Mapping) and isinstance(segmentation["counts"], (str, bytes)):
        counts = segmentation["counts"]
    else:
        plain: Any = {"size": list(size), "counts": runs.tolist()}  # Any: the type stubs know no plain run lengths
        counts = coco_mask.frPyObjects(plain, *size)["counts"]
    return {"size": list(size), "counts": counts if isinstance(counts, str) else str(counts, "ascii")}


def encode(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Encode masks as compressed COCO run lengths.

    Args:
        masks: ``(N, H, W)`` bool.

    Returns:
        N dicts with ``size`` ``[H, W]`` and ``counts`` as str, ready for JSON.

    Raises:
        InvalidInputError: If ``masks`` is not ``(N, H, W)`` bool, or an image is empty.
    """
    if masks.ndim != 3 or masks.dtype != bool or 0 in masks.shape[1:]:
        raise InvalidInputError(
            f"expected masks of shape (N, H, W), bool, H and W at least 1, got {masks.shape} {masks.dtype}: "
            "threshold probabilities first, masks >= 0.5"
        )
    height, width = masks.shape[1:]
    # One at a time: as fast as one call, and only one mask is held in the column order that pycocotools needs.
    encoded: list[Any] = [coco_mask.encode(np.asfortranarray(mask).view(np.uint8)) for mask in masks]
    return [{"size": [height, width], "counts": str(rle["counts"], "ascii")} for rle in encoded]


def _decode_into(mask: NDArray[np.bool_], segmentation: Segmentation) -> None:
    """Write one segmentation into ``mask``, ``(H, W)`` bool.

    Note:
        pycocotools decodes compressed run lengths without a look at the string, and broken ones can end the process.
        Here they are parsed and checked first; ``numpy.repeat`` then draws them several times faster than pycocotools.
    """
    height, width = mask.shape
    runs = _runs(segmentation, (height, width))
    is_object = np.arange(len(runs)) % 2 == 1  # runs alternate, background first, down the columns
    mask[:] = np.repeat(is_object, runs).reshape(width, height).T


def _runs(segmentation: Segmentation, size: tuple[int, int]) -> NDArray[np.int64]:
    """Take the run lengths out of one segmentation of any form, and check them."""
    if isinstance(segmentation, Mapping):
        return _checked_runs(segmentation, size)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, (str, bytes)):
        polygons: Any = _checked_polygons(segmentation)  # Any: the type stubs of pycocotools know no polygons
        return _parse_counts(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))["counts"])
    raise InvalidInputError(
        f"expected a COCO segmentation, a dict of run lengths or a list of polygons, got {segmentation!r:.60}"
    )


def _checked_runs(rle: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.int64]:
    """Take the run lengths out of a COCO RLE whose every field may be wrong."""
    if not {"size", "counts"} <= rle.keys():
        raise InvalidInputError(f'expected run lengths with the keys "size" and "counts", got {list(rle)}')
    if not isinstance(rle["size"], Sequence) or list(rle["size"]) != list(size):
        raise InvalidInputError(
            f"expected run lengths of size {list(size)} (height, width), got {rle['size']}: "
            "the segmentation belongs to another image, or the image was resized"
        )
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        runs = _parse_counts(counts)
    else:
        try:
            runs = np.asarray(counts)
        except ValueError:
            runs = np.empty((0, 0))  # ragged
        if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu"):
            raise InvalidInputError(f"expected counts as a string or a list of integers, got {str(counts)[:60]}")
        runs = runs.astype(np.int64)
    pixels = size[0] * size[1]
    # The bound on each keeps the sum of damaged ones from wrapping around to the right number.
    if ((runs < 0) | (runs > pixels)).any() or runs.sum() != pixels:
        raise InvalidInputError(
            f"expected run lengths that add up to {size[0]} x {size[1]} = {pixels} pixels, got {len(runs)} of sum "
            f"{runs.sum()}: the counts are damaged, encode the mask again"
        )
    return runs


def _parse_counts(counts: str | bytes) -> NDArray[np.int64]:
    """Parse compressed counts: 6-bit characters from "0" on, each with 5 bits of a number and a flag for more to come.

    The lowest bits come first, the highest bit is the sign, and from the fourth number on a number is the difference to
    the one two before it.
    """
    # Whatever is not ASCII, a lone surrogate too, becomes bytes that are no digits.
    text = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits < 32)
    lengths = np.diff(ends, prepend=-1)
    broken = ((digits < 0) | (digits > 63)).any() or not len(ends) or ends[-1] != len(digits) - 1
    if broken or lengths.max() > MAX_DIGITS:
        raise InvalidInputError(
            f"expected counts compressed as in COCO, got {counts[:20]!r} of {len(counts)} characters: "
            "they are damaged or cut short, encode the mask again"
        )
    starts = ends - lengths + 1
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _checked_polygons(polygons: Sequence[Any]) -> list[list[float]]:
    """Check one object's polygons, and bring them to the lists of floats that pycocotools takes."""
    if not polygons or not all(isinstance(polygon, (Sequence, np.ndarray)) for polygon in polygons):
        raise InvalidInputError(
            f"expected a list of polygons, [[x1, y1, x2, y2, ...], ...], got {str(polygons)[:60]}: "
            "a single polygon goes into a list of its own"
        )
    checked = []
    length = 0.0
    for polygon in polygons:
        try:
            values = np.asarray(polygon)
        except ValueError:
            values = np.empty(0, object)  # ragged
        if values.ndim != 1 or values.dtype.kind not in "iuf" or len(values) < 6 or len(values) % 2:
            raise InvalidInputError(
                f"expected polygons [x1, y1, x2, y2, x3, y3, ...] of at least 3 points, got {str(polygon)[:60]}"
            )
        if not (np.abs(values) <= MAX_COORDINATE).all():
            raise InvalidInputError(
                f"expected polygon coordinates in image pixels, finite and at most {MAX_COORDINATE:g}, "
                f"got {str(polygon)[:60]}"
            )
        points = values.astype(float).reshape(-1, 2)
        length += np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
        checked.append(points.ravel().tolist())
    if length > MAX_OUTLINE:
        raise InvalidInputError(
            f"expected polygons whose outline is at most {MAX_OUTLINE:g} pixels long, got {length:.0f}: bring them to "
            "image pixels, or encode the mask as run lengths"
        )
    return checked
