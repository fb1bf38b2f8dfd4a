"""How a refiner in training is judged: by what its users would get, on photos that training never sees.

N instances of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfiner_refine.config import RefineOptions
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.boundary import boundary_iou, mask_iou
from transfiner_refine.evaluation.detector import DetectorCounts, detector_counts
from transfiner_refine.evaluation.matching import match_detections
from transfiner_refine.evaluation.report import PairedFigures, figures_from_scores
from transfiner_refine.functional.boxes import touches_image
from transfiner_refine.functional.rle import decode_batch, encode
from transfiner_refine.inputs import as_image, boxes_from_masks
from transfiner_refine.modeling.gain import STATISTICS
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.training.calibration import EXACT_WEIGHT, asked_statistics, fit_gain
from transfiner_refine.training.coarse import simulate_coarse
from transfiner_refine.training.processes import map_shared
from transfiner_refine.types import Instances

WORSE_COSTS = 0.2
"""What a mask made worse takes from the score: as much as a gain of 0.2 gives."""

FIT_FROM = 80
"""Refinements, two of each object, from which on the gain predictor is fitted to them; with fewer it stays as it is."""

FOLDS = 5
"""Parts of the photos that are judged by a gain predictor which has not seen them."""


@dataclass(frozen=True)
class ValidationImage:
    """One photo, and coarse masks of N of its objects.

    Attributes:
        image: The photo's file.
        truth: N compressed run lengths, the ground truth.
        coarse: N compressed run lengths, the coarse masks.
        boxes: ``(N, 4)`` float32 xyxy, image pixels, the boxes of the coarse masks.
    """

    image: Path
    truth: list[dict[str, Any]]
    coarse: list[dict[str, Any]]
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.truth)


def matched_image(image: Path, truth: np.ndarray, coarse: np.ndarray, boxes: np.ndarray) -> ValidationImage:
    """Pair the objects of a photo with a detector's masks at an IoU above one half; the others are left out.

    So are masks whose box lies outside of the photo, which no refinement touches.

    Args:
        image: The photo's file.
        truth: ``(N, H, W)`` bool.
        coarse: ``(M, H, W)`` bool.
        boxes: ``(M, 4)`` float32 xyxy, image pixels.
    """
    inside = touches_image(torch.from_numpy(boxes), truth.shape[1:]).numpy()
    coarse, boxes = coarse[inside], boxes[inside]
    matches = match_detections(truth, coarse)
    found = matches.detection
    return ValidationImage(image, encode(truth[matches.truth]), encode(coarse[found]), boxes[found])


def simulated_image(image: Path, truth: np.ndarray, seed: Sequence[int]) -> ValidationImage:
    """Give each object of a photo a simulated coarse mask.

    Args:
        image: The photo's file.
        truth: ``(N, H, W)`` bool, none of them empty.
        seed: Numbers of at least 0 on which the masks depend.
    """
    rng = np.random.default_rng(list(seed))
    made = [simulate_coarse(mask, rng) for mask in truth]
    boxes = np.array([one.box for one in made], np.float32).reshape(-1, 4)
    return ValidationImage(image, encode(truth), encode(np.array([one.mask for one in made])), boxes)


class _Judged(NamedTuple):
    """N masks of one photo.

    Attributes:
        scores: ``(N, 4)``, in the order of ``figures_from_scores``.
        statistics: ``(N, K)`` of their refinements, 10, 14 or 16 of each; ``(0, 10)`` if no gain is predicted.
        exact_gains: ``(M,)``, Boundary IoU that refining ground truth in their place wins; none if none is predicted.
        exact_statistics: ``(M, K)`` of those refinements.
        cells: Of each quadtree level.
    """

    scores: np.ndarray
    statistics: Tensor
    exact_gains: np.ndarray
    exact_statistics: Tensor
    cells: tuple[DetectorCounts, ...]


class Validation:
    """Judges a refiner by its public path, and fits its gain predictor, if it has one, to what it finds.

    A predictor knows the refinements of the weights that it was fitted to; those of other weights it misjudges. Each
    photo is judged by one that was fitted to the others, and the refiner keeps one that was fitted to all. It is fitted
    to the coarse masks and, less weighty, to ground truth in their place, which a refinement can only spoil.

    Of several processes, each takes a share of the photos.

    Args:
        images: Photos with at least one object.
        options: How masks are refined.

    Raises:
        InvalidInputError: If there is no object.
    """

    def __init__(self, images: Sequence[ValidationImage], options: RefineOptions | None = None):
        self.images = [image for image in images if len(image)]
        if not self.images:
            raise InvalidInputError(
                "expected at least one object to validate on, got none: add annotated photos, or predictions that match"
            )
        self.options = replace(options or RefineOptions(), return_quadtree=True)

    @property
    def count(self) -> int:
        """Objects."""
        return sum(map(len, self.images))

    def __call__(self, refiner: Refiner) -> dict[str, float]:
        """Judge a refiner.

        Returns:
            ``iou``, ``boundary_iou`` and the same of the ``_coarse`` masks; ``worse``, the share of masks that lost
            more than 0.02 of Boundary IoU; ``recall_<level>`` and ``accuracy_<level>`` of the incoherence detector
            (:class:`~transfiner_refine.evaluation.detector.DetectorCounts`) and ``nodes_<level>``, those of a mask;
            ``score``, the gain in both kinds of IoU less ``WORSE_COSTS`` times ``worse``.
        """
        parts = map_shared(lambda image: self._judge(refiner, image), self.images)
        scores, statistics, exact_gains, exact_statistics, counts = zip(*parts, strict=True)
        scores = np.concatenate(scores)
        if refiner.model.gain_predictor is not None:
            photo = [number for number, part in enumerate(parts) for _ in part.scores]
            photo += [number for number, part in enumerate(parts) for _ in part.exact_gains]
            gains = np.concatenate([scores[:, 3] - scores[:, 2], *exact_gains])
            is_exact = torch.arange(len(gains)) >= len(scores)
            predicted = _predicted_gains(
                refiner.model,
                _joined([*statistics, *exact_statistics]),
                torch.from_numpy(gains),
                torch.tensor(photo),
                torch.where(is_exact, EXACT_WEIGHT, 1.0),
            )
            refused = (predicted[~is_exact] < self.options.keep_if_gain_below).numpy()
            scores[refused, 1], scores[refused, 3] = scores[refused, 0], scores[refused, 2]
        figures = figures_from_scores(*scores.T)
        record = {
            "iou_coarse": figures.mean_iou_coarse,
            "iou": figures.mean_iou_refined,
            "boundary_iou_coarse": figures.mean_boundary_iou_coarse,
            "boundary_iou": figures.mean_boundary_iou_refined,
            "worse": figures.share_worse,
        }
        for level, of_images in enumerate(zip(*counts, strict=True)):
            cells = sum(of_images, start=DetectorCounts())
            record[f"recall_{level}"], record[f"accuracy_{level}"] = cells.recall, cells.accuracy
            record[f"nodes_{level}"] = cells.found / figures.count
        return record | {"score": score(figures)}

    def _judge(self, refiner: Refiner, image: ValidationImage) -> _Judged:
        """Refine the masks of a photo, with none refused for its predicted gain."""
        pixels = as_image(image.image)
        size = (pixels.shape[1], pixels.shape[2])
        truth, coarse = decode_batch(image.truth, size), decode_batch(image.coarse, size)
        out, statistics = self._refine(refiner, pixels, image.boxes, coarse)
        refined = out.masks.numpy()
        pairs = [f(masks, truth) for f in (mask_iou, boundary_iou) for masks in (coarse, refined)]
        exact = truth if refiner.model.gain_predictor is not None else truth[:0]
        spoilt, exact_statistics = self._refine(refiner, pixels, boxes_from_masks(torch.from_numpy(exact)), exact)
        exact_gains = boundary_iou(spoilt.masks.numpy(), exact) - 1
        cells = detector_counts(out, torch.from_numpy(truth))
        return _Judged(np.stack(pairs, axis=1), statistics, exact_gains, exact_statistics, cells)

    def _refine(
        self, refiner: Refiner, pixels: Tensor, boxes: np.ndarray | Tensor, masks: np.ndarray
    ) -> tuple[Instances, Tensor]:
        """Refine masks of a photo, with their statistics ``(N, K)``; none if no gain is predicted."""
        options = replace(self.options, keep_if_gain_below=-1.0)
        with asked_statistics(refiner.model) as rows:
            out = refiner.refine(pixels, boxes=boxes, masks=masks, options=options).to("cpu")
        return out, _joined(rows)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Join rows of statistics; those of no refinement do not say how many columns there are."""
    return torch.cat([x for x in rows if len(x)] or [torch.zeros(0, len(STATISTICS))])


