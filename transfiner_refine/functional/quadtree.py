"""The point quadtree: nodes by level with parent links, and coarse-to-fine propagation (Mask Transfiner, Sec. 3.2).

R RoIs, K nodes of one level, S side of one level. A node is a cell ``(roi, row, col)`` of its level; its four children
are the cells ``(roi, 2·row + i, 2·col + j)`` of the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from transfiner_refine.config import REFERENCE_SIDE, ROOT_SIDE
from transfiner_refine.functional.incoherence import double_nearest
from transfiner_refine.types import LevelNodes


def grid_nodes(rois: int, side: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """All cells of a level, in row-major order of (roi, row, col).

    Args:
        rois: Number of RoIs R.
        side: Side S of the level.
        device: Where to put the indices.

    Returns:
        ``roi``, ``row`` and ``col``, each ``(R · S², )`` int64.
    """
    index = torch.arange(rois * side * side, device=device)
    return index // (side * side), index // side % side, index % side


def child_nodes(nodes: LevelNodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four children of every node, parent by parent.

    Args:
        nodes: K nodes of one level.

    Returns:
        ``roi``, ``row``, ``col`` and ``parent``, each ``(4K,)`` int64; ``parent`` indexes ``nodes``.
    """
    parent = torch.arange(nodes.roi.shape[0], device=nodes.roi.device).repeat_interleave(4)
    quadrant = torch.arange(4, device=nodes.roi.device).repeat(nodes.roi.shape[0])
    row = 2 * nodes.row[parent] + quadrant // 2
    col = 2 * nodes.col[parent] + quadrant % 2
    return nodes.roi[parent], row, col, parent


def rank_in_roi(roi: Tensor, score: Tensor | None = None) -> Tensor:
    """Rank of each node among the nodes of its RoI, the highest score first.

    Args:
        roi: ``(K,)`` int64.
        score: ``(K,)`` float; ties keep their order. None ranks the nodes in the order in which they come.

    Returns:
        ``(K,)`` int64, 0 for the highest score of each RoI.
    """
    if score is None:
        order = torch.argsort(roi, stable=True)
    else:
        order = torch.argsort(score, descending=True, stable=True)
        order = order[torch.argsort(roi[order], stable=True)]
    counts = torch.bincount(roi) if roi.numel() else roi
    start = counts.cumsum(0) - counts
    rank = torch.empty_like(roi)
    rank[order] = torch.arange(roi.shape[0], device=roi.device) - start[roi[order]]
    return rank


KEY_SIDE = 7
"""Side of the grid of keys that the reference tokens share where attention has a key for each tree."""


def reference_keys(rois: int, device: torch.device | str = "cpu") -> Tensor:
    """The key that each reference token is part of, 2×2 tokens each, ``(R · 14²,)`` int64 below ``KEY_SIDE²``."""
    _, row, col = grid_nodes(rois, REFERENCE_SIDE, device)
    share = REFERENCE_SIDE // KEY_SIDE
    return row // share * KEY_SIDE + col // share


def tree_cells(row: Tensor, col: Tensor, level: int) -> Tensor:
    """The cell of level 0 that nodes of a level lie in, ``(K,)`` int64: row by row, below 28²."""
    return (row >> level) * ROOT_SIDE + (col >> level)


def tree_keys(roi: Tensor, cell: Tensor, rois: int) -> Tensor:
    """The key that each node is part of: one for each tree, which is a cell of level 0 with all nodes that lie in it.

    Args:
        roi: ``(K,)`` int64.
        cell: ``(K,)`` int64, from :func:`tree_cells`.
        rois: Number of RoIs R.

    Returns:
        ``(K,)`` int64; those of a RoI follow its reference tokens' without a gap, in the order of their cells.
    """
    has_nodes = torch.zeros((rois, ROOT_SIDE**2), dtype=torch.bool, device=roi.device)
    has_nodes[roi, cell] = True
    return KEY_SIDE**2 - 1 + has_nodes.cumsum(1)[roi, cell]


def take_nodes(nodes: LevelNodes, index: Tensor) -> LevelNodes:
    """The nodes at ``index``, ``(K',)`` int64."""
    return replace(
        nodes,
        roi=nodes.roi[index],
        row=nodes.row[index],
        col=nodes.col[index],
        parent=nodes.parent[index],
        logits=nodes.logits[index],
    )


PADDING = 0.1
"""Share of a sequence that may be padding, for the sake of a larger batch."""

SMALL_BATCH = 4096
"""Padded tokens up to which a batch is not split for that."""


