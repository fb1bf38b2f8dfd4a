"""Means over small neighbourhoods. Torch's pooling does the same, several times slower on a CPU."""

from torch import Tensor
from torch.nn import functional as F


def halve(maps: Tensor) -> Tensor:
    """Average squares of two by two.

    Args:
        maps: ``(..., H, W)`` float, of even sides.

    Returns:
        ``(..., H / 2, W / 2)``.
    """
    rows = maps[..., ::2, :] + maps[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) * 0.25


def window_mean(maps: Tensor, window: int) -> Tensor:
    """Mean over windows around each place, of what of them lies within the maps.

    Args:
        maps: ``(R, C, H, W)`` float.
        window: Odd side of the windows.

    Returns:
        ``(R, C, H, W)``.
    """
    sums, counts = maps, maps.new_ones((1, 1, *maps.shape[2:]))
    for axis in (2, 3):
        sums, counts = _window_sum(sums, window, axis), _window_sum(counts, window, axis)
    return sums / counts


def _window_sum(maps: Tensor, window: int, axis: int) -> Tensor:
    """Sum over windows along one axis."""
    half, size = window // 2, maps.shape[axis]
    padding = (0, 0, half, half) if axis == 2 else (half, half)
    padded = F.pad(maps, padding)
    total = padded.narrow(axis, 0, size)
    for start in range(1, window):
        total = total + padded.narrow(axis, start, size)
    return total
