"""Put a refiner behind torchvision's Mask R-CNN: it is called as before, with better masks.

    python examples/torchvision_detector.py --photo photo.jpg
    python examples/torchvision_detector.py --untrained

torchvision downloads the weights of its detector once (170 MB). Without them (``--untrained``) it finds nonsense.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.adapters import adapt
from transfiner_refine.visualize import draw_masks

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"


def build(untrained: bool, input_side: int) -> MaskRCNN:
    """Your detector."""
    if untrained:
        return maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=input_side, box_score_thresh=0.0, box_detections_per_img=3
        )
    return maskrcnn_resnet50_fpn(weights="DEFAULT", min_size=input_side, box_score_thresh=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photo", type=Path, default=DEMO / "coffee.jpg")
    parser.add_argument("--untrained", action="store_true", help="without the detector's weights")
    parser.add_argument("--input-side", type=int, default=800, help="shorter side of the detector's input in pixels")
    parser.add_argument("--output", type=Path, default=Path("outputs/torchvision_detector.png"))
    args = parser.parse_args()

    torch.manual_seed(0)
    detector = build(args.untrained, args.input_side).eval()
    adapter = adapt(detector)
    # The embedded refiner sees the image; one that was trained on this detector's features goes in the same place.
    model = adapter.with_refiner(Refiner.from_pretrained())

    photo = np.array(Image.open(args.photo).convert("RGB"))  # (H, W, 3)
    images = [torch.from_numpy(photo).permute(2, 0, 1) / 255]
    with torch.no_grad():
        (coarse,), (refined,) = detector(images), model(images)  # the same call, the same list of dicts

    before, after = coarse["masks"][:, 0] >= 0.5, refined["masks"][:, 0] >= 0.5
    for index, (label, score) in enumerate(zip(refined["labels"].tolist(), refined["scores"].tolist(), strict=True)):
        changed = int((before[index] ^ after[index]).sum())
        print(f"instance {index}: class {label}, score {score:.2f}, {changed} pixels changed")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([draw_masks(photo, before), draw_masks(photo, after)], axis=1)).save(args.output)
    print(f"before and after: {args.output}")
    adapter.detach()  # the detector is alone again


if __name__ == "__main__":
    main()
