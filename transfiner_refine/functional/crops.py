"""Cutting image windows to one size, without a loop over windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

OUTSIDE = 127 / 255
"""Grey that fills what lies beyond the image: the image encoder's zero."""


def crop_image(image: Tensor, windows: Tensor, side: int, samples: int = 2) -> Tensor:
    """Resample windows of an image to squares of one size, averaging when they shrink.

    Each window is read from the first level of a halving image pyramid that is less than twice as fine as the result
    along the window's shorter side.

    Args:
        image: ``(3, H, W)`` float in [0, 1].
        windows: ``(N, 4)`` float, xyxy pixels; parts beyond the image come out grey (``OUTSIDE``).
        side: Side of the result.
        samples: Samples per pixel of the result and axis; -1 takes one for every pixel of the level, which long windows
            need.

    Returns:
        ``(N, 3, side, side)`` float.
    """
    shrink = (windows[:, 2:] - windows[:, :2]).amin(dim=1) / side
    level = torch.log2(shrink.clamp(min=1)).floor().long()
    out = image.new_empty((windows.shape[0], image.shape[0], side, side))
    shifted = image[None] - OUTSIDE
    for k in range(int(level.max()) + 1 if level.numel() else 0):
        if k:
            # An odd last row or column is averaged with what lies outside, as in the full-size image.
            shifted = F.avg_pool2d(F.pad(shifted, (0, shifted.shape[3] % 2, 0, shifted.shape[2] % 2)), 2)
        index = (level == k).nonzero()[:, 0]
        boxes = torch.cat([windows.new_zeros((index.shape[0], 1)), windows[index] / 2**k], dim=1)
        out[index] = roi_align(shifted, boxes.to(shifted.dtype), side, sampling_ratio=samples, aligned=True) + OUTSIDE
    return out
