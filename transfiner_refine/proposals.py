"""Before the first pass: masks that the segmenter proposes for the boxes of an image, in the place of coarse masks.

N instances of an image, n of a group, L side of the segmenter's masks. A proposal that is far from the coarse mask is
left alone: the detector decides which object is meant, the segmenter where it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfiner_refine.functional.crops import OUTSIDE, ImageHalves, crop_image
from transfiner_refine.functional.paste import crop_masks, paste
from transfiner_refine.modeling.segmenter import FRAME, STRIDE, Segmenter

CROP_SIDE = 448
"""Side of the window in which one instance is segmented: whole windows of the encoder's attention."""

CROP_SPAN = 299
"""Pixels of that window that the long side of the box takes."""

LEAST_AGREEMENT = 0.6
"""IoU with the coarse mask from which a proposal is believed."""

WHOLE_WORTH, LEAST_SPAN = 3.0, 128
"""The whole image may cost this many times as much as crops, for it wins more, where objects span so many pixels."""

CPU_GROUP, GROUP = 2, 16
"""Instances that go through the segmenter at once: more are not faster on a CPU."""

NOWHERE = -20.0
"""Logit beyond the map of masks."""


class _Group(NamedTuple):
    """Instances that are decoded together.

    Attributes:
        index: ``(n,)`` int64, the instances.
        embedding: ``(n, C, h, w)``, the segmenter's, of a window around each.
        windows: ``(n, 4)`` float32 xyxy, image pixels: squares that the longer side of the embedding spans.
        scale: ``(n, 1)`` float32, pixels that the segmenter sees per image pixel.
    """

    index: Tensor
    embedding: Tensor
    windows: Tensor
    scale: Tensor


def propose(
    segmenter: Segmenter, image: ImageHalves, boxes: Tensor, masks: Tensor, index: Tensor, encode: str, threshold: float
) -> tuple[Tensor, Tensor]:
    """Write proposals that are believed into the masks of some instances of an image.

    Args:
        segmenter: The network.
        image: The image with its halves.
        boxes: ``(N, 4)`` float32 xyxy, image pixels.
        masks: ``(N, H, W)`` bool coarse masks, written to.
        index: ``(n,)`` int64, the instances.
        encode: ``"crops"``, ``"image"`` or ``"auto"``, as :attr:`RefineOptions.encode`.
        threshold: Probability from which a pixel belongs to a mask.

    Returns:
        ``(N, 2)`` float32, for each proposal its IoU with the coarse mask and the IoU with the true one that the
        segmenter expects, zero for the other instances; and ``(N,)`` bool, whose masks were replaced.
    """
    count, size = boxes.shape[0], (masks.shape[1], masks.shape[2])
    found, replaced = boxes.new_zeros((count, 2)), torch.zeros(count, dtype=torch.bool, device=boxes.device)
    groups = _of_whole if _encodes_whole(size, boxes[index], encode) else _of_crops
    for part, embedding, windows, scale in groups(segmenter, image, boxes, size, index):
        logits, quality = segmenter.decode(embedding, (boxes[part] - windows[:, :2].repeat(1, 2)) * scale)
        height, width = logits.shape[2:]
        side = max(height, width)
        logits = F.pad(logits, (0, side - width, 0, side - height), value=NOWHERE)
        coarse = crop_masks(masks[part], windows, side) >= threshold
        agreement = _agreement(logits > 0, coarse[:, None])  # (n, K)
        best = (quality * agreement.sqrt()).argmax(dim=1, keepdim=True)  # between the segmenter and the detector
        agreement, quality = agreement.gather(1, best), quality.gather(1, best)
        found[part] = torch.cat([agreement, quality], dim=1)
        chosen = (agreement[:, 0] >= LEAST_AGREEMENT).nonzero()[:, 0]
        rows = part[chosen]
        replaced[rows] = True
        masks[rows] = False
        paste(logits[chosen, best[chosen, 0]], windows[chosen], masks, 0.0, index=rows)
    return found, replaced


