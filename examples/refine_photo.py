"""Refine the masks that a detector found on one photo, and draw them before and after.

    python examples/refine_photo.py
    python examples/refine_photo.py --photo photo.jpg --predictions dets.json --image-id 139

The predictions are COCO results, a JSON list of ``{"image_id", "segmentation", "bbox", ...}``. Without arguments a
bundled photo is refined.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import transfiner_refine
from transfiner_refine import Instances, Refiner
from transfiner_refine.functional.rle import decode_batch
from transfiner_refine.visualize import before_after

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photo", type=Path, default=DEMO / "coffee.jpg")
    parser.add_argument("--predictions", type=Path, default=DEMO / "detections.json")
    parser.add_argument("--image-id", default="2", help="image_id of the photo in the predictions")
    parser.add_argument("--output", type=Path, default=Path("outputs/refine_photo"))
    args = parser.parse_args()

    image = np.asarray(Image.open(args.photo).convert("RGB"))  # (H, W, 3)
    size = (image.shape[0], image.shape[1])
    image_id = int(args.image_id) if args.image_id.isdecimal() else args.image_id
    results = [x for x in json.loads(args.predictions.read_text()) if x["image_id"] == image_id]
    boxes = torch.tensor([x["bbox"] for x in results]).reshape(-1, 4)  # x, y, width, height
    boxes[:, 2:] += boxes[:, :2]  # x1, y1, x2, y2
    coarse = Instances(
        boxes=boxes,
        masks=torch.from_numpy(decode_batch([x["segmentation"] for x in results], size)),
        image_size=size,
        labels=torch.tensor([x["category_id"] for x in results]),
        scores=torch.tensor([x["score"] for x in results]),
    )

    refiner = Refiner.from_pretrained()
    refined = refiner.refine(image, boxes=coarse.boxes, masks=coarse.masks, labels=coarse.labels, scores=coarse.scores)

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "refined.json").write_text(json.dumps(refined.to_coco(image_id)))
    Image.fromarray(before_after(image, coarse, refined)).save(args.output / "before_after.png")
    changed = (refined.masks ^ coarse.masks).sum(dim=(1, 2))
    for index, pixels in enumerate(changed.tolist()):
        print(f"instance {index}: {pixels} pixels changed")
    print(f"refined.json and before_after.png are in {args.output}")


if __name__ == "__main__":
    main()
