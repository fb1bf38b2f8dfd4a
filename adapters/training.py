"""Training a detector and its refiner together on a COCO-format data set: photos in, the joined model's directory out.

K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfiner_refine.adapters.joint import RefinedDetector
from transfiner_refine.adapters.protocol import Adapter
from transfiner_refine.adapters.training_card import CardFacts, write_card
from transfiner_refine.adapters.training_validation import DetectorValidation
from transfiner_refine.data.annotated import DataFiles
from transfiner_refine.data.photos import FlippedPhotos, PhotoSample, PhotoSet
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.model import IMAGE_ENCODER, RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.training.loop import TrainResult, make_accelerator, run_task
from transfiner_refine.training.metrics import Record, Tracker
from transfiner_refine.training.schedule import JOINT_TRAINING, TrainConfig, fit_batch, parameter_groups
from transfiner_refine.training.task import Task


def train_detector(
    model: RefinedDetector,
    data: DataFiles,
    output: str | Path,
    *,
    validation: DataFiles | float = 0.2,
    config: TrainConfig = JOINT_TRAINING,
    validation_limit: int = 200,
    tracker: Tracker | None = None,
    start: Mapping[str, Any] | None = None,
    command: str = "transfiner-refine train",
) -> TrainResult:
    """Train a detector and its refiner together; the same call goes on with a run that was interrupted.

    Several processes that ``accelerate launch`` or ``torchrun`` started make one run; they need the same folders, and
    the same weights to start from.

    Args:
        model: From :meth:`Adapter.with_refiner <transfiner_refine.adapters.protocol.Adapter.with_refiner>`, whose
            ``train``, ``max_rois`` and ``loss`` say what is trained and how. Its weights are changed.
        data: What to train on; photos without an object are trained on too.
        output: Gets ``best/``, the joined model with the best averaged weights, and the files of
            :func:`~transfiner_refine.training.loop.train`.
        validation: What to judge by: other files, or the share of the photos of ``data`` to set apart.
        config: Schedule, in photos; the rate of the backbone is ``backbone_scale`` of the others'. A batch is never
            larger than the data.
        validation_limit: Photos to judge by at most, spread over those there are.
        tracker: Where the figures go besides ``metrics.jsonl``.
        start: What the run starts from, as JSON values: a directory with another run is refused.
        command: What the model card says repeats the run.

    Returns:
        Where the best model is, and its figures: see
        :class:`~transfiner_refine.adapters.training_validation.DetectorValidation`.

    Raises:
        InvalidInputError: If the data cannot be used, the detector has another number of classes or a trainer of its
            own, the refiner does not read its features, or ``output`` holds another run.
        TrainingError: If training does not stay finite.
        MissingDependencyError: If a package for training or evaluation is not installed.
    """
    adapter, output = model.adapter, Path(output)
    _check_model(model)
    whole = PhotoSet.read(data, adapter.categories)
    if isinstance(validation, DataFiles):
        training, judged = whole, PhotoSet.read(validation, whole.categories)
        judged_file = validation.annotations
    else:
        training, judged = whole.split(validation, config.seed)
        judged_file = data.annotations
    judged = judged.spread(validation_limit)
    if adapter.class_count not in (None, len(whole.categories)):
        raise InvalidInputError(
            f"expected a detector of the {len(whole.categories)} categories of {data.annotations}, got one of "
            f"{adapter.class_count} classes: build it for these categories, or leave the other annotations out"
        )
    adapter.categories = whole.categories
    config = fit_batch(config, len(training), make_accelerator().num_processes)
    task = DetectorTask(
        model,
        FlippedPhotos(training, config.seed),
        DetectorValidation(judged, judged_file),
        {
            "start": dict(start or {}),
            "data": data.fingerprint(),
            "validation": validation.fingerprint() if isinstance(validation, DataFiles) else validation,
            "choices": {"validation_limit": validation_limit},
        },
    )
    facts = CardFacts(
        source=adapter.source,
        model=model.refiner_model.config,
        joint=model.joint,
        categories=[str(category.get("name", category["id"])) for category in whole.categories],
        can_be_loaded_alone=adapter.recipe is not None,
        train=f"{len(training)} photos with {training.count} objects",
        validation=f"{len(judged)} photos with {judged.count} objects",
        schedule=config,
        command=command,
    )
    return run_task(task, output, config, card=lambda result: write_card(facts, result), tracker=tracker)


def start_refiner(adapter: Adapter, name: str | Path | None) -> Refiner:
    """A refiner on a detector's features, to be trained with it.

    Args:
        adapter: The detector's.
        name: A refiner as :meth:`Refiner.from_pretrained` takes it: one on features of this kind, or any whose features
            have as many channels, of which the network on top of them is taken. None makes a new one, which begins by
            changing nothing.

    Raises:
        InvalidInputError: If its features have another number of channels.
        WeightsError: If it cannot be loaded.
    """
    if name is None:
        return Refiner(RefinerModel(adapter.config(decoder="residual")))
    found = Refiner.from_pretrained(name).model
    if found.config.feature_channels != adapter.channels:
        raise InvalidInputError(
            f"expected a refiner on {adapter.channels} channels, those of {adapter.source!r}, got {str(name)!r} on "
            f"{found.config.feature_channels}: start from another, or leave it out for a new one"
        )
    features = adapter.config()
    config = replace(
        found.config,
        feature_source=features.feature_source,
        strides=features.strides,
        feature_fingerprint=None,
        # A prediction that was fitted to another model's refinements says nothing of these.
        predicts_gain=False,
        pixel_widths=(),  # it takes photos, and here come features alone
    )
    model = RefinerModel(config)
    model.transfiner.load_state_dict(found.transfiner.state_dict())
    return Refiner(model)


class DetectorTask(Task):
    """A detector and its refiner, trained on whole photos.

    Args:
        model: The joined model.
        dataset: The photos.
        validate: Judges the averaged weights.
        record: What else makes the run what it is, such as its data.
    """

    unit = "photos"
    model: RefinedDetector

    def __init__(
        self,
        model: RefinedDetector,
        dataset: FlippedPhotos,
        validate: DetectorValidation,
        record: Mapping[str, Any],
    ) -> None:
        self.model, self.dataset, self.validate, self.others = model, dataset, validate, record

    @property
    def record(self) -> Mapping[str, Any]:
        """Detector, refiner, objective, and what the caller says."""
        joint = self.model.joint
        return {
            "detector": {"source": self.model.adapter.source, "recipe": self.model.adapter.recipe},
            "model": asdict(self.model.refiner_model.config),
            "loss": asdict(joint.loss),
            "joint": {"train": joint.train, "max_rois": joint.max_rois, "detach_coarse": joint.detach_coarse},
            **self.others,
        }

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """What ``with_refiner`` left trainable; the backbone is what comes before the feature pyramid."""
        # torchvision counts its pyramid among the backbone; it learns at the rate of the heads, as laterals do.
        backbone = getattr(self.model.adapter.backbone, "body", self.model.adapter.backbone)
        of_backbone = set(map(id, backbone.parameters()))
        names = {name for name, parameter in self.model.named_parameters() if id(parameter) in of_backbone}
        return parameter_groups(self.model, config, names.__contains__)

    def objective(self) -> nn.Module:
        """The detector's own losses, and the refiner's."""
        return _Objective(self.model)

    def collate(self, samples: Sequence[PhotoSample]) -> list[PhotoSample]:
        """Photos differ in size: each stays by itself."""
        return list(samples)

    def to_device(self, batch: Sequence[PhotoSample], device: torch.device) -> Sequence[Any]:
        """All photos as one argument."""
        return ([PhotoSample(*super(DetectorTask, self).to_device(sample, device)) for sample in batch],)

    def judge(self, averaged: nn.Module) -> Record:
        """AP of the detector's own masks and of the refined ones."""
        assert isinstance(averaged, RefinedDetector)
        return self.validate(averaged)

    def save(self, averaged: nn.Module, directory: Path) -> None:
        """Write the joined model's directory."""
        assert isinstance(averaged, RefinedDetector)
        averaged.save_pretrained(directory)


class _Objective(nn.Module):
    """What processes share: a module whose call gives the losses."""

    def __init__(self, model: RefinedDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Sequence[PhotoSample]) -> dict[str, Tensor]:
        return self.model.training_losses(samples)


def _check_model(model: RefinedDetector) -> None:
    adapter = model.adapter
    if adapter.trainer is not None:
        raise InvalidInputError(
            f"expected a detector of torchvision or transformers, got {adapter.source!r}: train the model that "
            f"with_refiner made by {adapter.trainer}"
        )
    if model.refiner_model.config.feature_source == IMAGE_ENCODER:
        raise InvalidInputError(
            "expected a refiner on the detector's features, got one with an image encoder: make one with "
            "start_refiner(adapter, None), or fine-tune it on the detector's predictions"
        )
    if model.refiner_model.config.depth == 0:
        raise InvalidInputError("expected a refiner with at least one quadtree level, got depth 0: nothing to train")
