"""Train the pixel head of a refiner, whose other weights stay as they are.

    python scripts/train_pixel_head.py MODEL_DIR OUTPUT_DIR --cache CACHE_DIR --samples SAMPLES_DIR [--data DIR]

What the network makes of the training photos is collected once, in SAMPLES_DIR: the head sees nothing else of it. The
photos are those of the embedded model without composites, whose cut edges no real photo has.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from baselines import load_refiner  # pyright: ignore[reportMissingImports]
from dataset import DATA, ECSSD_VALIDATION, MatchedSet, open_set  # pyright: ignore[reportMissingImports]
from sample_files import open_columns  # pyright: ignore[reportMissingImports]
from train_embedded import Validation  # pyright: ignore[reportMissingImports]

from transfiner_refine import Refiner
from transfiner_refine.config import ROOT_SIDE
from transfiner_refine.data.augment import compose
from transfiner_refine.data.crops import CROP_SIDE, CropDataset
from transfiner_refine.data.object_cache import CropSource
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.pixel_head import HEAD_SIDE, PixelHead, enlarge
from transfiner_refine.modeling.transfiner import above_threshold
from transfiner_refine.training.schedule import mixed_precision, warming_average

WIDTHS = (32, 64, 96, 96)

BAND = 13
"""Width of the band along the refined outline whose pixels count most."""

ELSEWHERE = 0.2
"""What a pixel counts in which nothing is in doubt."""

GROUP = 16
"""Samples that go through the network, or through the head, at once."""


class Sample(NamedTuple):
    """What the head is trained on; a batch has a leading dimension more.

    S is the side of the finest level, H that at which the head works.

    Attributes:
        pixels: ``(3, H, H)`` uint8 RGB of the RoI.
        probs: ``(S, S)`` uint8, refined probabilities · 255.
        coarse: ``(S, S)`` uint8, coarse probabilities · 255.
        target: ``(H, H / 8)`` uint8, the ground truth in bits.
        weight: ``()`` uint8, weight · 100.
    """

    pixels: np.ndarray
    probs: np.ndarray
    coarse: np.ndarray
    target: np.ndarray
    weight: np.ndarray


class RoIPixels(CropDataset):
    """The crop of each object for the network, with its RoI at the pixels of the head."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        draw = self.draw(index)
        crop, (coarse, target) = self.pixels(draw, draw.placed, CROP_SIDE), self.masks(draw)
        x0, y0, x1, y1 = draw.crop_roi
        scale = HEAD_SIDE / np.array([x1 - x0, y1 - y0])
        to_roi = np.column_stack([np.diag(scale), -scale * [x0, y0]])
        pixels = self.pixels(draw, compose(to_roi, draw.placed), HEAD_SIDE)
        roi = torch.from_numpy(draw.crop_roi).float()
        return crop, roi, coarse, target, pixels, torch.tensor(draw.weight)


