"""Boxes: continuous pixels, half-open xyxy."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_boxes(boxes: Tensor, margin: float) -> Tensor:
    """Grow each box on all four sides by a share of its own side.

    Args:
        boxes: ``(N, 4)`` float, xyxy pixels.
        margin: Share of the width added left and right, and of the height added above and below.

    Returns:
        ``(N, 4)`` float, xyxy pixels; not clipped to any image.
    """
    size = boxes[:, 2:] - boxes[:, :2]  # (N, 2)
    return torch.cat([boxes[:, :2] - margin * size, boxes[:, 2:] + margin * size], dim=1)


def crop_windows(boxes: Tensor, span: float, side: int) -> Tensor:
    """Square windows centred on boxes, in which each box's long side takes ``span`` of ``side`` pixels.

    Args:
        boxes: ``(N, 4)`` float, xyxy pixels.
        span: Length of a box's long side after the window is resized to ``side``.
        side: Side of the resized window.

    Returns:
        ``(N, 4)`` float, xyxy pixels; windows may reach beyond the image.
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True) * (side / span / 2)
    return torch.cat([centre - half, centre + half], dim=1)


def touches_image(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Whether each box reaches into the image.

    Args:
        boxes: ``(N, 4)`` float, xyxy pixels.
        image_size: ``(H, W)`` pixels.

    Returns:
        ``(N,)`` bool.
    """
    height, width = image_size
    return (boxes[:, 0] < width) & (boxes[:, 1] < height) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)


def within_reach(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Cut off what boxes that reach into the image have farther away from it than it is wide or high.

    There is no mask and no pixel out there, only cells to fill: a wrong box of thousands of pixels would take all
    memory.

    Args:
        boxes: ``(N, 4)`` float, xyxy pixels.
        image_size: ``(H, W)`` pixels.

    Returns:
        ``(N, 4)`` float, xyxy pixels; boxes outside of the image as they were.
    """
    height, width = image_size
    size = boxes.new_tensor([width, height]).repeat(2)
    near = torch.minimum(torch.maximum(boxes, -size), 2 * size)
    return torch.where(touches_image(boxes, image_size)[:, None], near, boxes)
