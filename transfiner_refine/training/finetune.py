"""Fine-tuning on one's own data: a COCO-format data set in, a refiner's directory out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.data.annotated import MIN_AREA, AnnotatedSet, DataFiles
from transfiner_refine.data.coco import boxes_of, decode_masks
from transfiner_refine.data.crops import CropDataset
from transfiner_refine.data.object_cache import CropSource
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.model import IMAGE_ENCODER, RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.training.card import CardFacts, write_card
from transfiner_refine.training.loop import TrainResult, make_accelerator, train
from transfiner_refine.training.losses import LossConfig
from transfiner_refine.training.metrics import Tracker
from transfiner_refine.training.schedule import FINE_TUNING, TrainConfig, fit_batch
from transfiner_refine.training.validation import Validation, ValidationImage, matched_image, simulated_image

OBJECTIVE = LossConfig(cross_entropy_weight=0.5, nodes_per_level=(50, 150))
"""That of the embedded model."""


def fine_tune(
    data: DataFiles,
    output: str | Path,
    *,
    validation: DataFiles | float = 0.2,
    model: str | Path | None = None,
    config: TrainConfig = FINE_TUNING,
    loss_config: LossConfig = OBJECTIVE,
    real_share: float = 0.7,
    min_area: float = MIN_AREA,
    validation_limit: int = 200,
    cache: str | Path | None = None,
    tracker: Tracker | None = None,
    command: str = "transfiner-refine train",
) -> TrainResult:
    """Fine-tune a refiner; the same call goes on with a run that was interrupted.

    Several processes that ``accelerate launch`` or ``torchrun`` started make one run; they need the same folders.

    Args:
        data: What to train on. With predictions, objects that the detector found are trained with its own masks.
        output: Gets ``best/``, the refiner, and the files of :func:`~transfiner_refine.training.loop.train`.
        validation: What to judge by: other files, or the share of the photos of ``data`` to set apart.
        model: Refiner to start from, as :meth:`Refiner.from_pretrained` takes it; None for the embedded one.
        config: Schedule. A batch is never larger than the data: for a few objects it shrinks.
        loss_config: Objective.
        real_share: Share of samples with a detector's mask, of the objects that have one; the others are simulated.
        min_area: Objects of fewer pixels are left out.
        validation_limit: Photos to judge by at most, spread over those there are.
        cache: Where decoded objects are kept, about half a megabyte each, by what is trained on, so that runs can share
            it; None keeps them in ``output``.
        tracker: Where the figures go besides ``metrics.jsonl``.
        command: What the model card says repeats the run.

    Returns:
        Where the best refiner is, and its figures.

    Raises:
        InvalidInputError: If the data cannot be used, the refiner needs a detector's features, or ``output`` holds
            another run.
        WeightsError: If the refiner to start from cannot be loaded.
        TrainingError: If training does not stay finite.
        MissingDependencyError: If the tracker is not installed.
    """
    output = Path(output)
    start = Refiner.from_pretrained(model).model
    side = _check_model(start)
    whole = AnnotatedSet.read(data)
    if isinstance(validation, DataFiles):
        training, judged = whole, AnnotatedSet.read(validation)
    else:
        training, judged = whole.split(validation, config.seed)
    judged = judged.spread(validation_limit)

    record = {
        "start": None if model is None else str(model),
        "data": data.fingerprint(),
        "validation": validation.fingerprint() if isinstance(validation, DataFiles) else validation,
        "choices": {"real_share": real_share, "min_area": min_area, "validation_limit": validation_limit},
    }
    folder = output / "cache" if cache is None else Path(cache)
    # Runs that share a cache may set other photos apart.
    apart = None if isinstance(validation, DataFiles) else (validation, config.seed)
    part = json.dumps([str(data.images.resolve()), record["data"], apart])
    place = folder / f"train-{hashlib.sha256(part.encode()).hexdigest()[:12]}"
    accelerator = make_accelerator()
    with accelerator.local_main_process_first():  # the others find what the first has decoded
        training.write(place)
        source = CropSource(place, min_area=min_area)
        dataset = CropDataset(
            [source], folder, side=side, box_margin=start.config.box_margin, real_share=real_share, seed=config.seed
        )
    judge = Validation(list(_validation_images(judged, min_area, config.seed)))
    config = fit_batch(config, len(dataset), accelerator.num_processes)

    found = " with the masks of a detector where it found them" if training.predictions else ""
    facts = CardFacts(
        model=start.config,
        start="the embedded refiner" if model is None else f"`{model}`",
        train=f"{len(dataset)} objects of {len(training)} photos{found}, else with simulated coarse masks",
        validation=f"{judge.count} objects of {len(judge.images)} photos, coarse masks "
        + ("of a detector" if judged.predictions else "simulated"),
        schedule=config,
        command=command,
    )
    return train(
        start.to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
        dataset,
        output,
        config,
        loss_config,
        judge,
        record=record,
        card=lambda result: write_card(facts, result),
        tracker=tracker,
    )


def _check_model(model: RefinerModel) -> int:
    """Side of the finest quadtree level of a model that can be trained on photos."""
    config = model.config
    if config.feature_source != IMAGE_ENCODER:
        raise InvalidInputError(
            f"expected a refiner with an image encoder, got one for the features of {config.feature_source!r}: train "
            "it together with that detector, through its adapter"
        )
    if config.depth == 0:
        raise InvalidInputError("expected a refiner with at least one quadtree level, got depth 0: nothing to train")
    return ROOT_SIDE << (config.depth - 1)


def _validation_images(judged: AnnotatedSet, min_area: float, seed: int) -> Iterator[ValidationImage]:
    """The photos to judge by, with a detector's masks where there are any, and else with simulated ones."""
    for number, (image_id, path) in enumerate(judged.paths.items()):
        with Image.open(path) as photo:
            size = (photo.height, photo.width)
        objects = judged.objects[image_id]
        truth = decode_masks(objects, range(len(objects)), size)
        truth = truth[np.count_nonzero(truth, axis=(1, 2)) >= max(min_area, 1)]
        if not len(truth):
            continue
        if judged.predictions:
            found = judged.predictions.get(image_id, [])
            coarse = decode_masks(found, range(len(found)), size)
            boxes = boxes_of(found, boxes_from_masks(torch.from_numpy(coarse))).numpy()
            yield matched_image(path, truth, coarse, boxes)
        else:
            yield simulated_image(path, truth, (seed, number))