def length_groups(quadtree: Sequence[LevelNodes], rois: int, token_budget: int) -> Iterator[Tensor]:
    """Group the RoIs that have nodes into batches of similar sequence length.

    Args:
        quadtree: Nodes of each level.
        rois: Number of RoIs R.
        token_budget: Padded tokens per batch; a longer single sequence is a batch of its own.

    Yields:
        RoI indices ``(B,)`` int64; RoIs without a node appear in no batch.
    """
    if not quadtree:
        return
    lengths = torch.zeros(rois, dtype=torch.long, device=quadtree[0].roi.device)
    for nodes in quadtree:
        lengths += torch.bincount(nodes.roi, minlength=rois)
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes = (lengths[order] + REFERENCE_SIDE**2).tolist()
    used = int((lengths > 0).sum())
    start = 0
    while start < used:
        stop = min(used, start + max(1, token_budget // sizes[start]))  # the first of a batch is its longest
        # Attention pays for padding by its square: sequences much shorter than the longest wait for the next batch.
        while (stop - start) * sizes[start] > SMALL_BATCH and sizes[stop - 1] < (1 - PADDING) * sizes[start]:
            stop -= 1
        yield order[start:stop]
        start = stop


def node_centres(row: Tensor, col: Tensor, side: int) -> Tensor:
    """Centres of cells relative to the RoI.

    Args:
        row: ``(K,)`` int64.
        col: ``(K,)`` int64.
        side: Side of the level.

    Returns:
        ``(K, 2)`` float32 in [0, 1], (x, y).
    """
    return (torch.stack([col, row], dim=1).float() + 0.5) / side


def propagate(
    coarse: Sequence[Tensor], quadtree: Sequence[LevelNodes], probs: Sequence[Tensor], hand_down: bool = True
) -> tuple[Tensor, Tensor]:
    """Write refined nodes into the mask, level by level, handing each level down to the quadrants of the next.

    Mask Transfiner, Sec. 3.2 (quadtree propagation): from the root level on, refined values are written and passed by
    nearest neighbour to the four children, until the finest level is reached.

    Args:
        coarse: Coarse mask probabilities of each level, ``(R, S_l, S_l)``, coarsest first; at least one.
        quadtree: Nodes of each level; one level for each map of ``coarse``, or none at all.
        probs: Refined probabilities of each level's nodes, ``(K_l,)``.
        hand_down: False writes only the nodes of the finest level, at which they stand (paper, Table 8).

    Returns:
        ``(R, S, S)`` refined probabilities at the finest level, and ``(R, S, S)`` bool, true where a node or one of
        its ancestors was refined.

    Note:
        Cells without a refined node or ancestor take the coarse mask *of their own level*. Where the coarse mask is
        itself only 28×28, that is its upsampled value, as in the paper; where the caller's mask is finer, nothing of
        it is lost.
    """
    refined = coarse[0]
    touched = torch.zeros_like(refined, dtype=torch.bool)
    for level, base in enumerate(coarse):
        if level:
            touched = double_nearest(touched)
            refined = torch.where(touched, double_nearest(refined), base) if hand_down else base
            if not hand_down:
                touched = torch.zeros_like(touched)
        if level < len(quadtree):
            nodes = quadtree[level]
            index = (nodes.roi, nodes.row, nodes.col)
            refined = refined.index_put(index, probs[level].to(refined.dtype))
            touched = touched.index_put(index, torch.ones_like(nodes.roi, dtype=torch.bool))
    return refined, touched


def propagate_corrections(
    coarse_logits: Sequence[Tensor], quadtree: Sequence[LevelNodes], logits: Sequence[Tensor], hand_down: bool = True
) -> tuple[Tensor, Tensor]:
    """Propagation for a decoder that corrects: what is handed down is the correction, not the value.

    A quadrant without a node of its own adds its parent's correction to its own coarse logit. A correction of zero so
    leaves every finer detail of the coarse mask as it is, which handing down the parent's value would blur.

    Args:
        coarse_logits: Coarse mask logits of each level, ``(R, S_l, S_l)``, coarsest first; at least one.
        quadtree: Nodes of each level; one level for each map of ``coarse_logits``, or none at all.
        logits: Refined logits of each level's nodes, ``(K_l,)``.
        hand_down: False writes only the nodes of the finest level.

    Returns:
        ``(R, S, S)`` refined logits at the finest level, and ``(R, S, S)`` bool, true where a node or one of its
        ancestors was refined.
    """
    correction = torch.zeros_like(coarse_logits[0])
    touched = torch.zeros_like(correction, dtype=torch.bool)
    for level, base in enumerate(coarse_logits):
        if level:
            correction, touched = double_nearest(correction), double_nearest(touched)
            if not hand_down:
                correction, touched = torch.zeros_like(correction), torch.zeros_like(touched)
        if level < len(quadtree):
            nodes = quadtree[level]
            index = (nodes.roi, nodes.row, nodes.col)
            correction = correction.index_put(index, logits[level].to(base.dtype) - base[index])
            touched = touched.index_put(index, torch.ones_like(nodes.roi, dtype=torch.bool))
    return coarse_logits[-1] + correction, touched
