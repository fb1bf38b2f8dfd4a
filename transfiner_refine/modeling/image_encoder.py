"""The image encoder: EfficientNet-Lite and a light FPN, so that any image can be refined without a detector."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.modeling.efficientnet_lite import EfficientNetLite
from transfiner_refine.types import FeaturePyramid

ACTIVATION_DEVIATION = (10.0, 11.0, 7.0, 4.0, 1.7)
"""Rough standard deviation of the ImageNet backbones' maps on photos, which the laterals expect scaled to one."""


class ImageEncoder(nn.Module):
    """Backbone and FPN from an RGB image to maps of one width at strides 2 to 32.

    Args:
        channels: Width of every output map.
        backbone: One of :data:`~transfiner_refine.modeling.efficientnet_lite.VARIANTS`.

    Note:
        Each map above stride 2 is smoothed by a 3×3 convolution. At stride 2 that convolution alone would cost four
        times as much as all others together, and each node sees its 3×3 neighbourhood anyway, so there the lateral
        and the upsampled map are only added.
    """

    def __init__(self, channels: int, backbone: str = "efficientnet_lite0"):
        super().__init__()
        self.backbone = EfficientNetLite(backbone)
        self.scale = tuple(1 / deviation for deviation in ACTIVATION_DEVIATION)
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
