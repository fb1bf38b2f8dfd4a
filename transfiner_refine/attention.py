"""What one node of the quadtree looked at: the attention of its query to all tokens of its sequence.

The weights are those of a layer of the sequence encoder (Mask Transfiner, Sec. 3.3), averaged over the heads. They are
computed by the layer's own queries and keys, from what it was given in a refinement: nothing of the network is repeated
here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfiner_refine.canvas import INK, PAPER, Picture, grey, mixed, ramp, resized
from transfiner_refine.config import REFERENCE_SIDE, RefineOptions
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.functional.quadtree import grid_nodes
from transfiner_refine.modeling.transfiner import SequenceLayer, SharedKeys
from transfiner_refine.refiner import Refiner
from transfiner_refine.types import Instances, LevelNodes
from transfiner_refine.visualize import check_photo, node_boxes

BRIGHT = 0.97
"""Share of the tokens that are drawn with less than full brightness."""


@dataclass(frozen=True)
class NodePlace:
    """Where a node stands: instance, quadtree level, and index among the level's nodes."""

    instance: int
    level: int
    index: int


@dataclass(frozen=True, eq=False)
class NodeAttention:
    """The attention of one node; all weights together sum to 1.

    Attributes:
        place: The node that looks, among the nodes of ``quadtree``.
        layer: The layer of the sequence encoder, counted from 0.
        reference: ``(14, 14)`` float32, weights of the coarse reference tokens, which tile the RoI.
        nodes: Weights of each level's nodes, ``(K_l,)`` float32, coarsest level first; zeros for a level that is not in
            the node's sequence. Tokens that share a key have equal parts of its weight.
        quadtree: The nodes of each level, of this one instance.
        roi: ``(4,)`` float32 xyxy, image pixels: where reference grid and quadtree lie.
    """

    place: NodePlace
    layer: int
    reference: Tensor
    nodes: tuple[Tensor, ...]
    quadtree: tuple[LevelNodes, ...]
    roi: Tensor


def nearest_node(refined: Instances, point: tuple[float, float]) -> NodePlace:
    """Find the node whose centre is nearest to a point of the image.

    Args:
        refined: Instances with ``details``, refined with ``return_quadtree=True``.
        point: ``(x, y)``, image pixels.

    Raises:
        InvalidInputError: If the instances carry no details, or not a single node.
    """
    if refined.details is None:
        raise InvalidInputError(
            "expected instances with details, got none: refine with RefineOptions(return_quadtree=True)"
        )
    rois = (refined.boxes if refined.rois is None else refined.rois).double().numpy(force=True)
    found: list[tuple[float, NodePlace]] = []
    for level, nodes in enumerate(refined.details.quadtree):
        if len(nodes):
            boxes = node_boxes(nodes, rois)
            distance = np.hypot(*((boxes[:, :2] + boxes[:, 2:]) / 2 - point).T)
            index = int(distance.argmin())
            found.append((float(distance[index]), NodePlace(int(nodes.roi[index]), level, index)))
    if not found:
        raise InvalidInputError(
            "expected instances with incoherent nodes, got none: lower the incoherence threshold, "
            "or take a mask whose outline lies within the image"
        )
    return min(found, key=lambda entry: entry[0])[1]


def node_attention(
    refiner: Refiner,
    image: Any,
    *,
    box: Tensor | NDArray,
    mask: Tensor | NDArray,
    point: tuple[float, float],
    layer: int = -1,
    options: RefineOptions | None = None,
) -> NodeAttention:
    """Refine one instance, and see what the node nearest to a point attended to.

    Args:
        refiner: The refiner.
        image: As for :meth:`Refiner.refine <transfiner_refine.Refiner.refine>`.
        box: ``(4,)`` xyxy, image pixels.
        mask: ``(H, W)`` coarse mask: bool, uint8, or float probabilities.
        point: ``(x, y)``, image pixels.
        layer: Layer of the sequence encoder; negative ones count from the last.
        options: Choices of the refinement; it is of one pass.

    Raises:
        InvalidInputError: If there is no such layer, no node to look at, or an input cannot be used.

    Note:
        The layer is watched by a forward hook while the refinement runs: no other thread may use the refiner meanwhile.
    """
    encoder_layers = refiner.model.transfiner.sequence_encoder.layers
    count = len(encoder_layers)
    if not -count <= layer < count:
        raise InvalidInputError(f"expected a layer from 0 to {count - 1}, the model's last, got {layer}")
    watched = encoder_layers[layer]
    assert isinstance(watched, SequenceLayer)
    made: list[Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[Tensor, Tensor | None, SharedKeys | None]) -> None:
        made.append(_weights(watched, *given))

    handle = watched.register_forward_pre_hook(keep)
    try:
        refined = refiner.refine(
            image,
            boxes=box[None],
            masks=mask[None],
            options=replace(options or RefineOptions(), passes=1, return_quadtree=True),
        )
    finally:
        handle.remove()
    place = nearest_node(refined, point)
    assert refined.details is not None and refined.rois is not None
    quadtree = refined.details.quadtree
    # One instance is one sequence: the reference tokens, then the nodes level by level; or one such for each level. The
    # last ones count: before them are those behind a proposal whose refinement was refused.
    levels = [level for level, nodes in enumerate(quadtree) if len(nodes)]
    if refiner.config.joint_levels:
        weights, lengths = made[-1], [len(nodes) for nodes in quadtree]
    else:
        weights = made[levels.index(place.level) - len(levels)]
        lengths = [len(nodes) if level == place.level else 0 for level, nodes in enumerate(quadtree)]
    weights = weights[REFERENCE_SIDE**2 + sum(lengths[: place.level]) + place.index]  # (T,)
    reference, *parts = weights.split([REFERENCE_SIDE**2, *lengths])
    nodes = tuple(
        part if len(part) else part.new_zeros(len(level)) for part, level in zip(parts, quadtree, strict=True)
    )
    grid = reference.reshape(REFERENCE_SIDE, REFERENCE_SIDE)
    return NodeAttention(place, layer % count, grid, nodes, quadtree, refined.rois[0])


