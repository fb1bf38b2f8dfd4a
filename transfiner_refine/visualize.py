"""Pictures of a refinement: masks, before and after, incoherence maps, quadtrees.

Every function takes the photo as ``(H, W, 3)`` uint8 RGB and returns a picture of that kind. Small photos are enlarged,
so that single cells and pixels of an outline can be seen. Colours are those of Okabe and Ito, and the map of
incoherence is cividis: both can be told apart with any colour vision.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfiner_refine.canvas import (
    INK,
    MARGIN,
    MIN_WIDTH,
    PAPER,
    SWATCH,
    Color,
    Picture,
    badge,
    caption,
    framed,
    grey,
    mixed,
    padded,
    ramp,
    resized,
    stacked,
)
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.types import Instances, LevelNodes

INSTANCE_COLORS: tuple[Color, ...] = (
    (86, 180, 233),  # sky blue
    (240, 228, 66),  # yellow
    (0, 158, 115),  # bluish green
    (230, 159, 0),  # orange
    (204, 121, 167),  # reddish purple
    (213, 94, 0),  # vermillion
    (0, 114, 178),  # blue
)
LEVEL_COLORS: tuple[Color, ...] = ((0, 114, 178), (86, 180, 233), (240, 228, 66), (213, 94, 0))
"""Quadtree levels, coarsest first."""

PANEL_SIDE = 900
"""Long side that a photo is brought near to; where that enlarges it, by a whole factor."""

QUADTREE_SIDE = 1400
"""The same for quadtrees, whose finest nodes are small."""

FILL = 0.35
"""Opacity of a mask's inside."""

ZOOM_SHARE = 0.16
"""Side of a zoomed region over the long side of the photo."""

ZOOMS = 3


def draw_masks(image: Picture, masks: Tensor | NDArray, *, fill: float = FILL, scale: float = 1.0) -> Picture:
    """Draw masks over a photo, each in its colour with a crisp outline.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        masks: ``(N, H, W)`` bool, or float probabilities of which 0.5 and above count; image frame.
        fill: Opacity of the inside; 0 draws the outlines alone.
        scale: Size of the picture over the size of the photo.

    Returns:
        ``(scale · H, scale · W, 3)`` uint8 RGB.

    Raises:
        InvalidInputError: If the photo is not ``(H, W, 3)`` uint8, or the masks have another size.
    """
    check_photo(image)
    masks = masks.numpy(force=True) if isinstance(masks, Tensor) else np.asarray(masks)
    if masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
        raise InvalidInputError(f"expected masks of shape (N, {image.shape[0]}, {image.shape[1]}), got {masks.shape}")
    picture = resized(image, scale)
    thickness = max(2, round(max(picture.shape) / 500))
    for index, mask in enumerate(masks):
        color = INSTANCE_COLORS[index % len(INSTANCE_COLORS)]
        inside = resized((mask >= 0.5).astype(np.uint8) * 255, scale) >= 128
        if fill:
            picture[inside] = mixed(picture[inside], color, fill)
        # Continued beyond the picture, a mask that its border cuts off has no outline along the border.
        rim = thickness + 2
        continued = cv2.copyMakeBorder(inside.astype(np.uint8), rim, rim, rim, rim, cv2.BORDER_REPLICATE)
        outline, _ = cv2.findContours(continued, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(-rim, -rim))
        # Dark on both sides, the line stays visible on ground of its own colour.
        cv2.drawContours(picture, outline, -1, INK, thickness + 2, cv2.LINE_AA)
        cv2.drawContours(picture, outline, -1, color, thickness, cv2.LINE_AA)
    return picture


