"""Train torchvision's Mask R-CNN on Penn-Fudan with and without a refiner on its features, and compare the masks.

    python benchmarks/joint_pennfudan.py runs/joint_pennfudan

Of the 170 photos, 120 are trained on and 50 evaluated, the same in every run. The two runs of a seed share the
detector's first weights, the order of the photos, the schedule and the number of steps; they differ in the refiner and
its losses alone. The detector's backbone and feature pyramid start from those of the embedded model, whose backbone
was trained on ImageNet; the heads start at random. The refiner starts from the embedded one. The folder gets
``figures.json``, from which an interrupted command goes on, and the joint models. ``joint_pennfudan_queries.py`` does
the same with a Mask2Former.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from dataset import DATA
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from transfiner_refine import Instances, Refiner
from transfiner_refine.adapters.joint import RefinedDetector
from transfiner_refine.adapters.protocol import Adapter
from transfiner_refine.adapters.torchvision import TorchvisionAdapter
from transfiner_refine.data.coco import Result, decode_masks
from transfiner_refine.data.datasets import CocoDataset, load_coco
from transfiner_refine.data.photos import PhotoSample
from transfiner_refine.errors import InvalidInputError, TransfinerError
from transfiner_refine.evaluation.coco_metrics import average_precision
from transfiner_refine.evaluation.ground_truth import GroundTruth, load_ground_truth
from transfiner_refine.inputs import as_image, boxes_from_masks
from transfiner_refine.modeling.image_encoder import ImageEncoder
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.training.finetune import OBJECTIVE

SPLIT_SEED = 0
PERSON = 1
"""Category of all annotations."""

BACKBONE_RATE = 0.1
"""Learning rate of the backbone over that of the heads."""

WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""

DECAY = 0.4
"""Share of the steps over which it falls to zero."""


@dataclass(frozen=True)
class Budget:
    """What both runs of a seed get.

    Attributes:
        steps: Optimiser steps.
        batch_size: Photos per step.
        side: Shorter side of the detector's input.
        learning_rate: Of AdamW; the backbone gets a tenth.
        train_photos: Photos that are trained on; the others are evaluated.
    """

    steps: int
    batch_size: int
    side: int
    learning_rate: float
    train_photos: int


@dataclass(frozen=True)
class Figures:
    """What one run reached: AP of masks and of boundaries, in percent.

    Attributes:
        coarse_ap: Of the detector's own masks.
        coarse_boundary_ap: Of the detector's own masks.
        refined_ap: Of the refined masks; None without a refiner.
        refined_boundary_ap: Of the refined masks; None without a refiner.
        seconds_per_step: Time of a training step on the clock.
    """

    coarse_ap: float
    coarse_boundary_ap: float
    refined_ap: float | None
    refined_boundary_ap: float | None
    seconds_per_step: float


@dataclass(frozen=True)
class Host:
    """A kind of detector.

    Attributes:
        build: Makes one, for people alone.
        losses: Those of a training step without a refiner.
        refiner_rate: Learning rate of the refiner over that of the heads.
    """

    build: Callable[[Budget], Adapter]
    losses: Callable[[Adapter, Sequence[PhotoSample]], dict[str, Tensor]]
    refiner_rate: float = 1.0


def embedded_encoder() -> ImageEncoder:
    """The embedded model's EfficientNet-Lite0 and feature pyramid, of which the first two stages stay."""
    encoder = Refiner.from_pretrained().model.image_encoder
    assert encoder is not None
    encoder.backbone.freeze(2)
    return encoder.train()


