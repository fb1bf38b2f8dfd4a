"""IoU of masks, and Boundary IoU: the IoU of their boundary regions.

Cheng, Girshick, Dollár, Berg, Kirillov, *Boundary IoU: Improving Object-Centric Image Segmentation Evaluation*,
CVPR 2021. Letters: N masks, H W image pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from torch import Tensor

from transfiner_refine.errors import InvalidInputError

Masks = np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor]
"""``(N, H, W)`` bool, or a sequence of N ``(H, W)`` bool masks whose sizes may differ; image frame."""


def mask_iou(a: Masks, b: Masks) -> np.ndarray:
    """Intersection over union of each pair of masks.

    Args:
        a: ``(N, H, W)`` bool, or a sequence of N ``(H, W)`` bool; image frame.
        b: The same N and the same sizes as ``a``.

    Returns:
        ``(N,)`` float64 in [0, 1]; two empty masks agree, so their IoU is 1.

    Raises:
        InvalidInputError: If the masks are not boolean, or differ in number or size.
    """
    return np.array([_iou(*_crop_to_union(x, y)) for x, y in _pairs(a, b)], dtype=np.float64)


def boundary_iou(a: Masks, b: Masks, dilation: float = 0.02) -> np.ndarray:
    """Boundary IoU of each pair of masks: the IoU of ``boundary_region(a)`` and ``boundary_region(b)``.

    Args:
        a: ``(N, H, W)`` bool, or a sequence of N ``(H, W)`` bool; image frame.
        b: The same N and the same sizes as ``a``.
        dilation: Width of the boundary as a share of the image diagonal.

    Returns:
        ``(N,)`` float64 in [0, 1]; two empty masks agree, so theirs is 1.

    Raises:
        InvalidInputError: If the masks are not boolean, or differ in number or size.
    """
    scores = []
    for x, y in _pairs(a, b):
        width = boundary_width(x.shape, dilation)
        x, y = _crop_to_union(x, y)
        scores.append(_iou(boundary_region(x, width), boundary_region(y, width)))
    return np.array(scores, dtype=np.float64)


def boundary_width(image_size: tuple[int, ...], dilation: float = 0.02) -> int:
    """Width of the boundary in pixels: a share of the diagonal of an ``(H, W)`` image, at least 1."""
    return max(1, round(dilation * math.hypot(*image_size)))


def boundary_region(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask within ``width`` of its outline: the mask minus its erosion.

    The erosion is ``width`` rounds with a 3×3 square; whatever lies outside the image is background, so an object
    that the image's border cuts off has its boundary there.

    Args:
        mask: ``(H, W)`` bool.
        width: Pixels, at least 1; see ``boundary_width``.

    Returns:
        ``(H, W)`` bool.

    Note:
        The published code counts rounds of a 3×3 erosion. One erosion with a square of side ``2 * width + 1`` is the
        same thing: both keep the pixels that have no background within Chebyshev distance ``width``.
    """
    # OpenCV ignores what is outside of the array, so one ring of zeros makes it background.
    padded = np.pad(mask.view(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((2 * width + 1, 2 * width + 1), np.uint8))[1:-1, 1:-1]
    return mask & (eroded == 0)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def _crop_to_union(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut both masks to the bounding box of their union; outside of it is only background, which no score counts."""
    left, top, width, height = cv2.boundingRect((a | b).view(np.uint8))
    window = np.s_[top : top + height, left : left + width]
    return a[window], b[window]


def _pairs(a: Masks, b: Masks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if len(a) != len(b):
        raise InvalidInputError(f"expected as many masks on both sides, got {len(a)} and {len(b)}: pair them first")
    for index, (x, y) in enumerate(zip(as_arrays(a), as_arrays(b), strict=True)):
        if x.shape != y.shape:
            raise InvalidInputError(
                f"expected pairs of masks of one size, got {x.shape} and {y.shape} at index {index}: "
                "bring both to the image frame"
            )
        yield x, y


def as_arrays(masks: Masks) -> Iterator[np.ndarray]:
    """Yield each mask as an ``(H, W)`` bool array that shares memory where it can.

    Raises:
        InvalidInputError: If a mask is not boolean or not two-dimensional.
    """
    if isinstance(masks, Tensor):
        masks = masks.detach().cpu().numpy()
    for index, mask in enumerate(masks):
        array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if array.dtype != np.bool_ or array.ndim != 2:
            raise InvalidInputError(
                f"expected (H, W) bool masks, got {array.dtype} {array.shape} at index {index}: "
                "threshold probabilities first, for instance probs >= 0.5"
            )
        yield array
