"""Refine with a detector's own features instead of the package's image encoder.

    python examples/detector_features.py
    python examples/detector_features.py --photo photo.jpg --mask mask.png

The features are torchvision's ResNet-18 FPN and the refiner is new, both untrained: this shows how features are
passed, not better masks. With the residual decoder an untrained refiner leaves the masks as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import transfiner_refine
from transfiner_refine import FeaturePyramid, InvalidInputError, Refiner, TransfinerConfig
from transfiner_refine.data.mask_image import read_mask
from transfiner_refine.functional.rle import decode
from transfiner_refine.modeling.model import RefinerModel

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"
SOURCE = "my torchvision detector"


def bundled_mask(size: tuple[int, int]) -> np.ndarray:
    """A detector's mask of the bundled cup, ``(H, W)`` bool."""
    detections = json.loads((DEMO / "detections.json").read_text())
    (cup,) = (x["segmentation"] for x in detections if x["category_id"] == 47)
    return decode(cup, size)


@torch.no_grad()
def features_of(image: np.ndarray, input_side: int = 512) -> FeaturePyramid:
    """Run the detector's backbone, and say how the image lies in its input."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=0).eval()
    height, width = image.shape[:2]
    scale = input_side / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    maps = backbone(torch.nn.functional.interpolate(pixels, (rows, columns), mode="bilinear", antialias=True))
    ratio = torch.tensor([[columns / width, rows / height]])  # network pixels per image pixel, x and y
    finest_first = tuple(maps[name] for name in "0123")
    return FeaturePyramid(finest_first, strides=(4, 8, 16, 32), scale=ratio, source=SOURCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photo", type=Path, default=DEMO / "coffee.jpg")
    parser.add_argument("--mask", type=Path, help="white on black; default: the mask of the bundled cup")
    args = parser.parse_args()
    image = np.array(Image.open(args.photo).convert("RGB"))  # (H, W, 3)
    size = (image.shape[0], image.shape[1])
    mask = bundled_mask(size) if args.mask is None else read_mask(args.mask, size)

    # feature_source says what the refiner was trained on; only features of that source are accepted.
    config = TransfinerConfig(feature_source=SOURCE, feature_channels=256, channels=64, decoder="residual")
    refiner = Refiner(RefinerModel(config))
    features = features_of(image)
    refined = refiner.refine(features=features, masks=mask[None], image_size=size)
    print(f"{(refined.masks[0].numpy() ^ (mask >= 0.5)).sum()} of {(mask >= 0.5).sum()} pixels changed")

    try:
        Refiner.from_pretrained().refine(features=features, masks=mask[None], image_size=size)
    except InvalidInputError as error:
        print(f"the embedded model refuses them: {error}")


if __name__ == "__main__":
    main()
