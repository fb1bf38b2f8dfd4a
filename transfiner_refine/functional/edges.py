"""What the colours of a photo say about a mask: a guided filter, a vote of like colours nearby, and a colour model.

R RoIs, P side of their pixels, which is even. Photos are RGB in [0, 1], float32, as small differences count.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.functional.pooling import halve, window_mean

COLOUR_BINS = 16
"""Bins of each colour channel in the colour model."""

LEAST_SHARE = 1e-4
"""Share of an object's pixels below which a colour says nothing."""

MOST_ODDS = 4.0
"""Log-odds of a colour beyond which it is no surer."""

VOTE_STEPS, VOTE_STRIDE = 3, 3
"""Lattice of the vote: so many steps to each side, of so many cells of half the photo."""

VOTE_COLOUR, VOTE_REACH = 10 / 255, 6.0
"""Deviations of its kernel in colour and in cells."""


def guided_filter(pixels: Tensor, mask: Tensor, window: int, eps: float, halvings: int = 1) -> Tensor:
    """Filter masks with colour photos as guides, fitted at a fraction of the resolution.

    He, Sun, Tang, *Guided Image Filtering*, TPAMI 2013, Eq. 19 to 21: within each window the mask is fitted as a linear
    function of the colours. He, Sun, *Fast Guided Filter*, 2015: the coefficients are smooth and need no full
    resolution.

    Args:
        pixels: ``(R, 3, P, P)`` float32.
        mask: ``(R, P, P)`` float32.
        window: Odd side of the windows, in pixels of the shrunken photo.
        eps: Penalty on the slopes, in squared intensities.
        halvings: How often the photo's side is halved before the filter is fitted.

    Returns:
        ``(R, P, P)`` float32 in [0, 1].
    """
    guide, target = pixels, mask[:, None]
    for _ in range(halvings):
        guide, target = halve(guide), halve(target)
    centre = guide.mean(dim=(2, 3), keepdim=True)
    guide = guide - centre  # covariances of small numbers are exacter
    i, j = torch.triu_indices(3, 3)  # the six distinct products of two colours
    products = guide[:, i] * guide[:, j]
    moments = window_mean(torch.cat([guide, target, products, guide * target], dim=1), window)
    guide_mean, target_mean, product_mean, joint_mean = moments.split([3, 1, 6, 3], dim=1)
    covariance = product_mean - guide_mean[:, i] * guide_mean[:, j]
    shared = joint_mean - guide_mean * target_mean
    slope = _solve(covariance, eps, shared)
    offset = target_mean - (slope * (guide_mean + centre)).sum(dim=1, keepdim=True)
    lines = window_mean(torch.cat([slope, offset], dim=1), window)
    slope, offset = F.interpolate(lines, size=pixels.shape[2:], mode="bilinear").split([3, 1], dim=1)
    return ((slope * pixels).sum(dim=1) + offset[:, 0]).clamp(0, 1)


def like_colours(pixels: Tensor, mask: Tensor) -> Tensor:
    """What the pixels nearby say whose colour is alike: one step of a dense CRF's message, on a coarse lattice.

    Krähenbühl, Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*, NIPS 2011, the
    bilateral kernel of Eq. 3.

    Args:
        pixels: ``(R, 3, P, P)`` float32.
        mask: ``(R, P, P)`` float32 in [0, 1].

    Returns:
        ``(R, P / 2, P / 2)`` float32 in [-1, 1]: where those pixels are object above zero, where there are none zero.
    """
    colours, votes = halve(pixels), 2 * halve(mask[:, None]) - 1
    height, width = votes.shape[2:]
    reach = VOTE_STEPS * VOTE_STRIDE
    around = F.pad(torch.cat([colours, votes], dim=1), (reach, reach, reach, reach), mode="replicate")
    total, weight = torch.zeros_like(votes[:, 0]), torch.ones_like(votes[:, 0])
    steps = range(-reach, reach + 1, VOTE_STRIDE)
    for dy, dx in ((dy, dx) for dy in steps for dx in steps if dy or dx):
        there = around[:, :, reach + dy : reach + dy + height, reach + dx : reach + dx + width]
        apart = (there[:, :3] - colours).square().sum(dim=1) / (2 * VOTE_COLOUR**2)
        kernel = torch.exp(-apart - (dy * dy + dx * dx) / (2 * VOTE_REACH**2))
        weight = weight + kernel
        total = total + kernel * there[:, 3]
    return total / weight


def colour_log_odds(pixels: Tensor, probs: Tensor) -> Tensor:
    """How much more a pixel's colour belongs to the object than to its surroundings, by a histogram of each.

    Args:
        pixels: ``(R, 3, P, P)`` float, RGB in [0, 1].
        probs: ``(R, P, P)`` float, how much each pixel belongs to the object.

    Returns:
        ``(R, P, P)`` float32 in [-1, 1].
    """
    rois = pixels.shape[0]

    def bins(colours: Tensor) -> Tensor:
        channels = (colours * COLOUR_BINS).long().clamp(0, COLOUR_BINS - 1)
        return ((channels[:, 0] * COLOUR_BINS + channels[:, 1]) * COLOUR_BINS + channels[:, 2]).flatten(1)

    # A quarter of the pixels make the histograms just as well.
    samples, weights = bins(halve(pixels)), halve(probs).flatten(1)
    empty = pixels.new_zeros((rois, COLOUR_BINS**3))
    histograms = torch.stack(
        [empty.scatter_add(1, samples, weights), empty.scatter_add(1, samples, 1 - weights)], dim=1
    )
    histograms = histograms.view(2 * rois, 1, COLOUR_BINS, COLOUR_BINS, COLOUR_BINS)
    for axis in (2, 3, 4):  # a colour speaks for its neighbours, too
        padding = [0] * 6
        padding[2 * (4 - axis)] = padding[2 * (4 - axis) + 1] = 1
        below, here, above = (F.pad(histograms, padding).narrow(axis, i, COLOUR_BINS) for i in range(3))
        histograms = 0.25 * below + 0.5 * here + 0.25 * above
    histograms = histograms.view(rois, 2, COLOUR_BINS**3)
    shares = histograms / histograms.sum(dim=2, keepdim=True).clamp(min=1) + LEAST_SHARE
    odds = torch.log(shares[:, 0] / shares[:, 1]).clamp(-MOST_ODDS, MOST_ODDS) / MOST_ODDS
    return odds.gather(1, bins(pixels)).view(rois, *pixels.shape[2:])


def _solve(upper: Tensor, eps: float, right: Tensor) -> Tensor:
    """Solve a symmetric 3×3 system per pixel, by its adjugate.

    Args:
        upper: ``(R, 6, H, W)``, the upper triangles row by row.
        eps: Added to the diagonals.
        right: ``(R, 3, H, W)``.
    """
    a, b, c, d, e, f = upper.unbind(dim=1)
    a, d, f = a + eps, d + eps, f + eps
    adjugate = torch.stack([d * f - e * e, c * e - b * f, b * e - c * d, a * f - c * c, b * c - a * e, a * d - b * b])
    determinant = (a * adjugate[0] + b * adjugate[1] + c * adjugate[2]).clamp(min=eps**3)
    x, y, z = right.unbind(dim=1)
    p, q, r, s, t, u = adjugate
    solution = torch.stack([p * x + q * y + r * z, q * x + s * y + t * z, r * x + t * y + u * z], dim=1)
    return solution / determinant[:, None]
