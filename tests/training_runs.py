"""A tiny data set and runs on it, also for processes of their own: ``python training_runs.py TASK DIRECTORY``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_models import discs, encoder_config
from torch import Tensor
from torch.utils.data import Dataset

from transfiner_refine import Refiner
from transfiner_refine.data.crops import CropSample
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.training.loop import TrainResult, train
from transfiner_refine.training.losses import LossConfig
from transfiner_refine.training.schedule import TrainConfig

CROP = 64
DEPTH = 2
OBJECTS = 5
SIX_STEPS = TrainConfig(
    steps=6,
    batch_size=2,
    micro_batch=1,
    warmup=2,
    ema=0.5,
    frozen_stages=4,
    precision="no",
    workers=0,
    validate_every=2,
)
"""Two batches an epoch and an object left over, so that steps 3 and 4 are the second epoch."""


def tiny_model() -> RefinerModel:
    torch.manual_seed(0)
    return RefinerModel(encoder_config(depth=DEPTH))


def disc_sample(generator: torch.Generator, index: int = 0) -> CropSample:
    """A disc of its own brightness, and a coarse mask that is a disc beside it."""
    x, y, radius, dx, dy, growth = (torch.rand(6, generator=generator) - 0.5).tolist()
    circle = (32 + 8 * x, 32 + 8 * y, 18 + 6 * radius)
    wrong = (circle[0] + 6 * dx, circle[1] + 6 * dy, circle[2] + 4 * growth)
    noise = torch.randint(0, 60, (3, CROP, CROP), generator=generator)
    roi = torch.tensor([4.0, 4.0, 60.0, 60.0])
    side = 28 << (DEPTH - 1)
    return CropSample(
        image=(noise + 150 * discs(CROP, CROP, [circle])).to(torch.uint8),
        roi=roi,
        coarse=crop_masks(discs(CROP, CROP, [wrong]), roi[None], side)[0],
        target=crop_masks(discs(CROP, CROP, [circle]), roi[None], 2 * side)[0] >= 0.5,
        weight=torch.tensor(1.0),
        index=torch.tensor(index),
    )


class Discs(Dataset[CropSample]):
    """Samples that depend on epoch and index alone.

    Attributes:
        seen: ``(epoch, index)`` of each sample that was read.
        limit: Samples after which ``at_limit`` is called.
        spoilt: Samples, by number, whose weight is not a number.
    """

    def __init__(self, limit: int | None = None, at_limit: Callable[[], None] = lambda: None, spoilt: range = range(0)):
        self.epoch = 0
        self.seen: list[tuple[int, int]] = []
        self.limit, self.at_limit, self.spoilt = limit, at_limit, spoilt

    def __len__(self) -> int:
        return OBJECTS

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> CropSample:
        number = len(self.seen)
        if number == self.limit:
            self.at_limit()
        self.seen.append((self.epoch, index))
        sample = disc_sample(torch.Generator().manual_seed(100 * self.epoch + index), index)
        return sample._replace(weight=torch.tensor(float("nan"))) if number in self.spoilt else sample


class Scores:
    """A validation that gives these scores, one after the other, and then the last one again and again.

    Attributes:
        judged: Weights of each refiner that was judged.
    """

    def __init__(self, *scores: float):
        self.scores = scores
        self.judged: list[dict[str, Tensor]] = []

    def __call__(self, refiner: Refiner) -> dict[str, float]:
        self.judged.append({name: value.clone() for name, value in refiner.model.state_dict().items()})
        return {"score": self.scores[min(len(self.judged), len(self.scores)) - 1]}


def run(
    directory: Path, dataset: Dataset[CropSample] | None = None, config: TrainConfig = SIX_STEPS, **changes: Any
) -> TrainResult:
    values: dict[str, Any] = {"model": tiny_model(), "validate": Scores(0.0), "loss_config": LossConfig()} | changes
    return train(dataset=dataset or Discs(), directory=directory, config=config, **values)


def checkpoint(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "last.pt", weights_only=True)


def weights(directory: Path) -> dict[str, Tensor]:
    return checkpoint(directory)["model"]


def metrics(directory: Path) -> list[dict[str, float]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(task: str, directory: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a task of this file in a process of its own."""
    command = [sys.executable, __file__, task, str(directory)]
    return subprocess.Popen(command, env=os.environ | (environment or {}))


def six_steps(directory: Path) -> None:
    """All six steps; of two processes, each its half of every batch."""
    run(directory)


def hang_in_step_5(directory: Path) -> None:
    """A checkpoint after every second step, and the third of them never comes."""
    dataset = Discs(limit=9, at_limit=lambda: time.sleep(600))
    run(directory, dataset, replace(SIX_STEPS, validate_every=6, save_every=2))


if __name__ == "__main__":
    {"six_steps": six_steps, "hang_in_step_5": hang_in_step_5}[sys.argv[1]](Path(sys.argv[2]))