def open_samples(folder: Path, count: int, side: int) -> Sample:
    """The samples of a folder as arrays on disk, empty at first."""
    shapes = [(3, HEAD_SIDE, HEAD_SIDE), (side, side), (side, side), (HEAD_SIDE, HEAD_SIDE // 8), ()]
    return Sample(*open_columns(folder, Sample._fields, count, [(shape, np.uint8) for shape in shapes]))


@torch.no_grad()
def collect(model: RefinerModel, dataset: RoIPixels, samples: Sample, seed: int) -> None:
    """Fill the samples that are still empty: an object's weight is written last."""
    count, select = len(samples.weight), above_threshold(0.5)
    epochs = range(-(-count // len(dataset)))
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(len(dataset)) for epoch in epochs])
    for start in trange(0, count, GROUP, desc="Collecting"):
        part = slice(start, min(start + GROUP, count))
        if samples.weight[part].all():
            continue
        drawn = []
        for place in range(part.start, part.stop):
            dataset.set_epoch(place // len(dataset))
            drawn.append(dataset[int(order[place])])
        crop, roi, coarse, target, pixels, weight = map(torch.stack, zip(*drawn, strict=True))
        with mixed_precision(torch.device("cpu")):
            roi_pyramid = model.transfiner.roi_pyramid(model.encode_crops(crop), roi, torch.arange(len(roi)))
            output = model.transfiner(roi_pyramid, coarse, model.config.depth, select)
        samples.pixels[part] = pixels.numpy()
        samples.probs[part] = (output.probs * 255).round().byte().numpy()
        samples.coarse[part] = (coarse * 255).round().byte().numpy()
        samples.target[part] = np.packbits(target.numpy(), axis=2)
        samples.weight[part] = (weight * 100).round().byte().numpy()


def batch(samples: Sample, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Pixels, refined and coarse probabilities, ground truth ``(R, H, H)`` float32 and weights; half are mirrored."""
    chosen = np.sort(rng.integers(len(samples.weight), size=GROUP))
    target = np.unpackbits(samples.target[chosen], axis=2)
    columns = [*(torch.from_numpy(x[chosen]).float() / 255 for x in samples[:3]), torch.from_numpy(target).float()]
    if rng.random() < 0.5:
        columns = [x.flip(-1) for x in columns]
    return *columns, torch.from_numpy(samples.weight[chosen]).float() / 100


def pixel_weights(probs: Tensor) -> Tensor:
    """How much each pixel counts, ``(R, H, H)``: most where the refined mask is in doubt or ends.

    It may not depend on the ground truth, or probabilities would lean towards change.
    """
    refined = enlarge(probs[:, None], HEAD_SIDE)
    inside = (refined >= 0.5).float()
    band = F.max_pool2d(inside, BAND, 1, BAND // 2) + F.max_pool2d(-inside, BAND, 1, BAND // 2)
    return (ELSEWHERE + band + 4 * refined * (1 - refined))[:, 0]


def train(head: PixelHead, samples: Sample, steps: int, learning_rate: float, seed: int) -> None:
    """Train the head, in place, to the average of its weights."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    factor = lambda step: min(1.0, (step + 1) / 50, max(0.02, (steps - step) / (0.5 * steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    averaged = torch.optim.swa_utils.AveragedModel(head, avg_fn=warming_average(0.99))
    for step in (bar := trange(steps, desc="Training")):
        pixels, probs, coarse, truth, weight = batch(samples, rng)
        counts = pixel_weights(probs) * weight[:, None, None]
        with mixed_precision(torch.device("cpu")):
            logits = head(pixels, probs, coarse)
        entropy = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
        loss = (counts * entropy).sum() / counts.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(head)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    head.load_state_dict(averaged.module.state_dict())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--count", type=int, default=16000)
    parser.add_argument("--steps", type=int, default=5800)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    ecssd = CropSource(args.data / "ecssd", exclude=ECSSD_VALIDATION)
    model = load_refiner(args.model).model
    side = ROOT_SIDE << (model.config.depth - 1)
    dataset = RoIPixels(
        [ecssd, ecssd, CropSource(args.data / "ccp", weight=0.7)],
        args.cache,
        side=side,
        box_margin=model.config.box_margin,
        real_share=0.65,
        seed=args.seed,
    )
    samples = open_samples(args.samples, args.count, side)
    collect(model, dataset, samples, args.seed)

    finished = RefinerModel(replace(model.config, pixel_widths=WIDTHS)).eval()
    fresh = {name: value for name, value in finished.state_dict().items() if name.startswith("pixel_head.")}
    finished.load_state_dict(model.state_dict() | fresh)
    assert finished.pixel_head is not None
    train(finished.pixel_head, samples, args.steps, args.learning_rate, args.seed)
    photos = list(open_set(args.data, "ecssd_validation"))
    refiner = Refiner(finished)
    print(Validation({"ecssd": photos, "davis": list(MatchedSet(args.data / "davis_dev", limit=60))})(refiner))
    print(refiner.save_pretrained(args.output))


if __name__ == "__main__":
    main()
