"""The refiner at a fixed node budget, so that no shape inside of it depends on the data.

R RoIs, B images, D feature channels, C channels, K nodes of one RoI at one level, S RoI side. Every RoI gets K nodes at
each level, its most incoherent candidates; those below the threshold are padding. The modules are the network's own.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.config import REFERENCE_SIDE, ROOT_SIDE
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.coarse import coarse_levels, coarse_logits
from transfiner_refine.functional.quadtree import (
    KEY_SIDE,
    child_nodes,
    grid_nodes,
    node_centres,
    propagate,
    propagate_corrections,
    reference_keys,
    take_nodes,
)
from transfiner_refine.functional.sampling import RoIPyramid
from transfiner_refine.modeling.gain import GainPredictor, edge_statistics, refinement_statistics
from transfiner_refine.modeling.image_encoder import ImageEncoder
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.pixel_head import PixelHead, align
from transfiner_refine.modeling.transfiner import (
    Detection,
    IncoherenceDetector,
    MaskTransfiner,
    SharedKeys,
    TransfinerOutput,
)
from transfiner_refine.types import FeaturePyramid, LevelNodes

NODES_OF_OUTLINES = (256, 704, 1280, 2304)
"""Nodes per level that real outlines stay below, as a rule: the budget where none is asked for."""


def node_budget(max_nodes: int | Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Nodes per RoI at each level.

    Args:
        max_nodes: One number for all levels, as ``RefineOptions.max_nodes``, or one for each; None for
            ``NODES_OF_OUTLINES``.
        depth: Levels.

    Returns:
        ``depth`` numbers, none greater than the candidates that a level can have.

    Raises:
        InvalidInputError: If a number is below 1, or their count is not ``depth``.
    """
    if max_nodes is None:
        wanted = NODES_OF_OUTLINES[:depth]
    else:
        wanted = (max_nodes,) * depth if isinstance(max_nodes, int) else tuple(max_nodes)
    if len(wanted) != depth or any(count < 1 for count in wanted):
        raise InvalidInputError(
            f"expected max_nodes of at least 1, one number or one for each of {depth} levels, got {max_nodes!r}"
        )
    budget: list[int] = []
    for count in wanted:
        candidates = 4 * budget[-1] if budget else ROOT_SIDE**2
        budget.append(min(count, candidates))
    return tuple(budget)