class LiteBackbone(nn.Module):
    """The embedded image encoder from stride 4 on, as torchvision calls a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = embedded_encoder()
        self.out_channels = self.encoder.lateral[0].out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.encoder(images.contiguous(memory_format=torch.channels_last)).maps[1:]
        coarser = F.max_pool2d(maps[-1], kernel_size=1, stride=2)  # as torchvision's own pyramids end
        return OrderedDict((str(index), level) for index, level in enumerate((*maps, coarser)))


def build_refiner(adapter: Adapter) -> Refiner:
    """The embedded refiner's network on the detector's features."""
    embedded = Refiner.from_pretrained().model
    features = adapter.config()
    config = replace(
        embedded.config,
        feature_source=features.feature_source,
        strides=features.strides,
        predicts_gain=False,
        pixel_widths=(),
        segments=False,
    )
    model = RefinerModel(config)
    model.transfiner.load_state_dict(embedded.transfiner.state_dict())
    return Refiner(model)


def build_mask_rcnn(budget: Budget) -> TorchvisionAdapter:
    model = MaskRCNN(
        LiteBackbone(),
        num_classes=2,
        min_size=budget.side,
        max_size=2 * budget.side,
        image_mean=[0.0] * 3,  # the backbone normalises
        image_std=[1.0] * 3,
    )
    return TorchvisionAdapter(model)


def mask_rcnn_losses(adapter: Adapter, samples: Sequence[PhotoSample]) -> dict[str, Tensor]:
    images = [sample.image / 255 for sample in samples]
    targets = [
        {"boxes": boxes_from_masks(masks), "labels": labels + PERSON, "masks": masks.to(torch.uint8)}
        for _, masks, labels in samples
    ]
    return adapter.model(images, targets)


MASK_RCNN = Host(build_mask_rcnn, mask_rcnn_losses)


class Photos:
    """The data set, split."""

    def __init__(self, data: CocoDataset, train_photos: int) -> None:
        self.data, self.annotations = data, data.by_image()
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        self.train, self.test = sorted(order[:train_photos]), sorted(order[train_photos:])

    def image(self, index: int) -> Tensor:
        """``(3, H, W)`` uint8 RGB."""
        return as_image(self.data.path_of(self.data.images[index]))

    def sample(self, index: int, flip: bool) -> PhotoSample:
        image, found = self.image(index), self.annotations[self.data.images[index]["id"]]
        masks = torch.from_numpy(decode_masks(found, range(len(found)), (image.shape[1], image.shape[2])))
        if flip:
            image, masks = image.flip(2), masks.flip(2)
        return PhotoSample(image, masks, torch.zeros(len(masks), dtype=torch.int64))


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a linear rise, a plateau, a linear fall."""
    return min(1.0, (step + 1) / max(1, WARMUP * steps), (steps - step) / max(1, DECAY * steps))


def train(
    model: nn.Module,
    losses_of: Callable[[Sequence[PhotoSample]], dict[str, Tensor]],
    photos: Photos,
    budget: Budget,
    seed: int,
    console: Console,
    refiner_rate: float = 1.0,
) -> float:
    """Train in place; returns the seconds of a step."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_refiner = name.startswith(("refiner_model.", "laterals."))
            rate = BACKBONE_RATE if ".encoder.backbone." in name else refiner_rate if of_refiner else 1.0
            groups.setdefault(rate * budget.learning_rate, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": rate} for rate, params in groups.items()], weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, budget.steps))
    draws = torch.Generator().manual_seed(seed)  # its own, because a refiner draws from the global one
    model.train()
    start = time.perf_counter()
    for _ in track(range(budget.steps), f"seed {seed}", console=console, transient=True):
        chosen = torch.randint(len(photos.train), (budget.batch_size,), generator=draws).tolist()
        flips = torch.rand(budget.batch_size, generator=draws).tolist()
        samples = [photos.sample(photos.train[i], flip < 0.5) for i, flip in zip(chosen, flips, strict=True)]
        losses = losses_of(samples)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        scheduler.step()
    return (time.perf_counter() - start) / budget.steps


def results_of(instances: Instances, image_id: int) -> list[Result]:
    binary = Instances(
        boxes=instances.boxes,
        masks=instances.masks >= 0.5,
        image_size=instances.image_size,
        scores=instances.scores,
        labels=torch.full_like(instances.boxes[:, 0], PERSON, dtype=torch.int64),
    )
    return binary.to_coco(image_id)


def evaluate(
    adapter: Adapter, model: RefinedDetector | None, photos: Photos, truth: GroundTruth, seconds: float
) -> Figures:
    """AP of the detector's own masks and of the refined ones."""
    coarse: list[Result] = []
    refined: list[Result] = []
    adapter.model.eval()
    for index in photos.test:
        image_id = photos.data.images[index]["id"]
        predictions = adapter.detect([photos.image(index)])
        coarse += results_of(predictions[0].instances, image_id)
        if model is not None:
            refined += results_of(model.eval().refine(predictions)[0], image_id)

    def percent(results: list[Result]) -> tuple[float, float]:
        return 100 * average_precision(truth, results).ap, 100 * average_precision(truth, results, "boundary").ap

    return Figures(*percent(coarse), *(percent(refined) if model is not None else (None, None)), seconds)


