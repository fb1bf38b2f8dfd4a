"""The RoI pyramid, sampled point by point (Mask Transfiner, Sec. 3.4).

A cell of a RoI level is smaller than a pixel of the feature map that serves it, so one bilinear sample at the cell's
centre is what RoIAlign with one sample per bin would pool. Nothing is therefore pooled densely beyond the root level:
maps are flattened into one table of rows, and each point is a weighted sum of four of them.

R RoIs, P points, C channels. Network frame: pixels of the network's input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.functional.quadtree import grid_nodes, node_centres
from transfiner_refine.types import FeaturePyramid

CANONICAL_SIDE = 224
NEIGHBOURHOOD = torch.tensor([[col, row] for row in (-1, 0, 1) for col in (-1, 0, 1)])
"""``(9, 2)`` offsets (x, y) of a cell's 3×3 neighbourhood, in row-major order."""


def assign_levels(boxes: Tensor, canonical_level: int = 4) -> Tensor:
    """Pyramid level that serves each RoI's root, before clamping to the levels that exist.

    Mask Transfiner, Sec. 3.4: ``floor(k0 + log2(sqrt(w · h) / 224))`` with ``k0 = 4``; a map of stride ``s`` is level
    ``log2(s)``.

    Args:
        boxes: ``(R, 4)`` float, xyxy, network frame.
        canonical_level: ``k0``, the level of a RoI of 224×224 pixels.

    Returns:
        ``(R,)`` int64.
    """
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    # The small term keeps a side of exactly 224 · 2^n from falling a level by rounding.
    return torch.floor(canonical_level + torch.log2(size.prod(dim=1).sqrt() / CANONICAL_SIDE) + 1e-6).long()


@dataclass(frozen=True)
class FeatureTable:
    """All maps of a batch, flattened into rows.

    Attributes:
        rows: ``(sum of B · H_l · W_l, C)`` float, maps finest first, each in (image, y, x) order.
        start: ``(L,)`` int64, first row of each map.
        size: ``(L, 2)`` int64, height and width of each map.
        strides: Strides of the maps, finest first.
    """

    rows: Tensor
    start: Tensor
    size: Tensor
    strides: tuple[int, ...]

    @staticmethod
    def of(pyramid: FeaturePyramid) -> FeatureTable:
        """Flatten a pyramid; costs one copy of it."""
        device = pyramid.maps[0].device
        rows = torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in pyramid.maps])
        size = [(m.shape[2], m.shape[3]) for m in pyramid.maps]
        start = [0]
        for m in pyramid.maps[:-1]:
            start.append(start[-1] + m.shape[0] * m.shape[2] * m.shape[3])
        return FeatureTable(
            rows, torch.tensor(start, device=device), torch.tensor(size, device=device), pyramid.strides
        )

    def sample(self, xy: Tensor, image: Tensor, index: Tensor) -> Tensor:
        """Bilinear features at points, with RoIAlign's rule at the border.

        Args:
            xy: ``(P, 2)`` float32, network frame.
            image: ``(P,)`` int64, image of the batch.
            index: ``(P,)`` int64, which of the maps.

        Returns:
            ``(P, C)``; zero more than one feature pixel outside the map, the border's value up to there.
        """
        stride = torch.tensor(self.strides, device=xy.device, dtype=xy.dtype)[index]
        size = self.size[index]  # (P, 2)
        height, width = size[:, 0], size[:, 1]
        x, y = xy[:, 0] / stride - 0.5, xy[:, 1] / stride - 0.5
        rows, weights = bilinear_rows(x, y, height, width)
        rows = rows + (self.start[index] + image * height * width)[:, None]
        return weighted_rows(self.rows, rows, weights)


def bilinear_rows(x: Tensor, y: Tensor, height: Tensor | int, width: Tensor | int) -> tuple[Tensor, Tensor]:
    """The four cells around each point of a row-major map, and their weights.

    Args:
        x: ``(P,)`` float, column in map cells, 0 at the centre of the first.
        y: ``(P,)`` float, row in map cells.
        height: Rows of the map that each point lies on.
        width: Columns of that map.

    Returns:
        ``(P, 4)`` int64 cells ``row · width + col`` and ``(P, 4)`` weights that sum to one, or to zero for points more
        than one cell outside.
    """
    inside = (x >= -1) & (y >= -1) & (x <= width) & (y <= height)
    last_x = torch.as_tensor(width, device=x.device) - 1
    last_y = torch.as_tensor(height, device=x.device) - 1
    x = x.clamp(min=0).minimum(last_x.to(x.dtype))
    y = y.clamp(min=0).minimum(last_y.to(y.dtype))
    left, top = x.long(), y.long()
    right, bottom = (left + 1).minimum(last_x), (top + 1).minimum(last_y)
    fx, fy = x - left, y - top
    top, bottom = top * width, bottom * width
    cells = torch.stack([top + left, top + right, bottom + left, bottom + right], dim=1)
    weights = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], dim=1)
    return cells, weights * inside[:, None]


