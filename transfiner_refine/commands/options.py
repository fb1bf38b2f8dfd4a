"""What several commands have in common: options, and a progress bar."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from transfiner_refine.config import RefineOptions

DEFAULTS = RefineOptions()

Model = Annotated[
    str | None, typer.Option(help="Directory or Hugging Face Hub id of a refiner.", show_default="the embedded one")
]
Device = Annotated[str | None, typer.Option(help="Torch device.", show_default="cpu")]


def _levels(value: str) -> int | str:
    try:
        return int(value)
    except ValueError:
        return value  # refused by RefineOptions, but for "auto"


Depth = Annotated[
    Any,
    typer.Option(
        parser=_levels,
        metavar="INTEGER|auto",
        help="Quadtree levels to refine; auto: as many as each box needs.",
        show_default="the model's",
    ),
]
Passes = Annotated[
    int | None,
    typer.Option(help="Refinements in a row, each of what the one before made.", show_default="the model's"),
]
TokenBudget = Annotated[int, typer.Option(help="Tokens held at once; bounds memory.")]
KeepIfIouBelow = Annotated[
    float, typer.Option(help="Keep the coarse mask if its IoU with the refined one is lower; 0 never does.")
]
KeepIfGainBelow = Annotated[
    float, typer.Option(help="Keep the coarse mask if the refined one promises less Boundary IoU; -1 never does.")
]
AlignPixels = Annotated[
    bool, typer.Option("--align-pixels/--no-align-pixels", help="Move outlines onto the edges of the photo.")
]
MaxNodes = Annotated[
    int | None,
    typer.Option(help="Nodes kept of each mask and level, the most incoherent first.", show_default="all"),
]
IncoherenceThreshold = Annotated[float, typer.Option(help="Probability above which a cell is refined.")]
MaskThreshold = Annotated[float, typer.Option(help="Probability from which a pixel belongs to the mask.")]
AgainIfIouBelow = Annotated[
    float, typer.Option(help="Refine a mask again if its IoU with what it was is lower; 1 always does.")
]
BoxMargin = Annotated[
    float | None,
    typer.Option(help="Share of its side by which a box grows on each side.", show_default="the model's"),
]
Encode = Annotated[
    Literal["auto", "image", "crops"],
    typer.Option(help="Encode the whole image once, a crop for each mask, or whichever is cheaper."),
]


def progress_bar() -> Progress:
    """A bar that leaves standard output to the results."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