def run(
    host: Host,
    joint: bool,
    seed: int,
    photos: Photos,
    truth: GroundTruth,
    budget: Budget,
    folder: Path,
    console: Console,
) -> Figures:
    """One run; a joint model is saved."""
    torch.manual_seed(seed)
    adapter = host.build(budget)
    if not joint:
        seconds = train(adapter.model, partial(host.losses, adapter), photos, budget, seed, console)
        return evaluate(adapter, None, photos, truth, seconds)
    model = adapter.with_refiner(build_refiner(adapter), max_rois=8, loss=OBJECTIVE)
    seconds = train(model, model.training_losses, photos, budget, seed, console, host.refiner_rate)
    model.save_pretrained(folder / f"seed_{seed}")
    return evaluate(adapter, model, photos, truth, seconds)


def report(figures: dict[str, Figures], title: str) -> Table:
    """The table that is printed."""
    table = Table(title=title, caption="AP / boundary AP in percent; gain: refined over coarse of the same run")
    masks = ("coarse, alone", "coarse, joint", "refined, joint")
    for heading in ("seed", *masks, "gain", "s/step, alone", "s/step, joint"):
        table.add_column(heading, justify="right")
    for name, joint in figures.items():
        seed, _, kind = name.partition(" ")
        if kind != "joint" or joint.refined_ap is None or joint.refined_boundary_ap is None:
            continue
        alone = figures[f"{seed} alone"]
        gains = joint.refined_ap - joint.coarse_ap, joint.refined_boundary_ap - joint.coarse_boundary_ap
        table.add_row(
            seed,
            f"{alone.coarse_ap:.1f} / {alone.coarse_boundary_ap:.1f}",
            f"{joint.coarse_ap:.1f} / {joint.coarse_boundary_ap:.1f}",
            f"{joint.refined_ap:.1f} / {joint.refined_boundary_ap:.1f}",
            f"{gains[0]:+.1f} / {gains[1]:+.1f}",
            f"{alone.seconds_per_step:.2f}",
            f"{joint.seconds_per_step:.2f}",
        )
    return table


def compare(host: Host, budget: Budget, seeds: int, folder: Path, data: Path) -> None:
    """Do the runs that are missing in a folder, and print the table."""
    console = Console()
    path = folder / "figures.json"
    try:
        source = data / "pennfudan"
        photos = Photos(load_coco(source / "annotations.json", source / "images"), budget.train_photos)
        names = [photos.data.images[index]["file_name"] for index in photos.test]
        truth = load_ground_truth(source / "annotations.json", only=names)
        known = json.loads(path.read_text()) if path.exists() else {"budget": asdict(budget), "runs": {}}
        if known["budget"] != asdict(budget):
            raise InvalidInputError(f"expected the budget of {path}, {known['budget']}, got another: name a new folder")
        figures = {name: Figures(**values) for name, values in known["runs"].items()}
        for seed in range(seeds):
            for kind in ("alone", "joint"):
                if (name := f"{seed} {kind}") in figures:
                    continue
                figures[name] = run(host, kind == "joint", seed, photos, truth, budget, folder, console)
                known["runs"][name] = asdict(figures[name])
                folder.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(known, indent=2) + "\n")
                console.print(f"{name}: {figures[name]}", soft_wrap=True)
    except TransfinerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    title = f"Penn-Fudan: {len(photos.train)} photos, {budget.steps} steps; {len(photos.test)} evaluated"
    console.print(report(figures, title))


def main(
    folder: Annotated[Path, typer.Argument(help="Gets the figures and the models.")],
    data: Annotated[Path, typer.Option(help="Folder of the sets.")] = DATA,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    side: Annotated[int, typer.Option(min=32, help="Shorter side of the detector's input in pixels.")] = 320,
    learning_rate: Annotated[float, typer.Option()] = 5e-4,
    train_photos: Annotated[int, typer.Option(min=1, help="The others are evaluated.")] = 120,
) -> None:
    """Compare the masks of a detector, alone and with a refiner that is trained with it."""
    budget = Budget(steps, batch_size, side, learning_rate, train_photos)
    compare(MASK_RCNN, budget, seeds, folder, data)


if __name__ == "__main__":
    typer.run(main)
