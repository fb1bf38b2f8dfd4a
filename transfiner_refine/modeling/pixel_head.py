"""The pixel head: after the quadtree, it moves the outline onto the edges of the photo itself.

Not in the paper. Nodes see features of a stride of two pixels or more and decide cells of 112×112; what tells object
from background in the last few pixels is colour. Classical methods that start from refined masks (a dense CRF, a guided
filter, GrabCut) win there what the network leaves, so a small convolutional network learns the same from the photo's
pixels, the refined probabilities, and a colour model of each object. What it finds is filtered at last, guided by the
photo at twice its resolution.

R RoIs, S RoI side, H side at which the network works (``HEAD_SIDE``), P side of the pixel grid (``PIXEL_SIDE``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.functional.edges import colour_log_odds, guided_filter, like_colours
from transfiner_refine.functional.pooling import halve
from transfiner_refine.modeling.transfiner import TransfinerOutput

PIXEL_SIDE = 448
"""Side P of the grid on which a RoI's outline is aligned, whatever the depth of the quadtree."""

HEAD_SIDE = PIXEL_SIDE // 2
"""Side H at which the network works, half of that grid's."""

GUIDED_WINDOW, GUIDED_EPS = 7, 1e-4
"""Window of the guided filter that the network is given, in pixels of half of its side, and regularisation."""

LAST_WINDOW, LAST_HALVINGS = 3, 2
"""Window of the guided filter behind the network, in pixels of the grid, which is halved so many times."""

NEAR_CELLS = 2
"""Root cells from a node to which the outline may move."""

SATURATED = 0.002
"""Probabilities closer to 0 or 1 count as this close, or their logits would drown all else."""


class PixelHead(nn.Module):
    """A U-shaped network on the pixels of a RoI, which predicts a correction to the refined logits.

    Its finest scale works on two by two pixels at once. The last layer starts at zero, so that an untrained head
    changes nothing.

    Args:
        widths: Channels of each scale, finest first; each scale has half the side of the one before.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        # Colours, refined and coarse mask, colour model and guided filter of four pixels, and their vote.
        inputs = 4 * (3 + 4) + 1
        pairs = list(itertools.pairwise(widths))
        self.stem = nn.Sequential(*_layers(inputs, widths[0]), *_layers(widths[0], widths[0]))
        self.down = nn.ModuleList(
            nn.Sequential(*_layers(fine, coarse, stride=2), *_layers(coarse, coarse)) for fine, coarse in pairs
        )
        self.lateral = nn.ModuleList(_convolution(coarse, fine, kernel=1) for fine, coarse in pairs)
        self.up = nn.ModuleList(_layers(width, width) for width in widths[:-1])
        self.out = nn.Conv2d(widths[0], 4, 1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, pixels: Tensor, probs: Tensor, coarse: Tensor) -> Tensor:
        """Align R masks with their pixels.

        Args:
            pixels: ``(R, 3, H, H)`` float32, RGB in [0, 1]; grey beyond the image. Histograms and covariances need the
                precision, whatever that of the weights is.
            probs: ``(R, S, S)`` float32 refined probabilities.
            coarse: ``(R, S, S)`` float32 coarse probabilities.

        Returns:
            ``(R, H, H)`` float32 logits.
        """
        refined, before = enlarge(torch.stack([probs, coarse], dim=1), HEAD_SIDE).unbind(dim=1)
        logits = torch.logit(refined.clamp(SATURATED, 1 - SATURATED))
        odds = colour_log_odds(pixels, refined)
        guided = guided_filter(pixels, refined, GUIDED_WINDOW, GUIDED_EPS)
        masks = torch.stack([logits / 4, 2 * before - 1, odds, 2 * guided - 1], dim=1)
        fours = F.pixel_unshuffle(torch.cat([4 * pixels - 2, masks], dim=1), 2)
        x = torch.cat([fours, like_colours(pixels, refined)[:, None]], dim=1).to(self.out.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = [self.stem(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for lateral, up in zip(reversed(self.lateral), reversed(self.up), strict=True):
            x = up(F.interpolate(lateral(x), scale_factor=2.0, mode="nearest").add_(maps.pop()))
        return logits + F.pixel_shuffle(self.out(x).float(), 2)[:, 0]


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
    # There is no normalisation: without the gain of its ReLU, a stack of these fades out.
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _layers(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, stride), nn.ReLU(inplace=True))


def enlarge(maps: Tensor, side: int = PIXEL_SIDE) -> Tensor:
    """Interpolate ``(R, C, S, S)`` bilinearly to ``(R, C, side, side)``, as pasting does between cell centres."""
    return F.interpolate(maps, size=(side, side), mode="bilinear")


def align(head: PixelHead, pixels: Tensor, output: TransfinerOutput, coarse: Tensor) -> tuple[TransfinerOutput, Tensor]:
    """Align a refinement with the photo, in the cells that nodes touched and around them.

    Args:
        head: The pixel head.
        pixels: ``(R, 3, P, P)`` float32, RGB in [0, 1], RoI frame; grey beyond the image.
        output: The refinement of R RoIs.
        coarse: ``(R, S, S)`` float32 coarse probabilities at the finest level.

    Returns:
        The refinement with its probabilities and touched cells brought up to date, and ``(R, P, P)`` float32
        probabilities of pixels, which are those of the cells where nothing was touched.
    """
    side = coarse.shape[-1]
    refined = enlarge(output.probs[:, None])[:, 0]
    near = F.adaptive_max_pool2d(output.touched[:, None].float(), ROOT_SIDE)
    near = F.max_pool2d(near, 2 * NEAR_CELLS + 1, stride=1, padding=NEAR_CELLS)
    near_cells, near_pixels = (F.interpolate(near, size=(s, s), mode="nearest")[:, 0] > 0 for s in (side, PIXEL_SIDE))
    found = torch.sigmoid(head(halve(pixels), output.probs, coarse))
    found = guided_filter(pixels, enlarge(found[:, None])[:, 0], LAST_WINDOW, GUIDED_EPS, LAST_HALVINGS)
    aligned = torch.where(near_pixels, found, refined)
    correction = F.adaptive_avg_pool2d((aligned - refined)[:, None], side)[:, 0]
    probs = torch.where(near_cells, (output.probs + correction).clamp(0, 1), output.probs)
    return replace(output, probs=probs, touched=output.touched | near_cells), aligned
