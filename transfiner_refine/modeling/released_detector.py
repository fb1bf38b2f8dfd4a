"""The detector of the released checkpoints: Detectron2's Mask R-CNN FPN of 2021, in torchvision's operations.

ResNet-50 or 101 with the stride in the 1×1 convolution and frozen batch norms, plain or deformable from res3 on, an
FPN, a region proposal network and a box head. Modules carry Detectron2's names, so that its tensors load as they are.

All coordinates are pixels of the network's input. B images, C channels, R boxes, A = 3 anchors per place.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, deform_conv2d

from transfiner_refine.functional.sampling import FeatureTable
from transfiner_refine.modeling.released_branch import CHANNELS, CLASSES, ReleasedMaskBranch
from transfiner_refine.modeling.released_layout import BLOCKS, ReleasedConfig
from transfiner_refine.modeling.released_pooling import CellPooler, pyramid_level
from transfiner_refine.types import FeaturePyramid

PIXEL_MEANS = (103.53, 116.28, 123.675)
"""Of the input's channels blue, green and red."""

STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SIDES = (32, 64, 128, 256, 512)
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
"""Height over width."""

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_SCALE = math.log(1000 / 16)

PROPOSALS_PER_LEVEL = 1000
PROPOSALS = 1000
PROPOSAL_NMS = 0.7
DETECTION_NMS = 0.5
BOX_CROP = 7


class _Norm(nn.Module):
    """Frozen batch norm; unlike torchvision's, one pass over the activations, and Detectron2's order of operations."""

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, input: Tensor) -> Tensor:
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(input, mean, variance, self.get_buffer("weight"), self.get_buffer("bias"), eps=1e-5)


