"""What the incoherence detector and the pixel decoder are trained towards (Mask Transfiner, Sec. 3.1 and 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.functional.incoherence import cover_children, incoherence_levels, jitter


@dataclass(frozen=True)
class Targets:
    """Ground truth of R RoIs at each quadtree level, coarsest first.

    Attributes:
        incoherent: ``(R, S_l, S_l)`` bool, the cells that the detector should find; ancestors are covered.
        coverage: ``(R, S_l, S_l)`` float32 in [0, 1], the share of each cell that the object covers.
    """

    incoherent: tuple[Tensor, ...]
    coverage: tuple[Tensor, ...]


def make_targets(
    truth: Tensor, coarse: Sequence[Tensor], generator: torch.Generator | None = None, mark_wrong: bool = True
) -> Targets:
    """Build the targets of a batch.

    Args:
        truth: ``(R, 2S, 2S)`` bool, RoI frame, at twice the side of the finest level.
        coarse: Coarse probabilities of each level, ``(R, S_l, S_l)``, coarsest first.
        generator: Source of the jitter; None takes torch's global one.
        mark_wrong: Whether root cells whose coarse label is wrong count as incoherent too.

    Note:
        The paper refines the masks of a head that is trained with it, whose errors lie along the outline. A coarse
        mask from anywhere may miss a whole part: its cells are coherent by Eq. 1, but wrong. They join at the root,
        from where one correction reaches all of their quadrants.
    """
    depth = len(coarse)
    maps = [jitter(m, generator) for m in incoherence_levels(truth, depth)]
    coverage = [F.avg_pool2d(truth[:, None].float(), 2)[:, 0]]
    for _ in range(depth - 1):
        coverage.append(F.avg_pool2d(coverage[-1][:, None], 2)[:, 0])
    coverage.reverse()
    if mark_wrong:
        maps[0] = maps[0] | ((coarse[0] >= 0.5) != (coverage[0] >= 0.5))
    return Targets(tuple(cover_children(maps)), tuple(coverage))
