"""How like a real detector's masks the simulated ones are that training uses, as figures and as a plot.

    python benchmarks/simulated_masks.py ecssd ccp --plot docs/images/simulated_masks.png

For every object that the detector found, the real mask and a simulated one are compared with ground truth by mask IoU,
Boundary IoU, and how far wrong pixels lie from the true outline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from dataset import DATA, MatchedSet
from rich.console import Console
from rich.progress import track
from rich.table import Table

from transfiner_refine.evaluation import boundary_iou, mask_iou
from transfiner_refine.training.coarse import CoarseErrors, simulate_coarse

PERCENTILES = (10, 50, 90)
MIN_AREA = 24 * 24


@dataclass
class Distributions:
    """One entry per object; ``distance`` is the mean over its wrong pixels, as a share of the object's side."""

    iou: list[float] = field(default_factory=list)
    boundary_iou: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)

    def add(self, mask: np.ndarray, truth: np.ndarray) -> None:
        """Compare a mask with the ground truth, both ``(H, W)`` bool."""
        self.iou.append(float(mask_iou(mask[None], truth[None])[0]))
        self.boundary_iou.append(float(boundary_iou(mask[None], truth[None])[0]))
        wrong = mask != truth
        inner = cv2.distanceTransform(truth.view(np.uint8), cv2.DIST_L2, 5)
        outer = cv2.distanceTransform((~truth).view(np.uint8), cv2.DIST_L2, 5)
        away = np.maximum(inner, outer)[wrong]
        self.distance.append(float(away.mean() if away.size else 0.0) / float(np.sqrt(truth.sum())))


def measure(samples: MatchedSet, errors: CoarseErrors, console: Console) -> tuple[Distributions, Distributions]:
    """Distributions of the real and of the simulated masks of a set's objects."""
    real, simulated = Distributions(), Distributions()
    for sample in track(samples, "Comparing", total=len(samples), console=console, transient=True):
        for number, (truth, mask) in enumerate(zip(sample.truth, sample.coarse, strict=True)):
            if truth.sum() < MIN_AREA:
                continue
            rng = np.random.default_rng([len(real.iou), number])
            real.add(mask, truth)
            simulated.add(simulate_coarse(np.ascontiguousarray(truth), rng, errors).mask, truth)
    return real, simulated


def draw(found: dict[str, tuple[Distributions, Distributions]], path: Path) -> None:
    """Cumulative distributions, a row per set: what is real as a line, what is simulated dashed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measures = {"iou": "mask IoU", "boundary_iou": "Boundary IoU", "distance": "error distance / √area"}
    figure, axes = pyplot.subplots(len(found), 3, figsize=(10, 2.8 * len(found)), squeeze=False)
    for row, (name, pair) in zip(axes, found.items(), strict=True):
        for axis, (measure_name, title) in zip(row, measures.items(), strict=True):
            for kind, style, distributions in zip(("real", "simulated"), ("-", "--"), pair, strict=True):
                values = np.sort(getattr(distributions, measure_name))
                axis.plot(values, np.linspace(0, 1, len(values)), style, label=kind)
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def main(
    names: Annotated[list[str], typer.Argument(help="Sets, such as ecssd ccp.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos of each set, spread evenly.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the distributions here.")] = None,
) -> None:
    """Compare simulated with real coarse masks."""
    console = Console()
    errors = CoarseErrors(untouched=0.0, one_pixel=0.0)  # a detector returns no ground truth
    table = Table(title=f"mean and percentiles {PERCENTILES}, real / simulated")
    for heading in ("set", "objects", "mask IoU", "boundary IoU", "error distance"):
        table.add_column(heading)
    found = {name: measure(MatchedSet(data / name, limit), errors, console) for name in names}
    for name, (real, simulated) in found.items():
        cells = []
        for measure_name in ("iou", "boundary_iou", "distance"):
            pair = [np.array(getattr(d, measure_name)) for d in (real, simulated)]
            rows = [f"{v.mean():.3f} ({' '.join(f'{p:.3f}' for p in np.percentile(v, PERCENTILES))})" for v in pair]
            cells.append("\n".join(rows))
        table.add_row(name, str(len(real.iou)), *cells)
    console.print(table)
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    typer.run(main)