class _Conv(nn.Conv2d):
    """Convolution without bias, followed by a frozen batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = _Norm(out_channels)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


class _DeformableConv(_Conv):
    """3×3 convolution at shifted positions, given 18 offsets, or at shifted and weighted ones, given 27."""

    def forward(self, input: Tensor, offsets: Tensor | None = None) -> Tensor:
        assert offsets is not None
        shift, strength = offsets[:, :18], offsets[:, 18:]
        mask = strength.sigmoid() if strength.shape[1] else None
        return self.norm(deform_conv2d(input, shift, self.weight, padding=(1, 1), mask=mask))


class _Bottleneck(nn.Module):
    """Residual block 1×1, 3×3, 1×1; ``offset_channels`` is 0 for a plain 3×3 convolution."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, stride: int, offset_channels: int):
        super().__init__()
        self.shortcut = _Conv(in_channels, out_channels, 1, stride) if in_channels != out_channels else None
        self.conv1 = _Conv(in_channels, channels, 1, stride)
        if offset_channels:
            self.conv2_offset = nn.Conv2d(channels, offset_channels, 3, padding=1)
            self.conv2 = _DeformableConv(channels, channels, 3)
        else:
            self.conv2_offset = None
            self.conv2 = _Conv(channels, channels, 3)
        self.conv3 = _Conv(channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.relu_(self.conv1(features))
        hidden = self.conv2(hidden) if self.conv2_offset is None else self.conv2(hidden, self.conv2_offset(hidden))
        output = self.conv3(F.relu_(hidden))
        return F.relu_(output.add_(features if self.shortcut is None else self.shortcut(features)))


class _ResNet(nn.Module):
    def __init__(self, depth: int, offset_channels: int):
        super().__init__()
        self.stem = nn.ModuleDict({"conv1": _Conv(3, 64, 7, stride=2)})
        in_channels = 64
        for stage, blocks in enumerate(BLOCKS[depth]):
            out_channels = 256 << stage
            layers: list[nn.Module] = []
            for block in range(blocks):
                stride = 2 if stage and block == 0 else 1
                offsets = offset_channels if stage else 0  # res2 is never deformable
                layers.append(_Bottleneck(in_channels, out_channels // 4, out_channels, stride, offsets))
                in_channels = out_channels
            self.add_module(f"res{stage + 2}", nn.Sequential(*layers))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        features = F.max_pool2d(F.relu_(self.stem["conv1"](pixels)), 3, stride=2, padding=1)
        maps = []
        for stage in (2, 3, 4, 5):
            features = self.get_submodule(f"res{stage}")(features)
            maps.append(features)
        return maps


class Backbone(nn.Module):
    """ResNet and feature pyramid network.

    Args:
        depth: 50 or 101.
        offset_channels: Channels of the deformable convolutions' offsets: 18, or 27 if they are modulated; 0 for plain
            convolutions.
    """

    def __init__(self, depth: int, offset_channels: int):
        super().__init__()
        self.bottom_up = _ResNet(depth, offset_channels)
        for level in (2, 3, 4, 5):
            self.add_module(f"fpn_lateral{level}", nn.Conv2d(64 << level, CHANNELS, 1))
            self.add_module(f"fpn_output{level}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Compute the FPN.

        Args:
            pixels: ``(B, 3, H, W)`` float, BGR less the pixel means, H and W multiples of 32.

        Returns:
            p2 to p6, each ``(B, 256, H / s, W / s)`` for strides s of 4 to 64.
        """
        stages = self.bottom_up(pixels)
        maps: list[Tensor] = []
        merged: Tensor | None = None
        for level in (5, 4, 3, 2):
            lateral = self.get_submodule(f"fpn_lateral{level}")(stages[level - 2])
            merged = lateral if merged is None else lateral.add_(F.interpolate(merged, scale_factor=2.0))
            maps.append(self.get_submodule(f"fpn_output{level}")(merged))
        maps.reverse()
        return [*maps, maps[-1][:, :, ::2, ::2]]


class RPNHead(nn.Module):
    """Region proposal head, shared by the levels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.objectness_logits = nn.Conv2d(CHANNELS, len(ANCHOR_RATIOS), 1)
        self.anchor_deltas = nn.Conv2d(CHANNELS, 4 * len(ANCHOR_RATIOS), 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Judge the anchors of one image's level.

        Args:
            features: ``(1, 256, H, W)``.

        Returns:
            ``(H · W · A,)`` objectness logits and ``(H · W · A, 4)`` deltas.
        """
        hidden = F.relu_(self.conv(features))
        logits = self.objectness_logits(hidden)[0].permute(1, 2, 0).flatten()
        return logits, self.anchor_deltas(hidden)[0].permute(1, 2, 0).reshape(-1, 4)

    def propose(self, features: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Propose regions of one image.

        Args:
            features: p2 to p6, each ``(1, 256, H_l, W_l)``.
            size: Height and width of the image without padding.

        Returns:
            ``(R, 4)`` float32 boxes xyxy and ``(R,)`` logits, at most 1000, the highest logit first.
        """
        boxes, scores, levels = [], [], []
        for level, level_features in enumerate(features):
            logits, deltas = self(level_features)
            anchors = level_anchors(level, level_features)
            best, index = logits.float().topk(min(PROPOSALS_PER_LEVEL, logits.shape[0]))
            boxes.append(apply_deltas(anchors[index], deltas[index].float()))
            scores.append(best)
            levels.append(torch.full_like(index, level))
        joined, score, level = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        joined = clip_boxes_to_image(joined, size)
        valid = _has_area(joined) & joined.isfinite().all(dim=1) & score.isfinite()
        joined, score, level = joined[valid], score[valid], level[valid]
        keep = batched_nms(joined, score, level, PROPOSAL_NMS)[:PROPOSALS]
        return joined[keep], score[keep]


class BoxHead(nn.Module):
    """Two fully connected layers over the 7×7 crops."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(CHANNELS * BOX_CROP**2, 1024)
        self.fc2 = nn.Linear(1024, 1024)

    def forward(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """Encode boxes ``(R, 4)`` of one image with maps p2 to p5: ``(R, 1024)``."""
        pyramid = FeaturePyramid(tuple(features), STRIDES[:4])
        roi = torch.arange(boxes.shape[0], device=boxes.device)
        pooler = CellPooler(FeatureTable.of(pyramid), boxes, torch.zeros_like(roi))
        crops = pooler.crop(roi, BOX_CROP, pyramid_level(boxes))
        return F.relu_(self.fc2(F.relu_(self.fc1(crops.flatten(1)))))


class BoxPredictor(nn.Module):
    """Class scores, and a box for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_score = nn.Linear(1024, CLASSES + 1)
        self.bbox_pred = nn.Linear(1024, 4 * CLASSES)

    def detect(
        self, hidden: Tensor, proposals: Tensor, size: tuple[int, int], score_threshold: float, limit: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classify and refine the proposals of one image.

        Args:
            hidden: ``(R, 1024)``, the box head's output.
            proposals: ``(R, 4)`` float32 xyxy.
            size: Height and width of the image without padding.
            score_threshold: Detections have a score above it.
            limit: Most detections, the highest scores first.

        Returns:
            Boxes ``(N, 4)`` float32 xyxy, scores ``(N,)`` and classes ``(N,)`` int64, the highest score first.
        """
        probs = self.cls_score(hidden).float().softmax(dim=1)  # (R, 81), the last is background
        deltas = self.bbox_pred(hidden).float().view(-1, 4)
        boxes = apply_deltas(proposals.repeat_interleave(CLASSES, dim=0), deltas, BOX_WEIGHTS).view(-1, CLASSES, 4)
        valid = boxes.isfinite().all(dim=2).all(dim=1) & probs.isfinite().all(dim=1)
        boxes, scores = clip_boxes_to_image(boxes[valid], size), probs[valid, :CLASSES]
        row, label = (scores > score_threshold).nonzero(as_tuple=True)
        chosen, score = boxes[row, label], scores[row, label]
        keep = batched_nms(chosen, score, label, DETECTION_NMS)[:limit]
        return chosen[keep], score[keep], label[keep]


class ReleasedNetwork(nn.Module):
    """All networks of a released model: the detector's four, and the mask branch."""

    def __init__(self, config: ReleasedConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.depth, (27 if config.modulated else 18) if config.deformable else 0)
        self.rpn_head = RPNHead()
        self.box_head = BoxHead()
        self.box_predictor = BoxPredictor()
        self.mask_branch = ReleasedMaskBranch()


def cell_anchors() -> list[Tensor]:
    """Anchors around the origin: for each level ``(A, 4)`` float32 xyxy."""
    ratio = torch.tensor(ANCHOR_RATIOS, dtype=torch.float64)
    anchors = []
    for side in ANCHOR_SIDES:
        width = (side**2 / ratio).sqrt()
        half = torch.stack([width, width * ratio], dim=1) / 2
        anchors.append(torch.cat([-half, half], dim=1).float())
    return anchors


def level_anchors(level: int, features: Tensor) -> Tensor:
    """Anchors of all places of a level.

    Args:
        level: 0 for p2 to 4 for p6.
        features: ``(1, C, H, W)``, of which only the size counts.

    Returns:
        ``(H · W · A, 4)`` float32 xyxy; the anchors of place (i, j) are centred on the corner of its cell.
    """
    height, width = features.shape[2:]
    rows, columns = (torch.arange(n, device=features.device) * float(STRIDES[level]) for n in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=2).view(-1, 1, 4)
    return (shift + cell_anchors()[level].to(features.device)).view(-1, 4)


def apply_deltas(boxes: Tensor, deltas: Tensor, weights: tuple[float, float, float, float] = (1, 1, 1, 1)) -> Tensor:
    """Move and scale boxes by what a network regressed.

    Args:
        boxes: ``(R, 4)`` float32 xyxy.
        deltas: ``(R, 4)`` float32, shift relative to the box side in x and y, logarithm of the scale in x and y.
        weights: Factors that the network's output has over these.

    Returns:
        ``(R, 4)`` float32 xyxy.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + 0.5 * size
    deltas = deltas / deltas.new_tensor(weights)
    centre = deltas[:, :2] * size + centre
    half = 0.5 * size * deltas[:, 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre - half, centre + half], dim=1)


def _has_area(boxes: Tensor) -> Tensor:
    return cast(Tensor, (boxes[:, 2:] > boxes[:, :2]).all(dim=1))
