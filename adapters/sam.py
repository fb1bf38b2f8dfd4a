"""Masks of Segment Anything and of models that answer as it does; no framework is needed.

coarse = from_annotations(SamAutomaticMaskGenerator(sam).generate(image))
coarse = from_masks(masks, scores)  # of SamPredictor, SAM 2, or transformers' post_process_masks
(refined,) = refiner.refine_batch([image], [coarse])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transfiner_refine.arrays import check_image_size, mask_values, to_tensor
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_masks, boxes_from_masks
from transfiner_refine.types import Instances


def from_annotations(annotations: Sequence[Mapping[str, Any]], image_size: tuple[int, int] | None = None) -> Instances:
    """Take the list that an automatic mask generator returns as coarse instances.

    Args:
        annotations: N dicts with ``segmentation``, an ``(H, W)`` bool mask or COCO run lengths, compressed or not; and
            ``predicted_iou``, which becomes the score where all have it.
        image_size: ``(H, W)``; None takes it from the segmentations, of which there must be one then.

    Returns:
        N instances in the same order, boxes taken from the masks: zeros for an empty one.

    Raises:
        InvalidInputError: If a segmentation is missing, broken or of another size.

    Note:
        ``bbox`` is not read: SAM measures it from the first to the last pixel, one pixel short of the mask's extent.
    """
    if isinstance(annotations, Mapping):
        raise InvalidInputError("expected a list of annotations, got a single one: put it into a list")
    if without := [index for index, entry in enumerate(annotations) if "segmentation" not in entry]:
        raise InvalidInputError(f'expected "segmentation" in every annotation, got none in those at {without[:10]}')
    segmentations = [entry["segmentation"] for entry in annotations]
    if image_size is None and not segmentations:
        raise InvalidInputError("expected image_size=(H, W) with no annotations, got None: nothing else tells it")
    size = image_size or _size_of(segmentations[0])
    scored = len(annotations) > 0 and all("predicted_iou" in entry for entry in annotations)
    scores = to_tensor([entry["predicted_iou"] for entry in annotations], "predicted_iou") if scored else None
    return _instances(as_masks(segmentations, size).data, scores)


def from_masks(masks: Any, scores: Any = None) -> Instances:
    """Take a predictor's masks as coarse instances.

    Args:
        masks: ``(N, H, W)`` bool, 0 and 1, or probabilities, image frame; or ``(N, K, H, W)``, K candidates of each
            object, of which that with the highest score is taken. ``SamPredictor`` returns the three candidates of one
            object as ``(3, H, W)``: pass ``masks[None]`` and ``scores[None]``.
        scores: ``(N,)``, or ``(N, K)`` for candidates, which need them where K is above 1.

    Returns:
        N instances, boxes taken from the masks: zeros for an empty one.

    Raises:
        InvalidInputError: If shapes do not fit each other, or the masks are logits.
    """
    candidates = to_tensor(masks, "masks")
    ranks = None if scores is None else to_tensor(scores, "scores").to(candidates.device)
    if candidates.ndim not in (3, 4):
        raise InvalidInputError(
            f"expected masks of shape (N, H, W) or (N, K, H, W), got {tuple(candidates.shape)}: "
            "give a single mask as mask[None], and the images of a batch one by one"
        )
    if candidates.ndim == 3:
        return _instances(mask_values(candidates), ranks)
    if ranks is None and candidates.shape[1] == 1:
        return _instances(mask_values(candidates[:, 0]), None)
    if ranks is None or ranks.shape != candidates.shape[:2] or not candidates.shape[1]:
        found = "none" if ranks is None else str(tuple(ranks.shape))
        raise InvalidInputError(
            f"expected scores of shape (N, K) = {tuple(candidates.shape[:2])} to choose one of K candidates each, "
            f"got {found}"
        )
    best = ranks.argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    return _instances(mask_values(candidates[rows, best]), ranks[rows, best])


def _size_of(segmentation: Any) -> tuple[int, int]:
    """``(H, W)`` of a mask or of run lengths."""
    if isinstance(segmentation, Mapping):
        return check_image_size(segmentation.get("size"))
    return check_image_size(to_tensor(segmentation, "segmentation").shape)


def _instances(masks: Tensor, scores: Tensor | None) -> Instances:
    size = (masks.shape[1], masks.shape[2])
    return Instances(boxes=boxes_from_masks(masks), masks=masks, image_size=size, scores=scores)
