"""Masks of an Ultralytics ``Results`` (YOLO-seg and its kin), read by attribute: the package is never imported.

    results = YOLO("yolov8n-seg.pt")(image)[0]
    (refined,) = refiner.refine_batch([image], [from_results(results)])

Ultralytics takes numpy images as BGR; this package takes RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.arrays import check_image_size, mask_values, to_tensor
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.types import Instances

SUBPIXEL_BITS = 4
"""Fraction of a pixel that OpenCV keeps of a polygon's points, as a power of two."""


def from_results(results: Any) -> Instances:
    """Take the results of one image as coarse instances.

    Args:
        results: One ``ultralytics.engine.results.Results`` of a segmentation model, with N ``boxes`` and ``masks``, as
            tensors or after ``.numpy()``. Its masks may be at the network's size, as by default, or at the image's
            (``retina_masks=True``). Where ``masks.data`` is None, the polygons ``masks.xy`` are drawn.

    Returns:
        N instances in the same order: boxes xyxy, bool masks, ``conf`` as scores, ``cls`` as labels; image frame.

    Raises:
        InvalidInputError: If it is not the results of one image, or has boxes without masks.

    Note:
        Masks at the network's size lose the letterbox (the image is scaled by one factor, its sides rounded, and
        padded on both ends), are enlarged bilinearly and cut at 0.5. Polygons lose holes and up to a network pixel.
    """
    size, boxes = _parts_of(results)
    xyxy, scores, labels = (to_tensor(getattr(boxes, name), f"boxes.{name}") for name in ("xyxy", "conf", "cls"))
    if results.masks is None:
        if len(xyxy):
            raise InvalidInputError(
                f"expected masks, got results with {len(xyxy)} boxes alone: use a segmentation model, as yolov8n-seg"
            )
        masks = torch.zeros((0, *size), dtype=torch.bool, device=xyxy.device)
    elif results.masks.data is not None:
        masks = _to_image(mask_values(to_tensor(results.masks.data, "masks.data").detach()), size)
    else:
        masks = _drawn(results.masks.xy, size).to(xyxy.device)
    return Instances(boxes=xyxy, masks=masks, image_size=size, scores=scores, labels=labels.long())


def _parts_of(results: Any) -> tuple[tuple[int, int], Any]:
    """Image size ``(H, W)`` and boxes."""
    if isinstance(results, (list, tuple)):
        raise InvalidInputError(
            f"expected the Results of one image, got a list of {len(results)}: pass results[0], or each in turn"
        )
    if missing := [name for name in ("orig_shape", "boxes", "masks") if not hasattr(results, name)]:
        raise InvalidInputError(
            f"expected Ultralytics Results, got {type(results).__name__} without {', '.join(missing)}"
        )
    if results.boxes is None:
        raise InvalidInputError(
            "expected Results with boxes, got none: use a segmentation model; classifications and oriented boxes have "
            "no masks of instances"
        )
    return check_image_size(results.orig_shape[:2]), results.boxes


def _to_image(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring ``(N, h, w)`` masks, bool or probabilities, from the network's frame to ``(N, H, W)`` bool."""
    if tuple(masks.shape[1:]) != size and len(masks):
        top, left, bottom, right = letterbox((masks.shape[1], masks.shape[2]), size)
        content = masks[:, top:bottom, left:right].float()
        # One at a time: the float masks of a whole image of 4K would take gigabytes.
        enlarged = [F.interpolate(mask[None, None], size, mode="bilinear")[0, 0] >= 0.5 for mask in content]
        return torch.stack(enlarged)
    return (masks >= 0.5 if masks.is_floating_point() else masks).reshape(len(masks), *size)


def letterbox(network_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where Ultralytics puts an image in the network's input.

    Args:
        network_size: ``(h, w)`` of the input.
        image_size: ``(H, W)``.

    Returns:
        ``(top, left, bottom, right)``, half-open, network pixels.
    """
    gain = min(side / full for side, full in zip(network_size, image_size, strict=True))
    content = [max(round(full * gain), 1) for full in image_size]
    # Where the padding is odd, the smaller half comes first.
    top, left = ((side - inner) // 2 for side, inner in zip(network_size, content, strict=True))
    return top, left, top + content[0], left + content[1]


def _drawn(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> Tensor:
    """Draw N polygons ``(K, 2)``, xy of the outline's pixels, as ``(N, H, W)`` bool."""
    masks = np.zeros((len(polygons), *size), np.uint8)
    for mask, polygon in zip(masks, polygons, strict=True):
        points = np.round(np.asarray(polygon).reshape(-1, 1, 2) * 2**SUBPIXEL_BITS).astype(np.int32)
        if len(points):
            cv2.fillPoly(mask, [points], 1, shift=SUBPIXEL_BITS)
    return torch.from_numpy(masks.view(bool))
