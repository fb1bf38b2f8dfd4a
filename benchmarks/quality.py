"""How much a refiner improves a real detector's masks, beside what needs no learning.

    python benchmarks/quality.py davis_dev

Each object of the ground truth is paired with at most one detection: the pair of highest mask IoU first, regardless of
category and score, and only above 0.5. Every method starts from the paired detections alone and is judged on the same
objects by mask IoU and Boundary IoU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from dataset import DATA, MatchedImage, MatchedSet
from rich.console import Console
from rich.progress import track
from rich.table import Table

from transfiner_refine import Refiner
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.errors import InvalidInputError, TransfinerError
from transfiner_refine.evaluation import PairedFigures, boundary_iou, figures_from_scores, mask_iou
from transfiner_refine.evaluation.report import WORSE_BY
from transfiner_refine.functional.paste import paste

GRABCUT_BAND = 0.015
"""Half-width of the band that GrabCut decides, as a share of ``sqrt(w·h)`` of the box.

Of the bands from 0.01 to 0.1 that were tried on one frame of each DAVIS scene, this one served GrabCut best.
"""

GRABCUT_SURROUNDINGS = 0.25
"""Share of the box side added on each side to the window from which GrabCut learns the background's colours."""


class Frame(str, Enum):
    """Which of a detector's masks the refiner is given."""

    image = "image"
    box = "box"


@dataclass
class Scores:
    """What one method reached, instance by instance."""

    ious: list[np.ndarray] = field(default_factory=list)
    boundary_ious: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self, coarse: Scores) -> PairedFigures:
        """Compare with the coarse masks."""
        return figures_from_scores(
            np.concatenate(coarse.ious),
            np.concatenate(self.ious),
            np.concatenate(coarse.boundary_ious),
            np.concatenate(self.boundary_ious),
        )


Method = Callable[[MatchedImage], np.ndarray]
"""``(N, H, W)`` bool masks of a photo's N objects."""


def bilinear(sample: MatchedImage) -> np.ndarray:
    """Paste the 28×28 probabilities bilinearly, as a box head's detector does without a refiner."""
    masks = torch.zeros(sample.coarse.shape, dtype=torch.bool)
    paste(torch.from_numpy(sample.box_probs), torch.from_numpy(sample.boxes), masks)
    return masks.numpy()


def grabcut(sample: MatchedImage) -> np.ndarray:
    """Cut each object out by OpenCV's GrabCut, five iterations, started from its coarse mask."""
    bgr = cv2.cvtColor(sample.image, cv2.COLOR_RGB2BGR)
    return np.stack([_grabcut(bgr, mask, box) for mask, box in zip(sample.coarse, sample.boxes, strict=True)])


