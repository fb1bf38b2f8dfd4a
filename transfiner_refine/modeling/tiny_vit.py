"""TinyViT, the part of the image encoder that knows what belongs together.

Wu et al., *TinyViT* (ECCV 2022), in the form of 5 million weights whose last stage keeps stride 16, as in the image
encoder of MobileSAM (Zhang et al., 2023). Batch norms are folded into the convolutions
(:func:`tiny_vit_from_mobile_sam`): there are no running statistics, and ``train()`` and ``eval()`` compute the same
function. Attention stays within windows and knows only relative positions, so that any size goes through the same
weights.

Letters: B images, C channels, H W image pixels, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfiner_refine.errors import WeightsError

STEM_CHANNELS, STAGE_CHANNELS = 64, (128, 160, 320)
STRIDES = 2, 2, 1
DEPTHS = 2, (2, 6, 2)
HEADS = 4, 5, 10
WINDOWS = 7, 14, 7

MEAN = 123.675 / 255, 116.28 / 255, 103.53 / 255
DEVIATION = 58.395 / 255, 57.12 / 255, 57.375 / 255
_BATCH_NORM_EPS = 1e-5


class _Inverted(nn.Module):
    """Inverted residual of the first stage: 1×1 expansion, depthwise 3×3, linear 1×1 projection."""

    def __init__(self, channels: int, expansion: int = 4):
        super().__init__()
        hidden = channels * expansion
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return F.gelu(maps + self.project(F.gelu(self.depthwise(F.gelu(self.expand(maps))))))


class _Merging(nn.Module):
    """From one stage to the next: 1×1, depthwise 3×3 with the stride, 1×1."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.expand = nn.Conv2d(channels, out_channels, 1)
        self.depthwise = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, groups=out_channels)
        self.project = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.project(F.gelu(self.depthwise(F.gelu(self.expand(maps)))))


class _WindowAttention(nn.Module):
    """Self-attention within windows of side × side cells, with a learned bias for each distance in x and y."""

    def __init__(self, channels: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.zeros(heads, side * side))

    def _biases(self) -> Tensor:
        """``(1, heads, N, N)`` for the N cells of a window."""
        along = torch.arange(self.side, device=self.bias.device)
        along = (along[:, None] - along).abs()
        distances = along[:, None, :, None] * self.side + along[None, :, None, :]
        return self.bias[:, distances.flatten(2).flatten(0, 1)][None]

    def forward(self, cells: Tensor) -> Tensor:
        """``(B, h, w, C)`` to the same; cells beyond the end of the map count as zeros."""
        batch, height, width, channels = cells.shape
        side = self.side
        below, right = -height % side, -width % side
        padded = F.pad(cells, (0, 0, 0, right, 0, below))
        rows, columns = (height + below) // side, (width + right) // side
        windows = padded.view(batch, rows, side, columns, side, channels).transpose(2, 3)
        tokens = self.qkv(self.norm(windows.reshape(-1, side * side, channels)))
        # Each head has its query, key and value side by side.
        query, key, value = tokens.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self._biases().to(query.dtype))
        # Joined rather than reshaped: the layout that attention leaves them in is up to its kernel.
        mixed = self.project(torch.cat(mixed.unbind(1), dim=2))
        mixed = mixed.view(batch, rows, columns, side, side, channels).transpose(2, 3)
        return mixed.reshape(batch, rows * side, columns * side, channels)[:, :height, :width]


