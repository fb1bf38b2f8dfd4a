"""Refine the masks of ``supervision.Detections`` in place between a detector and an annotator.

    python examples/supervision_detections.py
    python examples/supervision_detections.py --photo photo.jpg --predictions dets.json --image-id 139

Needs ``pip install supervision``. The detections come from COCO results here, of a bundled photo without arguments; any
of supervision's ``Detections.from_...`` serves as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import supervision as sv
from PIL import Image

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.adapters.supervision import from_detections, to_detections
from transfiner_refine.functional.rle import decode_batch

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"


def load_detections(predictions: Path, image_id: str, size: tuple[int, int]) -> sv.Detections:
    """Read the detections of one image of size ``(H, W)``; stands in for your detector."""
    results = [x for x in json.loads(predictions.read_text()) if str(x["image_id"]) == image_id]
    boxes = np.array([x["bbox"] for x in results]).reshape(-1, 4)  # x, y, width, height
    return sv.Detections(
        xyxy=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        mask=decode_batch([x["segmentation"] for x in results], size),
        confidence=np.array([x["score"] for x in results], float),
        class_id=np.array([x["category_id"] for x in results], int),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photo", type=Path, default=DEMO / "coffee.jpg")
    parser.add_argument("--predictions", type=Path, default=DEMO / "detections.json")
    parser.add_argument("--image-id", default="2", help="image_id of the photo in the predictions")
    parser.add_argument("--output", type=Path, default=Path("outputs/supervision_detections.png"))
    args = parser.parse_args()

    image = np.array(Image.open(args.photo).convert("RGB"))  # (H, W, 3)
    size = (image.shape[0], image.shape[1])
    detections = load_detections(args.predictions, args.image_id, size)

    (refined,) = Refiner.from_pretrained().refine_batch([image], [from_detections(detections, size)])
    crisp = to_detections(refined, like=detections)  # tracker ids, data and metadata stay

    annotator = sv.MaskAnnotator(color_lookup=sv.ColorLookup.INDEX)  # which takes BGR
    scenes = [annotator.annotate(image[..., ::-1].copy(), found)[..., ::-1] for found in (detections, crisp)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(scenes, axis=1)).save(args.output)
    assert detections.mask is not None and crisp.mask is not None  # both have masks, by construction
    for index, (before, after) in enumerate(zip(detections.mask, crisp.mask, strict=True)):
        print(f"detection {index}: {np.count_nonzero(before ^ after)} pixels changed")
    print(f"before and after: {args.output}")


if __name__ == "__main__":
    main()
