"""Train a refiner on, and teach its image encoder what MobileSAM sees in the same photos.

    python scripts/teach_features.py RUN_DIR --init MODEL_DIR --features FEATURES_DIR --cache CACHE_DIR

FEATURES_DIR is made by ``collect_features.py``. Besides the usual losses, a linear map of the pyramid's maps has
to tell MobileSAM's features at the same places of the photo; samples that are composed of several photos have only the
usual losses. RUN_DIR gets the checkpoint, the metrics and the best refiner. The same command resumes an interrupted
run, and ``torchrun --nproc_per_node 2`` before it shares it between processes.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from collect_features import CHANNELS, Features  # pyright: ignore[reportMissingImports]
from dataset import DATA  # pyright: ignore[reportMissingImports]
from train_embedded import (  # pyright: ignore[reportMissingImports]
    Validation,
    held_out_photos,
    training_mix,
    with_changes,
)

from transfiner_refine import Refiner
from transfiner_refine.data.augment import compose
from transfiner_refine.data.crops import CROP_SIDE, CropDataset
from transfiner_refine.data.object_cache import CropSource
from transfiner_refine.errors import InvalidInputError
from transfiner_refine.modeling.hub import save_model
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.training.loop import run_task
from transfiner_refine.training.losses import LossConfig, RefinementLoss
from transfiner_refine.training.metrics import Record
from transfiner_refine.training.schedule import TrainConfig, freeze, parameter_groups
from transfiner_refine.training.task import CropTask

STRIDES = (8, 16)
"""Of the maps that are taught."""

DEVIATION = 0.065
"""Rough standard deviation of MobileSAM's features."""


class TaughtSample(NamedTuple):
    """A training sample with the teacher's features.

    Attributes:
        image: See ``CropSample``, as the four below.
        roi: See there.
        coarse: See there.
        target: See there.
        weight: See there.
        features: ``(256, h, w)`` float16 at the places of the finest taught map, zero where they are not known.
    """

    image: Tensor
    roi: Tensor
    coarse: Tensor
    target: Tensor
    weight: Tensor
    features: Tensor


