"""What happens at each click of the page. Importing this needs Gradio.

The photo and the masks are read from their uploads each time: no two of them can disagree, and nothing is kept of a
visitor but the last refinement.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import gradio as gr
import numpy as np

from transfiner_refine import visualize
from transfiner_refine.canvas import INK, Picture, resized
from transfiner_refine.errors import InvalidInputError, TransfinerError
from transfiner_refine.refiner import Refiner
from transfiner_refine.web import refinement, uploads
from transfiner_refine.web.examples import Example
from transfiner_refine.web.refinement import Refinement

DRAW, BOX, FILES = "Draw it", "Give a box", "Upload it"
"""Where the coarse mask is from."""

BOARD_SIDE = 900
"""Long side of the drawing board: strokes are coarse, and a board as large as a photo would be slow."""

TAP = "Tap a spot on the outline, and see what the node there attends to."

Box = Sequence[float | None]


def shown(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show the package's own errors on the page."""

    @functools.wraps(handler)
    def call(*values: Any) -> Any:
        try:
            return handler(*values)
        except TransfinerError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


class Handlers:
    """The handlers of one page.

    Args:
        refiner: The refiner behind it, used by one visitor at a time.
        examples: What to offer to those who have no photo at hand.
        folder: Where files for downloads are put.
    """

    def __init__(self, refiner: Refiner, examples: Sequence[Example], folder: Path):
        self.refiner = refiner
        self.examples = examples
        self.folder = folder

    def take_example(self, event: gr.SelectData) -> tuple[str, str, list[str]]:
        """Fill in the photo, the source of the mask and its file."""
        example = self.examples[event.index]
        return str(example.photo), FILES, [str(example.results)]

    def take_photo(self, path: str | None) -> tuple[Any, ...]:
        """Put a new photo on the drawing board and forget the box of the old one; put a wrong file away."""
        empty = (None,) * 4
        if path is None:
            return gr.skip(), None, *empty
        try:
            photo = uploads.read_photo(path)
        except InvalidInputError as error:
            gr.Warning(str(error))
            return None, None, *empty
        board = resized(photo, min(1.0, BOARD_SIDE / max(photo.shape)))
        # Were the same photo given back, that would count as a change, without end.
        return gr.skip(), {"background": board, "layers": [], "composite": None}, *empty

    def arrange(self, path: str | None, source: str) -> list[dict[str, Any]]:
        """Show what belongs to a source of the mask; the drawing board needs a photo."""
        drawing = source == DRAW and path is not None
        return [gr.update(visible=visible) for visible in (drawing, source == BOX, source == FILES)]

    @shown
    def preview(self, path: str | None, source: str, files: list[str] | None, *box: float | None) -> dict[str, Any]:
        """Draw a mask from files, or a box as far as it is known."""
        if path is None or source == DRAW or (source == FILES and not files):
            return gr.update(visible=False, value=None)
        photo = uploads.read_photo(path)
        scale = visualize.panel_scale(photo)
        if source == BOX:
            return gr.update(visible=True, value=_with_box(resized(photo, scale), box, scale), label="Box")
        masks, _ = uploads.masks_of_files(files or [], _size(photo))
        return gr.update(
            visible=True, value=visualize.draw_masks(photo, np.stack(masks), scale=scale), label="Coarse mask"
        )

    @shown
    def take_corner(
        self, path: str, source: str, left: float | None, top: float | None, right: float | None, event: gr.SelectData
    ) -> tuple[Any, ...]:
        """Take a tap as a corner of the box: the first of a new one, or the second."""
        if source != BOX:
            return (gr.skip(),) * 4
        scale = visualize.panel_scale(uploads.read_photo(path))
        x, y = (round(value / scale) for value in event.index)
        if left is None or top is None or right is not None:
            return x, y, None, None
        return min(left, x), min(top, y), max(left, x), max(top, y)

    @shown
    def refine(
        self,
        path: str | None,
        source: str,
        files: list[str] | None,
        left: float | None,
        top: float | None,
        right: float | None,
        bottom: float | None,
        board: dict[str, Any] | None,
        levels: int,
        threshold: float,
        accept_all: bool,
    ) -> tuple[Any, ...]:
        """Refine, and fill in all results."""
        if path is None:
            raise InvalidInputError("There is no photo yet: drop one into the first field, or take an example.")
        photo, entries = uploads.read_photo(path), []
        if source == DRAW:
            masks: list[uploads.Mask] = [uploads.mask_of_strokes((board or {}).get("layers") or [], _size(photo))]
        elif source == BOX:
            masks = [uploads.mask_of_box(photo, uploads.check_box((left, top, right, bottom), _size(photo)))]
        else:
            masks, entries = uploads.masks_of_files(files or [], _size(photo))
        options = refinement.options_of(levels, threshold, accept_all)
        done = refinement.refine(self.refiner, photo, masks, name=Path(path).stem, entries=entries, options=options)
        before, after = refinement.before_and_after(done)
        mask_file, json_file = refinement.write_files(done, Path(tempfile.mkdtemp(dir=self.folder)))
        return (
            done,
            None,
            gr.update(visible=False),
            gr.update(visible=True),
            refinement.summary(done),
            (before, after),
            visualize.close_ups(photo, done.coarse, done.refined, zooms=2),
            visualize.draw_incoherence(photo, done.refined),
            visualize.draw_quadtree(photo, done.refined),
            after,
            TAP,
            str(mask_file),
            str(json_file),
        )

    def take_point(self, event: gr.SelectData) -> tuple[float, float]:
        """Take a tap as the place to look from, in pixels of the picture."""
        return event.index[0], event.index[1]

    @shown
    def look(self, done: Refinement | None, point: tuple[float, float] | None, layer: int) -> tuple[Any, Any]:
        """Draw the attention of the node nearest to the last tap."""
        if done is None or point is None:
            return gr.skip(), gr.skip()
        return refinement.look(self.refiner, done, point, layer)


def _size(photo: Picture) -> tuple[int, int]:
    return photo.shape[0], photo.shape[1]


def _with_box(picture: Picture, box: Box, scale: float) -> Picture:
    """Draw a box, or its first corner alone, onto a picture that is the caller's to change."""
    left, top, *far = (None if value is None else round(value * scale) for value in box)
    if left is None or top is None:
        return picture
    for color, thickness in ((INK, 7), (visualize.INSTANCE_COLORS[0], 3)):
        if far[0] is None or far[1] is None:
            cv2.drawMarker(picture, (left, top), color, cv2.MARKER_CROSS, 24, thickness)
        else:
            cv2.rectangle(picture, (left, top), (far[0], far[1]), color, thickness)
    return picture
