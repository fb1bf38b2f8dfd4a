"""Masks of ``supervision.Detections``, and refined masks back into them.

    coarse = from_detections(detections, image_size=image.shape[:2])
    (refined,) = refiner.refine_batch([image], [coarse])
    detections = to_detections(refined, like=detections)

supervision's boxes are xyxy image pixels, as here; its masks are in the image frame.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

from transfiner_refine.adapters.protocol import missing_dependency
from transfiner_refine.arrays import check_image_size
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_masks
from transfiner_refine.types import Instances

try:
    import supervision as sv
except ModuleNotFoundError as error:
    raise missing_dependency("supervision", "pip install supervision") from error


def from_detections(detections: sv.Detections, image_size: tuple[int, int]) -> Instances:
    """Take the detections of one image as coarse instances.

    Args:
        detections: N detections with masks, dense or compact.
        image_size: ``(H, W)``.

    Returns:
        N instances in the same order: ``xyxy`` as boxes, ``mask``, ``confidence`` as scores, ``class_id`` as labels.

    Raises:
        InvalidInputError: If there are no masks, or they are not of the size of the image.

    Note:
        Instances have no place for ``tracker_id``, ``data`` and ``metadata``: give the detections to
        :func:`to_detections` as ``like``, and they are kept.
    """
    size = check_image_size(image_size)
    if detections.mask is not None:
        masks = as_masks(detections.mask, size).data
    elif len(detections) == 0:
        masks = torch.zeros((0, *size), dtype=torch.bool)
    else:
        raise InvalidInputError(
            f"expected detections with masks, got {len(detections)} with boxes alone: use a segmentation model, or "
            "masks of SAM prompted with these boxes"
        )
    return Instances(
        boxes=torch.from_numpy(np.array(detections.xyxy, np.float32)),
        masks=masks,
        image_size=size,
        scores=None if detections.confidence is None else torch.from_numpy(np.array(detections.confidence)),
        labels=None if detections.class_id is None else torch.from_numpy(np.array(detections.class_id)),
    )


def to_detections(instances: Instances, like: sv.Detections | None = None) -> sv.Detections:
    """Write instances as detections.

    Args:
        instances: N instances with bool masks.
        like: The N detections that the instances came from. All but their masks is kept; None makes new detections
            with the instances' boxes, scores and labels.

    Returns:
        N detections with dense masks, which share nothing with ``like``.

    Raises:
        InvalidInputError: If the masks are probabilities, or ``like`` differs in length.
    """
    if instances.masks.dtype != torch.bool:
        raise InvalidInputError(
            f"expected bool masks, got {instances.masks.dtype} probabilities: threshold them, masks >= 0.5"
        )
    masks = instances.masks.numpy(force=True).copy()
    if like is None:
        scores, labels = instances.scores, instances.labels
        return sv.Detections(
            xyxy=instances.boxes.numpy(force=True).copy(),
            mask=masks,
            confidence=None if scores is None else scores.numpy(force=True).copy(),
            class_id=None if labels is None else labels.numpy(force=True).copy(),
        )
    if len(like) != len(instances):
        raise InvalidInputError(
            f"expected as many detections in like as instances, {len(instances)}, got {len(like)}: select the same "
            "ones of both, like[index] and instances[index]"
        )
    return replace(copy.deepcopy(replace(like, mask=None)), mask=masks)
