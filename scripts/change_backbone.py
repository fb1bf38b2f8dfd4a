"""Give a trained refiner another backbone, with ImageNet weights and new laterals, to go on training from there.

python scripts/change_backbone.py MODEL_DIR OUTPUT_DIR --backbone efficientnet_lite2
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from fetch_backbone import imagenet_weights  # pyright: ignore[reportMissingImports]

from transfiner_refine import Refiner
from transfiner_refine.modeling.efficientnet_lite import VARIANTS
from transfiner_refine.modeling.model import RefinerModel


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--backbone", choices=sorted(VARIANTS), required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    old = Refiner.from_pretrained(args.model).model
    new = RefinerModel(replace(old.config, backbone=args.backbone))
    assert new.image_encoder is not None
    new.image_encoder.backbone.load_state_dict(imagenet_weights(args.backbone))
    replaced = ("image_encoder.backbone.", "image_encoder.lateral.")
    kept = {name: value for name, value in old.state_dict().items() if not name.startswith(replaced)}
    new.load_state_dict({**new.state_dict(), **kept})
    print(Refiner(new).save_pretrained(args.output))


if __name__ == "__main__":
    main()
