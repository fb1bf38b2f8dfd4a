"""Put a refiner behind a detector of MMDetection: it is called as before, with better masks.

    python examples/mmdet_detector.py --config mask-rcnn_r50_fpn_1x_coco.py --checkpoint mask_rcnn.pth --photo photo.jpg

Without a checkpoint the detector is untrained and finds nonsense. To train a refiner with the detector, end to end, by
MMDetection's own tools/train.py, put it behind the detector in the config:

    _base_ = "mask-rcnn_r50_fpn_1x_coco.py"
    custom_imports = dict(imports=["transfiner_refine.adapters.mmdet"])
    model = dict(type="TransfinerDetector", detector="MaskRCNN", refiner=dict(depth=3))
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mmdet  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector  # pyright: ignore[reportMissingImports]
from mmengine.config import Config  # pyright: ignore[reportMissingImports]
from PIL import Image

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.adapters import adapt
from transfiner_refine.visualize import draw_masks

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"
CONFIG = Path(mmdet.__path__[0]) / ".mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
SHOWN = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--checkpoint", help="weights of the detector; default: random ones")
    parser.add_argument("--photo", type=Path, default=DEMO / "coffee.jpg")
    parser.add_argument("--output", type=Path, default=Path("outputs/mmdet_detector.png"))
    args = parser.parse_args()

    torch.manual_seed(0)
    config = Config.fromfile(args.config)
    if args.checkpoint is None:
        config.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=SHOWN)
    detector = init_detector(config, args.checkpoint, device="cpu")
    adapter = adapt(detector)
    # The embedded refiner sees the image; one that was trained on this detector's features goes in the same place.
    model = adapter.with_refiner(Refiner.from_pretrained())

    photo = np.array(Image.open(args.photo).convert("RGB"))  # (H, W, 3)
    bgr = np.ascontiguousarray(photo[:, :, ::-1])  # as MMDetection takes arrays
    results: list[Any] = [inference_detector(each, bgr) for each in (detector, model)]  # the same call and type

    coarse, refined = (result.pred_instances[:SHOWN] for result in results)
    for index, (label, score) in enumerate(zip(refined.labels.tolist(), refined.scores.tolist(), strict=True)):
        changed = int((coarse.masks[index] ^ refined.masks[index]).sum())
        print(f"instance {index}: class {label}, score {score:.2f}, {changed} pixels changed")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pictures = [draw_masks(photo, masks) for masks in (coarse.masks, refined.masks)]
    Image.fromarray(np.concatenate(pictures, axis=1)).save(args.output)
    print(f"before and after: {args.output}")
    adapter.detach()  # the detector is alone again


if __name__ == "__main__":
    main()
