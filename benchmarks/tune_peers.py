"""Choose the parameters of the methods without training, on ECSSD photos that no figure is from.

    python benchmarks/tune_peers.py

One parameter after the other is moved to the value that gives the highest mean of IoU and Boundary IoU, until none
moves any more. The values found are the constants of ``methods.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import methods
import numpy as np
import typer
from dataset import DATA, ECSSD_VALIDATION, MatchedImage, MatchedSet
from methods import Method
from rich.console import Console

from transfiner_refine.errors import TransfinerError
from transfiner_refine.evaluation import boundary_iou, mask_iou

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "grabcut": {"band": (0.01, 0.015, 0.02, 0.03, 0.05, 0.1)},
    "guided_filter": {"radius": (0.01, 0.02, 0.03, 0.05, 0.1, 0.2), "eps": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)},
    "dense_crf": {
        "confidence": (0.6, 0.7, 0.8, 0.9),
        "reach": (0.02, 0.05, 0.1, 0.2, 0.4),
        "colour": (3.0, 5.0, 10.0, 20.0),
        "compatibility": (1.0, 2.0, 5.0, 10.0),
    },
}
"""Method: parameter: values tried."""


def score(samples: list[MatchedImage], method: Method) -> float:
    """Mean of mask IoU and Boundary IoU over all instances."""
    scores = []
    for sample in samples:
        masks = method(sample)
        scores += [mask_iou(masks, sample.truth), boundary_iou(masks, sample.truth)]
    return float(np.mean(np.concatenate(scores)))


def tune(samples: list[MatchedImage], method: str, console: Console) -> dict[str, float]:
    """Coordinate ascent from the middle of each grid."""
    grid = GRIDS[method]
    chosen = {name: values[len(values) // 2] for name, values in grid.items()}
    known: dict[tuple[float, ...], float] = {}

    def known_score(values: dict[str, float]) -> float:
        key = tuple(values.values())
        if key not in known:
            known[key] = score(samples, partial(getattr(methods, method), **values))
            console.print(f"{method} {values}: {known[key]:.4f}", highlight=False)
        return known[key]

    while True:
        before = dict(chosen)
        for name, values in grid.items():
            chosen[name] = max(values, key=lambda value: known_score({**chosen, name: value}))
        if chosen == before:
            return chosen


def main(
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    photos: Annotated[int, typer.Option(min=1, help="Photos, spread evenly over ECSSD's training photos.")] = 60,
    method: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(GRIDS)}; all if left out.")] = None,
) -> None:
    """Print the score of every value tried, and the best ones."""
    console = Console()
    try:
        samples = list(MatchedSet(data / "ecssd", photos, lambda name: name not in ECSSD_VALIDATION))
        coarse = score(samples, lambda sample: sample.coarse)
        console.print(f"{sum(map(len, samples))} instances of {len(samples)} photos, coarse: {coarse:.4f}")
        for name in method or GRIDS:
            console.print(f"best for {name}: {tune(samples, name, console)}", style="bold")
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
