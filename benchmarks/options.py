"""What each option of a call trades: quality against time, the embedded model on a real detector's masks.

    python benchmarks/options.py davis_dev

Each row differs from the defaults in one option. The rows of a run share the photos and the coarse masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from baselines import load_refiner
from dataset import DATA, open_set
from measure import Result, measure
from methods import Coarse, Method, refined
from rich.console import Console
from rich.table import Table

from transfiner_refine import RefineOptions
from transfiner_refine.errors import TransfinerError

VARIANTS: dict[str, RefineOptions] = {
    "defaults": RefineOptions(),
    "passes=1": RefineOptions(passes=1),
    "passes=3": RefineOptions(passes=3),
    "again_if_iou_below=1": RefineOptions(again_if_iou_below=1.0),
    "depth=2": RefineOptions(depth=2),
    "depth=1": RefineOptions(depth=1),
    'depth="auto"': RefineOptions(depth="auto"),
    "segment=False": RefineOptions(segment=False),
    "align_pixels=False": RefineOptions(align_pixels=False),
    "incoherence_threshold=0.3": RefineOptions(incoherence_threshold=0.3),
    "incoherence_threshold=0.7": RefineOptions(incoherence_threshold=0.7),
    "max_nodes=300": RefineOptions(max_nodes=300),
    "max_nodes=100": RefineOptions(max_nodes=100),
    'encode="crops"': RefineOptions(encode="crops"),
    'encode="image"': RefineOptions(encode="image"),
    "keep_if_gain_below=-1": RefineOptions(keep_if_gain_below=-1.0),
    "keep_if_gain_below=0": RefineOptions(keep_if_gain_below=0.0),
    "keep_if_gain_below=0.05": RefineOptions(keep_if_gain_below=0.05),
    "keep_if_iou_below=0": RefineOptions(keep_if_iou_below=0.0),
    "dtype=torch.bfloat16": RefineOptions(),
}
"""Rows of the table; the last one is not an option of a call but of ``Refiner.from_pretrained``."""


def report(result: Result, title: str) -> Table:
    """The table that is printed."""
    table = Table(title=title, caption="gains are over coarse; time: processor seconds, of those of the defaults")
    table.add_column("option")
    for heading in ("IoU", "boundary IoU", "worse", "time"):
        table.add_column(heading, justify="right")
    unit = result.scores["defaults"].processor_seconds
    for name in VARIANTS:
        score = result.scores[name]
        figures = score.figures(result.scores["coarse"])
        table.add_row(
            name,
            f"{figures.iou_gain:+.3f}",
            f"{figures.boundary_iou_gain:+.3f}",
            f"{figures.share_worse:.1%}",
            f"{score.processor_seconds / unit:.2f}×",
        )
    return table


def main(
    name: Annotated[str, typer.Argument(help="Set to run on, such as davis_dev or pennfudan.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model if left out.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos, spread evenly over the set.")] = None,
) -> None:
    """Compare the options of a call on one set."""
    console = Console()
    try:
        samples = open_set(data, name, limit)
        refiner, half = load_refiner(model), load_refiner(model)
        half.model.to(torch.bfloat16)
        methods: dict[str, Method] = {
            label: refined(half if "bfloat16" in label else refiner, options=options)
            for label, options in VARIANTS.items()
        }
        result = measure(samples, methods, Coarse.detector, 0.02, console)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    count = result.scores["coarse"].count
    console.print(report(result, f"{name}: {count} instances of {len(samples)} photos"))


if __name__ == "__main__":
    typer.run(main)
