"""Make training objects of what a detector found in training photos and nobody annotated: MobileSAM says what it is.

    python scripts/label_detections.py SAM_DIR DATASET_DIR OUTPUT_DIR

MobileSAM (SAM_DIR, see ``teacher.py``) is asked about the box of each detection that no annotation is like. Of its
masks the one it thinks best is the object's, if it is sure of it and the detector's mask is roughly the same.
OUTPUT_DIR gets ``annotations.json`` with these objects alone, and links to DATASET_DIR's photos and detections. Photos
that are held out are left out. ``--part 0 2`` and ``--part 1 2`` share the work between two processes, each with an
OUTPUT_DIR of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from sharpen_masks import write_beside  # pyright: ignore[reportMissingImports]
from teacher import BoxSegmenter  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from dataset import ECSSD_VALIDATION  # pyright: ignore[reportMissingImports]

from transfiner_refine.data.coco import Result, group_by_image, load_results
from transfiner_refine.functional.rle import decode, decode_batch, encode

MIN_SCORE = 0.25
"""Of the detections that are asked about."""

MIN_AREA = 2000
"""Pixels of the smallest: MobileSAM draws with 256 pixels for the longer side of a photo."""

KNOWN = 0.3
"""Share of a detection, or of what MobileSAM makes of it, that may belong to something annotated or found before."""

SURE = 0.88
"""IoU that MobileSAM has to expect of its mask."""

AGREE = 0.65
"""IoU of its mask and the detector's."""


def found_objects(
    detections: Sequence[Result], known: np.ndarray, ask: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[list[Result], int]:
    """Objects of one photo that nobody annotated.

    Args:
        detections: COCO results of the photo.
        known: ``(H, W)`` bool, what is annotated.
        ask: Candidates ``(K, H, W)`` bool and the IoU ``(K,)`` that is expected of each, for an xyxy box.

    Returns:
        COCO annotations without ids, and how many detections were asked about.
    """
    known, found, asked = known.copy(), [], 0
    likely = [entry for entry in detections if entry["score"] >= MIN_SCORE]
    for detection in sorted(likely, key=lambda entry: -entry["score"]):
        coarse = decode(detection["segmentation"], known.shape)
        area = coarse.sum()
        if area < MIN_AREA or (coarse & known).sum() > KNOWN * area:
            continue
        x, y, w, h = detection["bbox"]
        candidates, expected = ask(np.array([x, y, x + w, y + h]))
        asked += 1
        mask = candidates[expected.argmax()]
        agrees = (mask & coarse).sum() >= AGREE * (mask | coarse).sum()
        if expected.max() < SURE or not agrees or (mask & known).sum() > KNOWN * mask.sum():
            continue
        known |= mask
        found.append(
            {
                "image_id": detection["image_id"],
                "category_id": detection["category_id"],
                "segmentation": encode(mask[None])[0],
                "bbox": list(cv2.boundingRect(mask.astype(np.uint8))),
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
        )
    return found, asked


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mobile_sam", type=Path, help="folder with segment_any/mobile_sam and checkpoints")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "OF"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    segmenter = BoxSegmenter(args.mobile_sam)
    document = json.loads((args.dataset / "annotations.json").read_text())
    results = load_results(args.dataset / "detections.json")
    annotated, detected = group_by_image(document["annotations"]), group_by_image(results)
    images = [image for image in document["images"] if image["file_name"] not in ECSSD_VALIDATION]
    objects, asked = [], 0
    for image in tqdm(images[args.part[0] :: args.part[1]]):
        size = image["height"], image["width"]
        masks = decode_batch([document["annotations"][i]["segmentation"] for i in annotated.get(image["id"], [])], size)
        rgb = np.asarray(Image.open(args.dataset / "images" / image["file_name"]).convert("RGB"))
        detections = [results[i] for i in detected.get(image["id"], [])]
        found, count = found_objects(detections, np.asarray(masks.any(0)), partial(segmenter, rgb))
        objects += found
        asked += count
    for number, entry in enumerate(objects, 1):
        entry["id"] = number
    write_beside(args.dataset, args.output, {**document, "annotations": objects})
    print(f"{len(objects)} objects of {asked} detections")


if __name__ == "__main__":
    main()
