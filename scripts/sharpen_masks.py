"""Give the objects of a data set sharper masks where MobileSAM agrees with its annotations: COCO's are polygons.

    python scripts/sharpen_masks.py SAM_DIR DATASET_DIR OUTPUT_DIR

MobileSAM (SAM_DIR, see ``teacher.py``) is asked about the box of each annotation, and of its masks the one
most like the annotation takes its place if their IoU is above 0.8. OUTPUT_DIR gets ``annotations.json``, and links to
DATASET_DIR's photos and detections.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from teacher import BoxSegmenter  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from transfiner_refine.data.coco import group_by_image, write_json_atomic
from transfiner_refine.functional.rle import decode_batch, encode

AGREE = 0.8
"""IoU with the annotation above which MobileSAM's mask is taken."""

MIN_AREA = 1000
"""Pixels of the smallest object that is asked about."""


def write_beside(dataset: Path, output: Path, document: dict[str, Any]) -> None:
    """Write a data set with other annotations, and links to the photos and detections of the one it comes from."""
    output.mkdir(parents=True, exist_ok=True)
    write_json_atomic(output / "annotations.json", document)
    for name in ("images", "detections.json"):
        link = output / name
        if not link.is_symlink():
            link.symlink_to((dataset / name).resolve())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mobile_sam", type=Path, help="folder with segment_any/mobile_sam and checkpoints")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    segmenter = BoxSegmenter(args.mobile_sam)

    document = json.loads((args.dataset / "annotations.json").read_text())
    single = [annotation for annotation in document["annotations"] if not annotation.get("iscrowd")]
    of_image = group_by_image(single)
    taken, asked = 0, 0
    for image in tqdm(document["images"]):
        rgb = np.asarray(Image.open(args.dataset / "images" / image["file_name"]).convert("RGB"))
        annotations = [single[i] for i in of_image.get(image["id"], [])]
        masks = decode_batch([x["segmentation"] for x in annotations], rgb.shape[:2])
        chosen = np.flatnonzero(masks.sum((1, 2)) >= MIN_AREA)
        if not len(chosen):
            continue
        for index in chosen.tolist():
            mask = masks[index]
            x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
            found, _ = segmenter(rgb, np.array([x, y, x + w, y + h]))
            ious = (found & mask).sum((1, 2)) / (found | mask).sum((1, 2))
            asked += 1
            if ious.max() > AGREE:
                annotations[index]["segmentation"] = encode(found[ious.argmax()][None])[0]
                taken += 1
    write_beside(args.dataset, args.output, document)
    print(f"{taken} of {asked} masks taken")


if __name__ == "__main__":
    main()
