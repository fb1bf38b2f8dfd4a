"""Put a refiner behind a Detectron2 model: its predictor is called as before, with better masks.

    python examples/detectron2_detector.py --photo photo.jpg
    python examples/detectron2_detector.py --config config.yaml --weights model_final.pth --min-score 0.7

Needs Detectron2, which is installed from its repository. Without arguments, its model zoo downloads Mask R-CNN R50-FPN
once (180 MB).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from detectron2 import model_zoo  # pyright: ignore[reportMissingImports]
from detectron2.config import get_cfg  # pyright: ignore[reportMissingImports]
from detectron2.engine import DefaultPredictor  # pyright: ignore[reportMissingImports]
from PIL import Image

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.adapters import adapt
from transfiner_refine.visualize import draw_masks

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"
ZOO = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photo", type=Path, default=DEMO / "coffee.jpg")
    parser.add_argument("--config", type=Path, help="a config file of Detectron2; without it, one of its model zoo")
    parser.add_argument("--weights", help="a checkpoint for it; without it, the one that the config names")
    parser.add_argument("--min-score", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=Path("outputs/detectron2_detector.png"))
    args = parser.parse_args()

    config = get_cfg()
    config.merge_from_file(str(args.config or model_zoo.get_config_file(ZOO)))
    if args.weights or not args.config:
        config.MODEL.WEIGHTS = args.weights or model_zoo.get_checkpoint_url(ZOO)
    config.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.min_score
    config.MODEL.DEVICE = "cpu"
    predictor = DefaultPredictor(config)

    photo = np.array(Image.open(args.photo).convert("RGB"))  # (H, W, 3)
    bgr = photo[:, :, ::-1]  # as the predictor takes it
    coarse = predictor(bgr)["instances"]
    # The embedded refiner sees the image; one that was trained on this detector's features goes in the same place.
    predictor.model = adapt(predictor.model).with_refiner(Refiner.from_pretrained())
    refined = predictor(bgr)["instances"]  # the same call, the same Instances

    before, after = coarse.pred_masks, refined.pred_masks
    for index, (label, score) in enumerate(zip(refined.pred_classes.tolist(), refined.scores.tolist(), strict=True)):
        changed = int((before[index] ^ after[index]).sum())
        print(f"instance {index}: class {label}, score {score:.2f}, {changed} pixels changed")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([draw_masks(photo, before), draw_masks(photo, after)], axis=1)).save(args.output)
    print(f"before and after: {args.output}")


if __name__ == "__main__":
    main()
