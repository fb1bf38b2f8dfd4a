# pyright: reportMissingImports=false
"""Refine the masks of DETR for segmentation, from Hugging Face transformers.

    python examples/detr.py
    python examples/detr.py --checkpoint facebook/detr-resnet-50-panoptic --photo photo.jpg

Needs ``pip install transformers scipy timm``. Without a checkpoint a tiny DETR with random weights stands in: its masks
are noise, and only the calls are real.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.adapters.transformers import TransformersAdapter
from transfiner_refine.visualize import before_after

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"


def stand_in() -> tuple[torch.nn.Module, transformers.DetrImageProcessor]:
    """A tiny DETR with random weights, and its image processor."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    widths: Any = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "out_features": stages}
    backbone = transformers.ResNetConfig(**widths, layer_type="basic")
    sizes: Any = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3, "num_labels": 2}
    sizes |= {"backbone_config": backbone, "backbone": None}
    sizes |= {"use_timm_backbone": False, "use_pretrained_backbone": False}
    config = transformers.DetrConfig(**sizes)
    size = {"shortest_edge": 160, "longest_edge": 240}
    return transformers.DetrForSegmentation(config), transformers.DetrImageProcessor(size=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", help="name on the Hugging Face Hub, or a directory")
    parser.add_argument("--photo", type=Path, default=DEMO / "coffee.jpg")
    parser.add_argument("--threshold", type=float, help="least score; default: 0.7, or 0 without a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("outputs/detr.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.checkpoint is None:
        detector, processor = stand_in()
    else:
        detector = transformers.DetrForSegmentation.from_pretrained(args.checkpoint)
        processor = transformers.AutoImageProcessor.from_pretrained(args.checkpoint)
    threshold = args.threshold if args.threshold is not None else 0.7 if args.checkpoint else 0.0

    image = np.asarray(Image.open(args.photo).convert("RGB"))  # (H, W, 3)
    adapter = TransformersAdapter(detector, processor, score_threshold=threshold)
    (prediction,) = adapter.detect([image])
    coarse = prediction.instances  # each query's own mask: they may overlap
    refined = Refiner.from_pretrained().refine(image, boxes=coarse.boxes, masks=coarse.masks)
    for query, before, after in zip(prediction.indices.tolist(), coarse.masks, refined.masks, strict=True):
        print(f"query {query}: {int(((before >= 0.5) ^ after).sum())} pixels changed")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(before_after(image, coarse, refined)).save(args.output)
    print(f"before and after are in {args.output}")


if __name__ == "__main__":
    main()
