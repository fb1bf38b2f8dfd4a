"""The command line, ``transfiner-refine``.

Each command reads and checks its files, loads a refiner, and writes what it made in whole files. An error that the
package raises on purpose ends a command with one line and exit code 2.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from transfiner_refine import visualize
from transfiner_refine.bulk.work import load_refiner
from transfiner_refine.commands.benchmark import benchmark
from transfiner_refine.commands.coco import coco
from transfiner_refine.commands.convert import convert
from transfiner_refine.commands.evaluate import evaluate
from transfiner_refine.commands.export import export
from transfiner_refine.commands.options import Device, Model, with_refine_options
from transfiner_refine.commands.photo import decode_results_of
from transfiner_refine.commands.serve import serve
from transfiner_refine.commands.train import train
from transfiner_refine.config import RefineOptions
from transfiner_refine.data.coco import (
    Result,
    check_apart,
    check_output,
    decode_instances,
    decode_masks,
    group_by_image,
    join_instances,
    load_annotations,
    write_atomic,
    write_json_atomic,
)
from transfiner_refine.data.demo import ASSETS, OUTLINES, demo_results
from transfiner_refine.data.mask_image import read_mask
from transfiner_refine.errors import InvalidInputError, TransfinerError
from transfiner_refine.evaluation.boundary import boundary_iou, mask_iou
from transfiner_refine.evaluation.matching import match_detections
from transfiner_refine.inputs import as_image
from transfiner_refine.refiner import Refiner
from transfiner_refine.types import Instances

app = typer.Typer(
    help="Turn the coarse masks of any instance segmentation into crisp ones.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

REFINED = "refined.json"


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot print a sign gets another one
            stream.reconfigure(errors="replace")
    try:
        app()
    except TransfinerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("outputs/demo"),
    every: Annotated[bool, typer.Option("--all", help="All bundled photos, not only the first.")] = False,
    model: Model = None,
    device: Device = None,
) -> None:
    """Refine a bundled photo's masks, draw them, and compare them with an outline drawn by hand."""
    check_output(output / REFINED)
    refiner = load_refiner(model, device)
    table = Table("photo", "IoU", "boundary IoU", title="coarse -> refined, against hand-drawn outlines")
    results, names = demo_results(every)
    outlines = load_annotations(OUTLINES)
    outlined = group_by_image(outlines)
    refined_results = list(results)
    for image_id, positions in group_by_image(results).items():
        photo = as_image(ASSETS / names[image_id])
        coarse = decode_instances(results, positions, _size(photo))
        refined = _refine(refiner, photo, coarse, RefineOptions(return_quadtree=True))
        _write_pictures(output, Path(names[image_id]).stem, photo, coarse, refined)
        _replace(refined_results, positions, refined)
        if image_id in outlined:
            truth = decode_masks(outlines, outlined[image_id], coarse.image_size)
            table.add_row(names[image_id], *_scores(truth, coarse.masks, refined.masks))
    write_json_atomic(output / REFINED, refined_results)
    Console().print(table)
    print(f"Pictures and {REFINED}: {output}")


@app.command(context_settings={"allow_extra_args": True})
@with_refine_options
def image(
    context: typer.Context,
    photo: Annotated[Path, typer.Argument(help="Image file.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
    predictions: Annotated[Path | None, typer.Option(help="COCO results of this photo.")] = None,
    masks: Annotated[
        list[Path] | None, typer.Option(help="Mask images, one object each: --masks a.png b.png c.png")
    ] = None,
    model: Model = None,
    device: Device = None,
    *,
    options: RefineOptions,
) -> None:
    """Refine the masks of one photo, and draw them."""
    # Options take one value each; what follows the first mask arrives as further arguments.
    mask_files = [*(masks or []), *map(Path, context.args)]
    if (predictions is None) == (not mask_files):
        found = "neither" if predictions is None else f"both, with the masks {', '.join(map(str, mask_files))}"
        raise InvalidInputError(f"expected either --predictions or --masks, got {found}")
    options = replace(options, return_quadtree=True)
    written = {f"the output {name}": output / name for name in (REFINED, *map(_mask_name, range(len(mask_files))))}
    check_apart(written, {f"the mask {path.name}": path for path in mask_files} | {"--predictions": predictions})
    pixels = as_image(photo)
    if predictions is not None:
        results, coarse = decode_results_of(photo, predictions, pixels)
    else:
        results = [{"image_id": photo.stem} for _ in mask_files]
        coarse = join_instances(np.stack([read_mask(path, _size(pixels)) for path in mask_files]), results)
    check_output(output / REFINED)
    refined = _refine(load_refiner(model, device), pixels, coarse, options)
    if predictions is None:
        results = refined.to_coco(photo.stem)
        for number, mask in enumerate(refined.masks.numpy(force=True)):
            write_atomic(output / _mask_name(number), _png(mask.astype(np.uint8) * 255))
    else:
        _replace(results, range(len(results)), refined)
    _write_pictures(output, photo.stem, pixels, coarse, refined)
    write_json_atomic(output / REFINED, results)
    print(f"{len(refined)} masks refined, {_kept(refined)} kept coarse: {output}")


app.command()(benchmark)
app.command()(coco)
app.command()(convert)
app.command()(evaluate)
app.command()(export)
app.command()(serve)
app.command()(train)


def _refine(refiner: Refiner, photo: Tensor, coarse: Instances, options: RefineOptions) -> Instances:
    return refiner.refine(photo, boxes=coarse.boxes, masks=coarse.masks, options=options).to("cpu")


def _mask_name(number: int) -> str:
    return f"mask_{number:03}.png"


def _replace(results: list[Result], positions: Sequence[int], refined: Instances) -> None:
    """Put the refined masks into their results; every other field stays."""
    for position, segmentation in zip(positions, refined.to_rle(), strict=True):
        results[position] = {**results[position], "segmentation": segmentation}


def _size(photo: Tensor) -> tuple[int, int]:
    return photo.shape[1], photo.shape[2]


def _kept(refined: Instances) -> int:
    return 0 if refined.kept_coarse is None else int(refined.kept_coarse.sum())


def _scores(truth: NDArray[np.bool_], coarse: Tensor, refined: Tensor) -> list[str]:
    """Mean IoU and boundary IoU of the masks that match an outline, before and after."""
    matches = match_detections(truth, coarse)
    truth = truth[matches.truth]
    return [
        " -> ".join(f"{score(masks[matches.detection], truth).mean():.3f}" for masks in (coarse, refined))
        for score in (mask_iou, boundary_iou)
    ]


def _write_pictures(output: Path, name: str, photo: Tensor, coarse: Instances, refined: Instances) -> None:
    pixels = np.ascontiguousarray(photo.permute(1, 2, 0).numpy())
    for kind, picture in (
        ("before_after", visualize.before_after(pixels, coarse, refined)),
        ("incoherence", visualize.draw_incoherence(pixels, refined)),
        ("quadtree", visualize.draw_quadtree(pixels, refined)),
    ):
        write_atomic(output / f"{name}_{kind}.png", _png(picture[..., ::-1]))


def _png(picture: NDArray[np.uint8]) -> bytes:
    """Encode a grey or BGR picture."""
    return cv2.imencode(".png", np.ascontiguousarray(picture))[1].tobytes()