class TaughtCrops(CropDataset):
    """Training samples with the teacher's features of their photos."""

    def __init__(self, folder: Path, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        known = {path.stem for path in folder.glob("*.npy")}
        names = [cache.name for cache in self._caches]
        if known.isdisjoint(names):
            # Cut-outs are named by the files they come from: newer ones have other names.
            raise InvalidInputError(
                f"expected features of one of {names} in {folder}, got {sorted(known)}; run collect_features.py"
            )
        self._features = [Features(folder, cache) if cache.name in known else None for cache in self._caches]
        self._rows = [(k, row) for k, cache in enumerate(self._caches) for row in range(len(cache))]

    def __getitem__(self, index: int) -> TaughtSample:  # type: ignore[override]
        draw = self.draw(index)
        side = CROP_SIDE // STRIDES[0]
        k, row = self._rows[index]
        known = self._features[k]
        if draw.scene is None and known is not None:
            affine = compose(draw.placed, draw.work.affine)
            steps = (np.arange(side) + 0.5) * STRIDES[0]
            crop = np.stack(np.meshgrid(steps, steps), -1)
            places = (crop - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T
            features = known.sampled(row, self._caches[k].objects[row], places) / DEVIATION
        else:
            features = torch.zeros(CHANNELS, side, side)
        sample = self.sample(index, draw)
        return TaughtSample(sample.image, sample.roi, sample.coarse, sample.target, sample.weight, features.half())


class Taught(nn.Module):
    """A refiner, and linear maps of its features to the teacher's."""

    def __init__(self, refiner: RefinerModel):
        super().__init__()
        self.refiner = refiner
        self.readers = nn.ModuleList([nn.Conv2d(refiner.config.feature_channels, CHANNELS, 1) for _ in STRIDES])
        for reader in self.readers:
            nn.init.zeros_(reader.weight)  # pyright: ignore[reportArgumentType]


class TaughtLoss(nn.Module):
    """The usual losses, and how far the teacher's features are off."""

    def __init__(self, model: Taught, config: LossConfig, weight: float):
        super().__init__()
        self.model, self.usual, self.weight = model, RefinementLoss(model.refiner, config), weight

    def forward(
        self, image: Tensor, roi: Tensor, coarse: Tensor, truth: Tensor, weight: Tensor, features: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a batch; see ``TaughtSample``."""
        pyramid = self.model.refiner.encode_crops(image)
        losses = self.usual.of_features(pyramid, roi, coarse, truth, weight)
        known = (features != 0).any(dim=1, keepdim=True).float()
        errors = []
        for stride, reader in zip(STRIDES, self.model.readers, strict=True):
            step = stride // STRIDES[0]
            target, where = F.avg_pool2d(features.float(), step), F.avg_pool2d(known, step) == 1
            told = reader(pyramid.maps[pyramid.strides.index(stride)])
            squares = (told - target).square().mean(dim=1, keepdim=True)
            spread = (where * target.square().mean(dim=1, keepdim=True)).sum()
            errors.append((where * squares).sum() / spread.clamp(min=1e-6))
        error = torch.stack(errors).mean()
        return losses | {"loss_features": self.weight * error, "unexplained": error.detach()}


class TaughtTask(CropTask):
    """The usual training, with a teacher of features."""

    model: Taught  # type: ignore[assignment]

    def __init__(self, model: Taught, dataset: CropDataset, config: LossConfig, validate: Validation, weight: float):
        super().__init__(model.refiner, dataset, config, validate, {"features": weight})
        self._record = super().record
        self.model, self.weight = model, weight

    @property
    def record(self) -> Any:
        """As without a teacher, and what it counts."""
        return self._record

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """As without a teacher, and the linear maps."""
        freeze(self.model.refiner, config)
        groups = parameter_groups(self.model.refiner, config)
        return [*groups, {"params": list(self.model.readers.parameters()), "scale": 3.0, "weight_decay": 0.0}]

    def objective(self) -> nn.Module:
        """All losses."""
        return TaughtLoss(self.model, self.loss_config, self.weight)

    def to_device(self, batch: Any, device: torch.device) -> Any:
        """All columns."""
        return [column.to(device) for column in batch]

    def judge(self, averaged: nn.Module) -> Record:
        """Figures of the whole refinement."""
        assert isinstance(averaged, Taught)
        return self.validate(Refiner(averaged.refiner))

    def save(self, averaged: nn.Module, directory: Path) -> None:
        """Write a refiner's directory."""
        assert isinstance(averaged, Taught)
        save_model(averaged.refiner, directory)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--stamps", type=Path)
    parser.add_argument("--more", type=Path, action="append", default=[], help="set of sharpen_masks.py")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--backbone-scale", type=float, default=0.3)
    parser.add_argument("--frozen-stages", type=int, default=2)
    parser.add_argument("--decay", type=float, default=0.5)
    parser.add_argument("--weight", type=float, default=1.0, help="of the teacher's features")
    parser.add_argument("--real-share", type=float, default=0.8)
    parser.add_argument("--validate-every", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes-per-level", type=int, nargs=2, default=(50, 200))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    dataset = training_mix(
        args.data,
        args.cache,
        args.real_share,
        args.stamps,
        more=[CropSource(folder, weight=0.8, min_area=1000) for folder in args.more],
        make=partial(TaughtCrops, args.features),
        seed=args.seed,
    )
    refiner = with_changes(Refiner.from_pretrained(args.init).model)
    model = Taught(refiner.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    losses = LossConfig(cross_entropy_weight=0.5, nodes_per_level=tuple(args.nodes_per_level))
    task = TaughtTask(model, dataset, losses, Validation(held_out_photos(args.data)), args.weight)
    config = TrainConfig(
        steps=args.steps,
        learning_rate=args.learning_rate,
        decay=args.decay,
        backbone_scale=args.backbone_scale,
        frozen_stages=args.frozen_stages,
        validate_every=args.validate_every,
        warmup=args.warmup,
        seed=args.seed,
    )
    run_task(task, args.run, config)


if __name__ == "__main__":
    main()
