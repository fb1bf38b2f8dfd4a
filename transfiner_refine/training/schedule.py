"""How a run unfolds: its configuration, its learning rates, the average of its weights, and the order of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.model import RefinerModel

STEPS_BETWEEN_VALIDATIONS = 50
"""Epochs shorter than this are validated together: inference on a validation set costs as much as a few steps."""


@dataclass(frozen=True)
class TrainConfig:
    """Schedule of one run.

    Attributes:
        steps: Optimiser steps.
        batch_size: Objects per step, of all processes together; photos where a detector is trained too.
        micro_batch: Objects or photos that go through the model at once. A step is the mean over its micro-batches,
            each with random choices of its own, and processes share them out: what is learned does not depend on their
            number.
        learning_rate: Plateau of the schedule, for everything but the backbone.
        backbone_scale: The backbone's learning rate relative to the rest.
        frozen_stages: Backbone stages that stay as they are, 0 to 5; 5 freezes the backbone.
        frozen_detector: Whether the FPN and the incoherence detector stay as they are too, and with them the operating
            point that was set after their training; the backbone then stays in any case.
        warmup: Steps of linear warm-up.
        decay: Share of the steps, at the end, over which the learning rate falls to zero.
        weight_decay: Of AdamW, on weight matrices only.
        clip: Largest norm of the gradient.
        ema: Decay of the exponential moving average of the weights, which is what is validated and saved.
        precision: ``"bf16"``, ``"no"``, or ``"auto"``: bfloat16 where the device has instructions for it; a CPU without
            takes some ten times longer with it.
        workers: Loader processes.
        validate_every: Steps between validations; None validates after each epoch, or after as many whole epochs as
            make ``STEPS_BETWEEN_VALIDATIONS`` steps. Each is followed by a checkpoint.
        save_every: Steps between the checkpoints in between.
        log_every: Steps between records of the losses.
        patience: Validations without a better score after which the run ends; None never ends it early.
        max_skipped: Steps in a row with a gradient that is not finite, after which the run fails.
        seed: Seed of everything random.

    Raises:
        InvalidInputError: If a value is out of its range.
    """

    steps: int
    batch_size: int = 16
    micro_batch: int = 8
    learning_rate: float = 1e-3
    backbone_scale: float = 0.1
    frozen_stages: int = 5
    frozen_detector: bool = False
    warmup: int = 200
    decay: float = 0.3
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.998
    precision: Literal["auto", "bf16", "no"] = "auto"
    workers: int = 1
    validate_every: int | None = None
    save_every: int = 100
    log_every: int = 50
    patience: int | None = None
    max_skipped: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "micro_batch", "validate_every", "save_every", "log_every", "patience", "max_skipped"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"expected {name} of at least 1, got {value}")
        for name in ("warmup", "weight_decay", "workers", "seed"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"expected {name} of at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"expected {name} above 0, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InvalidInputError(f"expected ema from 0 to below 1, got {self.ema}: 0 does not average")
        if not 0 <= self.decay <= 1:
            raise InvalidInputError(f"expected decay from 0 to 1, a share of the steps, got {self.decay}")
        if not 0 <= self.frozen_stages <= 5:
            raise InvalidInputError(f"expected frozen_stages from 0 to 5, got {self.frozen_stages}")
        if self.precision not in ("auto", "bf16", "no"):
            raise InvalidInputError(f'expected precision "auto", "bf16" or "no", got {self.precision!r}')
        if self.batch_size % self.micro_batch:
            raise InvalidInputError(
                f"expected batch_size as a multiple of micro_batch, got {self.batch_size} and {self.micro_batch}"
            )


FINE_TUNING = TrainConfig(
    steps=300,
    learning_rate=5e-4,
    frozen_detector=True,
    warmup=20,
    decay=0.7,
    ema=0.98,
    save_every=50,
    patience=5,
)
"""A short run that starts from a trained refiner and comes to rest; what finds its nodes stays as it is.

The weights of a trained refiner are an average, whose quality the first steps lose: a run has to be long enough to win
it back.
"""


JOINT_TRAINING = TrainConfig(
    steps=2000,
    batch_size=4,
    micro_batch=2,
    learning_rate=2e-4,
    warmup=100,
    decay=0.4,
    ema=0.99,
    precision="no",
)
"""For a detector that has seen much, and a few hundred photos of one's own."""