def _weights(layer: SequenceLayer, tokens: Tensor, mask: Tensor | None, keys: SharedKeys | None) -> Tensor:
    """Attention of each token of one sequence to each, the mean over the heads: ``(T, T)`` float32, rows sum to 1."""
    with torch.no_grad():
        q, k, _ = layer.queries_keys_values(tokens, keys)
        scores = (q[0] @ k[0].transpose(1, 2)).float() / q.shape[3] ** 0.5  # (h, T, T), or (h, T, G)
        if mask is not None:
            scores = scores.masked_fill(~mask[0], -torch.inf)
        weights = torch.softmax(scores, dim=2).mean(dim=0)
    return weights if keys is None else weights[:, keys.slot[0]] * keys.weight[0]


def draw_attention(image: Picture, attention: NodeAttention, *, scale: float = 1.0) -> Picture:
    """Draw the cells of all tokens of a sequence, the brighter the more the node attends to them, and ring the node.

    Finer nodes lie over coarser ones, and all over the reference grid. The few highest weights share full brightness.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        attention: What to draw.
        scale: Size of the picture over the size of the photo.

    Returns:
        ``(scale · H, scale · W, 3)`` uint8 RGB: the photo in grey, under the cells.

    Raises:
        InvalidInputError: If the photo is not ``(H, W, 3)`` uint8.
    """
    check_photo(image)
    picture = mixed(grey(resized(image, scale)), INK, 0.4)
    height, width = picture.shape[:2]
    ratio = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    roi = attention.roi.double().numpy(force=True)[None]
    zero, row, col = grid_nodes(1, REFERENCE_SIDE)
    reference = LevelNodes(zero, row, col, zero, zero.float(), REFERENCE_SIDE)
    layers = [(reference, attention.reference.flatten()), *zip(attention.quadtree, attention.nodes, strict=True)]
    every = torch.cat([weights for _, weights in layers])
    brightest = max(float(every.quantile(BRIGHT)), float(every.max()) / 10)
    value = np.zeros((height, width), np.float32)
    opacity = np.zeros((height, width), np.float32)
    for nodes, weights in layers:
        # Small weights, of which there are hundreds, would be lost in a linear scale.
        relative = np.sqrt(np.minimum(weights.numpy(force=True) / brightest, 1))
        for (left, top, right, bottom), share in zip(_rounded(node_boxes(nodes, roi) * ratio), relative, strict=True):
            window = slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))
            value[window] = share
            opacity[window] = 0.7 * share if nodes is reference else 0.4 + 0.6 * share
    picture = mixed(picture, ramp(value), opacity[..., None])
    place = attention.place
    node = node_boxes(attention.quadtree[place.level], roi)[place.index] * ratio
    return _ringed(picture, (node[:2] + node[2:]) / 2, max(height, width) / 60)


def _rounded(boxes: np.ndarray) -> list[list[int]]:
    return np.round(boxes).astype(int).tolist()


def _ringed(picture: Picture, centre: np.ndarray, radius: float) -> Picture:
    """A ring of two colours, which shows on any ground."""
    rows, columns = np.ogrid[: picture.shape[0], : picture.shape[1]]
    distance = np.abs(np.hypot(columns + 0.5 - centre[0], rows + 0.5 - centre[1]) - radius)
    ringed = picture.copy()
    ringed[distance <= radius / 3] = INK
    ringed[distance <= radius / 6] = PAPER
    return ringed
