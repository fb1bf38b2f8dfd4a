"""What the incoherence detector sees beyond its 3×3 convolutions: the object as a whole, at coarser scales."""

import torch.nn.functional as F
from torch import Tensor, nn


def _convolution(channels: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
    # There is no normalisation: without the gain of its ReLU, a stack of these fades out.
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class WideContext(nn.Module):
    """A U-shaped network over the detector's features, added to them.

    The tower of Sec. 3.1 sees 9 of the 28 cells of a side. For the masks of a head that is trained with it that is
    enough; to tell a part that any detector missed from the background, the whole object and its surroundings count.
    The paper has no such network: ``context_scales = 0`` leaves it out. Its last layer starts at zero, so that it can
    be added to a trained model.

    Args:
        channels: Width C of the features.
        scales: How often the side is halved: 1 reaches 14×14, 2 reaches 7×7.
    """

    def __init__(self, channels: int, scales: int):
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(channels, 2), nn.ReLU(), _convolution(channels), nn.ReLU())
            for _ in range(scales)
        )
        self.up = nn.ModuleList(nn.Sequential(_convolution(channels), nn.ReLU()) for _ in range(scales))
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Add the wide context: ``(R, C, 28, 28)`` to ``(R, C, 28, 28)``."""
        maps = [features]
        for down in self.down:
            maps.append(down(maps[-1]))
        wide = maps.pop()
        for up in self.up:
            wide = up(maps.pop() + F.interpolate(wide, scale_factor=2.0, mode="nearest"))
        return features + self.out(wide)