def _grabcut(bgr: np.ndarray, mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Let colours decide a band along the outline: inside of it is object for sure, outside of it background."""
    size = box[2:] - box[:2]
    margin = GRABCUT_SURROUNDINGS * size
    left, top = np.floor(np.maximum(box[:2] - margin, 0)).astype(int)
    right, bottom = np.ceil(box[2:] + margin).astype(int)
    window = np.s_[top:bottom, left:right]
    radius = max(1, round(GRABCUT_BAND * float(np.sqrt(size.prod()))))
    square = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    inside = mask[window].astype(np.uint8)
    labels = np.where(inside, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[cv2.erode(inside, square) == 1] = cv2.GC_FGD
    labels[cv2.dilate(inside, square) == 0] = cv2.GC_BGD
    if inside.all() or not inside.any():  # GrabCut needs colours of both
        return mask
    cv2.setRNGSeed(0)  # its colour clusters start at random
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.ascontiguousarray(bgr[window]), labels, (0, 0, 0, 0), *models, 5, cv2.GC_INIT_WITH_MASK)
    cut = np.zeros_like(mask)
    cut[window] = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    return cut


def oracle(sample: MatchedImage) -> np.ndarray:
    """Fill the incoherent cells of the box's 28×28 grid, and their neighbours, with ground truth.

    A cell is incoherent where the ground truth within it is not all alike. This is what a refiner of these cells could
    reach at most.
    """
    return np.stack([_oracle(*one) for one in zip(sample.coarse, sample.truth, sample.boxes, strict=True)])


def _oracle(coarse: np.ndarray, truth: np.ndarray, box: np.ndarray) -> np.ndarray:
    height, width = coarse.shape
    column = np.floor((np.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * ROOT_SIDE).astype(int)
    row = np.floor((np.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * ROOT_SIDE).astype(int)
    inside = np.ix_((row >= 0) & (row < ROOT_SIDE), (column >= 0) & (column < ROOT_SIDE))
    cell = (row[:, None] * ROOT_SIDE + column)[inside]
    pixels = np.bincount(cell.ravel(), minlength=ROOT_SIDE**2)
    filled = np.bincount(cell.ravel(), weights=truth[inside].ravel(), minlength=ROOT_SIDE**2)
    incoherent = ((filled > 0) & (filled < pixels)).astype(np.uint8).reshape(ROOT_SIDE, ROOT_SIDE)
    near = cv2.dilate(incoherent, np.ones((3, 3), np.uint8)).ravel() == 1
    out = coarse.copy()
    out[inside] = np.where(near[cell], truth[inside], coarse[inside])
    return out


def refined(refiner: Refiner, frame: Frame) -> Method:
    """The refiner as a method, through its public interface."""

    def refine(sample: MatchedImage) -> np.ndarray:
        masks = sample.coarse if frame is Frame.image else sample.box_probs
        out = refiner.refine(sample.image, boxes=sample.boxes, masks=masks, mask_frame=frame.value)
        return np.asarray(out.masks.cpu())

    return refine


def measure(samples: MatchedSet, methods: dict[str, Method], dilation: float, console: Console) -> dict[str, Scores]:
    """Run every method on every photo.

    Returns:
        Scores by method; ``coarse`` is what the masks were before.

    Raises:
        InvalidInputError: If no detection matches any object.
    """
    scores = {name: Scores() for name in ("coarse", *methods)}
    warm = False
    for sample in track(samples, "Refining", total=len(samples), console=console, transient=True):
        if not warm:  # the first call of a library is not its speed
            for method in methods.values():
                method(sample)
            warm = True
        results = {"coarse": sample.coarse}
        for name, method in methods.items():
            start = time.perf_counter()
            results[name] = method(sample)
            scores[name].seconds += time.perf_counter() - start
        for name, masks in results.items():
            scores[name].ious.append(mask_iou(masks, sample.truth))
            scores[name].boundary_ious.append(boundary_iou(masks, sample.truth, dilation))
    if not warm:
        raise InvalidInputError(
            f"expected detections that match an object of {samples.folder}, got none among {len(samples)} photos"
        )
    return scores


def report(scores: dict[str, Scores], title: str) -> Table:
    """The table that is printed."""
    table = Table(title=title, caption=f"worse: lost more than {WORSE_BY} of Boundary IoU; gains are over coarse")
    table.add_column("method")
    for heading in ("IoU", "gain", "boundary IoU", "gain", "worse", "s/instance"):
        table.add_column(heading, justify="right")
    for name, score in scores.items():
        figures = score.figures(scores["coarse"])
        cells = [f"{figures.mean_iou_refined:.3f}", "", f"{figures.mean_boundary_iou_refined:.3f}", "", "", ""]
        if name != "coarse":
            cells[1] = f"{figures.iou_gain:+.3f}"
            cells[3] = f"{figures.boundary_iou_gain:+.3f}"
            cells[4] = f"{figures.share_worse:.1%}"
            cells[5] = f"{score.seconds / figures.count:.3f}"
        table.add_row(name, *cells, style="bold" if name == "refined" else None)
    return table


def main(
    name: Annotated[str, typer.Argument(help="Set to run on, such as davis_dev.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    frame: Annotated[Frame, typer.Option(help="Refine the image-sized masks, or the 28×28 ones.")] = Frame.image,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos, spread evenly over the set.")] = None,
    dilation: Annotated[float, typer.Option(help="Boundary's width as a share of the image diagonal.")] = 0.02,
    with_refiner: Annotated[bool, typer.Option("--refiner/--no-refiner")] = True,
    with_grabcut: Annotated[bool, typer.Option("--grabcut/--no-grabcut", help="It takes minutes.")] = True,
    with_oracle: Annotated[bool, typer.Option("--oracle/--no-oracle")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Compare coarse, refined and otherwise improved masks with the ground truth of a set."""
    console = Console()
    try:
        samples = MatchedSet(data / name, limit)
        methods: dict[str, Method] = {"bilinear": bilinear}
        if with_grabcut:
            methods["GrabCut"] = grabcut
        if with_refiner:
            methods["refined"] = refined(Refiner.from_pretrained(model), frame)
        if with_oracle:
            methods["oracle"] = oracle
        scores = measure(samples, methods, dilation, console)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    count = sum(map(len, scores["coarse"].ious))
    console.print(report(scores, f"{name}: {count} instances of {len(samples)} photos, dilation {dilation:g}"))
    if json_path is not None:
        figures = {
            method: {**asdict(score.figures(scores["coarse"])), "seconds_per_instance": score.seconds / count}
            for method, score in scores.items()
        }
        json_path.write_text(
            json.dumps({"set": name, "dilation": dilation, "methods": figures}, indent=2, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
