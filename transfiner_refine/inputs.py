"""The border: images, boxes and masks as callers hold them become tensors here, checked once.

Nothing behind this module looks at a shape or a range again. No input is written to; what comes back may share its
memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transfiner_refine.arrays import check_image_size, mask_values, to_tensor, unit_range
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional import rle

PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot read; its decoders have errors of their own for some kinds of damage."""


@dataclass(frozen=True, eq=False)
class CoarseMasks:
    """The coarse masks of one image.

    Attributes:
        data: ``(N, H, W)`` bool or float32 in the image frame, or ``(N, S, S)`` float32 in the box frame.
        frame: Which of the two it is.
    """

    data: Tensor
    frame: Literal["image", "box"]


def as_image(image: Any) -> Tensor:
    """Take one image in any accepted form.

    Args:
        image: A path; a PIL image of 8 bits a channel; ``(H, W, 3)`` or grey ``(H, W)`` uint8 numpy, RGB; or a
            ``(3, H, W)`` or grey ``(1, H, W)`` tensor, uint8 or float in [0, 1], RGB.

    Returns:
        ``(3, H, W)`` RGB, uint8 or float32 in [0, 1] as it came.

    Raises:
        InvalidInputError: If it is not an image, is empty, has alpha as an array, or has another dtype or range.

    Note:
        The EXIF orientation is not applied: boxes and masks refer to the pixels as they are stored. Transparency of a
        file or a PIL image is dropped.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _read_rgb(Path(image))
    elif isinstance(image, Image.Image):
        image = _pil_to_rgb(image)
    if isinstance(image, np.ndarray):
        image = _channels_first(image)
    if not isinstance(image, Tensor):
        raise InvalidInputError(
            f"expected an image as a path, a PIL image, a numpy array or a tensor, got {type(image).__name__}"
        )
    pixels = image.unsqueeze(0) if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise InvalidInputError(
            f"expected a tensor image of shape (3, H, W), got {tuple(pixels.shape)}: drop alpha with image[:3]; "
            "put channels first with image.permute(2, 0, 1); give several images to refine_batch"
        )
    if not pixels.numel():
        raise InvalidInputError(f"expected an image of at least one pixel, got shape {tuple(pixels.shape)}")
    if pixels.is_floating_point():
        pixels = unit_range(pixels, "a float image", "divide by 255, or undo the normalisation by mean and std")
    elif pixels.dtype != torch.uint8:
        raise InvalidInputError(f"expected a tensor image of uint8 or of float in [0, 1], got {pixels.dtype}")
    return pixels.expand(3, -1, -1)


def as_boxes(boxes: Any, image_size: tuple[int, int] | None = None, zero_ok: bool = False) -> Tensor:
    """Take boxes as a tensor. They may cross the border of the image or lie outside it.

    Args:
        boxes: ``(N, 4)`` xyxy, image pixels: numpy, tensor or nested lists.
        image_size: ``(H, W)``; where it is known, boxes in fractions of the image are recognised and refused.
        zero_ok: Whether four zeros, which stand for the box of an empty mask (:func:`boxes_from_masks`), are accepted.

    Returns:
        ``(N, 4)`` float32 xyxy, image pixels.

    Raises:
        InvalidInputError: If the shape or dtype is wrong, or a box is not finite, inverted or without area; the message
            says which.
    """
    given = to_tensor(boxes, "boxes")
    if given.shape == (0,):
        given = given.new_empty((0, 4))  # an empty list knows nothing of its columns
    if given.ndim != 2 or given.shape[1] != 4:
        raise InvalidInputError(
            f"expected boxes of shape (N, 4), got {tuple(given.shape)}: one row x1, y1, x2, y2 per instance, "
            "also for a single one"
        )
    if given.dtype == torch.bool or given.is_complex():
        raise InvalidInputError(f"expected boxes of float or integer pixels, got {given.dtype}")
    result = given.to(torch.float32)
    if len(bad := _rows_where(~torch.isfinite(result).all(dim=1))):
        raise InvalidInputError(f"expected finite boxes, got NaN or infinity at index {bad}: remove those instances")
    without_area = (result[:, 2:] <= result[:, :2]).any(dim=1)
    if zero_ok:
        without_area &= (result != 0).any(dim=1)
    if len(bad := _rows_where(without_area)):
        raise InvalidInputError(
            f"expected boxes x1, y1, x2, y2 with x2 > x1 and y2 > y1, got inverted ones or ones without area at index "
            f"{bad}, the first {result[bad[0]].tolist()}: from x, y, width, height add the corner to the size"
        )
    if image_size is not None and len(result):
        height, width = image_size
        # No detector means boxes that are all fractions of the pixel in the corner.
        in_first_pixel = bool(((result >= 0) & (result <= 1)).all())
        if in_first_pixel and max(image_size) > 1 and bool((result != result.round()).any()):
            raise InvalidInputError(
                f"expected boxes in pixels, got all coordinates within [0, 1], the first {result[0].tolist()}: "
                f"multiply relative boxes by {(width, height, width, height)}"
            )
    return result


def as_masks(masks: Any, image_size: tuple[int, int], mask_frame: Literal["image", "box"] = "image") -> CoarseMasks:
    """Take coarse masks in any accepted form.

    Args:
        masks: ``(N, H, W)`` numpy or tensor, or a list of N of ``(H, W)``, in the image frame; ``(N, S, S)`` in the box
            frame; or a list of N COCO segmentations (run lengths, compressed or not, or polygons). Values are bool,
            integers 0 and 1 or 0 and 255, or float probabilities in [0, 1].
        image_size: ``(H, W)``.
        mask_frame: ``"image"``, or ``"box"`` if each mask covers just its box.

    Returns:
        The masks on the device they came on: bool or float32 in the image frame, float32 in the box frame. An array of
        bool, uint8 0 and 1 or float32 is not copied.

    Raises:
        InvalidInputError: If shape, dtype or values are wrong, or a COCO segmentation is broken.
    """
    size = check_image_size(image_size)
    if mask_frame not in ("image", "box"):
        raise InvalidInputError(f'expected mask_frame "image" or "box", got {mask_frame!r}')
    if isinstance(masks, Mapping):
        raise InvalidInputError("expected a list of COCO segmentations, got a single one: put it into a list")
    if isinstance(masks, (list, tuple)) and masks and all(isinstance(mask, (Mapping, list, tuple)) for mask in masks):
        if mask_frame == "box":
            raise InvalidInputError(
                'expected arrays for mask_frame "box", got COCO segmentations: they are in the image frame, '
                'use mask_frame="image"'
            )
        return CoarseMasks(torch.from_numpy(rle.decode_batch(masks, size)), "image")

    data = to_tensor(masks, "masks")
    if not len(data):
        # No instances: whatever the other sides were, an empty list among them.
        if mask_frame == "box":
            return CoarseMasks(data.new_zeros((0, ROOT_SIDE, ROOT_SIDE), dtype=torch.float32), "box")
        return CoarseMasks(data.new_zeros((0, *size), dtype=torch.bool), "image")
    square = data.ndim == 3 and data.shape[1] == data.shape[2] > 0
    if mask_frame == "box":
        if not square:
            raise InvalidInputError(
                f'expected masks of shape (N, S, S) for mask_frame "box", got {tuple(data.shape)}: '
                'masks of the size of the image need mask_frame="image"'
            )
        return CoarseMasks(mask_values(data).to(torch.float32), "box")
    if data.ndim != 3 or tuple(data.shape[1:]) != size:
        if data.ndim == 2:
            remedy = "give a single mask as mask[None]"
        elif data.ndim == 4 and data.shape[1] == 1:
            remedy = "drop the channel with masks[:, 0]"
        elif square:
            remedy = 'if each mask covers just its box, use mask_frame="box"'
        else:
            remedy = "resize the masks to the image, and mind the order height, width"
        raise InvalidInputError(
            f"expected masks of shape (N, {size[0]}, {size[1]}) as the image, got {tuple(data.shape)}: {remedy}"
        )
    return CoarseMasks(mask_values(data), "image")


def boxes_from_masks(masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Find the tight box of each mask.

    Args:
        masks: ``(N, H, W)`` bool, or float probabilities.
        threshold: Probability from which a pixel belongs to the mask.

    Returns:
        ``(N, 4)`` float32 half-open xyxy, image pixels; zeros for an empty mask.
    """
    # As bytes and by the maximum: several times faster than `any` on a CPU.
    occupied = (masks >= threshold if masks.is_floating_point() else masks).view(torch.uint8)
    (left, right), (top, bottom) = _extent(occupied.amax(dim=1)), _extent(occupied.amax(dim=2))
    return torch.stack([left, top, right, bottom], dim=1).to(torch.float32)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Find the half-open range of the ones in each row of ``(N, L)`` uint8 zeros and ones; 0 and 0 if there is none."""
    steps = torch.arange(1, occupied.shape[1] + 1, device=occupied.device)
    end = (occupied * steps).amax(dim=1)
    # The first is the greatest distance to the far side.
    start = occupied.shape[1] - (occupied * steps.flip(0)).amax(dim=1)
    return torch.where(end > 0, start, 0), end


def _rows_where(bad: Tensor) -> list[int]:
    """Name the rows that are true, at most ten of them."""
    return bad.nonzero().flatten()[:10].tolist()


def _channels_first(image: np.ndarray) -> Tensor:
    """Check a numpy image, ``(H, W, 3)`` or ``(H, W)`` uint8, and turn it into ``(3, H, W)`` or ``(H, W)``."""
    if image.dtype != np.uint8:
        raise InvalidInputError(
            f"expected a numpy image of uint8, got {image.dtype}: for values in [0, 1] use "
            "(255 * image).round().astype(np.uint8)"
        )
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
        raise InvalidInputError(
            f"expected a numpy image of shape (H, W, 3) or (H, W), got {image.shape}: "
            "drop alpha with image[..., :3]; put channels last with image.transpose(1, 2, 0)"
        )
    pixels = to_tensor(image, "image")
    return pixels if image.ndim == 2 else pixels.permute(2, 0, 1)


def _read_rgb(path: Path) -> np.ndarray:
    """Read an image file as ``(H, W, 3)`` uint8."""
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise InvalidInputError(f"expected an image file, got {path}, which does not exist: check the path") from None
    except PILLOW_ERRORS as error:
        raise InvalidInputError(f"expected an image file that Pillow can read, got {path}: {error}") from error
    return _pil_to_rgb(image)


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a PIL image of any 8-bit mode to ``(H, W, 3)`` uint8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise InvalidInputError(
            f'expected an image of 8 bits a channel, got mode "{image.mode}": scale it to 0 to 255, convert it to RGB'
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow would warn of the lost transparency
    return np.array(image.convert("RGB"))
