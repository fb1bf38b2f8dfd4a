"""Two-dimensional sine position of a node inside its RoI."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_position(xy: Tensor, channels: int, turns: float = 64.0) -> Tensor:
    """Encode relative positions by sines and cosines of geometric frequencies.

    Mask Transfiner, Sec. 3.3 (positional encoding of a node). The first half of the channels encodes y, the second x;
    each half holds the sines of all frequencies, then their cosines.

    Args:
        xy: ``(K, 2)`` float in [0, 1], node centres relative to the RoI.
        channels: Width ``C`` of the code, divisible by 4.
        turns: Periods across the RoI at the highest frequency; the lowest makes half a turn.

    Returns:
        ``(K, C)`` float32.

    Note:
        Detection transformers spread the frequencies downwards from one turn. Neighbouring cells of a 112×112 level
        would then differ by 0.06 rad at most, so here they spread upwards, to one turn in about two cells.
    """
    frequencies = channels // 4
    exponent = torch.arange(frequencies, device=xy.device) / max(frequencies - 1, 1)
    rate = math.pi * (2 * turns) ** exponent  # (C/4,) radians across the RoI
    angle = xy.float().flip(1)[:, :, None] * rate  # (K, 2, C/4), y first
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)  # (K, C)