class EncoderGraph(nn.Module):
    """The image encoder with a plain tuple of maps as its result."""

    def __init__(self, image_encoder: ImageEncoder):
        super().__init__()
        self.image_encoder = image_encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encode ``(B, 3, H, W)`` float32 RGB in [0, 1] to ``(B, D, ceil(H / s), ceil(W / s))`` maps, finest first."""
        return self.image_encoder(pixels).maps


class RefinerGraph(nn.Module):
    """Mask Transfiner, pixel head and gain predictor at a fixed node budget.

    Args:
        model: The refiner's model, whose modules are used as they are.
        budget: Nodes per RoI at each level; see :func:`node_budget`.
        incoherence_threshold: Probability above which a cell is an incoherent node.
        mask_threshold: Probability from which a cell belongs to the mask, for the predicted gain.
        align_pixels: Whether the pixel head is part of the graph, where the model has one.
        segment: Whether a segmenter runs before, where the model has one, so that the graph starts from its proposals.
    """

    def __init__(
        self,
        model: RefinerModel,
        budget: Sequence[int],
        incoherence_threshold: float,
        mask_threshold: float,
        align_pixels: bool = True,
        segment: bool = True,
    ):
        super().__init__()
        self.transfiner: MaskTransfiner = model.transfiner
        self.pixel_head: PixelHead | None = model.pixel_head if align_pixels else None
        self.gain_predictor: GainPredictor | None = model.gain_predictor
        self.sees_proposals = segment and model.segmenter is not None
        self.strides = model.config.strides
        self.budget = tuple(budget)
        self.incoherence_threshold = incoherence_threshold
        self.mask_threshold = mask_threshold

    def forward(
        self,
        maps: tuple[Tensor, ...],
        rois: Tensor,
        image: Tensor,
        coarse: Tensor,
        roi_pixels: Tensor | None = None,
        given: Tensor | None = None,
        proposals: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Refine R RoIs.

        Args:
            maps: ``(B, D, H_l, W_l)`` float32 each, finest first.
            rois: ``(R, 4)`` float32 xyxy, network frame.
            image: ``(R,)`` int64, whose maps of the B serve each RoI.
            coarse: ``(R, S, S)`` float32 coarse probabilities, ``S = 28 · 2^(levels - 1)``.
            roi_pixels: ``(R, 3, P, P)`` float32, RGB in [0, 1] of each RoI, for the pixel head; None without one.
            given: ``(R, S, S)`` float32, the coarse probabilities before the segmenter; None without one.
            proposals: ``(R, 2)`` float32, the proposals' IoU with the coarse mask and their quality, negative for a RoI
                that starts from its own mask because the refinement of its proposal was refused; None without a
                segmenter.

        Returns:
            ``(R, S, S)`` float32 refined probabilities; ``(R, S, S)`` bool, the cells that a node or an ancestor of
            theirs set, or the pixel head; with a pixel head ``(R, P, P)`` float32, the refined probabilities of pixels;
            and ``(R,)`` float32 predicted gains, where the model predicts them.
        """
        count = rois.shape[0]
        levels = coarse_levels(coarse, len(self.budget))
        roi_pyramid = self.transfiner.roi_pyramid(FeaturePyramid(maps, self.strides), rois, image)
        output = self._refine(*self._with_spare_roi(roi_pyramid, levels, *self._detect(roi_pyramid, levels)))
        spared = _append_zeros(coarse)
        aligned: tuple[Tensor, ...] = ()
        if self.pixel_head is not None:
            assert roi_pixels is not None
            output, pixels = align(self.pixel_head, _append_zeros(roi_pixels), output, spared)
            aligned = (pixels[:count],)
        refined = output.probs[:count], output.touched[:count], *aligned
        if self.gain_predictor is None:
            return refined
        before = coarse if given is None else given
        statistics = refinement_statistics(output, _append_zeros(before), self.mask_threshold)[:count]
        if aligned and roi_pixels is not None:
            edges = edge_statistics(roi_pixels, before, aligned[0], self.mask_threshold)
            statistics = torch.cat([statistics, edges, *([] if proposals is None else [proposals])], dim=1)
        gain = self.gain_predictor(statistics)
        if proposals is not None:
            gain = torch.where(proposals[:, 0] < 0, self.gain_predictor(statistics, True), gain)
        return *refined, gain

    def _detect(self, roi_pyramid: RoIPyramid, coarse: Sequence[Tensor]) -> tuple[Detection, list[Tensor]]:
        """Find the nodes.

        Returns:
            What was found, with K nodes of each RoI at each level, in the order of the RoIs; and ``(R, K)`` bool, true
            for nodes, false for padding.
        """
        detector: IncoherenceDetector = self.transfiner.incoherence_detector
        guidance = detector.guidance(roi_pyramid.grid(ROOT_SIDE, 0), coarse[0])  # (R, C, 28, 28)
        root_logits = detector.classifier(guidance)[:, 0]
        hidden = guidance.permute(0, 2, 3, 1).flatten(0, 2)
        rois = guidance.shape[0]
        quadtree: list[LevelNodes] = []
        real: list[Tensor] = []
        for level, count in enumerate(self.budget):
            if level == 0:
                roi, row, col = grid_nodes(rois, ROOT_SIDE)
                cells = LevelNodes(roi, row, col, torch.full_like(roi, -1), root_logits.flatten(), ROOT_SIDE)
                scores = root_logits.flatten(1)  # (R, 784)
            else:
                side = ROOT_SIDE << level
                roi, row, col, parent = child_nodes(quadtree[-1])
                cues = [
                    roi_pyramid.sample(roi, node_centres(row, col, side), level),
                    coarse[level][roi, row, col, None],
                ]
                if detector.lower_level_guidance:
                    cues.append(hidden[parent])
                hidden = F.relu(detector.fusion[level - 1](torch.cat(cues, dim=1)))
                cells = LevelNodes(roi, row, col, parent, detector.finer_classifier[level - 1](hidden)[:, 0], side)
                scores = cells.logits.unflatten(0, (rois, -1))  # (R, 4K)
                scores = scores.masked_fill(~real[-1].repeat_interleave(4, dim=1), -torch.inf)
            best, place = scores.topk(count, dim=1)  # (R, K)
            keep = (place + torch.arange(rois)[:, None] * scores.shape[1]).flatten()
            real.append(torch.sigmoid(best) > self.incoherence_threshold)
            quadtree.append(take_nodes(cells, keep))
            hidden = hidden[keep]
        return Detection(root_logits, (), tuple(quadtree), guidance), real

    def _with_spare_roi(
        self, roi_pyramid: RoIPyramid, coarse: Sequence[Tensor], detection: Detection, real: list[Tensor]
    ) -> tuple[RoIPyramid, list[Tensor], Detection, list[Tensor]]:
        """Give the padding a RoI of its own, one more than there are, where whatever becomes of it does no harm."""
        spare = roi_pyramid.rois.shape[0]
        roi_pyramid = replace(
            roi_pyramid,
            rois=_append_zeros(roi_pyramid.rois),
            image=_append_zeros(roi_pyramid.image),
            level=_append_zeros(roi_pyramid.level),
        )
        quadtree = [
            replace(nodes, roi=torch.where(is_node.flatten(), nodes.roi, spare))
            for nodes, is_node in zip(detection.quadtree, real, strict=True)
        ]
        root_logits, guidance = _append_zeros(detection.root_logits), _append_zeros(detection.guidance)
        detection = Detection(root_logits, (), tuple(quadtree), guidance)
        return roi_pyramid, [_append_zeros(level) for level in coarse], detection, real

    def _refine(
        self, roi_pyramid: RoIPyramid, coarse: list[Tensor], detection: Detection, real: list[Tensor]
    ) -> TransfinerOutput:
        """Refine the nodes and hand their values down; everything has the spare RoI at its end."""
        transfiner = self.transfiner
        config, quadtree = transfiner.config, detection.quadtree
        every_level = range(len(self.budget))
        logits: list[Tensor] = []
        for group in [every_level] if config.joint_levels else [[level] for level in every_level]:
            logits += self._refine_levels(roi_pyramid, coarse, detection, real, group)
        node_probs = tuple(torch.sigmoid(x) for x in logits)
        if config.decoder == "residual":
            bases = [coarse_logits(level) for level in coarse]
            corrected, touched = propagate_corrections(bases, quadtree, logits, config.propagate)
            refined = torch.where(touched, torch.sigmoid(corrected), coarse[-1])
        else:
            refined, touched = propagate(coarse, quadtree, node_probs, config.propagate)
        return TransfinerOutput(refined, touched, detection, node_probs)

    def _refine_levels(
        self,
        roi_pyramid: RoIPyramid,
        coarse: list[Tensor],
        detection: Detection,
        real: list[Tensor],
        levels: Sequence[int],
    ) -> list[Tensor]:
        """Logits ``(R · K,)`` of the nodes of some levels, which share one sequence."""
        transfiner, guidance = self.transfiner, detection.guidance
        rois = roi_pyramid.rois.shape[0] - 1
        # The 14×14 reference tokens of each RoI head its sequence.
        roi, row, col = grid_nodes(rois, REFERENCE_SIDE)
        probs = F.avg_pool2d(coarse[0][:-1, None], ROOT_SIDE // REFERENCE_SIDE).flatten()
        centres = node_centres(row, col, REFERENCE_SIDE)
        tokens = [transfiner.node_encoder(roi_pyramid, guidance, probs, roi, centres, REFERENCE_SIDE, -1)]
        is_token = [torch.ones_like(roi, dtype=torch.bool)]
        coarse_of_nodes = []
        for level in levels:
            nodes = detection.quadtree[level]
            probs = coarse[level][nodes.roi, nodes.row, nodes.col]
            centres = node_centres(nodes.row, nodes.col, nodes.side)
            tokens.append(transfiner.node_encoder(roi_pyramid, guidance, probs, nodes.roi, centres, nodes.side, level))
            is_token.append(real[level].flatten())
            coarse_of_nodes.append(probs)
        padded = torch.cat([x.unflatten(0, (rois, -1)) for x in tokens], dim=1)  # (R, T, C)
        there = torch.cat([x.unflatten(0, (rois, -1)) for x in is_token], dim=1)  # (R, T)
        mask, keys = there[:, None, None], None  # (R, 1, 1, T)
        if transfiner.config.tree_keys:
            slots = [reference_keys(rois)] + [self._tree_keys(detection.quadtree, level) for level in levels]
            slot = torch.cat([x.unflatten(0, (rois, -1)) for x in slots], dim=1)
            keys, mask = SharedKeys.of(slot, there, KEY_SIDE**2 + self.budget[0], padded.dtype)  # (R, 1, 1, G)
        mask = mask.expand(-1, -1, padded.shape[1], -1)  # onnxruntime's attention broadcasts no rows
        for layer in transfiner.sequence_encoder.layers:
            padded = layer(padded, mask, keys)
        encoded = transfiner.sequence_encoder.norm(padded).split(self._lengths(levels), dim=1)
        return [
            transfiner.pixel_decoder(part.flatten(0, 1), probs)
            for part, probs in zip(encoded[1:], coarse_of_nodes, strict=True)
        ]

    def _tree_keys(self, quadtree: Sequence[LevelNodes], level: int) -> Tensor:
        """The key that each node of a level is part of, ``(R · K,)``: that of the root node that it descends from."""
        node = torch.arange(quadtree[level].parent.shape[0])
        for nodes in quadtree[level:0:-1]:
            node = nodes.parent[node]
        return KEY_SIDE**2 + node % self.budget[0]

    def _lengths(self, levels: Sequence[int]) -> list[int]:
        return [REFERENCE_SIDE**2, *(self.budget[level] for level in levels)]


def _append_zeros(values: Tensor) -> Tensor:
    """Append one row of zeros, ``(R, ...)`` to ``(R + 1, ...)``."""
    return torch.cat([values, values.new_zeros((1, *values.shape[1:]))])
