"""The command that times refinement on the user's machine, for :mod:`transfiner_refine.cli`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from transfiner_refine.bulk.work import load_refiner
from transfiner_refine.commands.options import Device, Model, progress_bar, with_refine_options
from transfiner_refine.commands.photo import decode_results_of
from transfiner_refine.config import RefineOptions
from transfiner_refine.data.coco import check_apart, check_output, decode_instances, write_json_atomic
from transfiner_refine.data.demo import ASSETS, DEMO_PHOTO, demo_results
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import as_image
from transfiner_refine.threads import torch_threads
from transfiner_refine.types import Instances

COUNTS = (1, 10, 100)
LEAST_CALLS = 3


@with_refine_options
def benchmark(
    photo: Annotated[Path | None, typer.Option(help="Image file.", show_default="a bundled one")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="COCO results of this photo.", show_default="those of the bundled photo")
    ] = None,
    count: Annotated[
        list[int] | None, typer.Option(min=1, help="Masks of a call; may be given again.", show_default="1, 10, 100")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time at least spent on each count.")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores.", show_default="torch's")] = None,
    model: Model = None,
    device: Device = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures here, too.")] = None,
    *,
    options: RefineOptions,
) -> None:
    """Time refinement on this machine, image encoder included; masks repeat where a call takes more than there are."""
    if (photo is None) != (predictions is None):
        given, missing = ("--predictions", "--photo") if photo is None else ("--photo", "--predictions")
        raise InvalidInputError(f"expected --photo and --predictions together, got {given} alone: add {missing}")
    if json_path is not None:
        check_apart({"--json": json_path}, {"--photo": photo, "--predictions": predictions})
        check_output(json_path)
    pixels = as_image(photo or ASSETS / DEMO_PHOTO)
    if photo is not None and predictions is not None:
        _, coarse = decode_results_of(photo, predictions, pixels)
    else:
        results, _ = demo_results(every=False)
        coarse = decode_instances(results, range(len(results)), (pixels.shape[1], pixels.shape[2]))
    if not len(coarse):
        raise InvalidInputError(f"expected masks to refine in {predictions}, got none: detect with a lower score")
    refiner = load_refiner(model, device)
    height, width = pixels.shape[1:]
    table = Table("masks", "seconds", "from, to", "ms a mask", "masks a second", title=f"{width}×{height} pixels")
    figures = []
    with progress_bar() as progress, torch_threads(threads):
        for number in progress.track(count or COUNTS, description="Timing"):
            some = coarse[torch.arange(number) % len(coarse)]
            times = _time(partial(refiner.refine, pixels, boxes=some.boxes, masks=some.masks, options=options), seconds)
            median = statistics.median(times)
            figures.append({"masks": number, "seconds": median, "times": times})
            table.add_row(
                str(number),
                f"{median:.3f}",
                f"{min(times):.3f} to {max(times):.3f}",
                f"{1e3 * median / number:.1f}",
                f"{number / median:.2f}",
            )
    if json_path is not None:
        document = {"width": width, "height": height, "device": str(refiner.device)}
        write_json_atomic(json_path, document | {"threads": threads or torch.get_num_threads(), "calls": figures})
    Console().print(table)


def _time(refine: Callable[[], Instances], seconds: float) -> list[float]:
    """Seconds of each call, as many as fit into some seconds, three at least.

    The first call of a size, which finds its memory and its kernels, is left out. What a device still works on is
    waited for.
    """
    times: list[float] = []
    refine()
    while len(times) < LEAST_CALLS or sum(times) < seconds:
        start = time.perf_counter()
        refine().to("cpu")
        times.append(time.perf_counter() - start)
    return times
