"""CascadePSP, by the package of its authors: ``pip install segmentation-refinement``.

Cheng, Chung, Tai, Tang, *CascadePSP: Toward Class-Agnostic and Very High-Resolution Segmentation via Global and Local
Refinement*, CVPR 2020. Where its weights cannot be downloaded, its network is timed with random ones.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from dataset import MatchedImage
from methods import Method
from torch import Tensor, nn

from transfiner_refine.errors import MissingDependencyError, WeightsError


class CoarseAnswer(nn.Module):
    """The network with all its work, answering with the masks that it was given.

    Which parts of a photo the package's second step looks at depends on what the first one answered. Random weights
    answer with noise; a trained network's answer lies close to the coarse mask, so with it the time is the true one.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, mask: Tensor, *coarser: Tensor | None) -> dict[str, Tensor]:
        out = self.network(image, mask, *coarser)
        return {name: (mask + 1) / 2 if name.startswith("pred") else value for name, value in out.items()}


def cascade_psp(folder: Path | None = None, fast: bool = False) -> Method:
    """CascadePSP as a method.

    Args:
        folder: Holds the weights in a file ``model``; the package downloads it to ``~/.segmentation-refinement``. None
            draws random weights, and every mask comes back about as it was.
        fast: Whether only the global step is done.

    Raises:
        MissingDependencyError: If ``segmentation-refinement`` is not installed.
        WeightsError: If the folder has no weights.
    """
    try:
        from segmentation_refinement.main import Refiner  # pyright: ignore[reportMissingImports]
        from segmentation_refinement.models.psp.pspnet import (  # pyright: ignore[reportMissingImports]
            RefinementModule,
        )
    except ImportError as error:
        raise MissingDependencyError(
            "expected the package segmentation-refinement for CascadePSP, got none: pip install segmentation-refinement"
        ) from error
    if folder is not None:
        if not (folder / "model").is_file():
            raise WeightsError(f"expected CascadePSP's weights in {folder / 'model'}, got no such file: download them")
        refiner = Refiner(model_folder=str(folder), download_and_check_model=False)
    else:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            weights = {f"module.{name}": value for name, value in RefinementModule().state_dict().items()}
            torch.save(weights, Path(scratch) / "model")
            refiner = Refiner(model_folder=scratch, download_and_check_model=False)
        refiner.model = CoarseAnswer(refiner.model)  # pyright: ignore[reportAttributeAccessIssue]

    def refine(sample: MatchedImage) -> np.ndarray:
        masks = [refiner.refine(sample.image, mask.astype(np.uint8) * 255, fast) > 127 for mask in sample.coarse]
        return np.stack(masks)

    return refine
