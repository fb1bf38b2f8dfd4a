"""Give a trained refiner MobileSAM's segmenter, to be calibrated then.

    python scripts/add_segmenter.py MODEL_DIR SAM_DIR OUTPUT_DIR

SAM_DIR: see ``teacher.py``. Weights are stored as int8, as the two together are too large for a package otherwise.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import teacher  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from transfiner_refine import Refiner
from transfiner_refine.modeling.model import RefinerModel
from transfiner_refine.modeling.segmenter import segmenter_from_mobile_sam


def with_segmenter(model: RefinerModel, weights: dict[str, Tensor]) -> RefinerModel:
    """The model with a segmenter; what it predicts of gains is as before until it is calibrated.

    Args:
        model: Not changed.
        weights: MobileSAM's.
    """
    new = RefinerModel(replace(model.config, segments=True))
    added = {f"segmenter.{name}": value for name, value in segmenter_from_mobile_sam(weights).items()}
    new.load_state_dict({**new.state_dict(), **model.state_dict(), **added})
    return new.eval()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("mobile_sam", type=Path, help="folder with segment_any/mobile_sam and checkpoints")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    model = Refiner.from_pretrained(args.model).model
    refiner = Refiner(with_segmenter(model, teacher.weights(args.mobile_sam)))
    print(refiner.save_pretrained(args.output, dtype=torch.int8))


if __name__ == "__main__":
    main()
