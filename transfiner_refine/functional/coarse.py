"""Coarse masks at the resolutions of the quadtree.

R RoIs, S side of the finest level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COARSE_LOGIT_LIMIT = 3.0
"""Coarse masks are often binary; their logits are limited so that a correction can overturn them."""


def coarse_levels(coarse: Tensor, depth: int) -> list[Tensor]:
    """Coarse mask probabilities at every quadtree level, by averaging quadrants.

    Args:
        coarse: ``(R, S, S)`` float, the finest level that is wanted, ``S = 28 · 2^(depth - 1)``; 28 for depth 0.
        depth: Number of levels.

    Returns:
        ``max(depth, 1)`` maps, coarsest (28×28) first.
    """
    maps = [coarse]
    for _ in range(depth - 1):
        maps.append(F.avg_pool2d(maps[-1][:, None], 2)[:, 0])
    return maps[::-1]


def coarse_logits(probs: Tensor) -> Tensor:
    """Logits of coarse probabilities, limited to ±``COARSE_LOGIT_LIMIT``; same shape."""
    return torch.logit(probs.float(), 1e-6).clamp(-COARSE_LOGIT_LIMIT, COARSE_LOGIT_LIMIT)
