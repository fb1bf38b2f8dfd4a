"""How much of the error of masks lies in incoherent regions (Mask Transfiner, Table 1).

N detections that cover an object, H W image pixels, h w pixels of a box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torchvision.ops import box_iou

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.data.coco import Result, boxes_of, group_by_image
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.ground_truth import GroundTruth
from transfiner_refine.functional import rle
from transfiner_refine.functional.incoherence import incoherence_levels
from transfiner_refine.functional.paste import crop_masks

DEPTH = 3
"""Quadtree levels of the paper's analysis: 28, 56 and 112 cells to a side."""

MIN_BOX_IOU = 0.5
"""Box IoU from which a detection is one of an object, as when box heads are trained."""


@dataclass(frozen=True)
class RegionFigures:
    """What a region of the boxes holds; pixels of all boxes are counted together, NaN where there are none.

    Attributes:
        area: Share of the boxes' pixels that lie in the region.
        errors: Share of the wrong pixels of the boxes that lie in the region.
        accuracy: Share of the region's pixels that are right.
        accuracy_outside: Share of the boxes' other pixels that are right.
    """

    area: float
    errors: float
    accuracy: float
    accuracy_outside: float


@dataclass(frozen=True)
class IncoherenceAnalysis:
    """What is to be won in incoherent regions.

    Attributes:
        count: Detections of an object, N.
        levels: The incoherent cells of each quadtree level, coarsest first.
        union: Those of all levels together.
        errors_beyond: Share of the N masks' wrong pixels that lie outside of their boxes, which no figure counts.
        filled: All results, in the order given; in those N, the union holds the ground truth instead.
    """

    count: int
    levels: tuple[RegionFigures, ...]
    union: RegionFigures
    errors_beyond: float
    filled: list[Result]


def analyse_incoherence(truth: GroundTruth, results: Sequence[Result]) -> IncoherenceAnalysis:
    """Compare masks with the ground truth inside and outside of its incoherent regions.

    A detection is one of the object of its category with which its box overlaps most, from a box IoU of 0.5 on;
    detections without an object and crowds do not count. Regions are those of the object's true mask in the box of the
    detection (Sec. 3.1, Eq. 1), each cell at its own size.

    Args:
        truth: Annotations.
        results: Entries of a COCO results file.

    Returns:
        The figures, and the results with these regions filled.

    Raises:
        InvalidInputError: If the results do not fit the annotations, or none is one of an object.
    """
    filled = truth.check_results(results)
    counts = np.zeros((DEPTH + 1, 4), np.int64)  # of each level and the union: pixels, errors, pixels and errors of box
    count = errors = 0
    for position, box, found, true in _detections(truth, filled):
        window, regions = incoherent_regions(true, box)
        wrong = found[window] != true[window]
        regions = np.concatenate([regions, regions.any(axis=0, keepdims=True)])
        counts += [(region.sum(), wrong[region].sum(), wrong.size, wrong.sum()) for region in regions]
        errors += np.count_nonzero(found != true)
        count += 1
        mask = found.copy()
        mask[window] = np.where(regions[-1], true[window], found[window])
        filled[position] = {**filled[position], "segmentation": rle.encode(mask[None])[0]}
    if not count:
        raise InvalidInputError(
            f"expected detections whose box overlaps an object by {MIN_BOX_IOU} or more, got none of {len(results)}: "
            "match masks regardless of category (--class-agnostic) if the categories differ"
        )
    *levels, union = (_figures(*row) for row in counts.tolist())
    beyond = _share(errors - int(counts[0, 3]), errors)
    return IncoherenceAnalysis(count, tuple(levels), union, beyond, filled)


def incoherent_regions(
    truth: NDArray[np.bool_], box: torch.Tensor, depth: int = DEPTH
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Mark the incoherent cells of a true mask in a box, in the image frame.

    Args:
        truth: ``(H, W)`` bool, image frame.
        box: ``(4,)`` float xyxy, image pixels.
        depth: Quadtree levels.

    Returns:
        The rows and columns of the image whose pixel centres lie in the box, and ``(depth, h, w)`` bool: in each of
        these pixels, whether its cell is incoherent at each level, coarsest first.
    """
    cropped = crop_masks(torch.from_numpy(truth)[None], box[None], ROOT_SIDE << depth) >= 0.5
    maps = incoherence_levels(cropped, depth)
    left, top, right, bottom = box.tolist()
    # The first pixel centre at or right of an edge e is pixel ceil(e - 0.5).
    y0, y1 = (int(np.clip(np.ceil(edge - 0.5), 0, truth.shape[0])) for edge in (top, bottom))
    x0, x1 = (int(np.clip(np.ceil(edge - 0.5), 0, truth.shape[1])) for edge in (left, right))
    y = (np.arange(y0, y1) + 0.5 - top) / (bottom - top)  # of the box, in [0, 1)
    x = (np.arange(x0, x1) + 0.5 - left) / (right - left)
    regions = np.empty((depth, len(y), len(x)), bool)
    for level, cells in enumerate(maps):
        side = cells.shape[-1]
        row, column = ((place * side).astype(int).clip(0, side - 1) for place in (y, x))
        regions[level] = cells[0].numpy()[np.ix_(row, column)]
    return np.s_[y0:y1, x0:x1], regions


def _detections(
    truth: GroundTruth, results: Sequence[Result]
) -> Iterator[tuple[int, torch.Tensor, NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yield each detection of an object: its position, its box, its mask and the object's."""
    objects = [entry for entry in truth.objects if not entry["iscrowd"]]
    of_image = group_by_image(objects)
    for image_id, positions in group_by_image(results).items():
        present = [objects[index] for index in of_image.get(image_id, [])]
        if not present:
            continue
        entries = [results[position] for position in positions]
        boxes = _boxes(entries)
        ious = box_iou(boxes, _boxes(present))  # (detections, objects)
        for position, entry, box, overlap in zip(positions, entries, boxes, ious, strict=True):
            overlap[[other["category_id"] != entry["category_id"] for other in present]] = 0
            best = int(overlap.argmax())
            if overlap[best] >= MIN_BOX_IOU:
                found, true = (
                    rle.decode(mask["segmentation"], truth.sizes[image_id]) for mask in (entry, present[best])
                )
                yield position, box, found, true


def _boxes(entries: Sequence[Result]) -> torch.Tensor:
    """Boxes ``(N, 4)`` float32 xyxy of checked entries: their own, else that of the mask."""
    codes: Any = [entry["segmentation"] for entry in entries]  # Any: the type stubs know a single one only
    tight = torch.from_numpy(coco_mask.toBbox(codes)).float()  # xywh
    return boxes_of(entries, torch.cat([tight[:, :2], tight[:, :2] + tight[:, 2:]], dim=1))


def _figures(region: int, wrong_in_region: int, box: int, wrong: int) -> RegionFigures:
    """Turn counts of pixels into shares."""
    return RegionFigures(
        area=_share(region, box),
        errors=_share(wrong_in_region, wrong),
        accuracy=_share(region - wrong_in_region, region),
        accuracy_outside=_share(box - region - (wrong - wrong_in_region), box - region),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
