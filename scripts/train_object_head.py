"""Train the object head of a refiner, whose other weights stay as they are.

    python scripts/train_object_head.py collect MODEL_DIR SAMPLES_DIR --cache CACHE_DIR [--data DIR]
    python scripts/train_object_head.py train MODEL_DIR OUTPUT_DIR --samples SAMPLES_DIR [SAMPLES_DIR ...] [--data DIR]

The backbone must be TinyViT. What it sees in the training photos is collected once, 0.7 MB a sample; an interrupted
collection goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
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
from dataset import DATA, MatchedSet, open_set  # pyright: ignore[reportMissingImports]
from sample_files import open_columns  # pyright: ignore[reportMissingImports]
from train_embedded import Validation, training_mix  # pyright: ignore[reportMissingImports]

from transfiner_refine import Refiner
from transfiner_refine.data.composite import CompositeShares
from transfiner_refine.data.crops import CROP_SIDE, CropDataset, CropSample
from transfiner_refine.data.object_cache import CropSource
from transfiner_refine.functional.coarse import coarse_logits
from transfiner_refine.functional.sampling import OBJECT_STRIDE, FeatureTable, RoIPyramid
from transfiner_refine.modeling.image_encoder import TinyViTBackbone
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.object_head import OBJECT_SIDE
from transfiner_refine.training.schedule import warming_average
from transfiner_refine.types import FeaturePyramid

CHANNELS = 40

GROUP = 16
"""Samples that go through the backbone, or through the head, at once."""

DROPPED = 0.1
"""Share of the backbone's channels that are left out, sample by sample: the photos are few."""

REAL_SHARE = 0.8
"""Share of samples with a real coarse mask."""

LIMIT = 65504.0
"""Largest number of float16, in which features are kept."""


class Sample(NamedTuple):
    """What the head is trained on; a batch has a leading dimension more.

    Attributes:
        fine_4: ``(h, w, C)`` float16, EfficientNet-Lite's map of stride 4.
        fine_8: Its map of stride 8.
        found_0: TinyViT's maps, finest first.
        found_1: The second.
        found_2: The third.
        roi: ``(4,)`` float32 xyxy, crop pixels.
        coarse: ``(H, H)`` uint8, coarse probabilities · 255.
        target: ``(H, H)`` uint8, coverage by the ground truth · 255.
        weight: ``()`` float32; 0 where the sample is not collected yet.
    """

    fine_4: np.ndarray
    fine_8: np.ndarray
    found_0: np.ndarray
    found_1: np.ndarray
    found_2: np.ndarray
    roi: np.ndarray
    coarse: np.ndarray
    target: np.ndarray
    weight: np.ndarray


def maps_of(backbone: TinyViTBackbone, crops: Tensor) -> list[Tensor]:
    """The maps that are kept of uint8 crops ``(R, 3, H, W)``, channels last."""
    fine, found = backbone.parts((crops.float() / 255).contiguous(memory_format=torch.channels_last))
    return [x.permute(0, 2, 3, 1).clamp(-LIMIT, LIMIT) for x in (*fine[1:], *found)]


def open_samples(folder: Path, count: int, backbone: TinyViTBackbone) -> Sample:
    """The samples of a folder as arrays on disk, empty at first."""
    maps = maps_of(backbone, torch.zeros((1, 3, CROP_SIDE, CROP_SIDE), dtype=torch.uint8))
    cells = (OBJECT_SIDE, OBJECT_SIDE)
    columns = [*((m.shape[1:], np.float16) for m in maps), ((4,), np.float32)]
    columns += [(cells, np.uint8), (cells, np.uint8), ((), np.float32)]
    return Sample(*open_columns(folder, Sample._fields, count, columns))