def before_after(image: Picture, coarse: Instances, refined: Instances, *, zooms: int = ZOOMS) -> Picture:
    """Show coarse and refined masks side by side, with the regions that changed most enlarged below.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        coarse: Instances before refinement.
        refined: The same instances after it.
        zooms: Regions to enlarge, at most; those that did not change are left out.

    Returns:
        ``(H', W', 3)`` uint8 RGB.

    Raises:
        InvalidInputError: If the photo is not ``(H, W, 3)`` uint8, or the instances are of another size.
    """
    _check_pair(image, coarse, refined)
    scale = panel_scale(image)
    regions = _changed_regions(_binary(coarse.masks), _binary(refined.masks), zooms)
    columns = [
        _column(title, image, instances.masks, regions, scale)
        for title, instances in (("Coarse", coarse), ("Refined", refined))
    ]
    gap = np.full((columns[0].shape[0], MARGIN, 3), PAPER, np.uint8)
    return framed(np.hstack([columns[0], gap, columns[1]]))


def close_ups(image: Picture, coarse: Instances, refined: Instances, *, zooms: int = ZOOMS) -> Picture:
    """Show only the regions that changed most, a row for each: coarse on the left, refined on the right.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        coarse: Instances before refinement.
        refined: The same instances after it.
        zooms: Regions to show, at most; the middle of the photo is shown if nothing changed.

    Returns:
        ``(H', W', 3)`` uint8 RGB.

    Raises:
        InvalidInputError: If the photo is not ``(H, W, 3)`` uint8, or the instances are of another size.
    """
    _check_pair(image, coarse, refined)
    height, width = image.shape[:2]
    side = min(height, width)
    middle = ((width - side) // 2, (height - side) // 2, side)
    regions = _changed_regions(_binary(coarse.masks), _binary(refined.masks), zooms) or [middle]
    columns = []
    for title, instances in (("Coarse", coarse), ("Refined", refined)):
        tiles = [_tile(image, instances.masks, region, MIN_WIDTH) for region in regions]
        parts = [caption(MIN_WIDTH, [(title, None)]), *(padded(tile, 0, MARGIN, 0, MARGIN) for tile in tiles)]
        columns.append(stacked(parts))
    return padded(np.hstack(columns), 0, 0, MARGIN, 0)


def draw_incoherence(image: Picture, refined: Instances) -> Picture:
    """Draw where the incoherence detector expects that 28×28 cells lose the label: its map at quadtree level 0.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        refined: Instances with ``details``, refined with ``return_quadtree=True``.

    Returns:
        ``(H', W', 3)`` uint8 RGB: the photo in grey, under the probability of each cell.

    Raises:
        InvalidInputError: If the photo is not ``(H, W, 3)`` uint8, or the instances carry no details.
    """
    check_photo(image)
    rois, maps = _rois(refined), _details(refined).incoherence
    picture = grey(resized(image, panel_scale(image)))
    height, width = picture.shape[:2]
    probability = np.zeros((height, width), np.float32)
    scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    for roi, cells in zip(rois * scale, maps.float().numpy(force=True), strict=True):
        left, top, right, bottom = np.clip(np.round(roi), 0, [width, height] * 2).astype(int)
        rows = ((np.arange(top, bottom) + 0.5 - roi[1]) / (roi[3] - roi[1]) * cells.shape[0]).astype(int)
        columns = ((np.arange(left, right) + 0.5 - roi[0]) / (roi[2] - roi[0]) * cells.shape[1]).astype(int)
        rows, columns = rows.clip(0, cells.shape[0] - 1), columns.clip(0, cells.shape[1] - 1)
        window = probability[top:bottom, left:right]
        np.maximum(window, cells[rows[:, None], columns[None]], out=window)
    picture = mixed(picture, ramp(probability), probability[..., None] * 0.85)
    bar = ramp(np.linspace(0, 1, 120, dtype=np.float32)[None].repeat(SWATCH, axis=0))
    return framed(stacked([picture, caption(width, [("incoherence of 28 x 28 cells, 0 to 1", bar)])]))


def draw_quadtree(image: Picture, refined: Instances) -> Picture:
    """Draw the nodes of the quadtree as squares of the size of their cells, one colour per level.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        refined: Instances with ``details``, refined with ``return_quadtree=True``.

    Returns:
        ``(H', W', 3)`` uint8 RGB: the photo in grey, under the nodes.

    Raises:
        InvalidInputError: If the photo is not ``(H, W, 3)`` uint8, or the instances carry no details.
    """
    check_photo(image)
    rois, quadtree = _rois(refined), _details(refined).quadtree
    picture = grey(resized(image, panel_scale(image, QUADTREE_SIDE)))
    scale = np.array([picture.shape[1] / image.shape[1], picture.shape[0] / image.shape[0]] * 2)
    entries = []
    for level, nodes in enumerate(quadtree):
        color = LEVEL_COLORS[level % len(LEVEL_COLORS)]
        inside, edges = _squares(node_boxes(nodes, rois) * scale, (picture.shape[0], picture.shape[1]))
        picture[inside] = mixed(picture[inside], color, 0.45)
        picture[edges] = mixed(picture[edges], color, 0.9)
        swatch = np.full((SWATCH, SWATCH, 3), color, np.uint8)
        entries.append((f"level {level}: {len(nodes):,} nodes of {nodes.side} x {nodes.side}", swatch))
    return framed(stacked([picture, caption(picture.shape[1], entries)]))


def node_boxes(nodes: LevelNodes, rois: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes of the cells of nodes.

    Args:
        nodes: K nodes of one level.
        rois: ``(N, 4)`` xyxy, image pixels: the RoIs that ``nodes.roi`` counts.

    Returns:
        ``(K, 4)`` xyxy, image pixels.
    """
    roi = rois[nodes.roi.numpy(force=True)]
    cell = (roi[:, 2:] - roi[:, :2]) / nodes.side
    index = torch.stack([nodes.col, nodes.row], dim=1).numpy(force=True)
    corner = roi[:, :2] + index * cell
    return np.concatenate([corner, corner + cell], axis=1)


def _squares(boxes: NDArray[np.float64], size: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rasterise K boxes at once: what they cover, and the lines around each.

    A running sum over marks at the corners covers any number of boxes in the time of one picture.

    Args:
        boxes: ``(K, 4)`` xyxy, picture pixels.
        size: ``(H, W)`` of the picture.

    Returns:
        ``(H, W)`` bool twice.
    """
    height, width = size
    # A rim of one pixel takes what lies outside.
    left, top, right, bottom = np.clip(np.round(boxes) + 1, 0, [width + 1, height + 1] * 2).astype(int).T
    area = np.zeros((height + 3, width + 3), np.int32)
    rows = np.zeros_like(area)  # horizontal lines
    columns = np.zeros_like(area)  # vertical lines
    for y, sign in ((top, 1), (bottom, -1)):
        np.add.at(area, (y, left), sign)
        np.add.at(area, (y, right), -sign)
    for y in (top, bottom):
        np.add.at(rows, (y, left), 1)
        np.add.at(rows, (y, right + 1), -1)
    for x in (left, right):  # the corners are in the horizontal lines
        np.add.at(columns, (top, x), 1)
        np.add.at(columns, (bottom, x), -1)
    inside = area.cumsum(axis=0).cumsum(axis=1) > 0
    edges = (rows.cumsum(axis=1) + columns.cumsum(axis=0)) > 0
    return inside[1:-2, 1:-2], edges[1:-2, 1:-2]


def _changed_regions(coarse: Tensor, refined: Tensor, count: int) -> list[tuple[int, int, int]]:
    """Find the squares with the most changed pixels, none overlapping another.

    Returns:
        Up to ``count`` of ``(x, y, side)``, image pixels, from left to right.
    """
    changed = (coarse ^ refined).any(dim=0).numpy(force=True).astype(np.float32)
    height, width = changed.shape
    side = min(height, width, max(24, round(ZOOM_SHARE * max(height, width))))
    regions = []
    for _ in range(count):
        # anchor (0, 0): the sum of the square whose upper left corner is the pixel
        sums = cv2.boxFilter(changed, -1, (side, side), anchor=(0, 0), normalize=False, borderType=cv2.BORDER_CONSTANT)
        sums = sums[: height - side + 1, : width - side + 1]
        y, x = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[y, x] < 1:
            break
        # Centred on the change, which the first of many equal squares is not.
        rows, columns = np.nonzero(changed[y : y + side, x : x + side])
        y = int(np.clip(y + (rows.min() + rows.max()) // 2 - side // 2, 0, height - side))
        x = int(np.clip(x + (columns.min() + columns.max()) // 2 - side // 2, 0, width - side))
        regions.append((x, y, side))
        changed[max(0, y - side // 2) : y + 3 * side // 2, max(0, x - side // 2) : x + 3 * side // 2] = 0
    return sorted(regions)


def _column(
    title: str, image: Picture, masks: Tensor, regions: Sequence[tuple[int, int, int]], scale: float
) -> Picture:
    """One half of ``before_after``: caption, photo with masks, enlarged regions."""
    panel = draw_masks(image, masks, scale=scale)
    width = max(panel.shape[1], MIN_WIDTH)
    tiles = []
    tile = (width - (ZOOMS - 1) * MARGIN) // ZOOMS
    for number, (x, y, side) in enumerate(regions, 1):
        part = badge(_tile(image, masks, (x, y, side), tile), number, (10, 10))
        tiles.append(padded(part, MARGIN, 0, 0, MARGIN))
        corner, far = (round(x * scale), round(y * scale)), (round((x + side) * scale), round((y + side) * scale))
        cv2.rectangle(panel, corner, far, INK, 5)
        cv2.rectangle(panel, corner, far, PAPER, 2)
        panel = badge(panel, number, (corner[0] + 6, corner[1] + 6))
    parts = [caption(width, [(title, None)]), panel]
    if tiles:
        parts.append(np.hstack(tiles)[:, :-MARGIN])
    return stacked(parts)


def _tile(image: Picture, masks: Tensor, region: tuple[int, int, int], width: int) -> Picture:
    """One region ``(x, y, side)`` of the photo, enlarged to a square, with the outlines of the masks."""
    x, y, side = region
    crop = np.ascontiguousarray(image[y : y + side, x : x + side])
    part = draw_masks(crop, masks[:, y : y + side, x : x + side], fill=0, scale=width / side)
    return np.asarray(cv2.resize(part, (width, width)), np.uint8)  # at most a pixel of rounding


def _check_pair(image: Picture, coarse: Instances, refined: Instances) -> None:
    check_photo(image)
    if {coarse.image_size, refined.image_size} != {image.shape[:2]} or len(coarse) != len(refined):
        raise InvalidInputError(
            f"expected as many coarse as refined instances of image size {image.shape[:2]}, got {len(coarse)} of "
            f"{coarse.image_size} and {len(refined)} of {refined.image_size}"
        )


def check_photo(image: Picture) -> None:
    """Refuse a photo that is not ``(H, W, 3)`` uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InvalidInputError(f"expected the photo as numpy (H, W, 3) uint8 RGB, got {found}")


def _details(refined: Instances):
    if refined.details is None:
        raise InvalidInputError(
            "expected instances with details, got none: refine with RefineOptions(return_quadtree=True)"
        )
    return refined.details


def _rois(refined: Instances) -> NDArray[np.float64]:
    rois = refined.boxes if refined.rois is None else refined.rois
    return rois.double().numpy(force=True)


def _binary(masks: Tensor) -> Tensor:
    return masks >= 0.5 if masks.is_floating_point() else masks


def panel_scale(image: Picture, side: int = PANEL_SIDE) -> float:
    """Factor that brings a photo near the size of a panel; whole where it enlarges, so that pixels stay squares."""
    factor = side / max(image.shape[:2])
    return float(max(1, round(factor))) if factor > 0.7 else factor
