"""The part of the training command that trains a detector and a refiner together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transfiner_refine.data.annotated import DataFiles
from transfiner_refine.data.photos import PhotoSet
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.training.schedule import JOINT_TRAINING

if TYPE_CHECKING:
    from transfiner_refine.training.loop import TrainResult

DEFAULT_SCOPE = "all"
DEFAULT_MAX_ROIS = 64


class TrainScope(str, Enum):
    """What training changes."""

    refiner = "refiner"
    heads = "heads"
    all = "all"


def train_joint(
    detector: str,
    data: DataFiles,
    output: Path,
    schedule: Mapping[str, Any],
    model: str | None,
    *,
    weights: str | None,
    scope: TrainScope | None,
    max_rois: int | None,
    **options: Any,
) -> TrainResult:
    """Build or load the detector, join a refiner to it, and train both.

    Args:
        detector: Its name, or the directory of a model that was saved with its refiner.
        data: What to train on.
        output: Folder of the run.
        schedule: What differs from the schedule of joint training.
        model: Refiner to start from; None makes a new one.
        weights: Of the detector.
        scope: What is trained.
        max_rois: RoIs of an image that the refiner sees.
        **options: Of :func:`~transfiner_refine.adapters.training.train_detector`.

    Raises:
        InvalidInputError: If an option does not fit the detector.
    """
    # Imported here: frameworks of detectors take seconds, and only this needs one.
    from transfiner_refine.adapters.models import build_detector, load_refined
    from transfiner_refine.adapters.training import start_refiner, train_detector

    config = replace(JOINT_TRAINING, **schedule)
    choices: dict[str, Any] = {
        "train": DEFAULT_SCOPE if scope is None else scope.value,
        "max_rois": DEFAULT_MAX_ROIS if max_rois is None else max_rois,
    }
    torch.manual_seed(config.seed)  # new weights are the same in every process, and when the command is repeated
    if Path(detector).is_dir():
        for name, value in (("--detector-weights", weights), ("--model", model)):
            if value is not None:
                raise InvalidInputError(
                    f"expected no {name} beside {detector}, which holds a detector and its refiner, got {value!r}: "
                    "leave it out"
                )
        joined = load_refined(detector, **choices)
    else:
        adapter = build_detector(detector, PhotoSet.read(data).categories, weights)
        joined = adapter.with_refiner(start_refiner(adapter, model), **choices)
    start = {"detector": detector, "weights": weights, "refiner": model}
    return train_detector(joined, data, output, config=config, start=start, **options)
