"""One training loop on Hugging Face accelerate: seeded, resumable to the step, validated through the full refiner."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Sampler

from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.refiner import Refiner
from transfiner_refine.training.losses import LossConfig, RefinementLoss

CHECKPOINT = "last.pt"
METRICS = "metrics.jsonl"
BEST = "best"


@dataclass(frozen=True)
class TrainConfig:
    """Schedule of one run.

    Attributes:
        steps: Optimiser steps.
        batch_size: Objects per step.
        learning_rate: Plateau of the schedule, for everything but the backbone.
        backbone_scale: The backbone's learning rate relative to the rest.
        frozen_stages: Backbone stages that stay as they are, 0 to 5; 5 freezes the backbone.
        warmup: Steps of linear warm-up.
        decay: Share of the steps, at the end, over which the learning rate falls to zero.
        weight_decay: Of AdamW, on weight matrices only.
        clip: Largest norm of the gradient.
        ema: Decay of the exponential moving average of the weights, which is what is validated and saved.
        precision: ``"bf16"`` or ``"no"``.
        workers: Loader processes.
        validate_every: Steps between validations, each followed by a checkpoint.
        seed: Seed of everything random.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    backbone_scale: float = 0.1
    frozen_stages: int = 5
    warmup: int = 200
    decay: float = 0.3
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.998
    precision: str = "bf16"
    workers: int = 1
    validate_every: int = 500
    seed: int = 0


class EpochSampler(Sampler[int]):
    """Every object once per epoch, in an order that depends on seed and epoch alone; can start in mid-epoch."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.length, generator=generator).tolist()[self.start :]

    def __len__(self) -> int:
        return self.length - self.start


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on the peak learning rate at a step: linear warm-up, a plateau, and a linear fall to zero at the end.

    Only the fall depends on the length of the run, so a run can be resumed with more steps from its plateau.
    """
    fall = max(1.0, config.decay * config.steps)
    return min(1.0, (step + 1) / max(1, config.warmup), (config.steps - step) / fall)


def warming_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Exponential moving average that forgets its start: its memory grows with the steps, up to ``decay``."""

    def update(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        steps = int(count)
        return torch.lerp(current, averaged, min(decay, (1 + steps) / (10 + steps)))

    return update


def parameter_groups(model: RefinerModel, config: TrainConfig) -> list[dict]:
    """Trainable parameters by learning rate and weight decay; norms, biases and embeddings do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and "level" not in name
            groups.setdefault((".backbone." in name, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": config.backbone_scale if backbone else 1.0,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (backbone, decays), parameters in groups.items()
    ]


def train(
    model: RefinerModel,
    dataset: Dataset,
    directory: Path,
    config: TrainConfig,
    loss_config: LossConfig,
    validate: Callable[[Refiner], dict[str, float]],
) -> None:
    """Train a refiner; a run that was interrupted goes on from its last checkpoint.

    Args:
        model: The model, initialised; its backbone is frozen as ``config`` says.
        dataset: Samples of :class:`~transfiner_refine.data.crops.CropDataset`, with ``set_epoch``.
        directory: Gets ``last.pt`` (everything to resume), ``metrics.jsonl``, and ``best/``, the refiner with the
            highest ``score``.
        config: Schedule.
        loss_config: Objective.
        validate: Figures of a refiner on data that training never sees; ``score`` decides which one is best.

    Raises:
        InvalidInputError: If the dataset has fewer objects than one batch.
    """
    torch.set_flush_denormal(True)
    accelerator = Accelerator(mixed_precision=config.precision)
    directory.mkdir(parents=True, exist_ok=True)
    if model.image_encoder is not None:
        model.image_encoder.backbone.freeze(config.frozen_stages)
    objective = RefinementLoss(model, loss_config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.learning_rate, fused=True)
    average = AveragedModel(model, avg_fn=warming_average(config.ema))
    assert isinstance(dataset, Sized)
    sampler = EpochSampler(len(dataset), config.seed)
    loader = DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=sampler,
        num_workers=config.workers,
        drop_last=True,
        persistent_workers=config.workers > 0,
        prefetch_factor=4 if config.workers else None,
    )
    steps_per_epoch = len(dataset) // config.batch_size
    if steps_per_epoch == 0:
        raise InvalidInputError(
            f"expected at least one batch of {config.batch_size} objects, got {len(dataset)} objects: "
            "lower batch_size or add data"
        )
    step, best = 0, -math.inf
    checkpoint = directory / CHECKPOINT
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, best = state["step"], state["best"]
    objective, optimizer = accelerator.prepare(objective, optimizer)
    objective.train()
    running: dict[str, float] = {}
    since, seen = time.perf_counter(), 0
    while step < config.steps:
        epoch, done = divmod(step, steps_per_epoch)
        sampler.epoch, sampler.start = epoch, done * config.batch_size
        dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            # Seeded by the step, so that a resumed run draws what an uninterrupted one would have drawn.
            torch.manual_seed(config.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * group["scale"] * learning_rate_factor(step, config)
            with accelerator.autocast():
                losses = objective(batch.image, batch.roi, batch.coarse, batch.target, batch.weight)
            loss = sum((value for name, value in losses.items() if name.startswith("loss")), start=torch.zeros(()))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(model)
            step, seen = step + 1, seen + 1
            for name, value in losses.items():
                running[name] = running.get(name, 0.0) + float(value.detach())
            if step % config.validate_every == 0 or step == config.steps:
                record = {"step": step, "samples_per_s": seen * config.batch_size / (time.perf_counter() - since)}
                record |= {name: value / seen for name, value in running.items()}
                started = time.perf_counter()
                averaged: RefinerModel = average.module  # type: ignore[assignment]
                record |= validate(Refiner(averaged))
                record["validation_s"] = time.perf_counter() - started
                if record["score"] > best:
                    best = record["score"]
                    save_model(averaged, directory / BEST)
                save_checkpoint(checkpoint, model, average, optimizer, step, best)
                with (directory / METRICS).open("a") as file:
                    file.write(json.dumps(record) + "\n")
                accelerator.print({k: round(v, 4) for k, v in record.items()})
                running, seen, since = {}, 0, time.perf_counter()
                objective.train()
            if step >= config.steps:
                break


def save_checkpoint(
    path: Path,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    best: float,
) -> None:
    """Write everything that a resumed run needs, in one file that is complete or not there."""
    temporary = path.with_suffix(".tmp")
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "best": best,
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def describe(config: TrainConfig, loss_config: LossConfig) -> str:
    """Both configurations as JSON, for the record of a run."""
    return json.dumps({"train": asdict(config), "loss": asdict(loss_config)}, indent=2)
