"""Give a trained refiner another backbone, to go on training from there.

    python scripts/change_backbone.py MODEL_DIR OUTPUT_DIR --backbone efficientnet_lite2
    python scripts/change_backbone.py MODEL_DIR OUTPUT_DIR --backbone tiny_vit --mobile-sam SAM_DIR --cache CACHE_DIR

An EfficientNet-Lite has ImageNet weights and new laterals. TinyViT has MobileSAM's weights (SAM_DIR: see
``teacher.py``). Beside it, the first stages of the old backbone and their laterals stay; those of strides 16 and 32
become the linear maps that come closest, on training crops, to what the old ones gave, so that the rest of the refiner
meets features that it knows.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import teacher  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from dataset import DATA  # pyright: ignore[reportMissingImports]
from fetch_backbone import imagenet_weights  # pyright: ignore[reportMissingImports]
from train_embedded import training_sources  # pyright: ignore[reportMissingImports]

from transfiner_refine import Refiner
from transfiner_refine.data.crops import CropDataset
from transfiner_refine.modeling.image_encoder import BACKBONES, FINE_STAGES, TINY_VIT, ImageEncoder
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.tiny_vit import tiny_vit_from_mobile_sam

CROPS = 160
"""Training crops that the linear maps are fitted to."""

RIDGE = 0.02
"""Weight of small coefficients in the fit, per cell."""


def with_imagenet(old: RefinerModel, backbone: str) -> RefinerModel:
    """The refiner with another EfficientNet-Lite."""
    new = RefinerModel(replace(old.config, backbone=backbone))
    assert new.image_encoder is not None
    new.image_encoder.backbone.load_state_dict(imagenet_weights(backbone))
    replaced = ("image_encoder.backbone.", "image_encoder.lateral.")
    kept = {name: value for name, value in old.state_dict().items() if not name.startswith(replaced)}
    new.load_state_dict({**new.state_dict(), **kept})
    return new


def with_tiny_vit(old: RefinerModel, weights: dict[str, Tensor], crops: Tensor) -> RefinerModel:
    """The refiner with TinyViT in the place of the last stages of its EfficientNet-Lite0; gains are to be fitted anew.

    Args:
        old: The refiner.
        weights: MobileSAM's.
        crops: ``(B, 3, H, W)`` uint8 training crops.
    """
    new = RefinerModel(replace(old.config, backbone=TINY_VIT, predicts_gain=False))
    before, after = old.state_dict(), new.state_dict()
    for name, value in before.items():
        name = name.replace("image_encoder.backbone.", "image_encoder.backbone.fine.")
        if name in after and after[name].shape == value.shape:
            after[name] = value
    for name, value in tiny_vit_from_mobile_sam(weights).items():
        after[f"image_encoder.backbone.tiny_vit.{name}"] = value
    for index in range(1, FINE_STAGES):
        name = f"image_encoder.lateral.{index}.weight"
        after[name] = torch.zeros_like(after[name])
        after[name][:, : before[name].shape[1]] = before[name]
    new.load_state_dict(after)
    assert old.image_encoder is not None and new.image_encoder is not None
    _fit_laterals(old.image_encoder, new.image_encoder, crops)
    return new


@torch.no_grad()
def _fit_laterals(old: ImageEncoder, new: ImageEncoder, crops: Tensor) -> None:
    """Fit the laterals of the coarsest maps to the old ones by ridge regression."""
    sums: dict[int, list[Tensor]] = {index: [] for index in range(FINE_STAGES, len(new.lateral))}
    for crop in crops:
        image = (crop[None].float() / 255).contiguous(memory_format=torch.channels_last)
        given, wanted = new.backbone(image), old.backbone(image)
        for index, parts in sums.items():
            x = given[index][0].flatten(1).T.double() * new.scale[index]
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            y = old._lateral(wanted, index)[0].flatten(1).T.double()
            parts.append(torch.cat([x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1]), x.T @ y], 1))
    for index, parts in sums.items():
        total = torch.stack(parts).sum(0)
        solved = torch.linalg.solve(total[:, : len(total)], total[:, len(total) :])
        lateral = new.lateral[index]
        lateral.weight.copy_(solved[:-1].T[:, :, None, None])  # pyright: ignore[reportCallIssue]
        lateral.bias.copy_(solved[-1])  # pyright: ignore[reportCallIssue]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--backbone", choices=BACKBONES, required=True)
    parser.add_argument("--mobile-sam", type=Path, help="folder with segment_any/mobile_sam and checkpoints")
    parser.add_argument("--cache", type=Path, help="cut-outs of the training photos")
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    torch.manual_seed(0)
    old = Refiner.from_pretrained(args.model).model
    if args.backbone != TINY_VIT:
        new = with_imagenet(old, args.backbone)
    elif args.mobile_sam is None or args.cache is None:
        parser.error(f"{TINY_VIT} needs --mobile-sam and --cache")
    else:
        dataset = CropDataset(training_sources(args.data), args.cache, real_share=0.8, seed=7)
        chosen = np.linspace(0, len(dataset) - 1, CROPS).round().astype(int).tolist()
        crops = torch.stack([dataset[index].image for index in chosen])
        new = with_tiny_vit(old, teacher.weights(args.mobile_sam), crops)
    print(Refiner(new).save_pretrained(args.output))


if __name__ == "__main__":
    main()
