"""Coarse against refined, instance by instance: the figures that a refiner is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.evaluation.boundary import Masks, boundary_iou, mask_iou

WORSE_BY = 0.02
"""Loss of Boundary IoU from which a refined mask counts as made worse; less is within the noise of annotations."""


@dataclass(frozen=True)
class PairedFigures:
    """Means over the same instances before and after refinement; each is NaN when there are no instances.

    Attributes:
        count: Instances.
        mean_iou_coarse: Mean mask IoU of the coarse masks with the ground truth.
        mean_iou_refined: Mean mask IoU of the refined masks with the ground truth.
        mean_boundary_iou_coarse: Mean Boundary IoU of the coarse masks.
        mean_boundary_iou_refined: Mean Boundary IoU of the refined masks.
        share_worse: Share of the instances that lost more than ``WORSE_BY`` of Boundary IoU.
    """

    count: int
    mean_iou_coarse: float
    mean_iou_refined: float
    mean_boundary_iou_coarse: float
    mean_boundary_iou_refined: float
    share_worse: float

    @property
    def iou_gain(self) -> float:
        """Mean IoU won by refinement."""
        return self.mean_iou_refined - self.mean_iou_coarse

    @property
    def boundary_iou_gain(self) -> float:
        """Mean Boundary IoU won by refinement."""
        return self.mean_boundary_iou_refined - self.mean_boundary_iou_coarse


def paired_figures(coarse: Masks, refined: Masks, truth: Masks, dilation: float = 0.02) -> PairedFigures:
    """Compare coarse and refined masks of the same instances with their ground truth.

    Args:
        coarse: ``(N, H, W)`` bool, or a sequence of N ``(H, W)`` bool when images differ in size; image frame.
        refined: As ``coarse``, in the same order.
        truth: As ``coarse``, in the same order.
        dilation: Width of the boundary as a share of the image diagonal.

    Returns:
        The figures, every instance counting the same.

    Raises:
        InvalidInputError: If the masks are not boolean, or differ in number or size.
    """
    return figures_from_scores(
        mask_iou(coarse, truth),
        mask_iou(refined, truth),
        boundary_iou(coarse, truth, dilation),
        boundary_iou(refined, truth, dilation),
    )


def figures_from_scores(
    iou_coarse: np.ndarray, iou_refined: np.ndarray, boundary_coarse: np.ndarray, boundary_refined: np.ndarray
) -> PairedFigures:
    """Summarise scores that are already at hand.

    Args:
        iou_coarse: ``(N,)`` float, mask IoU of the coarse masks.
        iou_refined: ``(N,)`` float, mask IoU of the refined masks.
        boundary_coarse: ``(N,)`` float, Boundary IoU of the coarse masks.
        boundary_refined: ``(N,)`` float, Boundary IoU of the refined masks.

    Returns:
        The figures.

    Raises:
        InvalidInputError: If the lengths differ.
    """
    lengths = [len(iou_coarse), len(iou_refined), len(boundary_coarse), len(boundary_refined)]
    if len(set(lengths)) > 1:
        raise InvalidInputError(f"expected scores of the same instances, got {lengths} of them: pair them first")
    worse = np.asarray(boundary_refined) < np.asarray(boundary_coarse) - WORSE_BY
    return PairedFigures(
        count=lengths[0],
        mean_iou_coarse=_mean(iou_coarse),
        mean_iou_refined=_mean(iou_refined),
        mean_boundary_iou_coarse=_mean(boundary_coarse),
        mean_boundary_iou_refined=_mean(boundary_refined),
        share_worse=_mean(worse),
    )


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
