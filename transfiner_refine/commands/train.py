"""The command that trains: a refiner alone, or a detector with a refiner on its features; for the command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from transfiner_refine.commands.train_joint import DEFAULT_MAX_ROIS, DEFAULT_SCOPE, TrainScope, train_joint
from transfiner_refine.data.annotated import MIN_AREA, DataFiles
from transfiner_refine.data.coco import check_output
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.training.schedule import FINE_TUNING, JOINT_TRAINING

if TYPE_CHECKING:
    from transfiner_refine.training.loop import TrainResult

SCHEDULE, ALONE, TOGETHER, JUDGED, RUN = (
    "Schedule", "A refiner alone", "A detector with its refiner", "What to judge by", "The run"
)  # fmt: skip
"""Headings under which the options are listed."""


class Precision(str, Enum):
    """Floating-point numbers of the forward pass."""

    auto = "auto"
    bf16 = "bf16"
    no = "no"


class Track(str, Enum):
    """Experiment trackers."""

    trackio = "trackio"


def _option(panel: str, text: str, default: object = None, **settings: Any) -> Any:
    """An option of which the command sees whether it was given: where not, it is None, and ``default`` is shown."""
    shown: dict[str, Any] = {} if default is None else {"show_default": str(default)}
    return typer.Option(help=text, rich_help_panel=panel, **shown, **settings)


def _scheduled(text: str, field: str, panel: str = SCHEDULE) -> Any:
    """An option of the schedule, with its default for either kind of training."""
    values = (getattr(schedule, field) for schedule in (FINE_TUNING, JOINT_TRAINING))
    alone, together = ("never" if value is None else value for value in values)
    return _option(panel, text, alone if alone == together else f"{alone}; {together}")


def train(
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    annotations: Annotated[Path, typer.Option(help="COCO annotations of these images.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; its best/ is the result. Resumes what is there.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or Hub id of the refiner to start from.",
            show_default="the embedded one; with a detector a new one",
        ),
    ] = None,
    predictions: Annotated[
        Path | None, _option(ALONE, "COCO results of your detector on these images: train on its own masks.")
    ] = None,
    frozen_stages: Annotated[
        int | None, _option(ALONE, "Stages of the backbone that stay as they are, 0 to 5.", FINE_TUNING.frozen_stages)
    ] = None,
    frozen_detector: Annotated[
        bool | None,
        typer.Option(
            "--frozen-detector/--no-frozen-detector",
            help="Train only what corrects nodes, not what finds them; the backbone then stays too.",
            rich_help_panel=ALONE,
            show_default="frozen-detector" if FINE_TUNING.frozen_detector else "no-frozen-detector",
        ),
    ] = None,
    min_area: Annotated[float | None, _option(ALONE, "Pixels of the smallest object to train on.", MIN_AREA)] = None,
    cache: Annotated[Path | None, _option(ALONE, "Folder for decoded objects, 0.5 MB each.", "in the output")] = None,
    detector: Annotated[
        str | None,
        _option(
            TOGETHER,
            "Train this detector and a refiner on its features, end to end: torchvision:NAME[,key=value...], "
            "transformers:DIRECTORY_OR_ID, or the best/ of such a run.",
        ),
    ] = None,
    detector_weights: Annotated[
        str | None,
        _option(TOGETHER, "State dict of a torchvision detector, .safetensors or .pth; DEFAULT downloads COCO's."),
    ] = None,
    train_scope: Annotated[
        TrainScope | None,
        _option(TOGETHER, "What changes: the refiner, the heads too (all but the backbone), or all.", DEFAULT_SCOPE),
    ] = None,
    max_rois: Annotated[
        int | None, _option(TOGETHER, "RoIs of an image that the refiner sees; bounds memory.", DEFAULT_MAX_ROIS)
    ] = None,
    validation_images: Annotated[Path | None, _option(JUDGED, "Folder of the images to judge by.")] = None,
    validation_annotations: Annotated[Path | None, _option(JUDGED, "COCO annotations of those.")] = None,
    validation_predictions: Annotated[
        Path | None, _option(JUDGED, "COCO results on those, for a refiner alone.")
    ] = None,
    validation_share: Annotated[
        float, _option(JUDGED, "Share of the images to set apart and judge by, without files for it.")
    ] = 0.2,
    validation_limit: Annotated[int, _option(JUDGED, "Images to judge by at most.", min=1)] = 200,
    validate_every: Annotated[
        int | None, _option(JUDGED, "Steps between validations.", "an epoch, or 50 steps if longer")
    ] = None,
    patience: Annotated[
        int | None, _scheduled("Validations without progress after which it ends.", "patience", JUDGED)
    ] = None,
    steps: Annotated[int | None, _scheduled("Optimiser steps.", "steps")] = None,
    batch_size: Annotated[int | None, _scheduled("Objects per step; images with --detector.", "batch_size")] = None,
    micro_batch: Annotated[
        int | None, _scheduled("Of these at once; bounds memory, divides the batch.", "micro_batch")
    ] = None,
    learning_rate: Annotated[
        float | None, _scheduled("Peak learning rate; a backbone's is a tenth.", "learning_rate")
    ] = None,
    precision: Annotated[Precision | None, _scheduled("Numbers of the forward pass.", "precision")] = None,
    seed: Annotated[int, _option(SCHEDULE, "Seed of everything random.", min=0)] = 0,
    save_every: Annotated[int | None, _scheduled("Steps between checkpoints.", "save_every", RUN)] = None,
    workers: Annotated[int, _option(RUN, "Processes that load data.", min=0)] = 1,
    track: Annotated[Track | None, _option(RUN, "Send the figures to a tracker too.")] = None,
) -> None:
    """Train on a COCO-format data set: fine-tune a refiner, or train a detector and a refiner together.

    Where two defaults are shown, the second is that with --detector.
    """
    data = DataFiles(images, annotations, predictions)
    validation = _validation(validation_share, validation_images, validation_annotations, validation_predictions)
    schedule = _given(
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        frozen_stages=frozen_stages,
        frozen_detector=frozen_detector,
        patience=patience,
        validate_every=validate_every,
        save_every=save_every,
        precision=None if precision is None else precision.value,
        workers=workers,
        seed=seed,
    )
    alone = _given(
        predictions=predictions,
        validation_predictions=validation_predictions,
        frozen_stages=frozen_stages,
        frozen_detector=frozen_detector,
        min_area=min_area,
        cache=cache,
    )
    together = _given(detector_weights=detector_weights, train_scope=train_scope, max_rois=max_rois)
    misplaced, where = (together, "only with") if detector is None else (alone, "only without")
    if misplaced:
        names = ", ".join("--" + name.replace("_", "-") for name in misplaced)
        raise InvalidInputError(f"expected {names} {where} --detector: see transfiner-refine train --help")
    check_output(output / "run.json")
    shared = {
        "validation": validation,
        "validation_limit": validation_limit,
        "tracker": None if track is None else track.value,
        "command": shlex.join(["transfiner-refine", *sys.argv[1:]]),
    }
    if detector is not None:
        result = train_joint(
            detector, data, output, schedule, model, weights=detector_weights, scope=train_scope, max_rois=max_rois,
            **shared,
        )  # fmt: skip
        _print(result, {"mask AP": "mask_ap", "boundary AP": "boundary_ap"}, "{:.1%}")
        return
    # Imported here: accelerate and matplotlib take a second, and only training needs them.
    from transfiner_refine.training.finetune import fine_tune

    options = _given(min_area=min_area, cache=cache)
    result = fine_tune(data, output, model=model, config=replace(FINE_TUNING, **schedule), **options, **shared)
    _print(result, {"IoU": "iou", "boundary IoU": "boundary_iou"}, "{:.3f}", with_worse=True)


def _given(**values: Any) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in values.items() if value is not None}


def _validation(
    share: float, images: Path | None, annotations: Path | None, predictions: Path | None
) -> DataFiles | float:
    """Files to judge by, or the share of the images to set apart."""
    if annotations is not None or images is not None:
        if annotations is None or images is None:
            raise InvalidInputError("expected both --validation-images and --validation-annotations, got one of them")
        return DataFiles(images, annotations, predictions)
    if predictions is not None:
        raise InvalidInputError(
            "expected --validation-images and --validation-annotations with --validation-predictions, got neither"
        )
    return share


def _print(result: TrainResult, figures: Mapping[str, str], form: str, with_worse: bool = False) -> None:
    """Print the figures of coarse and refined masks, by heading, before training and of the best weights."""
    best, start = result.best, result.start
    table = Table("masks", *figures, *(["worse"] if with_worse else []), title="on the images set apart")
    table.add_row("coarse", *(form.format(best[f"{name}_coarse"]) for name in figures.values()))
    for label, record in (("refined, before", start), (f"refined, step {best['step']:.0f}", best)):
        worse = [f"{record['worse']:.1%}"] if with_worse else []
        table.add_row(label, *(form.format(record[name]) for name in figures.values()), *worse)
    Console().print(table)
    end = ", ended early" if result.ended_early else ""
    print(f"{result.steps} steps{end}: {result.directory}")
