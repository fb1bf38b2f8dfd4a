"""The image encoder: a backbone and a light FPN, so that any image can be refined without a detector."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.efficientnet_lite import VARIANTS, EfficientNetLite
from transfiner_refine.modeling.tiny_vit import TinyViT
from transfiner_refine.types import FeaturePyramid

TINY_VIT = "tiny_vit"
BACKBONES = (*VARIANTS, TINY_VIT)

ACTIVATION_DEVIATION = (10.0, 11.0, 7.0, 4.0, 1.7)
"""Rough standard deviation of EfficientNet-Lite's maps on photos, which the laterals expect scaled to one."""

TINY_VIT_DEVIATION = (1.0, 1.0, 2.3)
"""The same of TinyViT's maps."""

RESIZED = 7, 8
"""What TinyViT sees of the image's size: a crop of 256 pixels is 224 wide, so that the windows fit without padding.

At 448 pixels, for four times the time, a refiner is no better.
"""

CELL = 16
"""Stride of TinyViT's coarsest map."""

FINE_STAGES = 3
"""Stages of EfficientNet-Lite that go along with TinyViT: strides 2 to 8."""


class TinyViTBackbone(nn.Module):
    """TinyViT on the resized image for what belongs together, and EfficientNet-Lite0's first stages for edges.

    Attributes:
        channels: Channels of each map.
        deviation: Rough standard deviation of each map on photos.
        unit: Sides of an image that are multiples of this are resized to whole windows of TinyViT, as those of a crop.
    """

    strides: ClassVar[tuple[int, ...]] = EfficientNetLite.strides
    unit: ClassVar[int] = 128
    deviation: ClassVar[tuple[float, ...]] = (ACTIVATION_DEVIATION[0], 1.0, 1.0, 1.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.fine = EfficientNetLite("efficientnet_lite0", FINE_STAGES)
        self.tiny_vit = TinyViT()
        wide, narrow = self.tiny_vit.channels[-1], self.fine.channels
        eighth, *coarse = self.tiny_vit.channels
        self.channels = (narrow[0], narrow[1] + eighth, narrow[2] + sum(coarse), wide, wide)
        self._is_frozen = False

    def forward(self, images: Tensor) -> list[Tensor]:
        """Five maps, as :meth:`EfficientNetLite.forward` gives."""
        finest, *maps = self.fine(images)
        maps = [x / d for x, d in zip(maps, ACTIVATION_DEVIATION[1:], strict=False)]
        # In whole cells of its coarsest map, or they would lie beside those of the other maps.
        grown, by = RESIZED
        half = by * CELL // 2
        size = [max(1, (grown * side + half) // (by * CELL)) * CELL for side in images.shape[2:]]
        resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_frozen):
            found = [x / d for x, d in zip(self.tiny_vit(resized), TINY_VIT_DEVIATION, strict=True)]
        placed = [
            F.interpolate(x, size=maps[index].shape[2:], mode="bilinear", align_corners=False)
            for x, index in zip(found, (0, 1, 1), strict=True)
        ]
        half = F.avg_pool2d(placed[2], 2, ceil_mode=True, count_include_pad=False)
        quarter = F.avg_pool2d(half, 2, ceil_mode=True, count_include_pad=False)
        return [finest, torch.cat([maps[0], placed[0]], 1), torch.cat([maps[1], *placed[1:]], 1), half, quarter]

    def freeze(self, stages: int) -> None:
        """As :meth:`EfficientNetLite.freeze`; TinyViT goes with the first stage."""
        self.fine.freeze(min(stages, FINE_STAGES))
        self._is_frozen = stages > 0
        self.tiny_vit.requires_grad_(not self._is_frozen)


class ImageEncoder(nn.Module):
    """Backbone and FPN from an RGB image to maps of one width at strides 2 to 32.

    Args:
        channels: Width of every output map.
        backbone: One of ``BACKBONES``.

    Raises:
        InvalidInputError: If there is no such backbone.

    Note:
        Each map above stride 2 is smoothed by a 3×3 convolution. At stride 2 that convolution alone would cost four
        times as much as all others together, and each node sees its 3×3 neighbourhood anyway, so there the lateral
        and the upsampled map are only added.
    """

    def __init__(self, channels: int, backbone: str = "efficientnet_lite0"):
        super().__init__()
        if backbone not in BACKBONES:
            raise InvalidInputError(f"expected a backbone among {BACKBONES}, got {backbone!r}")
        self.backbone = TinyViTBackbone() if backbone == TINY_VIT else EfficientNetLite(backbone)
        deviations = ACTIVATION_DEVIATION if isinstance(self.backbone, EfficientNetLite) else self.backbone.deviation
        self.scale = tuple(1 / deviation for deviation in deviations)
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in self.backbone.channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in self.backbone.channels[1:])

    def forward(self, images: Tensor) -> FeaturePyramid:
        """Encode a batch.

        Args:
            images: ``(B, 3, H, W)`` float, RGB in [0, 1].

        Returns:
            Maps ``(B, C, ceil(H / s), ceil(W / s))`` for s = 2, 4, 8, 16, 32.
        """
        features = self.backbone(images)
        merged = self._lateral(features, -1)
        maps = [F.relu(self.smooth[-1](merged), inplace=True)]
        for index in range(len(features) - 2, -1, -1):
            height, width = features[index].shape[2:]
            # Each coarse cell covers exactly two fine ones; an odd map's last cell covers one.
            above = F.interpolate(maps[0], scale_factor=2.0, mode="nearest")[:, :, :height, :width]
            merged = self._lateral(features, index).add_(above)
            maps.insert(0, F.relu(self.smooth[index - 1](merged) if index else merged, inplace=True))
        return FeaturePyramid(tuple(maps), self.backbone.strides, source="image_encoder")

    def _lateral(self, features: Sequence[Tensor], index: int) -> Tensor:
        """The lateral convolution of a map brought to unit deviation, by way of the layer's few weights."""
        layer = self.lateral[index]
        assert isinstance(layer, nn.Conv2d)
        return F.conv2d(features[index], layer.weight * self.scale[index], layer.bias)