def is_bf16_native(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def mixed_precision(device: torch.device, precision: str = "auto") -> torch.autocast:
    """The numbers of a forward pass on a device, by :attr:`TrainConfig.precision`."""
    rounds = precision == "bf16" or (precision == "auto" and is_bf16_native(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=rounds)


class MicroBatches(Sampler[list[int]]):
    """Micro-batches of one process: every object at most once an epoch, in an order of seed and epoch alone.

    What is left over when an epoch's objects do not fill a whole step is left out, other objects in each epoch.

    Args:
        length: Objects of the data set.
        config: The schedule.
        process: Index of this process.
        processes: Number of processes.
        unit: What the objects are called in messages.

    Attributes:
        epoch: The epoch to go through.
        start: Steps of it to leave out, at its start.

    Raises:
        InvalidInputError: If there are fewer objects than one step takes, or the processes cannot share a step.
    """

    def __init__(self, length: int, config: TrainConfig, process: int = 0, processes: int = 1, unit: str = "objects"):
        self.length, self.config = length, config
        self.epoch, self.start = 0, 0
        self.steps = length // config.batch_size
        if self.steps == 0:
            raise InvalidInputError(
                f"expected at least one batch of {config.batch_size} {unit}, got {length} {unit}: "
                "lower batch_size or add data"
            )
        of_a_step = config.batch_size // config.micro_batch
        if of_a_step % processes:
            raise InvalidInputError(
                f"expected processes that share the {of_a_step} micro-batches of a step evenly (batch_size "
                f"{config.batch_size}, micro_batch {config.micro_batch}), got {processes} processes: lower micro_batch "
                "or raise batch_size"
            )
        share = of_a_step // processes
        self.places = range(process * share, (process + 1) * share)
        """Which of a step's micro-batches are this process's."""

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mix_seed(self.config.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        size = self.config.micro_batch
        for step in range(self.start, self.steps):
            for place in self.places:
                first = step * self.config.batch_size + place * size
                yield order[first : first + size]

    def __len__(self) -> int:
        return (self.steps - self.start) * len(self.places)


def mix_seed(*parts: int) -> int:
    """One seed out of several numbers of at least 0, such as a run's seed, a step and a place in it."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on the peak learning rate at a step: linear warm-up, a plateau, and a linear fall to zero at the end.

    Only the fall depends on the length of the run, so a run can be resumed with more steps from its plateau.
    """
    fall = max(1.0, config.decay * config.steps)
    return min(1.0, (step + 1) / max(1, config.warmup), (config.steps - step) / fall)


def validation_interval(config: TrainConfig, steps_per_epoch: int) -> int:
    """Steps between validations."""
    return config.validate_every or steps_per_epoch * -(-STEPS_BETWEEN_VALIDATIONS // steps_per_epoch)


def warming_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Exponential moving average that forgets its start: its memory grows with the steps, up to ``decay``."""

    def update(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        steps = int(count)
        return torch.lerp(current, averaged, min(decay, (1 + steps) / (10 + steps)))

    return update


def freeze(model: RefinerModel, config: TrainConfig) -> None:
    """Make exactly those weights trainable that a schedule trains."""
    model.requires_grad_(True)
    if model.pixel_head is not None:
        model.pixel_head.requires_grad_(False)  # it sees edges and colours, which are alike everywhere
    if model.segmenter is not None:
        model.segmenter.requires_grad_(False)
    if model.image_encoder is not None:
        model.image_encoder.backbone.freeze(5 if config.frozen_detector else config.frozen_stages)
    if config.frozen_detector:
        model.transfiner.incoherence_detector.requires_grad_(False)
        if model.image_encoder is not None:
            model.image_encoder.requires_grad_(False)


def fit_batch(config: TrainConfig, samples: int, processes: int) -> TrainConfig:
    """Shrink the batch to the data, so that a handful of samples makes a step too."""
    if samples >= config.batch_size:
        return config
    micro = max(1, min(config.micro_batch, samples // processes))
    return replace(config, micro_batch=micro, batch_size=max(1, samples // (micro * processes)) * micro * processes)


def parameter_groups(
    model: nn.Module, config: TrainConfig, is_backbone: Callable[[str], bool] = lambda name: ".backbone." in name
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay; norms, biases and embeddings do not decay.

    Args:
        model: The model.
        config: The schedule.
        is_backbone: Whether a parameter is of the backbone, by its name.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and ".level." not in name
            groups.setdefault((is_backbone(name), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": config.backbone_scale if backbone else 1.0,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (backbone, decays), parameters in groups.items()
    ]
