"""The object head: before the quadtree, it corrects whole regions that the coarse mask has wrong.

Not in the paper. Its incoherent regions lie along the outline that a mask head drew; but a detector also misses parts
and takes in what is not the object's, far from any outline. Which parts belong together is told by the features of a
strong backbone, compared with those inside and outside of the coarse mask, and by the object as a whole. So a small
convolutional network looks at all of the RoI once, at 56×56, and corrects the coarse logits; the quadtree refines what
it leaves.

R RoIs, C channels, S RoI side, H the head's side (``OBJECT_SIDE``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.functional.coarse import coarse_logits
from transfiner_refine.functional.sampling import RoIPyramid

OBJECT_SIDE = 56
"""Side H of the grid on which the head looks at a RoI."""

GROUPS = 8
"""Groups of channels that are normalised together."""

DILATIONS = 1, 2, 4, 8
"""Dilations of the convolutions, which come to see the whole object."""

CORRECTED = 0.05
"""Change of probability from which a cell counts as corrected."""


class ObjectMap(nn.Module):
    """Projects the backbone's maps of strides 4, 8, ... to one map at stride 4.

    Args:
        inputs: Channels of the maps.
        channels: Channels C of the result.
    """

    def __init__(self, inputs: Sequence[int], channels: int):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in inputs)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps ``(B, inputs[k], H / s, W / s)``, of about unit deviation, to ``(B, C, H / 4, W / 4)``."""
        finest, *others = (project(features) for project, features in zip(self.project, maps, strict=True))
        size = finest.shape[2:]
        for other in others:
            finest = finest + F.interpolate(other, size=size, mode="bilinear", align_corners=False)
        return finest


class ObjectHead(nn.Module):
    """Dilated convolutions on a RoI's cells, which predicts a correction to the coarse logits.

    The last layer starts at zero, so that an untrained head changes nothing.

    Args:
        channels: Channels C of the map that it looks at.

    Attributes:
        growth: ``()``, the share of a correction that :meth:`correct` applies where it raises a logit. Set after
            training: what looks like the rest of an object is often another of its kind, in crowds more so than in
            training.
    """

    growth: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("growth", torch.ones(()))
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.compare = nn.Linear(2 * channels, 2 * channels)
        # Logit and probability of the coarse mask, likeness to what is inside and outside of it.
        self.masks = nn.Conv2d(4, channels, 3, padding=1)
        self.layers = nn.ModuleList(_layer(channels, dilation) for dilation in DILATIONS)
        self.out = nn.Conv2d(channels + 2, 1, 1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, coarse: Tensor) -> Tensor:
        """Correct R coarse masks.

        Args:
            features: ``(R, C, H, H)``, the map within each RoI.
            coarse: ``(R, H, H)`` float32 coarse probabilities.

        Returns:
            ``(R, H, H)`` float32, to be added to the coarse logits.
        """
        features = self.norm(features)
        mask = coarse[:, None].to(features.dtype)
        inside, outside = (_mean(features, share) for share in (mask, 1 - mask))  # (R, C)
        likeness = [F.cosine_similarity(features, x[:, :, None, None], dim=1)[:, None] for x in (inside, outside)]
        factor, offset = self.compare(torch.cat([inside, outside], dim=1))[:, :, None, None].chunk(2, dim=1)
        logits = coarse_logits(coarse)[:, None].to(features.dtype)
        masks = self.masks(torch.cat([logits / 4, mask, *likeness], dim=1))
        x = F.relu(features * (1 + factor) + offset + masks)
        for layer in self.layers:
            x = x + layer(x)
        return self.out(torch.cat([x, *likeness], dim=1))[:, 0].float()

    def correct(self, roi_pyramid: RoIPyramid, coarse: Tensor) -> Tensor:
        """Correct the coarse masks of R RoIs at any resolution.

        Args:
            roi_pyramid: RoIs with the image encoder's object map.
            coarse: ``(R, S, S)`` float32 coarse probabilities.

        Returns:
            ``(R, S, S)`` float32 probabilities.
        """
        side = coarse.shape[-1]
        correction = self(roi_pyramid.objects(OBJECT_SIDE), _resized(coarse, OBJECT_SIDE))
        correction = torch.where(correction > 0, correction * self.growth, correction)
        logits = coarse_logits(coarse)
        corrected = torch.sigmoid(logits + _resized(correction, side))
        # The limits of the logits are no correction.
        return torch.where((corrected - torch.sigmoid(logits)).abs() > CORRECTED, corrected, coarse)


def _mean(features: Tensor, share: Tensor) -> Tensor:
    """Mean ``(R, C)`` of features ``(R, C, H, H)``, weighted ``(R, 1, H, H)``."""
    return (features * share).sum(dim=(2, 3)) / share.sum(dim=(2, 3)).clamp(min=1)


def _layer(channels: int, dilation: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, channels), nn.ReLU(inplace=True))


def _resized(maps: Tensor, side: int) -> Tensor:
    """``(R, S, S)`` to ``(R, side, side)``: mean of the cells where it shrinks, bilinear where it grows."""
    if side < maps.shape[-1]:
        return F.adaptive_avg_pool2d(maps[:, None], side)[:, 0]
    return F.interpolate(maps[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]
