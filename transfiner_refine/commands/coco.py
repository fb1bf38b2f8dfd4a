"""The command that refines a data set, for :mod:`transfiner_refine.cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from transfiner_refine.bulk.coco_results import CocoResults
from transfiner_refine.bulk.job import SHARD_IMAGES, Summary, run, skipped_path
from transfiner_refine.bulk.mask_folder import MaskFolder
from transfiner_refine.bulk.source import Source
from transfiner_refine.bulk.work import Work
from transfiner_refine.commands.options import Device, Model, progress_bar, with_refine_options
from transfiner_refine.config import RefineOptions
from transfiner_refine.data.coco import check_apart, check_output, write_json_atomic
from transfiner_refine.errors import InvalidInputError


@with_refine_options
def coco(
    predictions: Annotated[
        Path, typer.Option(help="What to refine: COCO or LVIS results, a folder of mask PNGs, or a datasets folder.")
    ],
    output: Annotated[Path, typer.Option(help="What to write, of the same kind: a file or a new folder.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images.", show_default="those of the datasets folder")
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="COCO or LVIS annotations that map image ids to file names.", show_default="ids are file names"
        ),
    ] = None,
    model: Model = None,
    device: Device = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with the first image that cannot be refined, instead of listing it.")
    ] = False,
    summary: Annotated[Path | None, typer.Option(help="Write the summary here, too, as JSON.")] = None,
    image_column: Annotated[str, typer.Option(help="Column of a dataset's images.")] = "image",
    masks_column: Annotated[str, typer.Option(help="Column of a dataset's masks.")] = "masks",
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This process, or the workers of a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster, as auto.", show_default="one started here for the job")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Refiners of the cluster.", show_default="all it has room for")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Cores of a refiner.", show_default="those of the job begun, or torch's"),
    ] = None,
    shard_images: Annotated[
        int, typer.Option(min=1, help="Images that are kept together: what a killed job may lose.")
    ] = SHARD_IMAGES,
    *,
    options: RefineOptions,
) -> None:
    """Refine every mask of a COCO results file, or of another data set; all else in it stays as it is.

    A job that was interrupted goes on where it was when it is started again. Images that are missing or damaged stay
    coarse, and are listed in OUTPUT.skipped.json.
    """
    if engine == "local" and (address is not None or workers is not None):
        raise InvalidInputError("expected --address and --workers with --engine ray, got them without: add it")
    if summary is not None:
        check_output(summary)
    written = {"--output": output, "--summary": summary}
    check_apart(written, {"--annotations": annotations})
    check_apart({"--summary": summary}, {"--predictions": predictions})
    source = _source(images, predictions, annotations, image_column, masks_column, missing_ok=not strict)
    work = Work(source, options, model, device, strict=strict)
    with progress_bar() as progress:
        task = progress.add_task("Refining", total=len(source))
        done = run(
            work,
            output,
            engine=engine,
            address=address,
            workers=workers,
            threads=threads,
            shard_images=shard_images,
            begin=lambda finished, total: progress.update(task, completed=finished, total=total),
            advance=lambda count: progress.advance(task, count),
        )
    if summary is not None:
        write_json_atomic(summary, done.to_json())
    if any(sums.masks for sums in done.figures.sizes.values()):
        Console().print(_table(done))
    if done.skipped:
        count, listed = len(done.skipped), skipped_path(output)
        print(f"warning: {count} of {done.images} images stay coarse, listed with reasons: {listed}", file=sys.stderr)
    print(
        f"{done.figures.masks} masks of {done.figures.images} images refined, {done.figures.kept_coarse} kept coarse, "
        f"{len(done.skipped)} images skipped, {done.images_per_second:.2f} images/s: {output}"
    )


def _source(
    images: Path | None,
    predictions: Path,
    annotations: Path | None,
    image_column: str,
    masks_column: str,
    *,
    missing_ok: bool,
) -> Source:
    """Tell by the files what the predictions are."""
    from transfiner_refine.bulk.hf_dataset import HFDataset, is_dataset

    if is_dataset(predictions):
        if images is not None or annotations is not None:
            raise InvalidInputError(
                f"expected neither --images nor --annotations with the dataset {predictions}, which has its own: "
                "leave them out"
            )
        return HFDataset(predictions, image_column, masks_column)
    if images is None:
        raise InvalidInputError(f"expected --images, the folder of the images that {predictions} is about, got none")
    if predictions.is_dir():
        if annotations is not None:
            raise InvalidInputError("expected masks named after their photos, got --annotations too: leave it out")
        return MaskFolder(images, predictions, missing_ok=missing_ok)
    return CocoResults(images, predictions, annotations, missing_ok=missing_ok)


def _table(done: Summary) -> Table:
    table = Table("size of the coarse mask", title="refined masks beside their coarse ones, means")
    for heading in ("masks", "change of area", "IoU", "kept coarse"):
        table.add_column(heading, justify="right")
    for name, sums in done.figures.sizes.items():
        if sums.masks:
            count = sums.masks
            change, iou, kept = sums.area_change / count, sums.iou / count, sums.kept_coarse / count
            table.add_row(name, f"{count:,}", f"{change:+.1%}", f"{iou:.3f}", f"{kept:.1%}")
    return table
