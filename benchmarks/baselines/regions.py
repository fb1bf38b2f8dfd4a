"""Refiners of other cells than the incoherent ones: along the outline, or without one level (paper, Table 2).

R RoIs, S side of a level.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.config import TransfinerConfig
from transfiner_refine.functional.coarse import coarse_logits
from transfiner_refine.functional.quadtree import take_nodes
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.modeling.transfiner import Detection, IncoherenceDetector, MaskTransfiner, SelectNodes
from transfiner_refine.types import LevelNodes


class BoundaryDetector(IncoherenceDetector):
    """The incoherence detector, whose nodes are the cells along the coarse mask's outline instead of what it finds."""

    def forward(self, roi_pyramid: RoIPyramid, coarse: Sequence[Tensor], depth: int, select: SelectNodes) -> Detection:
        """Detect as :class:`IncoherenceDetector` does, with nodes chosen by the coarse mask alone."""
        outline = [_along_outline(level >= 0.5) for level in coarse]

        def along(level: int, cells: LevelNodes) -> Tensor:
            return outline[level][cells.roi, cells.row, cells.col]

        return super().forward(roi_pyramid, coarse, depth, along)


class LevelsTransfiner(MaskTransfiner):
    """A refiner that leaves the nodes of one level as they are.

    Args:
        config: The architecture.
        level: The level that is not refined; its nodes still have children.
    """

    def __init__(self, config: TransfinerConfig, level: int):
        super().__init__(config)
        self.level = level

    def refine_nodes(
        self,
        roi_pyramid: RoIPyramid,
        coarse: Sequence[Tensor],
        guidance: Tensor,
        quadtree: Sequence[LevelNodes],
        token_budget: int = 1 << 30,
    ) -> list[Tensor]:
        """Refine the nodes of the other levels; those of this one get their coarse logits."""
        if self.level >= len(quadtree):
            return super().refine_nodes(roi_pyramid, coarse, guidance, quadtree, token_budget)
        left = quadtree[self.level]
        others = list(quadtree)
        others[self.level] = take_nodes(left, left.roi.new_zeros(0))
        logits = super().refine_nodes(roi_pyramid, coarse, guidance, others, token_budget)
        logits[self.level] = coarse_logits(coarse[self.level][left.roi, left.row, left.col])
        return logits


def boundary(config: TransfinerConfig) -> MaskTransfiner:
    """The transformer on the cells along the outline."""
    transfiner = MaskTransfiner(config)
    transfiner.add_module("incoherence_detector", BoundaryDetector(config))
    return transfiner


def without_level(level: int) -> Callable[[TransfinerConfig], MaskTransfiner]:
    """The transformer without the nodes of one level."""
    return lambda config: LevelsTransfiner(config, level)


def _along_outline(mask: Tensor) -> Tensor:
    """Cells of ``(R, S, S)`` bool whose 3×3 neighbourhood has both labels."""
    values = F.pad(mask[:, None].float(), (1, 1, 1, 1), mode="replicate")
    return (F.max_pool2d(values, 3, 1) != -F.max_pool2d(-values, 3, 1))[:, 0]
