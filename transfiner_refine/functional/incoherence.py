"""Incoherent regions: where a mask's label is lost to low resolution (Mask Transfiner, Sec. 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.errors import InvalidInputError


def halve_nearest(mask: Tensor) -> Tensor:
    """Halve a mask's resolution by nearest-neighbour sampling: each 2×2 block keeps its upper left cell.

    Args:
        mask: ``(R, 2S, 2S)``, any dtype.

    Returns:
        ``(R, S, S)``, a view.
    """
    return mask[:, ::2, ::2]


def double_nearest(mask: Tensor) -> Tensor:
    """Double a map's resolution by nearest-neighbour sampling: each cell is handed to its four quadrants.

    Args:
        mask: ``(R, S, S)``, any dtype.

    Returns:
        ``(R, 2S, 2S)``.
    """
    return mask.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def incoherence_map(mask: Tensor) -> Tensor:
    """Mark the cells whose label is lost when the mask's resolution is halved.

    Mask Transfiner, Sec. 3.1, Eq. 1: the mask is sampled down and up again by nearest neighbour, compared with itself
    by XOR, and the differences are OR-pooled over each 2×2 block.

    Args:
        mask: ``(R, 2S, 2S)`` bool, RoI frame.

    Returns:
        ``(R, S, S)`` bool, true where a cell's four children are not all alike.

    Raises:
        InvalidInputError: If the side is odd or ``mask`` is not boolean.
    """
    if mask.dtype != torch.bool:
        raise InvalidInputError(f"expected a boolean mask, got {mask.dtype}: compare probabilities with a threshold")
    if mask.shape[-1] % 2 or mask.shape[-2] % 2:
        raise InvalidInputError(f"expected an even side, got {tuple(mask.shape)}: resample the mask to an even side")
    lost = mask ^ double_nearest(halve_nearest(mask))  # (R, 2S, 2S)
    return lost[:, ::2, ::2] | lost[:, ::2, 1::2] | lost[:, 1::2, ::2] | lost[:, 1::2, 1::2]


def incoherence_levels(mask: Tensor, depth: int) -> list[Tensor]:
    """Incoherence maps of all quadtree levels of a mask, coarsest first.

    Eq. 1 applied along the nearest-neighbour chain: the mask of level ``l`` is that of level ``l + 1`` sampled down,
    and level ``l`` is incoherent where its children's labels differ.

    Args:
        mask: ``(R, S, S)`` bool, RoI frame, at twice the side of the finest level: ``S = 28 · 2^depth``.
        depth: Number of levels.

    Returns:
        ``depth`` maps ``(R, 28 · 2^l, 28 · 2^l)`` bool.
    """
    maps: list[Tensor] = []
    for _ in range(depth):
        maps.append(incoherence_map(mask))
        mask = halve_nearest(mask)
    return maps[::-1]


def cover_children(maps: list[Tensor]) -> list[Tensor]:
    """Mark every ancestor of a marked cell, so that marked cells form a quadtree.

    Args:
        maps: Maps ``(R, S_l, S_l)`` bool, coarsest first, each twice the side of the one before.

    Returns:
        As many maps of the same shapes.
    """
    covered = list(maps)
    for level in range(len(maps) - 2, -1, -1):
        below = covered[level + 1]
        children = below[:, ::2, ::2] | below[:, ::2, 1::2] | below[:, 1::2, ::2] | below[:, 1::2, 1::2]
        covered[level] = covered[level] | children
    return covered


def dilate(mask: Tensor, radius: int = 1) -> Tensor:
    """Grow the marked cells by a square of ``2 · radius + 1`` cells.

    Args:
        mask: ``(R, S, S)`` bool.
        radius: Cells in each direction; 0 returns the mask itself.

    Returns:
        ``(R, S, S)`` bool.
    """
    if radius == 0 or mask.numel() == 0:
        return mask
    size = 2 * radius + 1
    for axis, padding in ((1, (0, 0, radius, radius)), (2, (radius, radius))):
        length, padded = mask.shape[axis], F.pad(mask, padding)
        mask = padded.narrow(axis, 0, length)
        for start in range(1, size):
            mask = mask | padded.narrow(axis, start, length)
    return mask


def jitter(mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Grow the marked cells into a random half of their neighbours (paper, Sec. 3.4).

    Each of the four axis neighbours of a marked cell is marked with probability one half, drawn per cell.

    Args:
        mask: ``(R, S, S)`` bool.
        generator: Source of randomness; None takes torch's global one.

    Returns:
        ``(R, S, S)`` bool, a superset of ``mask``.
    """
    padded = F.pad(mask, (1, 1, 1, 1))
    near = padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1] | padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:]
    coin = torch.rand(mask.shape, generator=generator, device=mask.device) < 0.5
    return mask | (near & coin)