def weighted_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of table rows, in one gather.

    Args:
        table: ``(rows, C)`` float.
        rows: ``(P, Q)`` int64.
        weights: ``(P, Q)`` float.

    Returns:
        ``(P, C)``.
    """
    if torch.compiler.is_compiling():
        # Neither ONNX nor a compiler has a counterpart of embedding_bag; they fuse this sum, which is one.
        return (F.embedding(rows, table) * weights.to(table.dtype)[..., None]).sum(dim=1)
    if rows.shape[0] == 0:
        return table.new_zeros((0, table.shape[1])) + 0 * table[:1].sum()
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.to(table.dtype))


@dataclass(frozen=True)
class RoIPyramid:
    """Features of RoIs at each quadtree level, sampled on demand.

    Attributes:
        table: The flattened maps.
        rois: ``(R, 4)`` float32, xyxy, network frame.
        image: ``(R,)`` int64, image of the batch.
        level: ``(R,)`` int64, pyramid level of each RoI's root, not yet clamped.
    """

    table: FeatureTable
    rois: Tensor
    image: Tensor
    level: Tensor

    @staticmethod
    def of(
        features: FeaturePyramid | FeatureTable, rois: Tensor, image: Tensor, canonical_level: int = 4
    ) -> RoIPyramid:
        """Assign each RoI its level.

        Args:
            features: The batch's features; a pyramid is flattened first.
            rois: ``(R, 4)`` float32, xyxy, network frame.
            image: ``(R,)`` int64.
            canonical_level: See :func:`assign_levels`.
        """
        table = FeatureTable.of(features) if isinstance(features, FeaturePyramid) else features
        return RoIPyramid(table, rois, image, assign_levels(rois, canonical_level))

    def map_index(self, quadtree_level: int) -> Tensor:
        """Index of the map that serves each RoI at a quadtree level, clamped to the maps that exist: ``(R,)``."""
        finest = round(math.log2(self.table.strides[0]))
        return (self.level - quadtree_level - finest).clamp(0, len(self.table.strides) - 1)

    def sample(self, roi: Tensor, centres: Tensor, quadtree_level: int) -> Tensor:
        """Features at points of RoIs.

        Args:
            roi: ``(P,)`` int64.
            centres: ``(P, 2)`` float32, (x, y) relative to the RoI, in [0, 1] inside it.
            quadtree_level: Level whose map is sampled.

        Returns:
            ``(P, C)``.
        """
        box = self.rois[roi]
        xy = box[:, :2] + centres * (box[:, 2:] - box[:, :2])
        return self.table.sample(xy, self.image[roi], self.map_index(quadtree_level)[roi])

    def sample_context(self, roi: Tensor, centres: Tensor, side: int, quadtree_level: int) -> Tensor:
        """Features of the 3×3 neighbourhood of cells (paper, Sec. 3.3).

        Args:
            roi: ``(K,)`` int64.
            centres: ``(K, 2)`` float32, cell centres relative to the RoI.
            side: Side of the cells' level, whose cells are ``1 / side`` apart.
            quadtree_level: Level whose map is sampled.

        Returns:
            ``(K, 9, C)`` in row-major order of the neighbourhood.
        """
        around = centres[:, None] + NEIGHBOURHOOD.to(centres) / side  # (K, 9, 2)
        features = self.sample(roi.repeat_interleave(9), around.flatten(0, 1), quadtree_level)
        return features.unflatten(0, (-1, 9))

    def grid(self, side: int, quadtree_level: int) -> Tensor:
        """Features of all cells of all RoIs at one resolution.

        Args:
            side: Cells per side S.
            quadtree_level: Level whose map is sampled.

        Returns:
            ``(R, C, S, S)``, channels last in memory.
        """
        rois = self.rois.shape[0]
        roi, row, col = grid_nodes(rois, side, self.rois.device)
        features = self.sample(roi, node_centres(row, col, side), quadtree_level)
        return features.unflatten(0, (rois, side, side)).permute(0, 3, 1, 2)
