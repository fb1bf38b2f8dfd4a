"""How well an incoherence detector finds what Eq. 1 marks in the ground truth (Mask Transfiner, Table 3).

N instances of an image, S side of a quadtree level.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.incoherence import cover_children, double_nearest, incoherence_levels
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.types import Instances


@dataclass(frozen=True)
class DetectorCounts:
    """Cells of one quadtree level; counts of several images add up. Shares are NaN where there is nothing to share.

    Attributes:
        cells: All cells of the level.
        judged: Cells that the detector looked at: all at level 0, below it the children of the nodes found.
        incoherent: Cells that are incoherent in the ground truth.
        found: Cells that the detector made nodes.
        hits: Nodes that are incoherent.
        right: Judged cells that were told rightly, incoherent or not.
    """

    cells: int = 0
    judged: int = 0
    incoherent: int = 0
    found: int = 0
    hits: int = 0
    right: int = 0

    def __add__(self, other: DetectorCounts) -> DetectorCounts:
        return DetectorCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def recall(self) -> float:
        """Share of all incoherent cells that were found; those whose parent was missed are lost with it."""
        return _share(self.hits, self.incoherent)

    @property
    def precision(self) -> float:
        """Share of the nodes that are incoherent."""
        return _share(self.hits, self.found)

    @property
    def accuracy(self) -> float:
        """Share of the judged cells that were told rightly."""
        return _share(self.right, self.judged)


def detector_counts(refined: Instances, truth: Tensor) -> tuple[DetectorCounts, ...]:
    """Compare the nodes of a refinement with the incoherent cells of the ground truth.

    Args:
        refined: What a refiner returned with ``return_quadtree=True``: N instances of one image.
        truth: ``(N, H, W)`` bool, the instances' true masks, image frame.

    Returns:
        Counts of each quadtree level, coarsest first.

    Raises:
        InvalidInputError: If the quadtrees are missing, or the masks are not N of the image's size.

    Note:
        A cell is incoherent by Eq. 1 in its RoI, or because one of its descendants is: nodes form a tree, so that a
        coherent ancestor would hide them. The jitter and the marks of wrong coarse cells, which training adds to these
        cells, are not counted; they show as lower precision.
    """
    if refined.details is None or refined.rois is None:
        raise InvalidInputError("expected refined instances with quadtrees, got none: refine with return_quadtree=True")
    if truth.shape != refined.masks.shape or truth.dtype != torch.bool:
        raise InvalidInputError(
            f"expected true masks of shape {tuple(refined.masks.shape)} bool, one for each instance, got "
            f"{tuple(truth.shape)} {truth.dtype}"
        )
    quadtree = refined.details.quadtree
    cropped = crop_masks(truth.to(refined.rois.device), refined.rois, ROOT_SIDE << len(quadtree)) >= 0.5
    counts = []
    judged = torch.ones((len(refined), ROOT_SIDE, ROOT_SIDE), dtype=torch.bool, device=cropped.device)
    for nodes, incoherent in zip(quadtree, cover_children(incoherence_levels(cropped, len(quadtree))), strict=True):
        found = torch.zeros_like(incoherent)
        found[nodes.roi, nodes.row, nodes.col] = True
        told = (found.numel(), judged.sum(), incoherent.sum(), found.sum(), (found & incoherent).sum())
        counts.append(DetectorCounts(*map(int, told), right=int((judged & (found == incoherent)).sum())))
        judged = double_nearest(found)
    return tuple(counts)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