def _encodes_whole(size: tuple[int, int], boxes: Tensor, encode: str) -> bool:
    """Whether instances are segmented in the image as a whole rather than in crops of it."""
    if encode != "auto":
        return encode == "image"
    scale = FRAME / max(size)
    cost = scale**2 * size[0] * size[1] / (boxes.shape[0] * CROP_SIDE**2)  # beside that of crops
    span = scale * float((boxes[:, 2:] - boxes[:, :2]).amax(dim=1).median())
    return cost < 1 or (cost < WHOLE_WORTH and span >= LEAST_SPAN)


def _of_crops(
    segmenter: Segmenter, image: ImageHalves, boxes: Tensor, size: tuple[int, int], index: Tensor
) -> Iterator[_Group]:
    height, width = size
    for part in index.split(_group(index)):
        low, high = boxes[part].split(2, dim=1)
        side = ((high - low).amax(dim=1, keepdim=True) * (CROP_SIDE / CROP_SPAN)).clamp(min=1, max=max(size))
        # Within the image where it is large enough: the segmenter knows borders on the right and below alone.
        room = (boxes.new_tensor([width, height]) - side).clamp(min=0)
        origin = ((low + high - side) / 2).clamp(min=0).minimum(room)
        windows = torch.cat([origin, origin + side], dim=1)
        pixels = crop_image(image, windows, CROP_SIDE)
        yield _Group(part, _embed(segmenter, pixels), windows, CROP_SIDE / side)


def _of_whole(
    segmenter: Segmenter, image: ImageHalves, boxes: Tensor, size: tuple[int, int], index: Tensor
) -> Iterator[_Group]:
    scale = FRAME / max(size)
    rows, columns = (max(1, round(side * scale)) for side in size)
    pixels = F.interpolate(image[0], size=(rows, columns), mode="bilinear", antialias=rows < size[0])
    beyond = -rows % STRIDE, -columns % STRIDE
    embedding = _embed(segmenter, F.pad(pixels, (0, beyond[1], 0, beyond[0])) + OUTSIDE)
    cells = embedding.new_tensor(embedding.shape[:1:-1]).float()  # columns and rows
    side = CROP_SIDE // STRIDE
    spans = (boxes[index, 2:] - boxes[index, :2]).amax(dim=1) * scale
    fits = (spans <= CROP_SPAN) & (cells >= side).all()
    # What lies within a window of the embedding needs no more of it.
    for part in index[fits].split(_group(index)):
        centre = (boxes[part, :2] + boxes[part, 2:]) * (scale / 2 / STRIDE)
        origin = (centre - side / 2).round().clamp(min=0).minimum(cells - side).long()
        along = torch.arange(side, device=boxes.device)
        x, y = (origin[:, axis, None] + along for axis in range(2))
        window = embedding[0][:, y[:, :, None], x[:, None, :]].transpose(0, 1)
        corner = origin.float() * (STRIDE / scale)
        yield _Group(part, window, torch.cat([corner, corner + CROP_SIDE / scale], dim=1), _column(part, scale))
    longest = float(cells.max()) * STRIDE / scale
    for part in index[~fits].split(_group(index)):
        windows = boxes.new_tensor([0, 0, longest, longest]).expand(part.shape[0], 4)
        yield _Group(part, embedding.expand(part.shape[0], -1, -1, -1), windows, _column(part, scale))


def _group(index: Tensor) -> int:
    return CPU_GROUP if index.device.type == "cpu" else GROUP


def _column(index: Tensor, value: float) -> Tensor:
    return torch.full((index.shape[0], 1), value, dtype=torch.float32, device=index.device)


def _embed(segmenter: Segmenter, pixels: Tensor) -> Tensor:
    dtype = segmenter.queries.dtype
    return segmenter.embed(pixels.to(dtype).contiguous(memory_format=torch.channels_last))


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """IoU of ``(n, K, L, L)`` bool and ``(n, 1, L, L)`` bool: ``(n, K)``, zero where both are empty."""
    return (a & b).sum(dim=(2, 3)).float() / (a | b).sum(dim=(2, 3)).clamp(min=1)
