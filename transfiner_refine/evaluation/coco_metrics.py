"""Average precision of results against annotations: of masks, of their boundaries, by the rules of COCO or LVIS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from transfiner_refine.data.coco import ImageId, Result
from transfiner_refine.errors import MissingDependencyError
from transfiner_refine.evaluation.ground_truth import Federation, GroundTruth

COCO_RESULTS = 100
"""Results that COCO counts for an image and category, the highest scores first."""

LVIS_RESULTS = 300
"""Results that LVIS counts for an image, of all categories together."""

IOU_75 = 5
"""Place of 0.75 among the ten IoU thresholds 0.5, 0.55, ... 0.95."""


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision, each in [0, 1], over the categories that have objects; NaN where there is no such object.

    Attributes:
        ap: Mean over the IoU thresholds 0.5, 0.55, ... 0.95.
        ap50: At IoU 0.5.
        ap75: At IoU 0.75.
        small: ``ap`` of objects of less than 32² pixels.
        medium: ``ap`` of objects of 32² to 96² pixels.
        large: ``ap`` of objects of more than 96² pixels.
    """

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float


def average_precision(
    truth: GroundTruth,
    results: Sequence[Result],
    overlap: Literal["mask", "boundary"] = "mask",
    dilation: float = 0.02,
) -> AveragePrecision:
    """Average precision of results.

    Against COCO annotations this is COCO's mask AP or, with ``overlap="boundary"``, boundary AP (Cheng et al., CVPR
    2021: the overlap of two masks is the lower of their IoU and their Boundary IoU). Against LVIS annotations of COCO's
    categories it is AP*: a result is no mistake where its category was not looked for, or not annotated to the end.

    Args:
        truth: Annotations, see ``load_ground_truth`` and ``load_lvis``.
        results: Entries of a COCO results file.
        overlap: What counts as overlap.
        dilation: Width of the boundary as a share of the image diagonal.

    Returns:
        The figures.

    Raises:
        InvalidInputError: If the results do not fit the annotations, see ``GroundTruth.check_results``.
        MissingDependencyError: If faster-coco-eval is not installed.
    """
    coco, evaluator = _library()
    federation = truth.federation
    checked = truth.check_results(results)
    if federation is not None:
        checked = _answerable(_highest_scores(checked, LVIS_RESULTS), truth, federation)
    # The library takes whole numbers from 1 on as ids. Images in the order of their ids: equal scores are ranked so.
    number = {image_id: i for i, image_id in enumerate(sorted(truth.sizes, key=_numbers_first), 1)}
    images: list[dict[str, Any]] = [
        {"id": number[image_id], "height": height, "width": width} for image_id, (height, width) in truth.sizes.items()
    ]
    if federation is not None:
        for image_id, image in zip(truth.sizes, images, strict=True):
            image["neg_category_ids"] = sorted(federation.absent[image_id])
            image["not_exhaustive_category_ids"] = sorted(federation.incomplete[image_id])
    # The frequency is that of LVIS's finer figures, which are not asked for.
    categories = [{"id": category, "name": str(category), "frequency": "f"} for category in truth.categories]

    def indexed(entries: Sequence[Result]) -> Any:
        kept = ("category_id", "iscrowd", "area", "score", "segmentation")
        annotations = [
            {"id": i, "image_id": number[entry["image_id"]], **{key: entry[key] for key in kept if key in entry}}
            for i, entry in enumerate(entries, 1)
        ]
        return coco({"images": images, "annotations": annotations, "categories": categories})

    evaluation = evaluator(
        indexed(truth.objects),
        indexed([{**entry, "iscrowd": 0} for entry in checked]),
        "segm" if overlap == "mask" else "boundary",
        lvis_style=federation is not None,
        boundary_dilation_ratio=dilation,
    )
    evaluation.params.maxDets = [COCO_RESULTS if federation is None else LVIS_RESULTS]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # (IoU thresholds, recalls, categories, areas)
    everything, *by_area = np.moveaxis(precision, 3, 0)
    return AveragePrecision(
        _mean(everything), _mean(everything[0]), _mean(everything[IOU_75]), *(_mean(area) for area in by_area)
    )


def _library() -> tuple[Any, Any]:
    try:
        from faster_coco_eval.core.coco import COCO
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster
    except ImportError as error:
        raise MissingDependencyError(
            f"expected the package faster-coco-eval, which computes AP, got: {error}; "
            "install it with: pip install 'transfiner-refine[eval]'"
        ) from error
    return COCO, COCOeval_faster


def _highest_scores(results: Sequence[Result], most: int) -> list[Result]:
    """Keep the results of the highest scores of each image."""
    by_image: defaultdict[ImageId, list[Result]] = defaultdict(list)
    for entry in results:
        by_image[entry["image_id"]].append(entry)
    return [
        entry
        for entries in by_image.values()
        for entry in sorted(entries, key=lambda x: x["score"], reverse=True)[:most]
    ]


def _answerable(results: Sequence[Result], truth: GroundTruth, federation: Federation) -> list[Result]:
    """Keep the results of categories that are known to be, or not to be, in their image.

    The library drops the others itself, but stumbles if an image has no other results.
    """
    present = {(entry["image_id"], entry["category_id"]) for entry in truth.objects}
    absent = {(image_id, category) for image_id, of_image in federation.absent.items() for category in of_image}
    known = present | absent
    return [entry for entry in results if (entry["image_id"], entry["category_id"]) in known]


def _numbers_first(image_id: ImageId) -> tuple[bool, ImageId]:
    return isinstance(image_id, str), image_id


def _mean(precision: np.ndarray) -> float:
    """Mean of the precisions that exist; the library marks others by -1."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")
