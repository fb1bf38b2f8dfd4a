"""Refine a COCO results file from Python, a few images at a time.

    python examples/refine_coco_results.py
    python examples/refine_coco_results.py --images val2017 --annotations instances_val2017.json --predictions dets.json

The command ``transfiner-refine coco`` does this image by image; ``refine_batch`` as used here shares the work among
images that have few instances each. Without arguments the bundled photos are refined.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

import transfiner_refine
from transfiner_refine import Instances, Refiner
from transfiner_refine.data.coco import (
    boxes_of,
    decode_masks,
    find_images,
    group_by_image,
    load_image_index,
    load_results,
    write_json_atomic,
)
from transfiner_refine.inputs import as_masks, boxes_from_masks

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, default=DEMO)
    parser.add_argument("--annotations", type=Path, default=DEMO / "outlines.json", help="file name of each image id")
    parser.add_argument("--predictions", type=Path, default=DEMO / "detections.json")
    parser.add_argument("--output", type=Path, default=Path("outputs/refine_coco_results/refined.json"))
    parser.add_argument("--batch-size", type=int, default=8, help="images held at once")
    args = parser.parse_args()

    results = load_results(args.predictions)
    groups = group_by_image(results)  # positions in the file by image_id
    paths = find_images(args.images, groups, load_image_index(args.annotations))
    refiner = Refiner.from_pretrained()

    remaining = iter(groups.items())
    while batch := list(islice(remaining, args.batch_size)):
        images, instances = [], []
        for image_id, positions in batch:
            image = np.asarray(Image.open(paths[image_id]).convert("RGB"))  # (H, W, 3)
            size = (image.shape[0], image.shape[1])
            masks = as_masks(decode_masks(results, positions, size), size).data  # (N, H, W)
            boxes = boxes_of([results[p] for p in positions], boxes_from_masks(masks))  # an entry may have none
            images.append(image)
            instances.append(Instances(boxes=boxes, masks=masks, image_size=size))
        for (image_id, positions), refined in zip(batch, refiner.refine_batch(images, instances), strict=True):
            for position, segmentation in zip(positions, refined.to_rle(), strict=True):
                results[position] = {**results[position], "segmentation": segmentation}
            print(f"{paths[image_id].name}: {len(refined)} masks")
    write_json_atomic(args.output, results)
    print(f"{len(results)} results: {args.output}")


if __name__ == "__main__":
    main()
