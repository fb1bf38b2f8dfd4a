"""Draw the pictures of README.md and docs/ anew, with the embedded model: ``python docs/make_pictures.py``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import transfiner_refine
from transfiner_refine import Instances, Refiner, cli
from transfiner_refine.attention import draw_attention, node_attention
from transfiner_refine.functional.boxes import expand_boxes
from transfiner_refine.functional.incoherence import incoherence_levels
from transfiner_refine.functional.paste import crop_masks
from transfiner_refine.functional.rle import decode
from transfiner_refine.inputs import boxes_from_masks
from transfiner_refine.types import LevelNodes, RefineDetails
from transfiner_refine.visualize import draw_quadtree

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"
IMAGES = Path(__file__).parent / "images"
CUP = 2
"""Image id of the cup among the demo's outlines."""

DEPTH = 3
MAX_BYTES = 300_000


def save(picture: Image.Image, name: str, width: int) -> None:
    """Write a picture of at most ``MAX_BYTES``, with as many colours as that leaves room for."""
    height = round(picture.height * width / picture.width)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    for colors in (256, 192, 128, 96, 64, 48):
        path = IMAGES / f"{name}.png"
        small.quantize(palette=palette_of(small, colors), dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            print(f"{path}: {width}×{height}, {colors} colours, {path.stat().st_size // 1000} kB")
            return
    raise SystemExit(f"expected {name}.png within {MAX_BYTES} bytes, got more: lower its width")


def palette_of(picture: Image.Image, colors: int) -> Image.Image:
    """Choose colours, half of them for vivid pixels: those of the nodes are few, and would be lost to the photo."""
    pixels = np.asarray(picture).reshape(-1, 3)
    is_vivid = np.ptp(pixels, axis=1) > 60
    palette = Image.new("P", (1, 1))
    parts = [Image.fromarray(part[None]).quantize(colors // 2) for part in (pixels[is_vivid], pixels[~is_vivid])]
    palette.putpalette([value for part in parts for value in part.getpalette() or []])
    return palette


def incoherence_of_outline() -> Image.Image:
    """The cells that Eq. 1 marks on the hand-drawn outline of the cup."""
    outlines = json.loads((DEMO / "outlines.json").read_text())
    (entry,) = (x for x in outlines["annotations"] if x["image_id"] == CUP)
    image = np.array(Image.open(DEMO / "coffee.jpg").convert("RGB"))
    size = image.shape[0], image.shape[1]
    masks = torch.from_numpy(decode(entry["segmentation"], size))[None]
    rois = expand_boxes(boxes_from_masks(masks), 0.125)
    truth = crop_masks(masks, rois, 28 << DEPTH) >= 0.5
    quadtree = []
    for cells in incoherence_levels(truth, DEPTH):
        roi, row, col = cells.nonzero().T
        quadtree.append(LevelNodes(roi, row, col, torch.full_like(roi, -1), torch.zeros(len(roi)), cells.shape[1]))
    no_probs = tuple(nodes.logits for nodes in quadtree)
    details = RefineDetails(torch.zeros(1, 28, 28), tuple(quadtree), torch.zeros(1, 28, 28), no_probs)
    return Image.fromarray(draw_quadtree(image, Instances(rois, masks, size, rois=rois, details=details)))


def attention_of_nodes() -> Image.Image:
    """What two nodes of the cup look at, one at its rim and one at the foot of its handle (paper, Fig. 13)."""
    (entry,) = (x for x in json.loads((DEMO / "detections.json").read_text()) if x["image_id"] == CUP)
    image = np.array(Image.open(DEMO / "coffee.jpg").convert("RGB"))
    mask = decode(entry["segmentation"], (image.shape[0], image.shape[1]))
    box = boxes_from_masks(torch.from_numpy(mask)[None])[0]
    refiner = Refiner.from_pretrained()
    pictures = []
    for x, y in ((0.5, 0.0), (0.15, 1.0)):
        point = (float(box[0] + x * (box[2] - box[0])), float(box[1] + y * (box[3] - box[1])))
        attention = node_attention(refiner, image, box=box, mask=mask, point=point)
        pictures.append(draw_attention(image, attention))
    return Image.fromarray(np.concatenate(pictures, axis=1))


def main() -> None:
    """Run the demo and shrink what it draws."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        cli.demo(output, every=True)
        save(Image.open(output / "coffee_before_after.png"), "demo", 1000)
        save(Image.open(output / "coffee_incoherence.png"), "incoherence", 800)
        save(Image.open(output / "coffee_quadtree.png"), "quadtree", 1000)
    save(incoherence_of_outline(), "eq1", 1000)
    save(attention_of_nodes(), "attention", 1000)


if __name__ == "__main__":
    main()