def _predicted_gains(
    model: RefinerModel, statistics: Tensor, gains: Tensor, photo: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Fit the gain predictor of a model to N refinements, if they are enough.

    Args:
        model: Its predictor is changed in place.
        statistics: ``(N, K)``.
        gains: ``(N,)``, what each refinement won.
        photo: ``(N,)`` int64, the photo of each.
        weights: ``(N,)``, how much each counts; None counts all the same.

    Returns:
        ``(N,)``, the gain that each refinement is given by a predictor fitted to other photos alone.
    """
    predictor = model.gain_predictor
    assert predictor is not None
    device = predictor.weight.device

    def predict(rows: Tensor) -> Tensor:
        return predictor(statistics[rows].to(device)).detach().cpu()

    weights = torch.ones_like(gains) if weights is None else weights
    folds = [photo % FOLDS == fold for fold in range(FOLDS)]
    if len(gains) < FIT_FROM or min(int((~apart).sum()) for apart in folds) < FIT_FROM // 2:
        return predict(torch.ones_like(photo, dtype=torch.bool))
    predicted = torch.zeros(len(gains))
    for apart in folds:
        fit_gain(model, *(part[~apart].to(device) for part in (statistics, gains, weights)))
        predicted[apart] = predict(apart)
    fit_gain(model, statistics.to(device), gains.to(device), weights.to(device))
    return predicted


def score(figures: PairedFigures) -> float:
    """One number to choose a checkpoint by."""
    return figures.iou_gain + figures.boundary_iou_gain - WORSE_COSTS * figures.share_worse
