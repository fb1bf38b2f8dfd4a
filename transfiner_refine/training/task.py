"""What a run trains, on what, and how the result is judged and kept: what the loop leaves open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from transfiner_refine.data.crops import CropSample
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.training.losses import LossConfig, RefinementLoss
from transfiner_refine.training.metrics import Record
from transfiner_refine.training.schedule import TrainConfig, freeze, parameter_groups

Validate = Callable[[Refiner], Record]
"""Figures of a refiner on data that training never sees; ``score`` decides which refiner is best."""


class Task(ABC):
    """One kind of training, for :func:`~transfiner_refine.training.loop.run_task`.

    Attributes:
        unit: What a sample is called in messages, in the plural.
        model: What is trained, averaged and put into checkpoints; on the CPU until the run begins.
        dataset: Samples by index, with ``set_epoch``; a sample depends on its index and the epoch alone.
    """

    unit: ClassVar[str]
    model: nn.Module
    dataset: Dataset[Any]

    @property
    @abstractmethod
    def record(self) -> Mapping[str, Any]:
        """What makes the run what it is, besides its schedule: JSON values by topic."""

    @abstractmethod
    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Make exactly the weights trainable that a schedule trains, and give them by learning rate and decay."""

    @abstractmethod
    def objective(self) -> nn.Module:
        """A module that holds ``model``, takes what :meth:`to_device` gives, and returns scalars by name.

        Those whose name begins with ``loss`` are summed.
        """

    @abstractmethod
    def judge(self, averaged: nn.Module) -> Record:
        """Figures of averaged weights; by every process, with the same result in each. ``score`` tells the best."""

    @abstractmethod
    def save(self, averaged: nn.Module, directory: Path) -> None:
        """Write averaged weights in the form that users load."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Join the samples of a micro-batch."""
        return default_collate(list(samples))

    def to_device(self, batch: Any, device: torch.device) -> Sequence[Any]:
        """Arguments of the objective for a micro-batch."""
        return [column.to(device, non_blocking=True) for column in batch]


class CropTask(Task):
    """A refiner with an image encoder, trained on crops of one object each.

    Args:
        model: The model, initialised.
        dataset: Samples of :class:`~transfiner_refine.data.crops.CropDataset`.
        loss_config: Objective.
        validate: Judges the averaged weights.
        record: What else makes the run what it is, such as its data.
    """

    unit = "objects"
    model: RefinerModel

    def __init__(
        self,
        model: RefinerModel,
        dataset: Dataset[CropSample],
        loss_config: LossConfig,
        validate: Validate,
        record: Mapping[str, Any],
    ) -> None:
        self.model, self.dataset = model, dataset
        self.loss_config, self.validate, self.others = loss_config, validate, record

    @property
    def record(self) -> Mapping[str, Any]:
        """Objective, architecture, and what the caller says."""
        return {"loss": asdict(self.loss_config), "model": asdict(self.model.config), **self.others}

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """All weights but those that the schedule freezes."""
        freeze(self.model, config)
        return parameter_groups(self.model, config)

    def objective(self) -> nn.Module:
        """The paper's losses, of whole crops."""
        return RefinementLoss(self.model, self.loss_config)

    def to_device(self, batch: CropSample, device: torch.device) -> Sequence[Tensor]:
        """The columns of a batch that the losses need."""
        batch = CropSample(*super().to_device(batch, device))
        return batch.image, batch.roi, batch.coarse, batch.target, batch.weight

    def judge(self, averaged: nn.Module) -> Record:
        """Figures of the whole refinement."""
        assert isinstance(averaged, RefinerModel)
        return self.validate(Refiner(averaged))

    def save(self, averaged: nn.Module, directory: Path) -> None:
        """Write a refiner's directory."""
        assert isinstance(averaged, RefinerModel)
        save_model(averaged, directory)
