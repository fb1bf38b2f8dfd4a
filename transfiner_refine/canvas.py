"""What pictures are made of: resized and grey photos, mixed and ramped colours, captions, badges, frames.

Every picture is ``(H, W, 3)`` uint8 RGB. The functions return new pictures and leave those they are given alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Color = tuple[int, int, int]

MARGIN = 12
MIN_WIDTH = 480
"""Captions and zooms are at least this wide, however narrow the photo."""

BAR = 44
"""Height of a line of a caption."""

SWATCH = 20
"""Height of a sample of colour in it."""

PAPER: Color = (255, 255, 255)
INK: Color = (30, 30, 30)


def resized(image: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """A new array of ``scale`` times the size, ``align_corners=False``."""
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    if size == (image.shape[1], image.shape[0]):
        return image.copy()
    method = cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, size, interpolation=method), dtype=np.uint8)


def grey(image: Picture) -> Picture:
    """The photo without colour and contrast to speak of, as ground to draw on."""
    values = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor((values * 0.7 + 25).astype(np.uint8), cv2.COLOR_GRAY2RGB).astype(np.uint8)


def mixed(under: Picture, over: Picture | Color, opacity: float | NDArray) -> Picture:
    """One picture or colour over another; opacity 1 leaves nothing of the one below."""
    return np.round(under + (np.asarray(over, np.float32) - under) * np.asarray(opacity, np.float32)).astype(np.uint8)


def ramp(values: NDArray[np.float32]) -> Picture:
    """Colour values in [0, 1]."""
    levels = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_CIVIDIS), cv2.COLOR_BGR2RGB).astype(np.uint8)


def caption(width: int, entries: Sequence[tuple[str, Picture | None]]) -> Picture:
    """Lines of text on paper, each text behind its swatch; texts that do not fit beside each other go below."""
    rows: list[list[tuple[int, str, Picture | None]]] = [[]]
    width, x = max(width, MIN_WIDTH), 0
    for text, swatch in entries:
        indent = 0 if swatch is None else swatch.shape[1] + 8
        end = x + indent + round(_font().getlength(text))
        if rows[-1] and end > width:
            rows.append([])
            x, end = 0, end - x
        rows[-1].append((x, text, swatch))
        x = end + 32
    strip = np.full((BAR * len(rows), width, 3), PAPER, np.uint8)
    for number, row in enumerate(rows):
        middle = number * BAR + BAR // 2
        for x, text, swatch in row:
            if swatch is not None:
                room = strip[middle - SWATCH // 2 :, x:]
                room[:SWATCH, : swatch.shape[1]] = swatch[:, : room.shape[1]]
                x += swatch.shape[1] + 8
            strip = _written(strip, (x, middle), text, anchor="lm")
    return strip


def badge(picture: Picture, number: int, corner: tuple[int, int]) -> Picture:
    """The picture with a number on a dark ground; ``corner`` is the upper left one, ``(x, y)``."""
    x, y = corner
    marked = cv2.rectangle(picture.copy(), (x, y), (x + 26, y + 28), INK, -1)
    return _written(np.asarray(marked, np.uint8), (x + 13, y + 14), str(number), anchor="mm", color=PAPER)


def stacked(parts: Sequence[Picture]) -> Picture:
    """Parts below each other, on paper as wide as the widest."""
    width = max(part.shape[1] for part in parts)
    return np.vstack([padded(part, 0, 0, 0, width - part.shape[1]) for part in parts])


def framed(picture: Picture) -> Picture:
    """The picture on paper, with a margin all around."""
    return padded(picture, MARGIN, MARGIN, MARGIN, MARGIN)


def padded(picture: Picture, top: int, bottom: int, left: int, right: int) -> Picture:
    """The picture on paper that is so many pixels larger on each side."""
    paper = np.full((picture.shape[0] + top + bottom, picture.shape[1] + left + right, 3), PAPER, np.uint8)
    paper[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return paper


def _written(picture: Picture, place: tuple[int, int], text: str, *, anchor: str, color: Color = INK) -> Picture:
    canvas = Image.fromarray(picture)
    ImageDraw.Draw(canvas).text(place, text, fill=color, font=_font(), anchor=anchor)
    return np.array(canvas)


def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=24)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what `size` gives, with the FreeType of every Pillow wheel
    return font
