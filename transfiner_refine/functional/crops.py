"""Cutting image windows to one size, without a loop over windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from transfiner_refine.functional.pooling import halve

OUTSIDE = 127 / 255
"""Grey that fills what lies beyond the image: the image encoder's zero."""


class ImageHalves:
    """An image, half of it, a quarter and so on: each made when it is first needed, and kept.

    Args:
        image: ``(3, H, W)`` uint8, or float in [0, 1].
    """

    def __init__(self, image: Tensor):
        self._image = image
        self._levels: list[Tensor] = []

    def __getitem__(self, level: int) -> Tensor:
        """Level k, ``(1, 3, H / 2**k, W / 2**k)`` float32, less ``OUTSIDE``: what lies beyond is zero."""
        if not self._levels:
            is_bytes = self._image.dtype == torch.uint8
            pixels = self._image.float().div_(255).sub_(OUTSIDE) if is_bytes else self._image.float() - OUTSIDE
            self._levels.append(pixels[None])
        while len(self._levels) <= level:
            last = self._levels[-1]
            # An odd last row or column is averaged with what lies outside, as in the full-size image.
            odd_rows, odd_columns = last.shape[2] % 2, last.shape[3] % 2
            padded = F.pad(last, (0, odd_columns, 0, odd_rows)) if odd_rows or odd_columns else last
            self._levels.append(halve(padded))
        return self._levels[level]

    def forget(self) -> None:
        """Give the memory of all levels back; they are made again when they are asked for."""
        self._levels.clear()


def crop_image(image: Tensor | ImageHalves, windows: Tensor, side: int, samples: int = 2) -> Tensor:
    """Resample windows of an image to squares of one size, averaging when they shrink.

    Each window is read from the first level of a halving image pyramid that is less than twice as fine as the result
    along the window's shorter side.

    Args:
        image: ``(3, H, W)`` float in [0, 1], or its halves where it is cut more than once.
        windows: ``(N, 4)`` float, xyxy pixels; parts beyond the image come out grey (``OUTSIDE``).
        side: Side of the result.
        samples: Samples per pixel of the result and axis; -1 takes one for every pixel of the level, which long windows
            need.

    Returns:
        ``(N, 3, side, side)`` float.
    """
    halves = ImageHalves(image) if isinstance(image, Tensor) else image
    shrink = (windows[:, 2:] - windows[:, :2]).amin(dim=1) / side
    level = torch.log2(shrink.clamp(min=1)).floor().long()
    crops, places = [halves[0].new_empty((0, 3, side, side))], [level[:0]]
    for k in level.unique().tolist():
        index = (level == k).nonzero()[:, 0]
        boxes = torch.cat([windows.new_zeros((index.shape[0], 1)), windows[index] / 2**k], dim=1)
        pixels = halves[k]
        crops.append(roi_align(pixels, boxes.to(pixels.dtype), side, sampling_ratio=samples, aligned=True))
        places.append(index)
    if len(crops) == 2:  # windows of one level are in order already
        return crops[1].add_(OUTSIDE)
    return torch.cat(crops)[torch.cat(places).argsort()].add_(OUTSIDE)
