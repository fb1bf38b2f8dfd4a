"""The command that fine-tunes a refiner, for :mod:`transfiner_refine.cli`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from transfiner_refine.data.annotated import MIN_AREA, DataFiles
from transfiner_refine.data.coco import check_output
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.training.schedule import FINE_TUNING


class Precision(str, Enum):
    """Floating-point numbers of the forward pass."""

    bf16 = "bf16"
    no = "no"


class Track(str, Enum):
    """Experiment trackers."""

    trackio = "trackio"


def train(
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    annotations: Annotated[Path, typer.Option(help="COCO annotations of these images.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; its best/ is the refiner. Resumes what is there.")],
    predictions: Annotated[
        Path | None, typer.Option(help="COCO results of your detector on these images: train on its own masks.")
    ] = None,
    validation_images: Annotated[Path | None, typer.Option(help="Folder of the images to judge by.")] = None,
    validation_annotations: Annotated[Path | None, typer.Option(help="COCO annotations of those.")] = None,
    validation_predictions: Annotated[Path | None, typer.Option(help="COCO results on those.")] = None,
    validation_share: Annotated[
        float, typer.Option(help="Share of the images to set apart and judge by, without files for it.")
    ] = 0.2,
    validation_limit: Annotated[int, typer.Option(min=1, help="Images to judge by at most.")] = 200,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or Hub id of the refiner to start from.", show_default="the embedded one"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = FINE_TUNING.steps,
    batch_size: Annotated[int, typer.Option(help="Objects per step.")] = FINE_TUNING.batch_size,
    micro_batch: Annotated[
        int, typer.Option(help="Objects at once; bounds memory, divides the batch.")
    ] = FINE_TUNING.micro_batch,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = FINE_TUNING.learning_rate,
    frozen_stages: Annotated[
        int, typer.Option(help="Stages of the backbone that stay as they are, 0 to 5.")
    ] = FINE_TUNING.frozen_stages,
    frozen_detector: Annotated[
        bool, typer.Option(help="Train only what corrects nodes, not what finds them; the backbone then stays too.")
    ] = FINE_TUNING.frozen_detector,
    patience: Annotated[
        int | None, typer.Option(help="Validations without progress after which it ends.")
    ] = FINE_TUNING.patience,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations.", show_default="an epoch, or 50 steps if longer")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = FINE_TUNING.save_every,
    precision: Annotated[Precision, typer.Option(help="Numbers of the forward pass.")] = Precision.bf16,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    min_area: Annotated[float, typer.Option(help="Pixels of the smallest object to train on.")] = MIN_AREA,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for decoded objects, 0.5 MB each.", show_default="in the output")
    ] = None,
    track: Annotated[Track | None, typer.Option(help="Send the figures to a tracker too.")] = None,
) -> None:
    """Fine-tune a refiner on a COCO-format data set: your images, their annotations, and your detector's masks."""
    data = DataFiles(images, annotations, predictions)
    validation = validation_share
    if validation_annotations is not None or validation_images is not None:
        if validation_annotations is None or validation_images is None:
            raise InvalidInputError("expected both --validation-images and --validation-annotations, got one of them")
        validation = DataFiles(validation_images, validation_annotations, validation_predictions)
    elif validation_predictions is not None:
        raise InvalidInputError(
            "expected --validation-images and --validation-annotations with --validation-predictions, got neither"
        )
    check_output(output / "run.json")
    # Imported here: accelerate and matplotlib take a second, and only training needs them.
    from transfiner_refine.training.finetune import fine_tune

    config = replace(
        FINE_TUNING,
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        frozen_stages=frozen_stages,
        frozen_detector=frozen_detector,
        patience=patience,
        validate_every=validate_every,
        save_every=save_every,
        precision=precision.value,
        workers=workers,
        seed=seed,
    )
    result = fine_tune(
        data,
        output,
        validation=validation,
        model=model,
        config=config,
        min_area=min_area,
        validation_limit=validation_limit,
        cache=cache,
        tracker=None if track is None else track.value,
        command=shlex.join(["transfiner-refine", *sys.argv[1:]]),
    )
    table = Table("masks", "IoU", "boundary IoU", "worse", title="on the images set apart")
    best, start = result.best, result.start
    table.add_row("coarse", f"{best['iou_coarse']:.3f}", f"{best['boundary_iou_coarse']:.3f}", "")
    for name, record in (("refined, before", start), (f"refined, step {best['step']:.0f}", best)):
        table.add_row(name, f"{record['iou']:.3f}", f"{record['boundary_iou']:.3f}", f"{record['worse']:.1%}")
    Console().print(table)
    end = ", ended early" if result.ended_early else ""
    print(f"{result.steps} steps{end}: {result.directory}")
