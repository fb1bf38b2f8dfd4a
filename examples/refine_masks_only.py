"""Refine the masks of a labelling folder: photos with one mask image per object, no detector and no boxes.

    python examples/refine_masks_only.py
    python examples/refine_masks_only.py --photos photos --masks masks --output refined

``photos/NAME.jpg`` goes with ``masks/NAME/*.png``, white on black; ``refined/NAME/*.png`` gets the same names. Without
arguments the folder is made from a bundled photo.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.data.mask_image import read_mask
from transfiner_refine.functional.rle import decode

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask ``(H, W)`` bool as a black and white image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def bundled_masks(folder: Path) -> Path:
    """Write a detector's mask of the bundled cup as a labelling tool would."""
    detections = json.loads((DEMO / "detections.json").read_text())
    (cup,) = (x["segmentation"] for x in detections if x["category_id"] == 47)
    height, width = cup["size"]
    write_mask(folder / "coffee" / "cup.png", decode(cup, (height, width)))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, default=DEMO)
    parser.add_argument("--masks", type=Path, help="default: the mask of a bundled photo")
    parser.add_argument("--output", type=Path, default=Path("outputs/refine_masks_only/refined"))
    args = parser.parse_args()
    masks_folder = args.masks or bundled_masks(args.output.parent / "masks")

    refiner = Refiner.from_pretrained()
    for photo in sorted(args.photos.glob("*.jpg")):
        paths = sorted((masks_folder / photo.stem).glob("*.png"))
        if not paths:
            continue
        image = np.asarray(Image.open(photo).convert("RGB"))  # (H, W, 3)
        masks = np.stack([read_mask(path, (image.shape[0], image.shape[1])) for path in paths])  # (N, H, W)
        refined = refiner.refine(image, masks=masks)  # the boxes are those of the masks
        for path, mask in zip(paths, np.asarray(refined.masks), strict=True):
            target = args.output / photo.stem / path.name
            write_mask(target, mask)
            print(f"{target}: {mask.sum()} pixels")


if __name__ == "__main__":
    main()
