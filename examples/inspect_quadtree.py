"""Look inside a refinement: where labels are lost to low resolution, and which nodes were corrected.

    python examples/inspect_quadtree.py
    python examples/inspect_quadtree.py --photo photo.jpg --mask mask.png

Writes the incoherence map and the quadtree as pictures, and prints each level's nodes. Without arguments a bundled
photo is shown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import transfiner_refine
from transfiner_refine import RefineOptions, Refiner
from transfiner_refine.data.mask_image import read_mask
from transfiner_refine.functional.rle import decode
from transfiner_refine.visualize import draw_incoherence, draw_quadtree

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"


def bundled_mask(size: tuple[int, int]) -> np.ndarray:
    """A detector's mask of the bundled cup, ``(H, W)`` bool."""
    detections = json.loads((DEMO / "detections.json").read_text())
    (cup,) = (x["segmentation"] for x in detections if x["category_id"] == 47)
    return decode(cup, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photo", type=Path, default=DEMO / "coffee.jpg")
    parser.add_argument("--mask", type=Path, help="white on black; default: the mask of the bundled cup")
    parser.add_argument("--depth", type=int, help="quadtree levels; default: the model's")
    parser.add_argument("--output", type=Path, default=Path("outputs/inspect_quadtree"))
    args = parser.parse_args()

    image = np.asarray(Image.open(args.photo).convert("RGB"))  # (H, W, 3)
    size = (image.shape[0], image.shape[1])
    mask = bundled_mask(size) if args.mask is None else read_mask(args.mask, size)
    options = RefineOptions(depth=args.depth, return_quadtree=True)
    refined = Refiner.from_pretrained().refine(image, masks=mask[None], options=options)

    details = refined.details
    assert details is not None  # as asked for by return_quadtree
    args.output.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_incoherence(image, refined)).save(args.output / "incoherence.png")
    Image.fromarray(draw_quadtree(image, refined)).save(args.output / "quadtree.png")
    for level, (nodes, probs) in enumerate(zip(details.quadtree, details.node_probs, strict=True)):
        share = len(nodes) / nodes.side**2
        unsure = ((probs > 0.25) & (probs < 0.75)).float().mean()
        print(f"level {level}: {len(nodes)} nodes, {share:.1%} of {nodes.side}×{nodes.side} cells, {unsure:.1%} unsure")
    print(f"incoherence.png and quadtree.png are in {args.output}")


if __name__ == "__main__":
    main()