class _Block(nn.Module):
    """Window attention, a depthwise 3×3 convolution, and a feed-forward network."""

    def __init__(self, channels: int, heads: int, side: int, expansion: int = 4):
        super().__init__()
        self.attention = _WindowAttention(channels, heads, side)
        self.local = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, expansion * channels)
        self.project = nn.Linear(expansion * channels, channels)

    def forward(self, cells: Tensor) -> Tensor:
        cells = cells + self.attention(cells)
        # A channels-last view either way: nothing is copied.
        cells = self.local(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return cells + self.project(F.gelu(self.expand(self.norm(cells))))


class TinyViT(nn.Module):
    """RGB images to three maps at strides 8, 16 and 16; randomly initialised.

    Attributes:
        channels: Channels of each map.
    """

    channels: ClassVar[tuple[int, ...]] = STAGE_CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList(
            [nn.Conv2d(3, STEM_CHANNELS // 2, 3, 2, 1), nn.Conv2d(STEM_CHANNELS // 2, STEM_CHANNELS, 3, 2, 1)]
        )
        self.inverted = nn.ModuleList([_Inverted(STEM_CHANNELS) for _ in range(DEPTHS[0])])
        before = (STEM_CHANNELS, *STAGE_CHANNELS[:-1])
        shapes = zip(before, STAGE_CHANNELS, STRIDES, strict=True)
        self.merging = nn.ModuleList([_Merging(*shape) for shape in shapes])
        self.stages = nn.ModuleList(
            [
                nn.ModuleList([_Block(channels, heads, side) for _ in range(depth)])
                for channels, heads, side, depth in zip(STAGE_CHANNELS, HEADS, WINDOWS, DEPTHS[1], strict=True)
            ]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps of a batch.

        Args:
            images: ``(B, 3, H, W)`` float, RGB in [0, 1].

        Returns:
            What each stage ends with: ``(B, 128, ceil(H / 8), ceil(W / 8))``, ``(B, 160, ceil(H / 16), ceil(W / 16))``
            and ``(B, 320, ...)`` of the same size.
        """
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        maps = ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)
        maps = self.stem[1](F.gelu(self.stem[0](maps)))
        for block in self.inverted:
            maps = block(maps)
        found = []
        for merging, blocks in zip(self.merging, self.stages, strict=True):
            cells = merging(maps).permute(0, 2, 3, 1)
            for block in blocks:  # type: ignore[union-attr]
                cells = block(cells)
            maps = cells.permute(0, 3, 1, 2)
            found.append(maps)
        return found


def tiny_vit_from_mobile_sam(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of :class:`TinyViT` from MobileSAM's, ``mobile_sam.pt``.

    Args:
        weights: MobileSAM's state dict; of it, ``image_encoder.`` is read, without its neck and its classifier.

    Raises:
        WeightsError: If they are not MobileSAM's.
    """
    own = {k.removeprefix("image_encoder."): v for k, v in weights.items() if k.startswith("image_encoder.")}
    made: dict[str, Tensor] = {}

    def fold(source: str, target: str) -> None:
        scale = own[f"{source}.bn.weight"] / (own[f"{source}.bn.running_var"] + _BATCH_NORM_EPS).sqrt()
        made[f"{target}.weight"] = own[f"{source}.c.weight"] * scale[:, None, None, None]
        made[f"{target}.bias"] = own[f"{source}.bn.bias"] - own[f"{source}.bn.running_mean"] * scale

    def take(source: str, target: str) -> None:
        made[f"{target}.weight"], made[f"{target}.bias"] = own[f"{source}.weight"], own[f"{source}.bias"]

    try:
        fold("patch_embed.seq.0", "stem.0")
        fold("patch_embed.seq.2", "stem.1")
        for number in range(DEPTHS[0]):
            for index, name in enumerate(("expand", "depthwise", "project"), 1):
                fold(f"layers.0.blocks.{number}.conv{index}", f"inverted.{number}.{name}")
        for stage, depth in enumerate(DEPTHS[1]):
            for index, name in enumerate(("expand", "depthwise", "project"), 1):
                fold(f"layers.{stage}.downsample.conv{index}", f"merging.{stage}.{name}")
            for number in range(depth):
                source, target = f"layers.{stage + 1}.blocks.{number}", f"stages.{stage}.{number}"
                for old, new in (
                    ("attn.norm", "attention.norm"),
                    ("attn.qkv", "attention.qkv"),
                    ("attn.proj", "attention.project"),
                    ("mlp.norm", "norm"),
                    ("mlp.fc1", "expand"),
                    ("mlp.fc2", "project"),
                ):
                    take(f"{source}.{old}", f"{target}.{new}")
                fold(f"{source}.local_conv", f"{target}.local")
                made[f"{target}.attention.bias"] = own[f"{source}.attn.attention_biases"]
    except KeyError as error:
        raise WeightsError(f"expected the weights of MobileSAM, got none named {error}: name mobile_sam.pt") from None
    return made
