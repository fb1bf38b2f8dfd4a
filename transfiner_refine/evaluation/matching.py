"""Matching of detected masks to ground truth, regardless of category and score."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.boundary import Masks, as_arrays


@dataclass(frozen=True)
class Matches:
    """Pairs of a ground-truth mask and a detected mask, in the order of the ground truth.

    Attributes:
        truth: ``(M,)`` int64, index of the ground-truth mask.
        detection: ``(M,)`` int64, index of its detection; no index comes twice in either.
        iou: ``(M,)`` float64, their mask IoU.
    """

    truth: np.ndarray
    detection: np.ndarray
    iou: np.ndarray

    def __len__(self) -> int:
        return len(self.truth)


def pairwise_iou(a: Masks, b: Masks) -> np.ndarray:
    """Mask IoU of every mask of ``a`` with every mask of ``b``.

    Args:
        a: ``(N, H, W)`` bool, image frame.
        b: ``(M, H, W)`` bool, image frame, of the same image.

    Returns:
        ``(N, M)`` float64 in [0, 1].

    Raises:
        InvalidInputError: If the masks are not boolean, or not all of one size.
    """
    rows, columns = list(as_arrays(a)), list(as_arrays(b))
    if len(sizes := {mask.shape for mask in rows + columns}) > 1:
        raise InvalidInputError(
            f"expected masks of one image size, got {sorted(sizes)}: bring all of them to the image frame"
        )
    ious = np.zeros((len(rows), len(columns)))
    areas = [np.count_nonzero(mask) for mask in columns]
    for i, mask in enumerate(rows):
        # Only the box of this mask can intersect: a crowded image costs its objects' areas, not N * M images.
        left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
        window = np.s_[top : top + height, left : left + width]
        mask = mask[window]
        area = np.count_nonzero(mask)
        for j, other in enumerate(columns):
            shared = np.count_nonzero(mask & other[window])
            ious[i, j] = shared / (area + areas[j] - shared) if shared else 0.0
    return ious


def match_detections(truth: Masks, detections: Masks, min_iou: float = 0.5) -> Matches:
    """Pair each ground-truth mask with at most one detection: greedily, the highest IoU of all pairs first.

    Categories and scores play no part, because what is judged is the mask and not the detector. Of equal pairs the
    one that comes first wins.

    Args:
        truth: ``(N, H, W)`` bool, image frame.
        detections: ``(M, H, W)`` bool, image frame.
        min_iou: A pair's IoU must be above this.

    Returns:
        The pairs; empty when nothing overlaps enough.

    Raises:
        InvalidInputError: If the masks are not boolean, or not all of one size.
    """
    ious = pairwise_iou(truth, detections)
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for flat in np.argsort(-ious, axis=None, kind="stable"):
        i, j = divmod(int(flat), ious.shape[1])
        if ious[i, j] <= min_iou:
            break
        if i not in partner and j not in taken:
            partner[i] = j
            taken.add(j)
    rows = np.array(sorted(partner), dtype=np.int64)
    columns = np.array([partner[i] for i in sorted(partner)], dtype=np.int64)
    return Matches(truth=rows, detection=columns, iou=ious[rows, columns])
