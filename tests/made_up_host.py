"""A host framework that is made up: the least that an adapter and its refined detector need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from small_models import discs
from torch import Tensor, nn

from transfiner_refine import (
    FeaturePyramid,
    Instances,
)
from transfiner_refine.adapters.joint import RefinedDetector
from transfiner_refine.adapters.protocol import (
    Adapter,
    JointOptions,
    Prediction,
    as_images,
    evaluating,
)
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.modeling.model import RefinerModel

CIRCLES = [(30.0, 28.0, 18.0), (60.0, 40.0, 14.0)]
STRIDES = (4, 8, 16, 32)
WIDTH = 8


class MadeUp(nn.Module):
    """A detector that finds two discs in every image."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.Dropout(0.5))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        stem = self.backbone(images)
        return [nn.functional.avg_pool2d(stem, stride) for stride in STRIDES]


class MadeUpAdapter(Adapter):
    name = "made_up"

    def __init__(self, model: nn.Module, with_laterals: bool = False) -> None:
        super().__init__(model)
        if with_laterals:
            self.laterals = nn.Conv2d(WIDTH, WIDTH, 1)

    @property
    def channels(self) -> int:
        return WIDTH

    @property
    def strides(self) -> tuple[int, ...]:
        return STRIDES

    @property
    def backbone(self) -> nn.Module:
        return self.model.get_submodule("backbone")

    def detect(self, images: Any) -> list[Prediction]:
        predictions = []
        for image in as_images(images):
            height, width = image.shape[1:]
            masks = discs(height, width, CIRCLES)
            with evaluating(self.model):
                maps = self.model(image.float()[None, :, : height // 32 * 32, : width // 32 * 32])
            pyramid = FeaturePyramid(tuple(maps), STRIDES, source=self.source)
            instances = Instances(boxes_from_masks(masks), masks, (height, width))
            predictions.append(Prediction(instances, torch.arange(2), pyramid))
        return predictions

    def _wrap(self, refiner: RefinerModel, options: JointOptions) -> RefinedDetector:
        return RefinedMadeUp(self, refiner, options)


class RefinedMadeUp(RefinedDetector):
    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [refined.masks for refined in self.refine(self.adapter.detect(images), list(images))]


def adapter(seed: int = 0, with_laterals: bool = False) -> MadeUpAdapter:
    return MadeUpAdapter(MadeUp(seed).eval(), with_laterals)