@torch.inference_mode()
def collect(backbone: TinyViTBackbone, dataset: CropDataset, samples: Sample) -> None:
    """Fill the samples that are still empty, object by object and epoch by epoch; a weight is written last."""
    count = len(samples.weight)
    for start in trange(0, count, GROUP, desc="Collecting"):
        part = slice(start, min(start + GROUP, count))
        if samples.weight[part].all():
            continue
        drawn: list[CropSample] = []
        for place in range(part.start, part.stop):
            dataset.set_epoch(place // len(dataset))
            drawn.append(dataset[place % len(dataset)])
        for column, maps in zip(samples, maps_of(backbone, torch.stack([s.image for s in drawn])), strict=False):
            column[part] = maps.half().numpy()
        samples.roi[part] = torch.stack([s.roi for s in drawn]).numpy()
        for column, masks in ((samples.coarse, [s.coarse for s in drawn]), (samples.target, [s.target for s in drawn])):
            cells = F.adaptive_avg_pool2d(torch.stack(masks)[:, None].float(), OBJECT_SIDE)[:, 0]
            column[part] = (255 * cells).round().byte().numpy()
        samples.weight[part] = torch.stack([s.weight for s in drawn]).numpy()


def gather(parts: Sequence[Sample], chosen: np.ndarray) -> Sample:
    """A batch out of several folders of samples, by their numbers in all of them together."""
    starts = np.cumsum([0, *(len(part.weight) for part in parts)])
    picked = [chosen[(chosen >= a) & (chosen < b)] - a for a, b in itertools.pairwise(starts.tolist())]
    rows = [[column[index] for column in part] for part, index in zip(parts, picked, strict=True)]
    return Sample(*(np.concatenate(columns) for columns in zip(*rows, strict=True)))


def logits_of(model: RefinerModel, batch: Sample, dropped: float) -> tuple[Tensor, Tensor]:
    """The corrected logits of a batch, and the coverage by the ground truth, ``(R, H, H)`` float32 each."""
    encoder, head = model.image_encoder, model.transfiner.object_head
    assert encoder is not None and encoder.object_map is not None and head is not None
    kept = [torch.from_numpy(column).float().permute(0, 3, 1, 2) for column in batch[:5]]
    maps = TinyViTBackbone.join([kept[0][:, :1], *kept[:2]], kept[2:])[encoder.object_maps]
    objects = encoder.object_map([F.dropout2d(x, dropped) for x in maps])
    table = FeatureTable.of(FeaturePyramid((objects,), (OBJECT_STRIDE,)))
    pyramid = RoIPyramid.of(replace(table, objects=table), torch.from_numpy(batch.roi), torch.arange(len(batch.roi)))
    coarse, target = (torch.from_numpy(column).float() / 255 for column in (batch.coarse, batch.target))
    return coarse_logits(coarse) + head(pyramid.objects(OBJECT_SIDE), coarse), target


def with_exact(batch: Sample, share: float, rng: np.random.Generator) -> Sample:
    """The batch with masks that are right already in the place of a share of its coarse masks."""
    exact = rng.random(len(batch.weight)) < share
    return batch._replace(coarse=np.where(exact[:, None, None], batch.target, batch.coarse))


def train(
    model: RefinerModel, parts: Sequence[Sample], steps: int, learning_rate: float, exact: float, seed: int
) -> None:
    """Train the head and its map, in place, to the average of their weights.

    Args:
        model: The refiner's.
        parts: Folders of samples.
        steps: Of ``GROUP`` samples each.
        learning_rate: Its largest.
        exact: Share of samples whose coarse mask is right already, so that such masks are left alone.
        seed: Of the order and of the exact masks.
    """
    encoder, head = model.image_encoder, model.transfiner.object_head
    assert encoder is not None and encoder.object_map is not None and head is not None
    trained = torch.nn.ModuleList([encoder.object_map, head])
    rng, count = np.random.default_rng(seed), sum(len(part.weight) for part in parts)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(trained, avg_fn=warming_average(0.998))
    left = np.empty(0, np.int64)
    smooth = 0.0
    for step in (bar := trange(steps, desc="Training", mininterval=10)):
        if len(left) < GROUP:
            left = rng.permutation(count)
        chosen, left = np.sort(left[:GROUP]), left[GROUP:]
        batch = with_exact(gather(parts, chosen), exact, rng)
        logits, target = logits_of(model, batch, DROPPED)
        entropy = F.binary_cross_entropy_with_logits(logits, (target >= 0.5).float(), reduction="none")
        loss = (entropy.mean(dim=(1, 2)) * torch.from_numpy(batch.weight)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(trained)
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
    trained.load_state_dict(averaged.module.state_dict())


def with_object_head(model: RefinerModel, channels: int) -> RefinerModel:
    """The same model with an object head that changes nothing yet; gains have to be calibrated anew."""
    changed = RefinerModel(replace(model.config, object_channels=channels, predicts_gain=False))
    weights = changed.state_dict()
    kept = {name: value for name, value in model.state_dict().items() if name in weights and "object" not in name}
    changed.load_state_dict(weights | kept)
    return changed.eval()


def tiny_vit_of(model: RefinerModel) -> TinyViTBackbone:
    """The backbone of a model.

    Raises:
        SystemExit: If it is another one.
    """
    backbone = None if model.image_encoder is None else model.image_encoder.backbone
    if not isinstance(backbone, TinyViTBackbone):
        raise SystemExit(f"expected a model with TinyViT as its backbone, got {model.config.backbone!r}")
    return backbone


def samples_of(args: argparse.Namespace) -> None:
    """Collect samples."""
    backbone = tiny_vit_of(load_refiner(args.model).model)
    more = [CropSource(folder) for folder in args.more]
    if args.only_more:
        dataset = CropDataset(more, args.cache, side=112, real_share=REAL_SHARE, seed=args.seed)
    else:
        shares = None if args.neighbour is None else CompositeShares(neighbour=args.neighbour, alike=args.alike)
        dataset = training_mix(args.data, args.cache, REAL_SHARE, args.stamps, more=more, shares=shares, seed=args.seed)
    with torch.inference_mode():
        samples = open_samples(args.samples, args.count or len(dataset), backbone)
    collect(backbone, dataset, samples)


def head_of(args: argparse.Namespace) -> None:
    """Train a head on collected samples."""
    model = with_object_head(load_refiner(args.model).model, CHANNELS)
    backbone = tiny_vit_of(model.to(memory_format=torch.channels_last))  # pyright: ignore[reportCallIssue]
    counts = [len(np.load(folder / "weight.npy", mmap_mode="r")) for folder in args.samples]
    with torch.inference_mode():
        parts = [open_samples(folder, count, backbone) for folder, count in zip(args.samples, counts, strict=True)]
    if not all(part.weight.all() for part in parts):
        raise SystemExit("expected samples that are all there, got some that are not collected yet: run collect again")
    train(model, parts, args.steps, args.learning_rate, args.exact, args.seed)
    refiner = Refiner(model)
    print(refiner.save_pretrained(args.output))
    photos = {"ecssd": open_set(args.data, "ecssd_validation"), "pennfudan": open_set(args.data, "pennfudan", 60)}
    photos["davis"] = MatchedSet(args.data / "davis_dev", limit=60)
    print(Validation({name: list(chosen) for name, chosen in photos.items()})(refiner))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("collect", help="collect what the backbone sees")
    first.add_argument("model", type=Path)
    first.add_argument("samples", type=Path)
    first.add_argument("--cache", type=Path, required=True)
    first.add_argument("--stamps", type=Path, help="folder of cut-outs with alpha for the composites")
    first.add_argument("--more", type=Path, nargs="+", default=[], help="other data sets, as label_detections.py makes")
    first.add_argument("--only-more", action="store_true", help="these alone, without composites")
    first.add_argument("--neighbour", type=float, help="probability of a pasted neighbour, instead of the default")
    first.add_argument("--alike", type=float, default=0.0, help="share of these that are like the object")
    first.add_argument("--count", type=int, help="samples; as many as there are objects otherwise")
    first.set_defaults(run=samples_of)
    second = commands.add_parser("train", help="train the head on collected samples")
    second.add_argument("model", type=Path)
    second.add_argument("output", type=Path)
    second.add_argument("--samples", type=Path, nargs="+", required=True)
    second.add_argument("--steps", type=int, default=2580)
    second.add_argument("--learning-rate", type=float, default=2e-3)
    second.add_argument("--exact", type=float, default=0.0, help="share of samples given a mask that is right already")
    second.set_defaults(run=head_of)
    for command in (first, second):
        command.add_argument("--data", type=Path, default=DATA)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    args.run(args)


if __name__ == "__main__":
    main()
