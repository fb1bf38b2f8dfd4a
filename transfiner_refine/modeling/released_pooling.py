"""RoIAlign as Detectron2 does it, cell by cell: ``aligned=True``, with the adaptive number of samples.

A RoI's crop is never made whole where only some of its cells are wanted. Sampling positions and counts follow
torchvision's ``roi_align(sampling_ratio=-1, aligned=True)``, in the same order of operations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from transfiner_refine.functional.quadtree import grid_nodes
from transfiner_refine.functional.sampling import CANONICAL_SIDE, FeatureTable, bilinear_rows, weighted_rows

FINEST_LEVEL, COARSEST_LEVEL = 2, 5
SAMPLES = 1 << 18
"""Bilinear samples taken in one gather, which bounds memory (about 20 MB of indices and weights)."""


def pyramid_level(boxes: Tensor) -> Tensor:
    """FPN level of each box, as Detectron2 assigns it.

    Args:
        boxes: ``(R, 4)`` float32 xyxy, network frame.

    Returns:
        ``(R,)`` int64, 2 to 5: 4 for 224×224 pixels.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.floor(4 + torch.log2(area.sqrt() / CANONICAL_SIDE + 1e-8))
    return level.clamp(FINEST_LEVEL, COARSEST_LEVEL).long()


@dataclass(frozen=True)
class CellPooler:
    """Pools cells of RoIs from p2 to p5.

    Attributes:
        table: The flattened maps.
        rois: ``(R, 4)`` float32 xyxy, network frame.
        image: ``(R,)`` int64, image of the batch.
    """

    table: FeatureTable
    rois: Tensor
    image: Tensor

    def crop(self, roi: Tensor, side: int, level: Tensor) -> Tensor:
        """Pool all cells of some RoIs.

        Args:
            roi: ``(n,)`` int64.
            side: Cells per side S.
            level: ``(R,)`` int64, FPN level of every RoI.

        Returns:
            ``(n, C, S, S)``, channels last in memory.
        """
        index, row, col = grid_nodes(roi.shape[0], side, roi.device)
        pooled = self.cells(roi[index], row, col, side, level[roi][index])
        return pooled.view(roi.shape[0], side, side, pooled.shape[1]).permute(0, 3, 1, 2)

    def cells(self, roi: Tensor, row: Tensor, col: Tensor, side: int, level: Tensor) -> Tensor:
        """Pool single cells.

        Args:
            roi: ``(K,)`` int64.
            row: ``(K,)`` int64, row of the cell in its RoI's grid.
            col: ``(K,)`` int64.
            side: Cells per side of the grid.
            level: ``(K,)`` int64, FPN level that serves the cell; p2 serves those below it too.

        Returns:
            ``(K, C)``, the mean of the samples in the cell; zero for RoIs without area.
        """
        table = self.table
        index = (level - FINEST_LEVEL).clamp(min=0)
        scale = 1 / torch.tensor(table.strides, device=roi.device, dtype=torch.float32)[index]
        corners = self.rois[roi] * scale[:, None] - 0.5  # (K, 4), the map's pixel centres are integers
        size = corners[:, 2:] - corners[:, :2]
        samples = torch.ceil(size / side).long()  # (K, 2), along x and y
        start = corners[:, :2] + torch.stack([col, row], dim=1) * (size / side)
        step = size / side / samples
        height, width = table.size[index].unbind(1)
        first = table.start[index] + self.image[roi] * height * width
        pooled = table.rows.new_zeros((roi.shape[0], table.rows.shape[1]))
        # Cells with as many samples are one gather; in practice there are a few kinds.
        for kind in torch.unique(samples, dim=0):
            columns, rows = kind.tolist()
            if columns < 1 or rows < 1:
                continue
            offset_x = torch.arange(columns, device=roi.device).repeat(rows) + 0.5  # (Q,)
            offset_y = torch.arange(rows, device=roi.device).repeat_interleave(columns) + 0.5
            chosen = (samples == kind).all(dim=1).nonzero()[:, 0]
            for part in chosen.split(max(1, SAMPLES // (columns * rows))):
                x = start[part, 0, None] + offset_x * step[part, 0, None]  # (k, Q)
                y = start[part, 1, None] + offset_y * step[part, 1, None]
                around = (height[part].repeat_interleave(x.shape[1]), width[part].repeat_interleave(x.shape[1]))
                cells, weights = bilinear_rows(x.flatten(), y.flatten(), *around)  # (k · Q, 4)
                cells = cells.view(part.shape[0], -1) + first[part, None]  # (k, 4Q)
                pooled[part] = weighted_rows(table.rows, cells, weights.view_as(cells) / (columns * rows))
        return pooled
