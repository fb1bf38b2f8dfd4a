"""Refine a labelling folder: photos, and for each one PNG of object numbers as an annotator's tool exports it.

    python examples/labelling_folder.py
    python examples/labelling_folder.py --photos JPEGImages --labels SegmentationObject --output refined

``photos/NAME.jpg`` goes with ``labels/NAME.png``: 0 is background, 255 is undecided, any other value one object (the
form of Pascal VOC, with or without a palette, and of CVAT's segmentation masks). The refined PNGs have the same names,
values and palette. Without arguments the folder is made from a bundled photo.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.functional.rle import decode

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"
UNDECIDED = 255


def bundled_labels(folder: Path) -> Path:
    """Write the detected masks of a bundled photo, numbered, as a labelling tool would."""
    detections = [x for x in json.loads((DEMO / "detections.json").read_text()) if x["image_id"] == 2]
    height, width = detections[0]["segmentation"]["size"]
    numbers = np.zeros((height, width), np.uint8)
    for number, entry in enumerate(detections, start=1):
        numbers[decode(entry["segmentation"], (height, width))] = number
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbers).save(folder / "coffee.png")
    return folder


def refine_numbers(refiner: Refiner, photo: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Refine all objects of one photo ``(H, W, 3)``; ``numbers`` is ``(H, W)``, and so is what comes back."""
    objects = [number for number in np.unique(numbers) if number not in (0, UNDECIDED)]
    masks = numbers == np.array(objects, numbers.dtype)[:, None, None]  # (N, H, W)
    refined = np.asarray(refiner.refine(photo, masks=masks).masks)
    result = np.where(numbers == UNDECIDED, numbers, 0)
    for number, mask in zip(objects, refined, strict=True):
        result[mask] = number
    contested = (refined.sum(axis=0) > 1) & (numbers > 0)  # here the annotator's choice stands
    return np.where(contested, numbers, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, default=DEMO)
    parser.add_argument("--labels", type=Path, help="default: the masks of a bundled photo")
    parser.add_argument("--output", type=Path, default=Path("outputs/labelling_folder/refined"))
    args = parser.parse_args()
    labels = args.labels or bundled_labels(args.output.parent / "labels")

    refiner = Refiner.from_pretrained()
    args.output.mkdir(parents=True, exist_ok=True)
    for path in sorted(labels.glob("*.png")):
        photo = np.array(Image.open(args.photos / f"{path.stem}.jpg").convert("RGB"))
        with Image.open(path) as label:
            refined = Image.fromarray(refine_numbers(refiner, photo, np.array(label)))
            if palette := label.getpalette():
                refined.putpalette(palette)
            changed = np.count_nonzero(np.array(refined) != np.array(label))
        refined.save(args.output / path.name)
        print(f"{args.output / path.name}: {changed} pixels changed")


if __name__ == "__main__":
    main()
