"""What the page does with a photo and its coarse masks: refine them, draw what happened, make files of the result."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transfiner_refine import attention, visualize
from transfiner_refine.canvas import Picture
from transfiner_refine.config import RefineOptions
from transfiner_refine.data.coco import Result, boxes_of
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_masks, boxes_from_masks
from transfiner_refine.refiner import Refiner
from transfiner_refine.types import Instances
from transfiner_refine.web.uploads import Mask


@dataclass(frozen=True, eq=False)
class Refinement:
    """One press of the button.

    Attributes:
        name: The photo's name without its suffix.
        photo: ``(H, W, 3)`` uint8 RGB.
        coarse: The masks as they came.
        refined: The same instances, with details.
        entries: Entries of a results file that the masks are from, or nothing.
        options: The choices that were made.
        seconds: Time that the refiner took.
    """

    name: str
    photo: Picture
    coarse: Instances
    refined: Instances
    entries: Sequence[Result]
    options: RefineOptions
    seconds: float


def refine(
    refiner: Refiner,
    photo: Picture,
    masks: Sequence[Mask],
    *,
    name: str,
    entries: Sequence[Result] = (),
    options: RefineOptions,
) -> Refinement:
    """Refine the masks of a photo.

    Args:
        refiner: The refiner.
        photo: ``(H, W, 3)`` uint8 RGB.
        masks: N coarse masks ``(H, W)``, bool or float32.
        name: The photo's name without its suffix.
        entries: N entries of a results file, whose boxes are taken; or nothing.
        options: Choices; ``return_quadtree`` has to be set.

    Raises:
        InvalidInputError: If an input cannot be used.
    """
    size = (photo.shape[0], photo.shape[1])
    stack = as_masks(np.stack(masks), size).data
    boxes = boxes_of(entries or [{}] * len(masks), boxes_from_masks(stack))
    coarse = Instances(boxes=boxes, masks=stack, image_size=size)
    start = time.perf_counter()
    refined = refiner.refine(photo, boxes=boxes, masks=stack, options=options).to("cpu")
    return Refinement(name, photo, coarse, refined, entries, options, time.perf_counter() - start)


def before_and_after(done: Refinement) -> tuple[Picture, Picture]:
    """The photo with its coarse masks, and with its refined ones."""
    scale = visualize.panel_scale(done.photo)
    before, after = (visualize.draw_masks(done.photo, part.masks, scale=scale) for part in (done.coarse, done.refined))
    return before, after


def look(refiner: Refiner, done: Refinement, click: tuple[float, float], layer: int) -> tuple[Picture, str]:
    """Draw what the node nearest to a click attended to.

    Args:
        refiner: The refiner that made ``done``.
        done: The refinement.
        click: ``(x, y)`` in pixels of the picture, which is one of :func:`before_and_after`.
        layer: Layer of the sequence encoder.

    Returns:
        A picture of the same size, and a line about the node.
    """
    scale = visualize.panel_scale(done.photo)
    point = (click[0] + 0.5) / scale, (click[1] + 0.5) / scale
    chosen = attention.nearest_node(done.refined, point).instance
    found = attention.node_attention(
        refiner,
        done.photo,
        box=done.coarse.boxes[chosen],
        mask=done.coarse.masks[chosen],
        point=point,
        layer=layer,
        options=done.options,
    )
    node = found.quadtree[found.place.level]
    shares = [f"level {level} {float(weights.sum()):.0%}" for level, weights in enumerate(found.nodes)]
    line = (
        f"Node of level {found.place.level} in row {int(node.row[found.place.index])}, "
        f"column {int(node.col[found.place.index])} of {node.side} × {node.side}. "
        f"Its attention: {', '.join(shares)}, coarse reference grid {float(found.reference.sum()):.0%}."
    )
    return attention.draw_attention(done.photo, found, scale=scale), line


def summary(done: Refinement) -> str:
    """What happened, in words."""
    count = len(done.refined)
    kept = 0 if done.refined.kept_coarse is None else int(done.refined.kept_coarse.sum())
    changed = int((done.refined.masks ^ (done.coarse.masks >= 0.5)).sum())
    details = done.refined.details
    nodes = 0 if details is None else sum(len(level) for level in details.quadtree)
    masks = f"{count} masks" if count > 1 else "1 mask"
    lines = [f"**{masks} refined in {done.seconds:.1f} s:** {nodes:,} nodes corrected, {changed:,} pixels changed."]
    gain = done.refined.predicted_gain
    if gain is not None and kept < count:
        lines.append(f"Predicted gain: {float(gain.mean()):+.3f} Boundary IoU.")
    if kept:
        what = "The coarse mask was" if count == 1 else f"{kept} coarse masks were"
        lines.append(
            f"{what} kept: the refinement promised too little, or strayed too far. "
            "“Accept every refinement” in the options shows it all the same."
        )
    return " ".join(lines)


def write_files(done: Refinement, folder: Path) -> tuple[Path, Path]:
    """Write the refined masks: all in one black and white PNG, and each by itself in COCO results.

    Args:
        done: The refinement.
        folder: An existing folder.

    Returns:
        The two files.
    """
    picture, results = folder / f"{done.name}_refined.png", folder / f"{done.name}_refined.json"
    union = torch.any(done.refined.masks, dim=0).numpy()
    Image.fromarray(union.astype(np.uint8) * 255).save(picture)
    made = done.refined.to_coco(done.name)
    if done.entries:
        made = [{**entry, "segmentation": new["segmentation"]} for entry, new in zip(done.entries, made, strict=True)]
    results.write_text(json.dumps(made), encoding="utf-8")
    return picture, results


def options_of(depth: int, threshold: float, accept_all: bool) -> RefineOptions:
    """The choices of the page as options.

    Args:
        depth: Quadtree levels.
        threshold: Probability of incoherence from which a cell is refined.
        accept_all: Whether no refinement is refused.

    Raises:
        InvalidInputError: If a value is out of range.
    """
    if not depth >= 1:
        raise InvalidInputError("The quadtree needs at least one level.")
    safe = RefineOptions()
    return RefineOptions(
        depth=int(depth),
        incoherence_threshold=threshold,
        keep_if_iou_below=0.0 if accept_all else safe.keep_if_iou_below,
        keep_if_gain_below=-1.0 if accept_all else safe.keep_if_gain_below,
        return_quadtree=True,
    )
