"""The same model computed densely, as plain code would do it: what sparsity saves is measured against this.

The features of every cell of every level are pooled by RoIAlign, the incoherence detector runs as convolutions over
whole grids, and the nodes are picked out afterwards and refined one RoI at a time. Weights, nodes and results are those
of :class:`~transfiner_refine.modeling.transfiner.MaskTransfiner`.

R RoIs of a batch, C channels, S RoI side, K nodes of one level, D channels of the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from transfiner_refine.config import REFERENCE_SIDE, ROOT_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.coarse import coarse_levels, coarse_logits
from transfiner_refine.functional.incoherence import double_nearest
from transfiner_refine.functional.quadtree import propagate, propagate_corrections, take_nodes
from transfiner_refine.functional.sampling import NEIGHBOURHOOD, FeatureTable, RoIPyramid, assign_levels
from transfiner_refine.modeling.transfiner import MaskTransfiner, SelectNodes
from transfiner_refine.pipeline import TOKENS_PER_INSTANCE
from transfiner_refine.types import FeaturePyramid, LevelNodes

RIM = 1
"""Cells pooled around each grid, for the 3×3 context of the cells at its border."""


@dataclass(frozen=True)
class DensePyramid:
    """Features of R RoIs, pooled at every cell; stands in for :class:`RoIPyramid` where nodes are encoded.

    Attributes:
        grids: ``(R, D, S + 2, S + 2)`` of each (quadtree level, side S), with a rim of one cell.
    """

    grids: dict[tuple[int, int], Tensor]

    @staticmethod
    def pool(model: MaskTransfiner, features: FeaturePyramid, rois: Tensor, image: Tensor, depth: int) -> DensePyramid:
        """RoIAlign with one sample per cell, at the sides of all levels and of the reference grid."""
        finest = round(math.log2(features.strides[0]))
        root = assign_levels(rois, model.config.canonical_level)
        grids = {}
        for level, side in ((0, REFERENCE_SIDE), *((level, ROOT_SIDE << level) for level in range(depth))):
            index = (root - level - finest).clamp(0, len(features.strides) - 1)
            rim = RIM * (rois[:, 2:] - rois[:, :2]) / side
            boxes = torch.cat([image[:, None].to(rois.dtype), rois[:, :2] - rim, rois[:, 2:] + rim], dim=1)
            cells = side + 2 * RIM
            grid = features.maps[0].new_empty((len(rois), features.channels, cells, cells))
            for number, (feature_map, stride) in enumerate(zip(features.maps, features.strides, strict=True)):
                chosen = (index == number).nonzero()[:, 0]
                if len(chosen):
                    grid[chosen] = roi_align(feature_map, boxes[chosen], cells, 1 / stride, 1, aligned=True)
            grids[level, side] = grid
        return DensePyramid(grids)

    def inner(self, level: int) -> Tensor:
        """``(R, D, S, S)`` features of a level without the rim."""
        return self.grids[level, ROOT_SIDE << level][:, :, RIM:-RIM, RIM:-RIM]

    def one(self, roi: int) -> DensePyramid:
        """One RoI alone."""
        return DensePyramid({key: grid[roi : roi + 1] for key, grid in self.grids.items()})

    def sample_context(self, roi: Tensor, centres: Tensor, side: int, quadtree_level: int) -> Tensor:
        """Pick the 3×3 neighbourhoods of cells: ``(K, 9, D)``; see :meth:`RoIPyramid.sample_context`."""
        cells = (centres * side).long()[:, None] + NEIGHBOURHOOD.to(centres.device) + RIM  # (K, 9, 2)
        return self.grids[quadtree_level, side][roi[:, None], :, cells[..., 1], cells[..., 0]]


@torch.no_grad()
def refine_densely(
    model: MaskTransfiner,
    features: FeaturePyramid,
    rois: Tensor,
    image: Tensor,
    coarse: Tensor,
    depth: int,
    select: SelectNodes,
    at_once: int | None = None,
) -> Tensor:
    """Refine R RoIs densely.

    Args:
        model: Its weights.
        features: Features of the batch.
        rois: ``(R, 4)`` float32, xyxy, network frame.
        image: ``(R,)`` int64, image of the batch.
        coarse: ``(R, S, S)`` float32 coarse probabilities at the finest level.
        depth: Quadtree levels to refine, at least 1.
        select: Chooses the nodes.
        at_once: RoIs pooled and searched for nodes together; None takes all, as the authors' released code does. Nodes
            are refined one RoI at a time in any case.

    Returns:
        ``(R, S, S)`` float32 refined probabilities.

    Raises:
        InvalidInputError: If the model has no context cue.
    """
    if "context" not in model.config.node_cues or not model.config.joint_levels:
        raise InvalidInputError("expected a model with the context cue and one sequence of all levels, got another")
    if not len(rois):
        return coarse
    parts = torch.arange(len(rois)).split(at_once or len(rois))
    return torch.cat([_refine(model, features, rois[i], image[i], coarse[i], depth, select) for i in parts])


def _refine(
    model: MaskTransfiner,
    features: FeaturePyramid,
    rois: Tensor,
    image: Tensor,
    coarse: Tensor,
    depth: int,
    select: SelectNodes,
) -> Tensor:
    levels = coarse_levels(coarse, depth)
    pyramid = DensePyramid.pool(model, features, rois, image, depth)
    guidance, quadtree = _detect(model, pyramid, levels, select)
    logits = [torch.zeros(len(nodes)) for nodes in quadtree]
    for roi in range(len(rois)):
        index = [(nodes.roi == roi).nonzero()[:, 0] for nodes in quadtree]
        mine = [take_nodes(nodes, i) for nodes, i in zip(quadtree, index, strict=True)]
        mine = [replace(nodes, roi=torch.zeros_like(nodes.roi)) for nodes in mine]
        own = cast(RoIPyramid, pyramid.one(roi))
        found = model.refine_nodes(own, [x[roi : roi + 1] for x in levels], guidance[roi : roi + 1], mine)
        for values, i, new in zip(logits, index, found, strict=True):
            values[i] = new
    if model.config.decoder == "residual":
        bases = [coarse_logits(x) for x in levels]
        corrected, touched = propagate_corrections(bases, quadtree, logits, model.config.propagate)
        return torch.where(touched, torch.sigmoid(corrected), coarse)
    return propagate(levels, quadtree, [torch.sigmoid(x) for x in logits], model.config.propagate)[0]


def _detect(
    model: MaskTransfiner, pyramid: DensePyramid, coarse: Sequence[Tensor], select: SelectNodes
) -> tuple[Tensor, list[LevelNodes]]:
    """Run the incoherence detector over whole grids: guidance ``(R, C, 28, 28)`` and the nodes of each level."""
    detector = model.incoherence_detector
    guidance = hidden = detector.guidance(pyramid.inner(0), coarse[0])
    logits = detector.classifier(guidance)[:, 0]
    quadtree = []
    allowed = torch.ones_like(logits, dtype=torch.bool)
    for level in range(len(coarse)):
        if level:
            cues = [pyramid.inner(level), coarse[level][:, None]]
            hidden = double_nearest_maps(hidden)
            if detector.lower_level_guidance:
                cues.append(hidden)
            hidden = F.relu(as_convolution(detector.fusion[level - 1], torch.cat(cues, dim=1)))
            logits = as_convolution(detector.finer_classifier[level - 1], hidden)[:, 0]
        roi, row, col = allowed.nonzero().unbind(1)
        cells = LevelNodes(roi, row, col, torch.full_like(roi, -1), logits[allowed], logits.shape[-1])
        kept = take_nodes(cells, select(level, cells).nonzero()[:, 0])
        quadtree.append(kept)
        chosen = torch.zeros_like(allowed)
        chosen[kept.roi, kept.row, kept.col] = True
        allowed = double_nearest(chosen)
    return guidance, quadtree


def double_nearest_maps(maps: Tensor) -> Tensor:
    """Double the resolution of ``(R, C, S, S)`` maps by nearest-neighbour sampling."""
    return F.interpolate(maps, scale_factor=2.0, mode="nearest")


def as_convolution(layer: torch.nn.Module, maps: Tensor) -> Tensor:
    """Apply a fully connected layer to every cell of ``(R, C, S, S)`` maps."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    return F.conv2d(maps, weight[:, :, None, None], bias)


@torch.no_grad()
def refine_sparsely(
    model: MaskTransfiner,
    features: FeaturePyramid,
    rois: Tensor,
    image: Tensor,
    coarse: Tensor,
    depth: int,
    select: SelectNodes,
    token_budget: int = 16384,
) -> Tensor:
    """Refine R RoIs as the refiner does, in groups that fit the budget; arguments and result as above."""
    table = FeatureTable.of(features)
    group = max(1, token_budget // TOKENS_PER_INSTANCE)
    probs = torch.empty_like(coarse)
    for i in torch.arange(len(rois)).split(group):
        roi_pyramid = model.roi_pyramid(table, rois[i], image[i])
        probs[i] = model(roi_pyramid, coarse[i], depth, select, token_budget).probs
    return probs
