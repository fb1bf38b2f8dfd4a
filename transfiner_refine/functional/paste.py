"""Between the image frame and the RoI frame: cropping masks into RoIs and pasting probabilities back.

N instances, H×W image pixels, S RoI side. No step loops over instances; large inputs go through in groups that bound
memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from transfiner_refine.functional.incoherence import dilate
from transfiner_refine.functional.sampling import bilinear_rows

CROP_PIXELS = 1 << 22
"""Mask pixels turned to float at once while cropping (16 MB)."""

PASTE_PIXELS = 1 << 20
"""Image pixels whose RoI coordinates are held at once while pasting (about 100 MB)."""

LEAST_CHANGE = 0.15
"""Change of the interpolated probability from which a pixel's new label is believed."""


def crop_masks(masks: Tensor, rois: Tensor, side: int) -> Tensor:
    """Average image-frame masks over the cells of their RoIs.

    Args:
        masks: ``(N, H, W)`` bool, or float probabilities.
        rois: ``(N, 4)`` float, xyxy pixels, image frame; may reach beyond the image, where the mask is zero from half a
            pixel on (RoIAlign's rule).
        side: Cells per side S.

    Returns:
        ``(N, S, S)`` float32 probabilities, RoI frame.
    """
    count, height, width = masks.shape
    out = torch.zeros((count, side, side), dtype=torch.float32, device=masks.device)
    group = max(1, CROP_PIXELS // max(1, height * width))
    for start in range(0, count, group):
        part = masks[start : start + group].float()[:, None]
        index = torch.arange(part.shape[0], device=masks.device, dtype=torch.float32)[:, None]
        boxes = torch.cat([index, rois[start : start + group].float()], dim=1)
        # Adaptive sampling takes one sample per pixel of a cell, which is the average over the cell.
        out[start : start + group] = roi_align(part, boxes, side, sampling_ratio=-1, aligned=True)[:, 0]
    return out


def crop_box_masks(probs: Tensor, boxes: Tensor, rois: Tensor, side: int) -> Tensor:
    """Resample box-frame probabilities into RoIs that differ from the boxes.

    Args:
        probs: ``(N, S0, S0)`` float, frame of ``boxes``.
        boxes: ``(N, 4)`` float, xyxy pixels, image frame.
        rois: ``(N, 4)`` float, xyxy pixels, image frame.
        side: Cells per side S of the result.

    Returns:
        ``(N, S, S)`` float32 probabilities, RoI frame; beyond the box they fall to zero within half a cell of
        ``probs``.
    """
    corner, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    scale = probs.shape[-1] / size
    # A rim of zeros, one cell wide, lets the probability fall to zero across the box edge instead of being repeated.
    in_probs = torch.cat([(rois[:, :2] - corner) * scale, (rois[:, 2:] - corner) * scale], dim=1) + 1
    return crop_masks(F.pad(probs, (1, 1, 1, 1)), in_probs, side)


def paste(
    probs: Tensor,
    rois: Tensor,
    masks: Tensor,
    threshold: float = 0.5,
    where: Tensor | None = None,
    before: Tensor | None = None,
    index: Tensor | None = None,
) -> None:
    """Write RoI-frame probabilities, thresholded or as they are, into image-frame masks, in place.

    Probabilities are interpolated bilinearly between cell centres (``align_corners=False``); a pixel belongs to a RoI
    if its centre does.

    Args:
        probs: ``(N, S, S)`` float, RoI frame.
        rois: ``(N, 4)`` float, xyxy pixels, image frame.
        masks: ``(N, H, W)``, or more with ``index``, contiguous, written to: bool, or float to take the probabilities
            themselves.
        threshold: Probability from which a pixel belongs to the mask.
        where: ``(N, S, S)`` bool, the cells whose pixels are written; None writes the whole RoI.
        before: ``(N, S, S)`` float, the same cells before they were refined. A pixel is written only where its
            interpolated probability has changed by more than :data:`LEAST_CHANGE`: a mask of pixels has detail that
            cells average away, and where nothing was refined it stays. None writes all.
        index: ``(N,)`` int64, the masks that are written to; None if there are N.
    """
    height, width = masks.shape[1:]
    side = probs.shape[-1]
    if probs.shape[0] == 0:
        return
    if before is not None:
        # What is interpolated changes no more than the cells around: most pixels need not be looked at.
        moved = dilate((probs - before).abs() > LEAST_CHANGE)
        where = moved if where is None else where & moved
    limit = rois.new_tensor([width, height]).repeat(2)
    # The first pixel centre at or right of an edge e is pixel ceil(e - 0.5).
    edges = torch.ceil(rois.float() - 0.5).clamp(min=0).minimum(limit).long()  # (N, 4)
    columns, rows = edges[:, 2] - edges[:, 0], edges[:, 3] - edges[:, 1]
    flat, values = masks.view(-1), probs.reshape(-1)
    chosen = None if where is None else where.reshape(-1)

    # Lines: one entry per (instance, image row). A line is the unit of grouping, so memory is bounded for any image.
    instance = torch.arange(rois.shape[0], device=rois.device).repeat_interleave(rows)
    first = rows.cumsum(0) - rows
    y = torch.arange(instance.shape[0], device=rois.device) - first[instance] + edges[instance, 1]
    ends = columns[instance].cumsum(0)
    cell_size = (rois[:, 2:] - rois[:, :2]).float() / side
    start, lines = 0, instance.shape[0]
    while start < lines:
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, done + PASTE_PIXELS, right=True)))
        line, part_y = instance[start:stop], y[start:stop]
        length = columns[line]
        offset = length.cumsum(0) - length
        pixel_line = torch.arange(line.shape[0], device=rois.device).repeat_interleave(length)
        pixel_instance = line[pixel_line]
        part_x = torch.arange(pixel_line.shape[0], device=rois.device)
        part_x = part_x - (offset - edges[line, 0])[pixel_line]
        line_v = (part_y + 0.5 - rois[line, 1]) / cell_size[line, 1]
        u = (part_x + 0.5 - rois[pixel_instance, 0]) / cell_size[pixel_instance, 0]
        v = line_v[pixel_line]
        pixel_mask = pixel_instance if index is None else index[pixel_instance]
        target = (pixel_mask * height + part_y[pixel_line]) * width + part_x
        if chosen is not None:
            cell = (pixel_instance * side + v.long().clamp(max=side - 1)) * side + u.long().clamp(max=side - 1)
            keep = chosen[cell].nonzero()[:, 0]
            u, v, target, pixel_instance = u[keep], v[keep], target[keep], pixel_instance[keep]
        cells, weights = bilinear_rows(u - 0.5, v - 0.5, side, side)
        cells = cells + (pixel_instance * side * side)[:, None]
        value = (values[cells] * weights).sum(dim=1)
        if before is not None:
            was = (before.reshape(-1)[cells] * weights).sum(dim=1)
            held = flat[target] if masks.dtype == torch.bool else flat[target] >= threshold
            changed = (((value >= threshold) != held) & ((value - was).abs() > LEAST_CHANGE)).nonzero()
            value, target = value[changed[:, 0]], target[changed[:, 0]]
        flat[target] = value >= threshold if masks.dtype == torch.bool else value.to(masks.dtype)
        start = stop
