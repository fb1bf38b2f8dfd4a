# pyright: reportMissingImports=false
"""Train a refiner together with Mask2Former from Hugging Face transformers, then call the two as one model.

    python examples/mask2former.py
    python examples/mask2former.py --checkpoint facebook/mask2former-swin-tiny-coco-instance --steps 100

Needs ``pip install transformers scipy timm``. It is trained on the bundled cup alone, and without a checkpoint a tiny
Mask2Former with random weights stands in: this shows the calls, not better masks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import transfiner_refine
from transfiner_refine import Refiner
from transfiner_refine.adapters.transformers import TransformersAdapter
from transfiner_refine.functional.rle import decode
from transfiner_refine.modeling.model import RefinerModel

DEMO = Path(transfiner_refine.__file__).parent / "assets" / "demo"


def stand_in() -> tuple[torch.nn.Module, transformers.Mask2FormerImageProcessor]:
    """A tiny Mask2Former with random weights, and its image processor."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    widths: Any = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "out_features": stages}
    sizes: Any = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 32}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 4, "num_labels": 2}
    config = transformers.Mask2FormerConfig(backbone_config=transformers.SwinConfig(**widths), **sizes)
    processor = transformers.Mask2FormerImageProcessor(size={"height": 128, "width": 192})
    return transformers.Mask2FormerForUniversalSegmentation(config), processor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", help="name on the Hugging Face Hub, or a directory")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/mask2former"))
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.checkpoint is None:
        detector, processor = stand_in()
    else:
        detector = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(args.checkpoint)
        processor = transformers.AutoImageProcessor.from_pretrained(args.checkpoint)
    image = Image.open(DEMO / "coffee.jpg").convert("RGB")
    (cup,) = (x for x in json.loads((DEMO / "detections.json").read_text()) if x["category_id"] == 47)
    numbers = decode(cup["segmentation"], (image.height, image.width)).astype(np.int32)  # 1 is the cup

    adapter = TransformersAdapter(detector, processor)
    refiner = Refiner(RefinerModel(adapter.config(channels=64, layers=1, decoder="residual")))
    model: Any = adapter.with_refiner(refiner, train="heads").train()  # all but the backbone
    inputs = processor(image, numbers, instance_id_to_semantic_id={0: 0, 1: 1}, ignore_index=0, return_tensors="pt")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    for step in range(args.steps):
        outputs = model(**inputs)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        print(f"step {step}: " + ", ".join(f"{k} {outputs.loss_dict[k]:.3f}" for k in ("loss_refine", "loss_mask")))
    print(f"the model is in {model.save_pretrained(args.output)}")

    with torch.no_grad():
        outputs = model.eval()(**processor(image, return_tensors="pt"))
    (result,) = model.post_process_instance_segmentation(outputs, 0.0, target_sizes=[(image.height, image.width)])
    print(f"{len(result['segments_info'])} instances in a map of {tuple(result['segmentation'].shape)}")


if __name__ == "__main__":
    main()
