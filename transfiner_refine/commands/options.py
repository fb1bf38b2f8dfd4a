"""What several commands have in common: options, and a progress bar."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from transfiner_refine.config import RefineOptions

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

REFINE_OPTIONS: dict[str, Any] = {
    "depth": Depth,
    "passes": Annotated[
        int | None,
        typer.Option(help="Refinements in a row, each of what the one before made.", show_default="the model's"),
    ],
    "again_if_iou_below": Annotated[
        float, typer.Option(help="Refine a mask again if its IoU with what it was is lower; 1 always does.")
    ],
    "segment": Annotated[
        bool, typer.Option("--segment/--no-segment", help="Let the segmenter propose masks first; without: faster.")
    ],
    "incoherence_threshold": Annotated[float, typer.Option(help="Probability above which a cell is refined.")],
    "mask_threshold": Annotated[float, typer.Option(help="Probability from which a pixel belongs to the mask.")],
    "token_budget": Annotated[int, typer.Option(help="Tokens held at once; bounds memory.")],
    "max_nodes": Annotated[
        int | None,
        typer.Option(help="Nodes kept of each mask and level, the most incoherent first.", show_default="all"),
    ],
    "box_margin": Annotated[
        float | None,
        typer.Option(help="Share of its side by which a box grows on each side.", show_default="the model's"),
    ],
    "keep_if_iou_below": Annotated[
        float, typer.Option(help="Keep the coarse mask if its IoU with the refined one is lower; 0 never does.")
    ],
    "keep_if_gain_below": Annotated[
        float, typer.Option(help="Keep the coarse mask if the refined one promises less Boundary IoU; -1 never does.")
    ],
    "align_pixels": Annotated[
        bool, typer.Option("--align-pixels/--no-align-pixels", help="Move outlines onto the edges of the photo.")
    ],
    "encode": Annotated[
        Literal["auto", "image", "crops"],
        typer.Option(help="Encode the whole image once, a crop for each mask, or whichever is cheaper."),
    ],
}
"""What a command tells of the fields of :class:`RefineOptions` that shape masks, by name."""


def with_refine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of ``REFINE_OPTIONS``, with the defaults of :class:`RefineOptions`.

    Args:
        command: Takes them together, as the argument ``options``.
    """
    signature = inspect.signature(command, eval_str=True)
    defaults = RefineOptions()
    own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, name), annotation=annotation)
        for name, annotation in REFINE_OPTIONS.items()
    ]

    @wraps(command)
    def expanded(**values: Any) -> None:
        options = RefineOptions(**{name: values.pop(name) for name in REFINE_OPTIONS})
        command(**values, options=options)

    # Where typer looks: it reads the signature, the annotations, or both.
    expanded.__signature__ = signature.replace(parameters=[*own, *added])  # pyright: ignore[reportAttributeAccessIssue]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
    return expanded


def progress_bar() -> Progress:
    """A bar that leaves standard output to the results."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
